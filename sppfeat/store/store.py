"""The HDF5 store: one file with names and descriptors, whose structure never changes once it has rows to fill.

    /descriptors  (N, D) float16 or float32, contiguous, allocated when the file is created
    /names        (N,)   UTF-8; see `sppfeat.images.reading.path_to_name`
    /status       (N,)   uint8: 0 pending, 1 done, 2 failed; set only after the row's values are on disk
    /image_size   (N, 2) int32, width and height of the upright original
    /error        (N,)   fixed-length bytes, why a row failed
    /file_size, /file_mtime_ns  (N,) int64, the file as it was when its row was written
    /checksum     (N,)   uint32, CRC-32 of the row's bytes

Rows are written with plain writes at known places of the file, not through HDF5: a killed process leaves a file that
opens, and readers can map it into memory while it grows. New rows mean a new file, written beside and renamed.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import json
import os
import platform
import stat
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

import h5py
import numpy as np

from sppfeat._version import __version__
from sppfeat.errors import StoreBusyError, StoreError, UsageError, one_line
from sppfeat.files.hdf5_check import check_hdf5, hdf5_reason
from sppfeat.files.names import unsafe_name
from sppfeat.files.output import DAMAGE, STORE, appearing, new_hdf5, os_reason, partial_path, read_document
from sppfeat.images.reading import NO_FINGERPRINT, Fingerprint
from sppfeat.recipe import Recipe

FORMAT_VERSION: Final = 1
ERROR_BYTES: Final = 200  # longest reason kept, in UTF-8 bytes
_COPY_BYTES: Final = 1 << 26
_MARK_BYTES: Final = 1 << 20
_LIBRARIES: Final = ("torch", "torchvision", "timm", "pillow", "numpy", "h5py")
# Per-row datasets besides /names, with type and width of a row; /descriptors is added with the recipe's type.
_COLUMNS: Final = {
    "status": ("u1", ()),
    "image_size": ("<i4", (2,)),
    "error": (f"S{ERROR_BYTES}", ()),
    "file_size": ("<i8", ()),
    "file_mtime_ns": ("<i8", ()),
    "checksum": ("<u4", ()),
}


class Status(enum.IntEnum):
    """State of a row."""

    PENDING = 0
    DONE = 1
    FAILED = 2


@dataclass(frozen=True)
class Column:
    """Where one dataset's values lie in the file."""

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return int(self.dtype.itemsize * np.prod(self.shape[1:], dtype=np.int64))


@dataclass(frozen=True)
class Store:
    """An open store. Arrays are read-only views of the file: they show rows as a running extraction fills them.

    A store stays the file it was opened from, also when an extraction replaces that by one with more rows.
    names: of the images, one a row; `sppfeat.images.reading.name_to_path(source_root, name)` is the file.
    descriptors: [N, D] float16 or float32; rows that are not done are zeros. status: [N] uint8, see `Status`.
    image_size: [N, 2] int32, width and height of the upright original. checksum: [N] uint32, CRC-32 of each row.
    error: [N] bytes. file_size, file_mtime_ns: [N] int64, of the files as they were described.
    """

    path: Path
    names: list[str]
    recipe: Recipe
    recipe_hash: str
    weights_sha256: str
    source_root: str
    versions: dict[str, str]
    columns: dict[str, Column]
    descriptors: np.ndarray
    status: np.ndarray
    image_size: np.ndarray
    error: np.ndarray
    file_size: np.ndarray
    file_mtime_ns: np.ndarray
    checksum: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    @property
    def dim(self) -> int:
        """Length of a descriptor."""
        return int(self.descriptors.shape[1])

    def errors(self) -> dict[str, str]:
        """Reason by name, for the rows that failed."""
        return {
            self.names[row]: bytes(self.error[row]).decode("utf-8", "replace")
            for row in np.flatnonzero(self.status == Status.FAILED)
        }

    def counts(self) -> dict[str, int]:
        """Rows by state: pending, done, failed."""
        found = np.bincount(self.status, minlength=3)
        return {status.name.lower(): int(found[status]) for status in Status}


