"""The HDF5 store: one file of names and descriptors, whose structure never changes once it is created.

    /descriptors  (N, D) float16 or float32, contiguous, allocated when the file is created
    /names        (N,)   UTF-8; see `sppfeat.images.path_to_name`
    /name_digest  (N,)   16 bytes, BLAKE2b of the name, see `digests`; older files have none
    /status       (N,)   uint8: 0 pending, 1 done, 2 failed; set only after the row's values are on disk
    /image_size   (N, 2) int32, width and height of the upright original
    /error        (N,)   fixed-length bytes, why the row failed
    /file_size, /file_mtime_ns  (N,) int64, the file as it was when its row was written
    /checksum     (N,)   uint32, CRC-32 of the row's bytes

Readers can map the file into memory while it grows. A store may also be a folder of such files, see `manifest`: then
rows are read from the shards on demand, see `joined`.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Final

import h5py
import numpy as np

from sppfeat.errors import StoreError, UsageError, near_path, one_line
from sppfeat.files import DAMAGE, STORE, check_hdf5, format_of, hdf5_reason, os_reason, read_document
from sppfeat.images import found_instead, is_url
from sppfeat.recipe import Recipe
from sppfeat.store.digests import DIGEST_BYTES, name_digests
from sppfeat.store.joined import FileNames, JoinedNames, Shards, Values, joined
from sppfeat.store.manifest import (
    MANIFEST,
    UNFINISHED,
    VIEW,
    Manifest,
    ShardEntry,
    building_files,
    publishing_shards,
    read_manifest,
    shard_file,
)

FORMAT_VERSION: Final = 1
ERROR_BYTES: Final = 200  # maximum length of a stored reason, in UTF-8 bytes
# Per-row datasets except /names, with the type and width of a row; /descriptors is added with the recipe's type.
COLUMNS: Final = {
    "status": ("u1", ()),
    "image_size": ("<i4", (2,)),
    "error": (f"S{ERROR_BYTES}", ()),
    "file_size": ("<i8", ()),
    "file_mtime_ns": ("<i8", ()),
    "checksum": ("<u4", ()),
}
# Columns whose field in `Store` has another name.
_FIELDS: Final = {"status": "states"}
# Derived from /names and written with them; opaque bytes, so that no program sorts or converts them as numbers.
DIGEST_TYPE: Final = np.dtype(f"V{DIGEST_BYTES}")
_BLOCK_ROWS: Final = 1 << 16


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

    A store keeps the file it was opened from, even if an extraction replaces it with a longer one. The rows of a
    folder are those of the shards that were published when it was opened, read on demand: its names and values are
    indexed like arrays, by a number, a slice or rows, and only a few shards are open at a time.
    names: of the images, one per row; `sppfeat.images.name_to_path(source_root, name)` is the file.
    descriptors: [N, D] float16 or float32; rows that are not done are zeros.
    image_size: [N, 2] int32, width and height of the upright original. checksum: [N] uint32, CRC-32 of each row.
    error: [N] bytes. file_size, file_mtime_ns: [N] int64, of the files as they were described.
    path: the file or folder. url: of a store in a bucket, whose path is a folder in the cache.
    columns: where the values are in the file; none for a folder. manifest, shards, building: of a folder, with the
    shards under work by number; None for a file. unfinished: of a folder, whether a run writes to it, or ended before
    all images were described. size: in bytes, of a store in a bucket; else its files tell.
    """

    path: Path
    names: Sequence[str]
    recipe: Recipe
    recipe_hash: str
    weights_sha256: str
    source_root: str
    versions: dict[str, str]
    columns: dict[str, Column]
    states: Values
    descriptors: Values
    image_size: Values
    error: Values
    file_size: Values
    file_mtime_ns: Values
    checksum: Values
    stored_digests: Values | None = None
    manifest: Manifest | None = None
    shards: Shards | None = None
    building: Mapping[int, Path] | None = None
    url: str | None = None
    unfinished: bool = False
    size: int | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def place(self) -> str:
        """Where the store is, as its user names it: a path or a URL."""
        return self.url or str(self.path)

    @property
    def dim(self) -> int:
        """Length of a descriptor."""
        return int(self.descriptors.shape[1])

    @cached_property
    def status(self) -> np.ndarray:
        """[N] uint8, see `Status`; of a folder, read at the first use."""
        return self.states if isinstance(self.states, np.ndarray) else np.asarray(self.states)

    @cached_property
    def name_digests(self) -> Values:
        """[N, 2] uint64, the digests of the names; see `digests`."""
        return name_digests(self.names) if self.stored_digests is None else self.stored_digests

    def failures(self) -> Iterator[tuple[str, str]]:
        """Names and reasons of the rows that failed, in order; read block by block."""
        for start in range(0, len(self), _BLOCK_ROWS):
            for row in start + np.flatnonzero(self.states[start : start + _BLOCK_ROWS] == Status.FAILED):
                yield self.names[int(row)], reason_text(self.error[row])

    def errors(self) -> dict[str, str]:
        """Reasons by name, for the rows that failed."""
        return dict(self.failures())

    def counts(self) -> dict[str, int]:
        """Rows by state: pending, done, failed; of a folder, without the shards under work."""
        if self.manifest is not None:
            return self.manifest.counts()
        found = np.bincount(self.status, minlength=3)
        return {status.name.lower(): int(found[status]) for status in Status}


