"""Reading a FAISS index of unknown origin: it writes to no other file, and refers to no missing row."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from sppfeat.errors import GalleryError
from sppfeat.files import os_reason
from sppfeat.retrieval.faiss_library import faiss_reason, load_faiss, typed

# Where an index keeps nested ones: transforms, refinement, lists' centers, graphs.
_PARTS: Final = ("index", "base_index", "refine_index", "quantizer", "storage", "index_ivf")
# On top of the file's contents: a small index holds empty lists and tables that are not written.
_SLACK_BYTES: Final = 1 << 26
# Search memory per query grows with this; `faiss_index.tune` sets at most 1024.
MAX_EFFORT: Final = 1 << 20
_LIMITS: Final = threading.Lock()


def read_index_file(file: Path, rows: int, dim: int) -> Any:
    """The index in a file, of `rows` rows of `dim` values, compared by inner products.

    Raises GalleryError for any other index, for a damaged one, and for one whose lists are in a separate file,
    which adding rows would write to wherever it is.
    """
    faiss = load_faiss()
    try:
        with _limits(file.stat().st_size + _SLACK_BYTES):
            # Read-only: lists in another file, which only the checks below see, are not opened for writing.
            index = typed(faiss.read_index(str(file), faiss.IO_FLAG_READ_ONLY))
        _check(file, index, rows, dim)
        return index
    except OSError as error:
        raise GalleryError(f"{file}: could not be read: {os_reason(error)}") from None
    except (RuntimeError, MemoryError, TypeError) as error:
        raise GalleryError(f"{file}: expected a complete FAISS index, found: {faiss_reason(error)}") from None


@contextlib.contextmanager
def _limits(size: int) -> Iterator[None]:
    """Within the block, FAISS reads no part longer than this many bytes. The limits apply to the whole process."""
    faiss = load_faiss()
    with _LIMITS:
        before = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
        faiss.set_deserialization_vector_byte_limit(size)
        faiss.set_deserialization_loop_limit(size)
        try:
            yield
        finally:
            faiss.set_deserialization_vector_byte_limit(before[0])
            faiss.set_deserialization_loop_limit(before[1])


def _check(file: Path, index: Any, rows: int, dim: int) -> None:
    faiss = load_faiss()
    if (index.ntotal, index.d) != (rows, dim):
        raise GalleryError(f"{file}: expected {rows} rows of {dim} values, found {index.ntotal} of {index.d}")
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise GalleryError(f"{file}: expected an index of inner products, found another")
    for part in _parts(index):
        if isinstance(part, faiss.IndexIDMap):
            raise GalleryError(f"{file}: expected an index whose rows are numbered from 0, found one with its own ids")
        if isinstance(part, faiss.IndexRefine) and not 1 <= part.k_factor <= MAX_EFFORT:
            raise GalleryError(f"{file}: expected a k_factor from 1 to {MAX_EFFORT}, found {part.k_factor:g}")
        if hasattr(part, "hnsw") and not 1 <= part.hnsw.efSearch <= MAX_EFFORT:
            raise GalleryError(f"{file}: expected an efSearch from 1 to {MAX_EFFORT}, found {part.hnsw.efSearch}")
        if hasattr(part, "invlists"):
            _check_lists(file, part)
            # A map of rows to lists is rebuilt where it is needed; one from the file could point anywhere.
            part.set_direct_map_type(faiss.DirectMap.NoMap)
        if isinstance(part, faiss.IndexIVFPQFastScan) and part.fine_quantizer is None:
            # FAISS 1.15 does not set this pointer on reading, but follows it when it reconstructs rows.
            part.fine_quantizer = part.pq


def _parts(index: Any) -> Iterator[Any]:
    """An index and all its parts."""
    faiss = load_faiss()
    yield index
    for name in _PARTS:
        part = getattr(index, name, None)
        if isinstance(part, faiss.Index):
            yield from _parts(faiss.downcast_index(part))


def _check_lists(file: Path, index: Any) -> None:
    """Check that lists are in memory and hold the ids of the index's rows."""
    faiss = load_faiss()
    lists = index.invlists and faiss.downcast_InvertedLists(index.invlists)
    if not isinstance(lists, faiss.ArrayInvertedLists | faiss.BlockInvertedLists):
        found = type(lists).__name__ if lists else "none"
        raise GalleryError(f"{file}: expected inverted lists inside the index itself, found {found}")
    if lists.nlist != index.nlist:
        raise GalleryError(f"{file}: expected {index.nlist} lists, found {lists.nlist}")
    held = 0
    for at in range(lists.nlist):
        size = lists.list_size(at)
        held += size
        if size:
            ids = faiss.rev_swig_ptr(lists.get_ids(at), size)
            if not 0 <= int(np.min(ids)) <= int(np.max(ids)) < index.ntotal:
                raise GalleryError(f"{file}: list {at} holds row ids beyond {index.ntotal}")
    if held != index.ntotal:
        raise GalleryError(f"{file}: expected {index.ntotal} rows in its lists, found {held}")
