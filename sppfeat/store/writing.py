"""Writing stores; see `reading` for their layout.

Rows are written with plain writes at known offsets of the file, not through HDF5: a killed process leaves a file that
opens. New rows need a new file, which is written beside the old one and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import threading
import time
import zlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import h5py
import numpy as np

from sppfeat._version import __version__
from sppfeat.errors import StoreError
from sppfeat.files import (
    DAMAGE,
    STORE,
    appearing,
    check_can_write,
    check_hdf5,
    check_new_file,
    format_of,
    new_hdf5,
    os_reason,
)
from sppfeat.images import NO_FINGERPRINT, Fingerprint
from sppfeat.recipe import Recipe
from sppfeat.store.digests import name_digests
from sppfeat.store.export import FORMATS
from sppfeat.store.locking import above_standard
from sppfeat.store.manifest import MANIFEST, foreign_files, is_shard, unlisted_shards
from sppfeat.store.reading import COLUMNS, DIGEST_TYPE, ERROR_BYTES, FORMAT_VERSION, Column, Status, Store

# A killed run loses the work of this time, and what is on its way to the disk.
FLUSH_SECONDS: Final = 0.25
# Rows that are written together; a block is full at either.
BLOCK_BYTES: Final = 1 << 24
BLOCK_ROWS: Final = 4096
_COPY_BYTES: Final = 1 << 26
_MARK_BYTES: Final = 1 << 20
# A store under such a name would only be taken for an export.
_EXPORTED: Final = frozenset(known.suffix for known in FORMATS.values() if known.suffix)
_LIBRARIES: Final = ("torch", "torchvision", "timm", "pillow", "numpy", "h5py")


def check_output(path: Path, *, overwrite: bool, resume: bool, folder: bool = False) -> None:
    """Raise StoreError unless a store can be created, resumed or overwritten at a path.

    folder: the store is to be a folder of shards, as one that exists is. Only a store is ever replaced, intact or
    damaged: a mistyped output must not destroy a photograph or other results.
    """
    if folder or path.is_dir():
        _check_folder(path, overwrite=overwrite, resume=resume)
        return
    if (ending := path.suffix.lower()) in _EXPORTED:
        raise StoreError(
            f"{path}: expected a store, such as {path.stem}.h5 or {path.stem}/, found a name that ends with {ending}; "
            "`sppfeat export` makes such a file of a store"
        )
    if is_shard(path):
        raise StoreError(f"{path}: is a shard, which never changes in place; give the folder {path.parent} instead")
    if path.is_file() and not os.access(path, os.R_OK | os.W_OK):
        raise StoreError(f"{path}: the store is not writable")
    check_new_file(path, overwrite=overwrite or resume, error=StoreError, kind=STORE, other=_other_kind)


def _check_folder(path: Path, *, overwrite: bool, resume: bool) -> None:
    parent = path.parent
    if not parent.is_dir():
        raise StoreError(f"{path}: its folder {parent} does not exist")
    if not os.path.lexists(path):
        check_can_write(path, StoreError)
        return
    if not path.is_dir():
        raise StoreError(f"{path}: expected a folder of shards or nothing, found a file; it is left as it is")
    foreign = foreign_files(path)
    if (path / MANIFEST).exists():
        if format_of(path) != STORE:
            foreign = [MANIFEST]  # another program's, or damaged: either way not ours to replace
        elif not overwrite and not resume:
            raise StoreError(f"{path}: already exists; choose another output, or use --overwrite")
        elif not overwrite:
            foreign = []  # nothing is removed: notes may lie beside the shards
    elif not overwrite and not foreign and (shards := unlisted_shards(path, None)):
        raise StoreError(
            f"{path}: damaged: expected {MANIFEST} beside its {len(shards)} shards, found none; run an interrupted "
            "`sppfeat merge` again, restore the file, or use --overwrite to start over"
        )
    if foreign:
        raise StoreError(
            f"{path}: expected a store or an empty folder, found {foreign[0]!r} in it; it is left as it is"
        )
    check_can_write(path / MANIFEST, StoreError)


def _other_kind(path: Path) -> str | None:
    """What a file is if it is not a store; None for a store, intact or damaged."""
    if not h5py.is_hdf5(path):
        return "a file that is not a store"
    try:
        check_hdf5(path)
        with h5py.File(path, "r", locking=False) as file:
            kind = file.attrs.get("format")
    except (OSError, *DAMAGE):
        # A damaged store still has its format name near the start; another program's file may just be of another kind.
        with open(path, "rb") as content:
            marked = STORE.encode() in content.read(_MARK_BYTES)
        return None if marked else "an HDF5 file that does not seem to be a store"
    return None if kind == STORE else f"an HDF5 file of format {kind!r}"


def create_store(
    path: Path, names: Sequence[str], *, recipe: Recipe, weights_sha256: str, dim: int, source_root: str
) -> None:
    """Write a store with every row pending; it appears atomically, and replaces what was there.

    Space for all rows is allocated now, so that a full disk is noticed before any work. Hold `lock_store`.
    """
    with appearing(path, StoreError) as partial:
        _write_structure(
            partial,
            names,
            dim,
            recipe.dtype,
            {
                "recipe": recipe.to_json(),
                "recipe_hash": recipe.identity(weights_sha256),
                "weights_sha256": weights_sha256,
                "source_root": np.void(os.fsencode(source_root)),
                "versions": json.dumps(library_versions()),
            },
        )


def extend_store(store: Store, names: Sequence[str], *, source_root: str) -> None:
    """Rewrite a store with new pending rows after the present ones, which take the first of the names.

    Hold `lock_store`.
    """
    with appearing(store.path, StoreError) as partial:
        _copy_rows(store, partial, [(0, len(store))], names, source_root)


def remove_rows(store: Store, rows: np.ndarray) -> None:
    """Rewrite a store that is one file without some of its rows. Hold `lock_store`."""
    with appearing(store.path, StoreError) as partial:
        copy_without(store, partial, rows)


def copy_without(store: Store, target: Path, rows: np.ndarray) -> None:
    """Write the other rows of a store that is one file to a new one; they are in the same order. Raises OSError."""
    kept = np.setdiff1d(np.arange(len(store)), rows)
    runs = [(int(kept[first]), int(kept[end - 1]) + 1) for first, end in _runs(kept)]
    names = [name for first, end in runs for name in store.names[first:end]]
    _copy_rows(store, target, runs, names, store.source_root)


def _copy_rows(
    store: Store, target: Path, runs: Sequence[tuple[int, int]], names: Sequence[str], source_root: str
) -> None:
    """Write a store whose first rows are those of a store between the first and one-past-last ones of some runs."""
    _write_structure(
        target,
        names,
        store.dim,
        store.recipe.dtype,
        {
            "recipe": store.recipe.to_json(),
            "recipe_hash": store.recipe_hash,
            "weights_sha256": store.weights_sha256,
            "source_root": np.void(os.fsencode(source_root)),
            "versions": json.dumps(store.versions),
        },
    )
    with h5py.File(target, "r", locking=False) as file:
        places = {name: file[name].id.get_offset() for name in store.columns}
    with open(store.path, "rb") as old, open(target, "r+b") as new:
        for name, column in store.columns.items():  # not the digests, which follow from the names
            new.seek(places[name])
            for first, end in runs:
                old.seek(column.offset + first * column.row_bytes)
                left = column.row_bytes * (end - first)
                while left:
                    block = old.read(min(left, _COPY_BYTES))
                    if not block:
                        raise OSError(errno.EIO, "the old store ends too early")
                    new.write(block)
                    left -= len(block)


def _write_structure(path: Path, names: Sequence[str], dim: int, dtype: str, attributes: dict[str, Any]) -> None:
    count = len(names)
    with new_hdf5(path) as file:
        file.attrs["format"] = STORE
        file.attrs["format_version"] = FORMAT_VERSION
        for key, value in attributes.items():
            file.attrs[key] = value
        file.create_dataset("names", data=np.asarray(names, dtype=object), dtype=h5py.string_dtype())
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_layout(h5py.h5d.CONTIGUOUS)
        layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # fresh space reads as zeros already
        columns = {**COLUMNS, "descriptors": ("<f2" if dtype == "float16" else "<f4", (dim,))}
        for name, (kind, width) in columns.items():
            space = h5py.h5s.create_simple((count, *width))
            h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(np.dtype(kind)), space, layout)
        file.create_dataset("name_digest", data=name_digests(names).view(DIGEST_TYPE)[:, 0])
    with open(path, "r+b") as whole:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(whole.fileno(), 0, os.fstat(whole.fileno()).st_size)


class StoreWriter:
    """Fills the rows of a store. Hold `lock_store` while it is open, as a context.

    One thread of its own writes: it takes the rows given so far every FLUSH_SECONDS, or once they fill a block, writes
    them in runs of consecutive rows, waits for the disk, and only then writes their status. A crash thus loses what
    was given in the last FLUSH_SECONDS and while one block is written, and leaves no row that is done without its
    values. Memory is three blocks: who gives rows faster than the disk takes them waits.
    seconds: how long the thread has been at work.
    Raises StoreError when a write fails, from any method, as soon as the thread finds out; what was flushed stays.
    """

    def __init__(self, store: Store) -> None:
        self._path = store.path
        self._columns = store.columns
        self._shape = store.columns["descriptors"].shape[1:]
        try:
            self._descriptor = above_standard(os.open(store.path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            raise StoreError(f"{store.path}: cannot be written: {os_reason(error)}") from None
        self.seconds = 0.0
        self._changed = threading.Condition()  # guards what follows
        self._filling, self._spare = _Block(store.columns), _Block(store.columns)
        self._busy = self._asked = self._closing = False
        self._failure: Exception | None = None
        self._unsynced = False
        self._thread = threading.Thread(target=self._work, name="store", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not isinstance(error, StoreError):
                self.flush()
        finally:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            self._thread.join()
            os.close(self._descriptor)
        if error is None and self._failure is not None:  # that of the last statuses
            raise self._failure

    def reset(self, rows: Sequence[int]) -> None:
        """Make rows pending again, before their values are touched; on disk when it returns."""
        self.flush()
        if not len(rows):
            return
        ordered = np.sort(np.asarray(rows, np.int64))
        for first, end in _runs(ordered):
            self._write("status", int(ordered[first]), np.full(end - first, Status.PENDING, np.uint8))
        self._sync()

    def write(self, row: int, descriptor: np.ndarray, image_size: tuple[int, int], fingerprint: Fingerprint) -> None:
        """Write a described row, soon; `descriptor` [D] is copied, so its memory may be used again at once."""
        if descriptor.shape != self._shape:
            raise StoreError(f"{self._path}: expected a descriptor of {self._shape}, found {descriptor.shape}")
        self._give(_Row(row, Status.DONE, image_size, b"", fingerprint), descriptor)

    def fail(self, row: int, reason: str, fingerprint: Fingerprint = NO_FINGERPRINT) -> None:
        """Write a failed row, soon: zeros, and the reason."""
        text = " ".join(reason.split()).encode("utf-8", "backslashreplace")[:ERROR_BYTES]
        self._give(_Row(row, Status.FAILED, (0, 0), text.decode("utf-8", "ignore").encode(), fingerprint), 0)

    def flush(self) -> None:
        """Wait until every row given so far is on disk, and its status is written."""
        with self._changed:
            self._asked = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._failure is not None or not (self._filling.rows or self._busy))
            if self._failure is not None:
                raise self._failure

    def _give(self, row: _Row, values: np.ndarray | int) -> None:
        with self._changed:
            if self._filling.full:
                self._changed.wait_for(lambda: self._failure is not None or not self._filling.full)
            if self._failure is not None:
                raise self._failure
            self._filling.add(row, values)
            if self._filling.full:
                self._changed.notify_all()

    def _work(self) -> None:
        """The writing thread. Nobody else touches the block that it has taken."""
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._asked or self._closing or self._filling.full, FLUSH_SECONDS)
                    if self._closing:
                        break
                    block, self._filling = self._filling, self._spare
                    self._asked, self._busy = False, True
                    self._changed.notify_all()
                start = time.perf_counter()
                self._write_block(block)
                self.seconds += time.perf_counter() - start
                with self._changed:
                    self._spare, self._busy = block, False
                    self._changed.notify_all()
            if self._unsynced and self._failure is None:
                self._sync()
        except Exception as error:  # raised where someone reads it
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _write_block(self, block: _Block) -> None:
        if not block.rows:
            return
        rows, columns = block.in_order()
        status = columns.pop("status")
        runs = _runs(rows)
        for first, end in runs:
            for name, values in columns.items():
                self._write(name, int(rows[first]), values[first:end])
        self._sync()
        for first, end in runs:
            self._write("status", int(rows[first]), status[first:end])
        self._unsynced = True  # by the next block, or at the end
        block.rows.clear()

    def _write(self, name: str, row: int, values: np.ndarray) -> None:
        """Write values of a column, of this row and those after it."""
        column = self._columns[name]
        data = values.reshape(-1).view(np.uint8).data
        place = column.offset + row * column.row_bytes
        try:
            while data:
                written = os.pwrite(self._descriptor, data, place)
                data, place = data[written:], place + written
        except OSError as error:
            raise StoreError(f"{self._path}: cannot be written: {os_reason(error)}") from None

    def _sync(self) -> None:
        try:
            getattr(os, "fdatasync", os.fsync)(self._descriptor)
        except OSError as error:
            raise StoreError(f"{self._path}: cannot be written: {os_reason(error)}") from None
        self._unsynced = False


class _Row(NamedTuple):
    row: int
    status: Status
    image_size: tuple[int, int]
    error: bytes
    fingerprint: Fingerprint


class _Block:
    """Rows in the order they came, with their values [B, D] in one array."""

    def __init__(self, columns: dict[str, Column]) -> None:
        self._columns = columns
        column = columns["descriptors"]
        self._most = max(1, min(column.shape[0], BLOCK_ROWS, BLOCK_BYTES // max(1, column.row_bytes)))
        self._values = np.empty((self._most, *column.shape[1:]), column.dtype)
        self.rows: list[_Row] = []

    @property
    def full(self) -> bool:
        return len(self.rows) >= self._most

    def add(self, row: _Row, values: np.ndarray | int) -> None:
        self._values[len(self.rows)] = values
        self.rows.append(row)

    def in_order(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """[n] row numbers, ascending, and [n, ...] their values of every column."""
        rows = np.array([one.row for one in self.rows], np.int64)
        order = np.argsort(rows, kind="stable")  # of a row that was given twice, the last one stays
        values = self._values[: len(rows)]
        if (np.diff(rows) < 0).any():
            rows, values = rows[order], values[order]
        given = [self.rows[at] for at in order.tolist()]
        plain = {
            "status": [one.status for one in given],
            "image_size": [one.image_size for one in given],
            "error": [one.error for one in given],
            "file_size": [one.fingerprint.file_size for one in given],
            "file_mtime_ns": [one.fingerprint.mtime_ns for one in given],
            "checksum": [zlib.crc32(one) for one in values],
        }
        columns = {name: np.array(found, self._columns[name].dtype) for name, found in plain.items()}
        return rows, {"descriptors": values, **columns}


def _runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """Where runs of consecutive numbers begin and end in ascending ones [n]."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    edges = [0, *breaks.tolist(), len(rows)]
    return list(pairwise(edges))


def library_versions() -> dict[str, str]:
    """What a file is made with: this program, Python and the libraries that matter for values."""
    found = {"sppfeat": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[library] = version(library)
    return found
