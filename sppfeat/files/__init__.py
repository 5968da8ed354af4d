"""Output files that appear whole or not at all, and checks of files and documents from untrusted sources."""

from __future__ import annotations

from sppfeat.files.cache import cache_folder, cache_key, read_entry, write_entry
from sppfeat.files.documents import decode_document
from sppfeat.files.formats import (
    DAMAGE,
    DETECTOR,
    GALLERY,
    NOUNS,
    STORE,
    SVM,
    VOCABULARY,
    WINDOWS,
    format_of,
    open_hdf5,
    read_document,
)
from sppfeat.files.hdf5_check import check_hdf5, hdf5_reason
from sppfeat.files.names import unsafe_name
from sppfeat.files.output import (
    appearing,
    appearing_hdf5,
    check_can_write,
    check_new_file,
    new_hdf5,
    os_reason,
    partial_path,
    sync_folder,
)

__all__ = [
    "DAMAGE",
    "DETECTOR",
    "GALLERY",
    "NOUNS",
    "STORE",
    "SVM",
    "VOCABULARY",
    "WINDOWS",
    "appearing",
    "appearing_hdf5",
    "cache_folder",
    "cache_key",
    "check_can_write",
    "check_hdf5",
    "check_new_file",
    "decode_document",
    "format_of",
    "hdf5_reason",
    "new_hdf5",
    "open_hdf5",
    "os_reason",
    "partial_path",
    "read_document",
    "read_entry",
    "sync_folder",
    "unsafe_name",
    "write_entry",
]