def open_store(path: str | os.PathLike[str]) -> Store:
    """Open a store for reading, also while it is being written. Raises StoreError when it is not a whole store."""
    path = Path(path)
    try:
        while True:
            # Reading takes no lock: rows are only ever added, and HDF5's own lock would stop a running extraction.
            check_hdf5(path)
            with open(path, "rb") as content, h5py.File(path, "r", locking=False) as file:
                # Else an extraction put a longer file in its place between the two openings.
                if os.path.samestat(os.stat(path), os.fstat(content.fileno())):
                    return _read(path, file, content)
    except FileNotFoundError:
        raise StoreError(f"{path}: expected a store, found no such file") from None
    except OSError as error:
        raise StoreError(
            f"{path}: expected a store, found a file that cannot be opened: {hdf5_reason(error)}"
        ) from None
    except (*DAMAGE, UsageError) as error:
        raise StoreError(f"{path}: expected a whole store, found: {one_line(error)}") from None


def _read(path: Path, file: h5py.File, content: BinaryIO) -> Store:
    kind = file.attrs.get("format")
    if kind != STORE:
        raise StoreError(f"{path}: expected a store (format {STORE!r}), found an HDF5 file with format {kind!r}")
    found = int(file.attrs["format_version"])
    if found > FORMAT_VERSION:
        raise StoreError(
            f"{path}: store format {found} is newer than this sppfeat reads ({FORMAT_VERSION}): update sppfeat"
        )
    size = os.fstat(content.fileno()).st_size
    columns: dict[str, Column] = {}
    for name in ("descriptors", *_COLUMNS):
        dataset = file[name]
        column = Column(dataset.id.get_offset() or 0, dataset.dtype, tuple(map(int, dataset.shape)))
        if not column.offset or column.offset + column.row_bytes * column.shape[0] > size:
            raise StoreError(f"{path}: cut short: /{name} ends beyond the {size} bytes of the file")
        columns[name] = column
        kinds = ("<f2", "<f4") if name == "descriptors" else (_COLUMNS[name][0],)
        width = column.shape[1:] if name == "descriptors" else _COLUMNS[name][1]
        if column.dtype not in kinds or column.shape[1:] != width or len(column.shape) != (2 if width else 1):
            raise StoreError(f"{path}: /{name} holds {column.dtype} {list(column.shape)}, which no store has")
    names = file["names"].asstr()[:].tolist()
    if any(column.shape[0] != len(names) for column in columns.values()):
        raise StoreError(f"{path}: expected one row a name, found {len(names)} names and columns of other lengths")
    recipe = Recipe.from_json(str(file.attrs["recipe"]))
    recipe_hash, weights_sha256 = str(file.attrs["recipe_hash"]), str(file.attrs["weights_sha256"])
    if recipe_hash != recipe.identity(weights_sha256):
        raise StoreError(f"{path}: its recipe_hash is of another recipe or other weights; extract it anew")
    if columns["descriptors"].dtype != recipe.dtype:
        raise StoreError(f"{path}: expected descriptors of {recipe.dtype}, found {columns['descriptors'].dtype}")
    return Store(
        path=path,
        names=names,
        recipe=recipe,
        recipe_hash=recipe_hash,
        weights_sha256=weights_sha256,
        source_root=os.fsdecode(bytes(file.attrs["source_root"])),
        versions=read_document(file, "versions", dict[str, str], StoreError),
        columns=columns,
        **{
            name: np.memmap(content, dtype=column.dtype, mode="r", offset=column.offset, shape=column.shape)
            for name, column in columns.items()
        },
    )


def check_output(path: Path, *, overwrite: bool, resume: bool) -> None:
    """Raise StoreError unless a store can be begun at a path, or resumed, or overwritten.

    Only a store is ever replaced, whole or damaged: a mistyped output must not cost a photograph or other results.
    """
    try:
        info = os.stat(path)
    except FileNotFoundError:
        if not os.path.isdir(path.parent):
            raise StoreError(f"{path}: expected its folder {path.parent} to exist, found none") from None
        return
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {os_reason(error)}") from None
    if not stat.S_ISREG(info.st_mode):
        kind = "a folder" if stat.S_ISDIR(info.st_mode) else "a special file"
        raise StoreError(f"{path}: expected a file to write the store to, found {kind}")
    if not info.st_size:
        return
    if not os.access(path, os.R_OK | os.W_OK):
        raise StoreError(f"{path}: store is not writable")
    found = _other_kind(path)
    if found is not None:
        raise StoreError(f"{path}: expected a store or a new file, found {found}; it is left as it is")
    if not resume and not overwrite:
        raise StoreError(f"{path}: exists already; choose another output, --resume or --overwrite")


