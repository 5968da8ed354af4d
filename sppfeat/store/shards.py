"""A store as a folder of shards, see `manifest`: adding, changing and publishing shards, and recovering from a kill.

A shard is filled as `.building-N.h5`, row by row, and resumes as any store does. When no row is pending it is synced,
renamed to `shard-N.h5`, and then named in the manifest. It never changes in place: its readers see the old rows or the
new ones, and a hard link of it in another store stays as it is.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import h5py
import numpy as np

from sppfeat.errors import StoreError
from sppfeat.files import STORE, appearing, appearing_hdf5, os_reason, partial_path, sync_folder
from sppfeat.recipe import Recipe
from sppfeat.store.locking import lock_shard
from sppfeat.store.manifest import (
    MANIFEST,
    MANIFEST_VERSION,
    SHARD_ROWS,
    UNFINISHED,
    VIEW,
    Manifest,
    building_file,
    building_files,
    foreign_files,
    publishing_file,
    publishing_shards,
    remove_leftovers,
    remove_marks,
    shard_file,
    unlisted_shards,
    write_manifest,
)
from sppfeat.store.reading import (
    DIGEST_TYPE,
    Store,
    open_file,
    open_shard,
    read_folder,
    require_shards,
    shard_entry,
    shard_fault,
)
from sppfeat.store.writing import copy_without, create_store, library_versions

VIEW_FORMAT: Final = "sppfeat-store-view"
_COPY_BYTES: Final = 1 << 30


@dataclass(frozen=True)
class ShardRows:
    """The rows of one shard, without names and descriptors. Its arrays are views of the file.

    building: whether it is under work; then its rows are the current ones, and those of the published shard of the
    same number, if there is one, are not.
    digest: [n, 2] uint64, see `name_digests`. status: [n] uint8. file_size, file_mtime_ns: [n] int64.
    """

    index: int
    building: bool
    digest: np.ndarray
    status: np.ndarray
    file_size: np.ndarray
    file_mtime_ns: np.ndarray


class Folder:
    """A folder store that is planned or written; to read its rows use `open_store`.

    manifest: as it is in the file. building: the shards under work, by number. Hold `lock_store` while it is changed.
    """

    def __init__(self, path: Path, manifest: Manifest, building: dict[int, Path]) -> None:
        self.path = path
        self.manifest = manifest
        self.building = building
        # Whether this run has marked the store, and changed nothing yet.
        self._only_marked = False

    @property
    def shards(self) -> dict[int, Path]:
        """The published shards, by number."""
        return {entry.index: self.path / entry.file for entry in self.manifest.shards}

    @property
    def recipe(self) -> Recipe:
        """What the descriptors are made with."""
        return self.manifest.read_recipe()

    def iter_shards(self) -> Iterator[ShardRows]:
        """Every row once, shard by shard in the order of their numbers. Raises StoreError for a damaged shard."""
        places = {entry.index: at for at, entry in enumerate(self.manifest.shards)}
        for index in sorted({*places, *self.building}):
            building = index in self.building
            if building:
                shard = open_file(self.building[index], names=False)
            else:
                shard = open_shard(self.path, self.manifest, places[index])
            yield ShardRows(
                index,
                building,
                np.asarray(shard.name_digests),
                shard.status,
                np.asarray(shard.file_size),
                np.asarray(shard.file_mtime_ns),
            )

    def begin_shard(self, names: Sequence[str]) -> Store:
        """Create the next shard under work, with every row pending: at most SHARD_ROWS names that no shard has."""
        if not 1 <= len(names) <= SHARD_ROWS:
            raise StoreError(f"{self.path}: expected 1 to {SHARD_ROWS} rows in a shard, found {len(names)}")
        self.begin()
        index = 1 + max((*self.shards, *self.building), default=-1)
        path = self.path / building_file(index)
        create_store(
            path,
            names,
            recipe=self.recipe,
            weights_sha256=self.manifest.weights_sha256,
            dim=self.manifest.dim,
            source_root=self.manifest.source_root,
        )
        self.building[index] = path
        return open_file(path)

    def rework_shard(self, index: int) -> Store:
        """A copy of a published shard to change rows in, or the copy that an earlier run left; `publish` replaces it.

        Where the file system can, the copy shares the unchanged blocks of the file.
        """
        path = self.path / building_file(index)
        self.begin()
        if index not in self.building:
            with appearing(path, StoreError) as partial:
                self.copy_shard(index, partial)
            self.building[index] = path
        return open_file(path)

    def copy_shard(self, index: int, target: Path) -> None:
        """Copy a published shard to a file. Raises OSError."""
        copy_file(self.shards[index], target)

    def clear(self) -> None:
        """Remove what is there of an older store. Raises StoreError for a folder with other files in it."""
        path = self.path
        if foreign := foreign_files(path):
            raise StoreError(f"{path}: expected a store or an empty folder, found {foreign[0]!r} in it")
        try:
            # The manifest first: without it the rest is no store, and no mix of an old and a new one.
            (path / MANIFEST).unlink(missing_ok=True)
            remove_leftovers(path)
            remove_marks(path)
            (path / VIEW).unlink(missing_ok=True)
            for index in unlisted_shards(path, None):
                (path / shard_file(index)).unlink()
            for file in building_files(path).values():
                file.unlink()
            sync_folder(path)
        except OSError as error:
            raise StoreError(f"{path}: cannot be overwritten: {os_reason(error)}") from None

    def write(self, manifest: Manifest) -> None:
        """Replace the manifest."""
        self.begin()
        self._only_marked = False
        self.manifest = manifest
        write_manifest(self.path, manifest)

    def remove_if_empty(self) -> None:
        """Remove the manifest of a store without any shard: it is none."""
        if not self.shards and not self.building:
            (self.path / MANIFEST).unlink(missing_ok=True)
            self.end()

    def begin(self) -> None:
        """Mark the store as unfinished, for its readers. Raises StoreError."""
        mark = self.path / UNFINISHED
        try:
            self._only_marked = self._only_marked or not mark.exists()
            mark.touch()
        except OSError as error:
            raise StoreError(f"{mark}: cannot be written: {os_reason(error)}") from None

    def end(self) -> None:
        """Remove the mark: all images are described."""
        (self.path / UNFINISHED).unlink(missing_ok=True)

    def discard(self, store: Store) -> None:
        """Remove a shard under work of which nothing is described. Close its writer before."""
        index = next(index for index, path in self.building.items() if path == store.path)
        store.path.unlink()
        del self.building[index]
        if not self.building and self._only_marked:
            self.end()

    def publish(self, store: Store) -> None:
        """Make a shard under work, whose rows are all described, a published one. Close its writer before."""
        index = next((index for index, path in self.building.items() if path == store.path), None)
        if index is None:
            raise StoreError(f"{store.path}: expected a shard under work of {self.path}")
        shard = open_file(store.path, names=False)
        if (fault := shard_fault(shard, self.manifest)) is not None:
            raise StoreError(f"{store.path}: cannot be published, found {fault}")
        final = self.path / shard_file(index)
        if index in self.shards:
            before = open_file(final, names=False)
            if not np.array_equal(before.name_digests, shard.name_digests):
                raise StoreError(f"{store.path}: cannot replace {final.name}, whose images are others")
        self.begin()
        try:
            with open(store.path, "rb") as file:
                os.fsync(file.fileno())
            (self.path / publishing_file(index)).touch()
            self.place(shard, final)
            sync_folder(self.path)
        except OSError as error:
            raise StoreError(f"{final}: cannot be published: {os_reason(error)}") from None
        del self.building[index]
        self.write(self.manifest.with_shard(shard_entry(shard, final)))
        remove_marks(self.path)

    def remove_rows(self, index: int, rows: np.ndarray) -> None:
        """Replace a published shard by one without some of its rows, or remove it if these are all.

        After a kill the shard is as it was, or as it is to be. Who reads it now keeps the old rows.
        """
        final = self.path / shard_file(index)
        self.begin()
        if len(rows) == len(open_file(final, names=False)):
            # In this order: a file that the manifest lacks is published again, one that only the manifest has is lost.
            self.write(self.manifest.without_shard(index))
            self.drop(final)
            return
        partial = partial_path(final)
        try:
            with self.whole_shard(index) as whole:
                copy_without(open_file(whole), partial, rows)
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            (self.path / publishing_file(index)).touch()
            self.place(open_file(partial, names=False), final)
            sync_folder(self.path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise StoreError(f"{final}: cannot be replaced: {os_reason(error)}") from None
        self.write(self.manifest.with_shard(shard_entry(open_file(final, names=False))))
        remove_marks(self.path)

    @contextlib.contextmanager
    def whole_shard(self, index: int) -> Iterator[Path]:
        """A published shard as a file that has all of its values."""
        yield self.shards[index]

    def drop(self, final: Path) -> None:
        """Remove the file of a shard that the manifest does not name."""
        final.unlink(missing_ok=True)

    def place(self, shard: Store, final: Path) -> None:
        """Put a complete shard where its readers find it. Raises OSError."""
        os.rename(shard.path, final)

    def finish(self, *, complete: bool = True) -> None:
        """Write `all.h5`, unless it is newer than the manifest. complete: whether all images are listed."""
        self.write_view()
        if complete and not self.building:
            self.end()

    def write_view(self) -> None:
        """Write `all.h5`, unless it is newer than the manifest."""
        view = self.path / VIEW
        with contextlib.suppress(FileNotFoundError):
            if view.stat().st_mtime_ns > (self.path / MANIFEST).stat().st_mtime_ns:
                return
        if self.manifest.shards:
            _write_view(self.path, self.manifest)
        else:
            view.unlink(missing_ok=True)

    def recover(self) -> None:
        """Clear what a killed writer left, and publish what it described. Hold the lock.

        Raises StoreError for a shard that is lost, or that is not of this store: nothing is removed or replaced.
        """
        recovered = recovered_manifest(self.path, self.manifest)
        if recovered != self.manifest:
            self.write(recovered)
        remove_marks(self.path)
        # A kill may come after the last row of a shard.
        for path in list(self.building.values()):
            with lock_shard(path):
                shard = open_file(path, names=False)
                if not shard.counts()["pending"]:
                    self.publish(shard)


# What a folder store is opened as: a `Folder`, or one that also keeps its shards elsewhere.
FolderKind = Callable[[Path, Manifest, dict[int, Path]], Folder]


def is_folder_store(path: Path) -> bool:
    """Whether there is a folder store, sound or damaged."""
    return (path / MANIFEST).exists()


def create_folder(
    path: Path,
    *,
    recipe: Recipe,
    weights_sha256: str,
    dim: int,
    source_root: str,
    part: tuple[int, int] | None = None,
    kind: FolderKind = Folder,
) -> Folder:
    """A folder store without shards; a store that was there is removed, see `check_output`. Hold `lock_store`.

    kind: what the folder is made as. Raises StoreError for a folder with other files in it.
    """
    path.mkdir(exist_ok=True)
    manifest = new_manifest(recipe=recipe, weights_sha256=weights_sha256, dim=dim, source_root=source_root, part=part)
    folder = kind(path, manifest, {})
    folder.clear()
    folder.write(manifest)
    return folder


def new_manifest(
    *, recipe: Recipe, weights_sha256: str, dim: int, source_root: str, part: tuple[int, int] | None
) -> Manifest:
    """The manifest of a store without shards."""
    return Manifest(
        format=STORE,
        format_version=MANIFEST_VERSION,
        dim=dim,
        recipe=json.loads(recipe.to_json()),
        recipe_hash=recipe.identity(weights_sha256),
        weights_sha256=weights_sha256,
        source_root=source_root,
        versions=library_versions(),
        part=part,
        shards=[],
    )


def open_folder(
    path: str | os.PathLike[str],
    *,
    writable: bool = False,
    kind: FolderKind = Folder,
) -> Folder:
    """Open a folder store for planning; writable: hold `lock_store`, and recover what a killed writer left.

    kind: what the folder is opened as. Raises StoreError if it is not a folder store, or damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise StoreError(f"{path}: expected a folder of shards, found {'a file' if path.exists() else 'nothing'}")
    manifest, building, _ = read_folder(path)
    folder = kind(path, manifest, building)
    if writable:
        folder.recover()
    return folder


