"""Our file formats: telling which one a file has, and opening it without trusting it.

Each of our HDF5 files has the root attributes `format` and `format_version`; a gallery is a folder with a
`gallery.json`, or of shards with a `manifest.json`, that has both keys.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import h5py
import msgspec

from sppfeat.errors import SppFeatError, UsageError, one_line
from sppfeat.files.documents import decode_document
from sppfeat.files.hdf5_check import check_hdf5, hdf5_reason

T = TypeVar("T")
STORE = "sppfeat-store"
SVM = "sppfeat-svm"
DETECTOR = "sppfeat-detector"
WINDOWS = "sppfeat-windows"
GALLERY = "sppfeat-gallery"
VOCABULARY = "sppfeat-vocabulary"
# Their names in messages.
NOUNS = {
    STORE: "a store",
    SVM: "an SVM",
    DETECTOR: "a detector",
    WINDOWS: "a file of windows",
    GALLERY: "a gallery",
    VOCABULARY: "a vocabulary",
}
# The commands that make them.
_MADE_BY = {
    STORE: "sppfeat extract",
    SVM: "sppfeat train svm",
    DETECTOR: "sppfeat train detector",
    WINDOWS: "sppfeat windows",
    GALLERY: "sppfeat index",
    VOCABULARY: "sppfeat train vocabulary",
}
# What h5py, NumPy and conversions raise for a file with unexpected content.
DAMAGE = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError)


class _Format(msgspec.Struct):
    format: str


def format_of(path: str | os.PathLike[str]) -> str | None:
    """The format of a file or folder, read without trusting it; None: none of ours, or unreadable."""
    path = Path(path)
    try:
        if path.is_dir():
            about = next((path / name for name in ("gallery.json", "manifest.json") if (path / name).is_file()), None)
            if about is None:
                return None
            # Lenient: a manifest may have paths that are not UTF-8.
            content = about.read_bytes()
            found = decode_document(content, _Format, what=str(about), error=UsageError, lenient=True).format
        else:
            check_hdf5(path)
            with h5py.File(path, "r", locking=False) as file:
                found = file.attrs.get("format")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, UsageError):
        return None
    return found if isinstance(found, str) and found in NOUNS else None


@contextlib.contextmanager
def open_hdf5(
    path: str | os.PathLike[str], kind: str | None, version: int, error: type[SppFeatError]
) -> Iterator[h5py.File]:
    """Open one of our HDF5 files for reading. Anything wrong with it, also within the block, raises `error`.

    kind: its format, one of NOUNS; None: a part of a gallery, which has no format. version: the newest format version
    that is supported.
    """
    path, noun = Path(path), "an HDF5 file" if kind is None else NOUNS[kind]
    try:
        check_hdf5(path)
        with h5py.File(path, "r", locking=False) as file:
            if kind is None:
                yield file
                return
            found = file.attrs.get("format")
            if found != kind:
                what = NOUNS.get(str(found), f"an HDF5 file with format {found!r}")
                raise error(f"{path}: expected {noun}, found {what}; `{_MADE_BY[kind]}` makes one")
            number = int(file.attrs["format_version"])
            if number > version:
                raise error(f"{path}: its format {number} is newer than this sppfeat reads ({version}): update sppfeat")
            yield file
    except FileNotFoundError:
        raise error(f"{path}: expected {noun}, found no such file") from None
    except IsADirectoryError:
        hint = f"; `{_MADE_BY[kind]}` makes one" if kind is not None else ""
        raise error(f"{path}: expected {noun}, found a folder{hint}") from None
    except OSError as reason:
        raise error(f"{path}: expected {noun}, found a file that cannot be opened: {hdf5_reason(reason)}") from None
    except (*DAMAGE, UsageError) as reason:
        raise error(f"{path}: damaged: expected {noun}, found: {one_line(reason)}") from None


def read_document(file: h5py.File, name: str, shape: type[T], error: type[SppFeatError]) -> T:
    """The JSON document in a root attribute of an open HDF5 file, as an instance of `shape`. Raises `error`."""
    what = f"{file.filename}: expected a JSON document {name!r}"
    return decode_document(str(file.attrs[name]), shape, what=what, error=error)