def _other_kind(path: Path) -> str | None:
    """What a file is that is no store; None for a store, or what is left of one."""
    if not h5py.is_hdf5(path):
        return "a file that is no store"
    try:
        check_hdf5(path)
        with h5py.File(path, "r", locking=False) as file:
            kind = file.attrs.get("format")
    except (OSError, *DAMAGE):
        # What is left of a store bears its mark near the start; another program's file may just be of another kind.
        with open(path, "rb") as content:
            marked = STORE.encode() in content.read(_MARK_BYTES)
        return None if marked else "an HDF5 file that is not known to be a store"
    return None if kind == STORE else f"an HDF5 file of format {kind!r}"


@contextlib.contextmanager
def lock_store(path: Path) -> Iterator[None]:
    """Hold the only right to write to a store; the lock ends with the process. Raises StoreBusyError, StoreError.

    The lock is a hidden file beside the store, because the store itself may be replaced, and readers of it must not
    be locked out.
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
        # Whoever held the lock before may have removed the file between our open and our lock.
        with contextlib.suppress(FileNotFoundError):
            if os.stat(beside).st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)
    try:
        # What a writer that was killed left behind: nobody else may be writing now.
        with contextlib.suppress(OSError):
            os.unlink(partial_path(path))
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        os.close(descriptor)


def require_complete(store: Store) -> None:
    """Raise StoreError for a store with rows that are still to be described."""
    if pending := store.counts()["pending"]:
        raise StoreError(
            f"{store.path}: {pending} of {len(store)} images are still to be described; run its extract again"
        )


def create_store(
    path: Path, names: Sequence[str], *, recipe: Recipe, weights_sha256: str, dim: int, source_root: str
) -> None:
    """Write a store with every row pending; it appears at once, whole, and replaces what was there.

    Space for all rows is taken now, so that a full disk is found out before any work is done. Hold `lock_store`.
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
    """Rewrite a store with further, pending rows after the present ones, which take the first of the names.

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
    Raises StoreError when the disk refuses; what was flushed stays.
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
        """Put the values on disk, then say so in the status of their rows."""
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
    """The same file, never under the number of a standard stream: a library that prints would write into it."""
    if descriptor > 2:
        return descriptor
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(descriptor)


def verify_store(store: Store) -> list[str]:
    """Check every row; one line for each that is wrong. Rows that are pending have nothing to check."""
    problems: list[str] = []
    reasons = store.errors()
    if len(set(store.names)) != len(store.names):
        problems.append(f"{len(store.names) - len(set(store.names))} names stand more than once")
    for row, (name, status) in enumerate(zip(store.names, store.status.tolist(), strict=True)):
        if (fault := unsafe_name(name)) is not None:
            problems.append(f"row {row} ({name!r}): its name {fault}")
        if status > Status.FAILED:
            problems.append(f"row {row} ({name!r}): expected status 0, 1 or 2, found {status}")
        elif status == Status.DONE:
            values = np.ascontiguousarray(store.descriptors[row])
            if zlib.crc32(values.data) != int(store.checksum[row]):
                problems.append(f"row {row} ({name!r}): its values do not match their checksum")
            elif not np.isfinite(values).all():
                problems.append(f"row {row} ({name!r}): holds values that are not finite")
            elif store.image_size[row].min() < 1:
                problems.append(f"row {row} ({name!r}): done, but its image has no size")
        elif status == Status.FAILED and not reasons[name]:
            problems.append(f"row {row} ({name!r}): failed without a reason")
    return problems


def _versions() -> dict[str, str]:
    found = {"sppfeat": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[library] = version(library)
    return found