def recovered_manifest(path: Path, manifest: Manifest) -> Manifest:
    """The manifest with the shards that a killed writer published, after clearing what it left. Hold the lock.

    Raises StoreError for a shard that is lost, or that is not of this store.
    """
    remove_leftovers(path)
    require_shards(path, manifest)
    known = {entry.index for entry in manifest.shards}
    # A mark alone is of a shard that was not renamed yet.
    for index in sorted({*unlisted_shards(path, manifest), *(known & {*publishing_shards(path)})}):
        shard = open_file(path / shard_file(index), names=False)
        if (fault := shard_fault(shard, manifest)) is not None:
            raise StoreError(f"{shard.path}: expected a shard of this store, found {fault}; move it out of the folder")
        manifest = manifest.with_shard(shard_entry(shard))
    return manifest


def copy_file(source: Path, target: Path) -> None:
    """Copy a file; within one file system that can share blocks between files, nothing is copied. Raises OSError."""
    try:
        with open(source, "rb") as old, open(target, "wb") as new:
            while os.copy_file_range(old.fileno(), new.fileno(), _COPY_BYTES):
                pass
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP):
            raise
        shutil.copyfile(source, target)


def _write_view(path: Path, manifest: Manifest) -> None:
    """Write `all.h5`: the columns of the shards one after the other, by file names relative to it."""
    files = [open_file(path / entry.file, names=False) for entry in manifest.shards]
    columns = {name: (column.dtype, column.shape[1:]) for name, column in files[0].columns.items()}
    columns["names"] = (h5py.string_dtype(), ())
    if all(file.stored_digests is not None for file in files):  # HDF5 would show zeros for those that lack them
        columns["name_digest"] = (DIGEST_TYPE, ())
    with appearing_hdf5(path / VIEW, StoreError) as view:
        view.attrs["format"] = VIEW_FORMAT
        view.attrs["recipe"] = json.dumps(manifest.recipe)
        view.attrs["source_root"] = np.void(os.fsencode(manifest.source_root))
        for name, (dtype, width) in columns.items():
            layout = h5py.VirtualLayout((sum(map(len, files)), *width), dtype)
            start = 0
            for file in files:
                end = start + len(file)
                layout[start:end] = h5py.VirtualSource(file.path.name, name, (len(file), *width), dtype)
                start = end
            view.create_virtual_dataset(name, layout)