def reason_text(stored: bytes) -> str:
    """A reason as /error has it, as text."""
    return bytes(stored).decode("utf-8", "replace")


def open_store(path: str | os.PathLike[str]) -> Store:
    """Open a store, a file or a folder of shards, here or in a bucket, for reading, even while it is being written.

    Raises StoreError if it is not an intact store; for a damaged shard of a folder, when that shard is first read.
    """
    if isinstance(path, str) and is_url(path):
        from sppfeat.store.mirrors import open_bucket  # which reads stores in turn

        return open_bucket(path)
    path = Path(path)
    return _open_folder(path) if path.is_dir() else open_file(path)


def is_store(place: str | os.PathLike[str]) -> bool:
    """Whether there is a store, sound or damaged: a file, a folder, or a folder of a bucket, which is asked for it."""
    if isinstance(place, str) and is_url(place):
        from sppfeat.store.mirrors import is_bucket_store

        return is_bucket_store(place)
    return format_of(place) == STORE


def open_file(path: Path, *, names: bool = True) -> Store:
    """Open a store that is one file. names: read them now; else on demand, and none of them is looked at before."""
    try:
        while True:
            # Reading takes no lock: rows are only ever added, and HDF5's own lock would stop a running extraction.
            check_hdf5(path, strings=names)
            with open(path, "rb") as content, h5py.File(path, "r", locking=False) as file:
                # Otherwise an extraction replaced the file between the two openings.
                if os.path.samestat(os.stat(path), os.fstat(content.fileno())):
                    return _read(path, file, content, names)
    except FileNotFoundError:
        raise StoreError(f"{path}: expected a store, found no such file{near_path(path)}") from None
    except OSError as error:
        if path.name == VIEW and (path.parent / MANIFEST).exists():
            raise StoreError(f"{path}: is for other programs; give the folder {path.parent} instead") from None
        found = found_instead(path, STORE) or f"a file that cannot be opened: {hdf5_reason(error)}"
        raise StoreError(f"{path}: expected a store, found {found}") from None
    except (*DAMAGE, UsageError) as error:
        raise StoreError(f"{path}: damaged: expected a store, found: {one_line(error)}") from None


