"""Writing stores; see `reading` for their layout.

Rows are written with plain writes at known offsets of the file, not through HDF5: a killed process leaves a file that
opens. New rows need a new file, which is written beside the old one and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import zlib
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import h5py
import numpy as np

from sppfeat._version import __version__
from sppfeat.errors import StoreBusyError, StoreError
from sppfeat.files import DAMAGE, STORE, appearing, check_hdf5, check_new_file, new_hdf5, os_reason, partial_path
from sppfeat.images import NO_FINGERPRINT, Fingerprint
from sppfeat.recipe import Recipe
from sppfeat.store.reading import _COLUMNS, ERROR_BYTES, FORMAT_VERSION, Status, Store

_COPY_BYTES: Final = 1 << 26
_MARK_BYTES: Final = 1 << 20
_LIBRARIES: Final = ("torch", "torchvision", "timm", "pillow", "numpy", "h5py")


def check_output(path: Path, *, overwrite: bool, resume: bool) -> None:
    """Raise StoreError unless a store can be created, resumed or overwritten at a path.

    Only a store is ever replaced, intact or damaged: a mistyped output must not destroy a photograph or other results.
    """
    if path.is_file() and not os.access(path, os.R_OK | os.W_OK):
        raise StoreError(f"{path}: the store is not writable")
    check_new_file(path, overwrite=overwrite or resume, error=StoreError, kind=STORE, other=_other_kind)


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


@contextlib.contextmanager
def lock_store(path: Path) -> Iterator[None]:
    """Hold the exclusive right to write to a store; the lock ends with the process. Raises StoreBusyError, StoreError.

    The lock is a hidden file beside the store, because the store itself may be replaced, and its readers must not be
    locked out.
    """
    beside = path.with_name(f".{path.name}.lock")
    while True:
        try:
            descriptor = _above_standard(os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
        except OSError as error:
            raise StoreError(f"{path}: cannot write in {path.parent}: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise StoreError(f"{path}: cannot be locked: {error.strerror}") from None
            raise StoreBusyError(f"{path}: another process is writing to it; wait for it to end") from None
        # The previous holder may have removed the file between our open and our lock.
        with contextlib.suppress(FileNotFoundError):
            if os.stat(beside).st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)
    try:
        # Remove what a killed writer left behind: no other process may be writing now.
        with contextlib.suppress(OSError):
            os.unlink(partial_path(path))
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        os.close(descriptor)


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
                "versions": json.dumps(_versions()),
            },
        )


def extend_store(store: Store, names: Sequence[str], *, source_root: str) -> None:
    """Rewrite a store with new pending rows after the present ones, which take the first of the names.

    Hold `lock_store`.
    """
    with appearing(store.path, StoreError) as partial:
        _write_structure(
            partial,
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
        with h5py.File(partial, "r", locking=False) as file:
            places = {name: file[name].id.get_offset() for name in store.columns}
        with open(store.path, "rb") as old, open(partial, "r+b") as new:
            for name, column in store.columns.items():
                old.seek(column.offset)
                new.seek(places[name])
                left = column.row_bytes * len(store)
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
        columns = {**_COLUMNS, "descriptors": ("<f2" if dtype == "float16" else "<f4", (dim,))}
        for name, (kind, width) in columns.items():
            space = h5py.h5s.create_simple((count, *width))
            h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(np.dtype(kind)), space, layout)
    with open(path, "r+b") as whole:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(whole.fileno(), 0, os.fstat(whole.fileno()).st_size)


class StoreWriter:
    """Fills the rows of a store. Hold `lock_store` while it is open; call `flush` now and then.

    A row is written in two steps: its values at once, its status at the next `flush`, after the values are on disk.
    Raises StoreError when a write fails; what was flushed stays.
    """

    def __init__(self, store: Store) -> None:
        self._path = store.path
        self._columns = store.columns
        try:
            self._descriptor = _above_standard(os.open(store.path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            raise StoreError(f"{store.path}: cannot be written: {os_reason(error)}") from None
        self._waiting: dict[int, Status] = {}
        self._unsynced = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not isinstance(error, StoreError):
                self.flush()
                if self._unsynced:
                    self._sync()
        finally:
            os.close(self._descriptor)

    def reset(self, rows: Sequence[int]) -> None:
        """Make rows pending again, before their values are touched."""
        for row in rows:
            self._write("status", row, Status.PENDING)
        self._sync()

    def write(self, row: int, descriptor: np.ndarray, image_size: tuple[int, int], fingerprint: Fingerprint) -> None:
        """Write a described row; it counts as done after the next `flush`."""
        self._write_row(row, descriptor, image_size, b"", fingerprint)
        self._waiting[row] = Status.DONE

    def fail(self, row: int, reason: str, fingerprint: Fingerprint = NO_FINGERPRINT) -> None:
        """Write a failed row: zeros, and the reason; it counts as failed after the next `flush`."""
        text = " ".join(reason.split()).encode("utf-8", "backslashreplace")[:ERROR_BYTES]
        zeros = np.zeros(self._columns["descriptors"].shape[1], self._columns["descriptors"].dtype)
        self._write_row(row, zeros, (0, 0), text.decode("utf-8", "ignore").encode(), fingerprint)
        self._waiting[row] = Status.FAILED

    def flush(self) -> None:
        """Write the values to disk, then the status of their rows."""
        if not self._waiting:
            return
        self._sync()
        for row, status in self._waiting.items():
            self._write("status", row, status)
        self._waiting.clear()
        self._unsynced = True  # by the next flush, or at the end

    def _write_row(
        self, row: int, descriptor: np.ndarray, image_size: tuple[int, int], error: bytes, fingerprint: Fingerprint
    ) -> None:
        column = self._columns["descriptors"]
        values = np.ascontiguousarray(descriptor, dtype=column.dtype)
        if values.shape != column.shape[1:]:
            raise StoreError(f"{self._path}: expected a descriptor of {column.shape[1:]}, found {values.shape}")
        self._write("descriptors", row, values)
        self._write("checksum", row, zlib.crc32(values.data))
        self._write("image_size", row, image_size)
        self._write("error", row, error)
        self._write("file_size", row, fingerprint.file_size)
        self._write("file_mtime_ns", row, fingerprint.mtime_ns)

    def _write(self, name: str, row: int, value: Any) -> None:
        column = self._columns[name]
        data = memoryview(np.asarray(value, dtype=column.dtype).tobytes())
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


def _above_standard(descriptor: int) -> int:
    """The same file, never with the number of a standard stream: a library that prints would write into it."""
    if descriptor > 2:
        return descriptor
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(descriptor)


def _versions() -> dict[str, str]:
    found = {"sppfeat": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[library] = version(library)
    return found
