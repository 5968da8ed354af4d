"""The HDF5 store: one file of names and descriptors, whose structure never changes once it is created.

    /descriptors  (N, D) float16 or float32, contiguous, allocated when the file is created
    /names        (N,)   UTF-8; see `sppfeat.images.sources.path_to_name`
    /status       (N,)   uint8: 0 pending, 1 done, 2 failed; set only after the row's values are on disk
    /image_size   (N, 2) int32, width and height of the upright original
    /error        (N,)   fixed-length bytes, why the row failed
    /file_size, /file_mtime_ns  (N,) int64, the file as it was when its row was written
    /checksum     (N,)   uint32, CRC-32 of the row's bytes

Readers can map the file into memory while it grows.
"""

from __future__ import annotations

import enum
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import h5py
import numpy as np

from sppfeat.errors import StoreError, UsageError, one_line
from sppfeat.files import DAMAGE, STORE, check_hdf5, hdf5_reason, read_document, unsafe_name
from sppfeat.recipe import Recipe

FORMAT_VERSION: Final = 1
ERROR_BYTES: Final = 200  # maximum length of a stored reason, in UTF-8 bytes
# Per-row datasets except /names, with the type and width of a row; /descriptors is added with the recipe's type.
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
    """The location of one dataset's values in the file."""

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return int(self.dtype.itemsize * np.prod(self.shape[1:], dtype=np.int64))


@dataclass(frozen=True)
class Store:
    """An open store. Arrays are read-only views of the file: they show rows as a running extraction fills them.

    A store keeps the file it was opened from, even if an extraction replaces it with a longer one.
    names: of the images, one per row; `sppfeat.images.name_to_path(source_root, name)` is the file.
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
        """Reasons by name, for the rows that failed."""
        return {
            self.names[row]: bytes(self.error[row]).decode("utf-8", "replace")
            for row in np.flatnonzero(self.status == Status.FAILED)
        }

    def counts(self) -> dict[str, int]:
        """Rows by state: pending, done, failed."""
        found = np.bincount(self.status, minlength=3)
        return {status.name.lower(): int(found[status]) for status in Status}


def open_store(path: str | os.PathLike[str]) -> Store:
    """Open a store for reading, even while it is being written. Raises StoreError if it is not an intact store."""
    path = Path(path)
    try:
        while True:
            # Reading takes no lock: rows are only ever added, and HDF5's own lock would stop a running extraction.
            check_hdf5(path)
            with open(path, "rb") as content, h5py.File(path, "r", locking=False) as file:
                # Otherwise an extraction replaced the file between the two openings.
                if os.path.samestat(os.stat(path), os.fstat(content.fileno())):
                    return _read(path, file, content)
    except FileNotFoundError:
        raise StoreError(f"{path}: expected a store, found no such file") from None
    except OSError as error:
        raise StoreError(
            f"{path}: expected a store, found a file that cannot be opened: {hdf5_reason(error)}"
        ) from None
    except (*DAMAGE, UsageError) as error:
        raise StoreError(f"{path}: damaged: expected a store, found: {one_line(error)}") from None


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
            raise StoreError(f"{path}: cut short: /{name} extends past the {size} bytes of the file")
        columns[name] = column
        kinds = ("<f2", "<f4") if name == "descriptors" else (_COLUMNS[name][0],)
        width = column.shape[1:] if name == "descriptors" else _COLUMNS[name][1]
        if column.dtype not in kinds or column.shape[1:] != width or len(column.shape) != (2 if width else 1):
            raise StoreError(f"{path}: /{name}: unexpected type or shape: {column.dtype} {list(column.shape)}")
    names = file["names"].asstr()[:].tolist()
    if any(column.shape[0] != len(names) for column in columns.values()):
        raise StoreError(f"{path}: expected one row per name, found {len(names)} names and columns of other lengths")
    recipe = Recipe.from_json(str(file.attrs["recipe"]))
    recipe_hash, weights_sha256 = str(file.attrs["recipe_hash"]), str(file.attrs["weights_sha256"])
    if recipe_hash != recipe.identity(weights_sha256):
        raise StoreError(f"{path}: its recipe_hash is of another recipe or other weights; extract it again")
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


def require_complete(store: Store) -> None:
    """Raise StoreError for a store with pending rows."""
    if pending := store.counts()["pending"]:
        raise StoreError(f"{store.path}: {pending} of {len(store)} images are still to be described; run extract again")


def verify_store(store: Store) -> list[str]:
    """Check every row that is not pending; returns one line per problem."""
    problems: list[str] = []
    reasons = store.errors()
    if len(set(store.names)) != len(store.names):
        problems.append(f"{len(store.names) - len(set(store.names))} duplicate names")
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
                problems.append(f"row {row} ({name!r}): contains values that are not finite")
            elif store.image_size[row].min() < 1:
                problems.append(f"row {row} ({name!r}): done, but its image has no size")
        elif status == Status.FAILED and not reasons[name]:
            problems.append(f"row {row} ({name!r}): failed without a reason")
    return problems