def _read(path: Path, file: h5py.File, content: BinaryIO, with_names: bool) -> Store:
    kind = file.attrs.get("format")
    if kind != STORE:
        other = found_instead(path, STORE) or f"an HDF5 file with format {kind!r}"
        raise StoreError(f"{path}: expected a store, found {other}")
    found = int(file.attrs["format_version"])
    if found > FORMAT_VERSION:
        raise StoreError(
            f"{path}: store format {found} is newer than this sppfeat reads ({FORMAT_VERSION}): update sppfeat"
        )
    opened = os.fstat(content.fileno())
    size = opened.st_size

    def place(name: str, kinds: tuple[str | np.dtype[Any], ...], width: tuple[int, ...] | None) -> Column:
        dataset = file[name]
        column = Column(dataset.id.get_offset() or 0, dataset.dtype, tuple(map(int, dataset.shape)))
        if not column.offset or column.offset + column.row_bytes * column.shape[0] > size:
            raise StoreError(f"{path}: cut short: /{name} extends past the {size} bytes of the file")
        row = column.shape[1:] if width is None else width
        if column.dtype not in kinds or column.shape[1:] != row or len(column.shape) != (2 if row else 1):
            raise StoreError(f"{path}: /{name}: unexpected type or shape: {column.dtype} {list(column.shape)}")
        return column

    def values(column: Column) -> np.ndarray:
        return np.memmap(content, dtype=column.dtype, mode="r", offset=column.offset, shape=column.shape)

    columns = {"descriptors": place("descriptors", ("<f2", "<f4"), None)}
    columns |= {name: place(name, (dtype,), width) for name, (dtype, width) in COLUMNS.items()}
    digest_column = place("name_digest", (DIGEST_TYPE,), ()) if "name_digest" in file else None
    digests = None if digest_column is None else values(digest_column).view("<u8").reshape(-1, 2)
    if h5py.check_string_dtype(file["names"].dtype) is None or file["names"].ndim != 1:
        raise StoreError(f"{path}: /names: unexpected type or shape: {file['names'].dtype} {file['names'].shape}")
    names: Sequence[str] = FileNames(path, len(file["names"]), opened, digests)
    if with_names:
        names = file["names"].asstr()[:].tolist()
    lengths = {column.shape[0] for column in columns.values()} | ({len(digests)} if digests is not None else set())
    if lengths != {len(names)}:
        raise StoreError(f"{path}: expected one row per name, found {len(names)} names and columns of other lengths")
    recipe = Recipe.from_json(str(file.attrs["recipe"]))
    recipe_hash, weights_sha256 = str(file.attrs["recipe_hash"]), str(file.attrs["weights_sha256"])
    if recipe_hash != recipe.identity(weights_sha256):
        raise StoreError(f"{path}: its recipe_hash is of another recipe or other weights; extract it again")
    if columns["descriptors"].dtype != recipe.dtype:
        raise StoreError(f"{path}: expected descriptors of {recipe.dtype}, found {columns['descriptors'].dtype}")
    arrays = {name: values(column) for name, column in columns.items()}
    return Store(
        path=path,
        names=names,
        recipe=recipe,
        recipe_hash=recipe_hash,
        weights_sha256=weights_sha256,
        source_root=os.fsdecode(bytes(file.attrs["source_root"])),
        versions=read_document(file, "versions", dict[str, str], StoreError),
        columns=columns,
        **_fields(arrays),
        stored_digests=digests,
    )


def _open_folder(path: Path) -> Store:
    mark = path / UNFINISHED
    begun = mark.exists()
    manifest, building, publishing = read_folder(path)
    require_shards(path, manifest)
    unfinished = begun or mark.exists()  # the manifest may be of a run that ended, or began, in between
    building = publishing | building
    return join_shards(
        path, manifest, lambda at: open_shard(path, manifest, at), building=building, unfinished=unfinished
    )


def join_shards(path: Path, manifest: Manifest, open_at: Callable[[int], Store], **about: Any) -> Store:
    """A folder store as its readers see it. open_at: a shard by its place in the manifest. about: more of `Store`."""
    recipe = manifest.read_recipe()
    shards = Shards([entry.rows for entry in manifest.shards], open_at)
    widths = {"descriptors": (recipe.dtype, (manifest.dim,)), **COLUMNS}
    columns = {name: joined(shards, _FIELDS.get(name, name), *kind) for name, kind in widths.items()}
    return Store(
        path=path,
        names=JoinedNames(shards),
        recipe=recipe,
        recipe_hash=manifest.recipe_hash,
        weights_sha256=manifest.weights_sha256,
        source_root=manifest.source_root,
        versions=manifest.versions,
        columns={},
        **_fields(columns),
        stored_digests=joined(shards, "name_digests", "<u8", (2,)),
        manifest=manifest,
        shards=shards,
        **about,
    )


def _fields(columns: Mapping[str, Values]) -> dict[str, Any]:
    """Columns by their fields in `Store`."""
    return {_FIELDS.get(name, name): values for name, values in columns.items()}


def read_folder(path: Path) -> tuple[Manifest, dict[int, Path], dict[int, Path]]:
    """The manifest of a folder, its shards under work and those being published, as they were at one moment."""
    try:
        while True:
            building, publishing = building_files(path), publishing_shards(path)
            manifest = read_manifest(path)
            # Otherwise a shard was published in between.
            if (building_files(path), publishing_shards(path)) == (building, publishing):
                return manifest, building, {index: path / shard_file(index) for index in publishing}
    except OSError as error:
        raise StoreError(f"{path}: could not be read: {os_reason(error)}") from None


def require_shards(folder: Path, manifest: Manifest) -> None:
    """Raise StoreError if a shard of the manifest is lost."""
    for entry in manifest.shards:
        if not (folder / entry.file).is_file():
            raise StoreError(
                f"{folder}: damaged: its manifest names {entry.file} with {entry.rows} rows, found no such file"
            )


def open_shard(folder: Path, manifest: Manifest, at: int) -> Store:
    """The shard at a place of the manifest, its names on demand. Raises StoreError unless it is as the manifest says.

    A shard that was replaced since the manifest was read is compared with the manifest of now.
    """
    entry = manifest.shards[at]
    shard = open_file(folder / entry.file, names=False)
    check_shard(shard, folder, manifest, entry)
    if (found := shard_entry(shard)) != entry and found not in read_manifest(folder).shards:
        raise StoreError(_other_counts(shard, entry))
    return shard


def check_shard(
    shard: Store, folder: Path | str, manifest: Manifest, entry: ShardEntry, *, counts: bool = False
) -> None:
    """Raise StoreError unless a file is the shard of an entry; counts: with as many rows done and failed, too."""
    if (fault := shard_fault(shard, manifest)) is not None:
        raise StoreError(f"{shard.path}: expected a shard of {folder}, found {fault}")
    if len(shard) != entry.rows:
        raise StoreError(f"{shard.path}: expected {entry.rows} rows, as in {MANIFEST}, found {len(shard)}")
    if counts and shard_entry(shard, Path(entry.file)) != entry:
        raise StoreError(_other_counts(shard, entry))


def _other_counts(shard: Store, entry: ShardEntry) -> str:
    found = shard.counts()
    return (
        f"{shard.path}: expected {entry.done} rows done and {entry.failed} failed, as in {MANIFEST}, found "
        f"{found['done']} and {found['failed']}; if an extraction was interrupted, run it again"
    )


def shard_entry(shard: Store, path: Path | None = None) -> ShardEntry:
    """What the manifest says of a shard, from its rows. path: where it is now, if it was renamed."""
    counts = shard.counts()
    return ShardEntry(file=(path or shard.path).name, rows=len(shard), done=counts["done"], failed=counts["failed"])


def shard_fault(shard: Store, manifest: Manifest) -> str | None:
    """Why a file cannot be a published shard of a folder; None if it can."""
    for what in ("recipe_hash", "weights_sha256", "source_root", "dim"):
        if getattr(shard, what) != getattr(manifest, what):
            return f"another {what}: {getattr(shard, what)!r}"
    counts = shard.counts()
    if sum(counts.values()) != counts["done"] + counts["failed"]:
        return f"{counts['pending']} pending rows"
    return None


def require_complete(store: Store) -> None:
    """Raise StoreError for a store with pending rows, or shards under work."""
    count = len(store)
    pending = store.counts()["pending"]
    if store.building:
        progress = building_progress(store)
        count, pending = count + progress.new, progress.missing
    if pending:
        raise StoreError(f"{store.place}: {pending} of {count} images are still to be described; run extract again")
    if store.building or store.unfinished:
        raise StoreError(f"{store.place}: a run was interrupted before its shards were complete; run extract again")


@dataclass(frozen=True)
class Building:
    """The shards under work of a folder.

    new: their rows that no published shard has. pending: rows that are not described. missing: images whose values a
    reader does not see as they will be: all new rows, and pending rows of published shards.
    """

    shards: int
    new: int
    pending: int
    missing: int


def building_progress(store: Store) -> Building:
    """Count the rows of a folder's shards under work."""
    published = {entry.index for entry in store.manifest.shards} if store.manifest is not None else set()
    shards = new = pending = missing = 0
    for index, path in (store.building or {}).items():
        if not path.exists():
            continue  # published meanwhile
        shard = open_file(path, names=False)
        left = shard.counts()["pending"]
        shards, pending = shards + 1, pending + left
        new += 0 if index in published else len(shard)
        missing += left if index in published else len(shard)
    return Building(shards, new, pending, missing)


def store_bytes(store: Store) -> int:
    """The size of a store's files, shards under work included."""
    if store.size is not None:
        return store.size
    files = [store.path]
    if store.manifest is not None:
        files = [*(store.path / entry.file for entry in store.manifest.shards), *(store.building or {}).values()]
    return sum(file.stat().st_size for file in files if file.exists())
