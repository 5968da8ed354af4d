"""Folder stores in a bucket, by way of a folder in the cache: what is written to them, and what is read of them.

A writer's mirror is a folder store of which the published shards have a hole for descriptors: a plan needs the other
columns only. Shards are filled there, and published by one conditional put. What the bucket has is the truth: a run
begins by taking it over, so that a store can be continued on any machine, at the cost of shards under work elsewhere.
A reader's mirror has whole shards, each fetched when it is first read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec
import numpy as np

from sppfeat.errors import SppFeatError, StoreBusyError, StoreError, UsageError
from sppfeat.files import appearing, cache_folder, decode_document, os_reason
from sppfeat.images import is_image_name
from sppfeat.recipe import Recipe
from sppfeat.store.buckets import Bucket, Object, Values
from sppfeat.store.manifest import (
    MANIFEST,
    UNFINISHED,
    VIEW,
    Manifest,
    building_files,
    is_part_of_store,
    is_shard_file,
    publishing_file,
    read_manifest,
    shard_file,
    shard_index,
    unlisted_shards,
)
from sppfeat.store.reading import Store, check_shard, join_shards, open_file
from sppfeat.store.shards import Folder
from sppfeat.store.writing import create_store, lock_store

_READING: Final = re.compile(r"[0-9a-f]{16}-shard-\d{5,9}\.h5", re.ASCII)
_BLOCK: Final = 1 << 24


def open_bucket(url: str) -> Store:
    """Open a store in a bucket, such as s3://bucket/feats/, for reading.

    Raises StoreError if it is not an intact store; for a damaged shard, when that shard is first read.
    """
    bucket = Bucket(url)
    folder = _mirror(bucket, "reading")
    there = bucket.list()
    found = bucket.read(MANIFEST)
    if found is None:
        raise StoreError(f"{bucket.url}: expected a store, found no {MANIFEST} there")
    with _named(folder, bucket):
        manifest = _keep_manifest(folder, found[0])
    for entry in manifest.shards:
        if entry.file not in there:
            raise StoreError(
                f"{bucket.url}: damaged: its manifest names {entry.file} with {entry.rows} rows, found no such object"
            )
    kept = {entry.file: folder / _reading_file(entry.file, there[entry.file].etag) for entry in manifest.shards}
    for path in {path for path in folder.iterdir() if _READING.fullmatch(path.name)} - set(kept.values()):
        path.unlink(missing_ok=True)  # replaced since

    def open_at(at: int) -> Store:
        entry = manifest.shards[at]
        path = kept[entry.file]
        if not path.exists():
            bucket.fetch(entry.file, path, there[entry.file].etag)
        try:
            shard = open_file(path, names=False)
            check_shard(shard, bucket.url, manifest, entry, counts=True)
        except StoreError as error:
            raise StoreError(str(error).replace(str(path), bucket.url + entry.file)) from None
        return shard

    return join_shards(
        folder,
        manifest,
        open_at,
        building={},
        url=bucket.url,
        unfinished=UNFINISHED in there,
        size=sum(there[entry.file].size for entry in manifest.shards),
    )


def is_bucket_store(url: str) -> bool:
    """Whether a store is at a URL: whether it has a manifest. Raises StoreError if that cannot be asked."""
    if not url.lower().startswith("s3://") or is_image_name(url):
        return False
    try:
        bucket = Bucket(url)
    except UsageError:
        return False  # a whole bucket, which holds stores or images
    return bucket.read(MANIFEST) is not None


def _reading_file(shard: str, etag: str) -> str:
    """The file of a shard's present version."""
    return f"{hashlib.sha256(etag.encode()).hexdigest()[:16]}-{shard}"


def _keep_manifest(folder: Path, content: bytes) -> Manifest:
    """A manifest as it is in the bucket, put into a mirror and checked."""
    with appearing(folder / MANIFEST, StoreError) as partial:
        partial.write_bytes(content)
    return read_manifest(folder)


def _mirror(bucket: Bucket, use: str) -> Path:
    """The folder in the cache for the objects of a bucket."""
    key = hashlib.sha256(bucket.url.encode()).hexdigest()[:32]
    folder = cache_folder() / "stores" / key / use
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"{bucket.url}: expected room for its shards in the cache, found that {folder} cannot be created: "
            f"{os_reason(error)}"
        ) from None
    return folder


@contextlib.contextmanager
def _named(folder: Path, bucket: Bucket) -> Iterator[None]:
    """Errors about a mirror, told of the bucket."""
    try:
        yield
    except SppFeatError as error:
        if str(folder) not in str(error):
            raise
        told = str(error).replace(f"{folder}{os.sep}", bucket.url).replace(str(folder), bucket.url)
        raise type(error)(told) from None


class Mirror:
    """The folder through which one run writes to a store in a bucket. Use it as a context, which locks it.

    path: the folder. overwrite: whether an older store may go. Errors that name the folder name the bucket instead.
    """

    def __init__(self, url: str, *, overwrite: bool = False) -> None:
        self.bucket = Bucket(url)
        self.path = _mirror(self.bucket, "writing")
        self._known = self.path.with_name("writing.json")
        self._overwrite = overwrite
        self._stack = contextlib.ExitStack()
        self.objects: dict[str, Object] = {}
        self.etags: dict[str, str] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_named(self.path, self.bucket))
            stack.enter_context(lock_store(self.path, folder=True))
            self._take_over()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)

    def put(self, name: str, content: Path | bytes, values: Values | None = None) -> None:
        """Put an object that nobody else has written since this run began, or wrote it."""
        self.etags[name] = self.bucket.put(name, content, replaces=self.etags.get(name), values=values)
        self._keep_known()

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        if self.etags.pop(name, None) is not None:
            self.bucket.remove(name)
            self._keep_known()

    @property
    def begun(self) -> bool:
        """Whether the bucket says so, by this run or one that was interrupted."""
        return UNFINISHED in self.etags

    def begin(self) -> None:
        """Say in the bucket that a run writes to the store."""
        if not self.begun:
            self.put(UNFINISHED, b"A run writes to this store, or was interrupted.\n")

    def _take_over(self) -> None:
        """Make the folder what the bucket has."""
        self.objects = self.bucket.list()
        shards = {name: found.etag for name, found in self.objects.items() if is_shard_file(name)}
        manifest = self.bucket.read(MANIFEST)
        if manifest is None and shards and not self._overwrite:
            raise StoreError(
                f"{self.path}: damaged: expected {MANIFEST} beside its {len(shards)} shards, found none; restore it, "
                "or use --overwrite to start over"
            )
        for path in self.path.glob(".*.partial"):
            path.unlink()  # of a run that was killed while it fetched
        if manifest is None:
            shards = {}
            (self.path / MANIFEST).unlink(missing_ok=True)
        else:
            _keep_manifest(self.path, manifest[0])
        known = self._read_known()
        for index in unlisted_shards(self.path, None):
            if shard_file(index) not in shards:
                (self.path / shard_file(index)).unlink()
        here = {name: known.get(name) for name in shards if (self.path / name).exists()}
        if here != shards:
            # Another machine went on: the images of shards under work here may be in shards of its own.
            for path in building_files(self.path).values():
                path.unlink()
        for name, etag in shards.items():
            if here.get(name) != etag:
                self.fetch_hollow(name, self.path / name, etag)
                # Its rows may be others than the manifest says, if the other run was killed before it said so.
                (self.path / publishing_file(shard_index(name))).touch()
        self.etags = shards | {name: self.objects[name].etag for name in (VIEW, UNFINISHED) if name in self.objects}
        if manifest is not None:
            self.etags[MANIFEST] = manifest[1]
        self._keep_known()

    def fetch_hollow(self, name: str, path: Path, etag: str) -> None:
        """Write the object of a shard to a file, with a hole for its descriptors."""
        left_out = self.bucket.fetch(name, path, etag, hollow=True)
        values = values_of(open_file(path, names=False))
        if left_out is None:
            make_hollow(path, values)
        elif left_out != values:
            path.unlink()
            raise StoreError(f"{path}: damaged: expected its descriptors at {left_out}, found them at {values}")

    def _read_known(self) -> dict[str, str]:
        try:
            content = self._known.read_bytes()
            return decode_document(content, dict[str, str], what=str(self._known), error=StoreError)
        except (OSError, StoreError):
            return {}  # then all is fetched anew

    def _keep_known(self) -> None:
        with appearing(self._known, StoreError) as partial:
            partial.write_bytes(msgspec.json.encode(self.etags))


class BucketFolder(Folder):
    """A folder store in a bucket, by its mirror."""

    def __init__(self, path: Path, manifest: Manifest, building: dict[int, Path], *, mirror: Mirror) -> None:
        super().__init__(path, manifest, building)
        self._mirror = mirror
        self._elsewhere = False
        # Shards under work that other machines have put into the bucket already.
        self._received: set[Path] = set()

    def clear(self) -> None:
        mirror = self._mirror
        if foreign := sorted(name for name in mirror.objects if not is_part_of_store(name)):
            raise StoreError(f"{self.path}: expected a store or nothing, found {foreign[0]!r} there")
        # The manifest first, as in a folder.
        for name in sorted(mirror.objects, key=lambda name: name != MANIFEST):
            mirror.bucket.remove(name)
        mirror.etags.clear()
        super().clear()

    def write(self, manifest: Manifest) -> None:
        super().write(manifest)
        self._mirror.put(MANIFEST, (self.path / MANIFEST).read_bytes())

    def place(self, shard: Store, final: Path) -> None:
        if shard.path in self._received:
            self._received.remove(shard.path)
            super().place(shard, final)
            return
        values = values_of(shard)
        self._mirror.put(final.name, shard.path, values)
        super().place(shard, final)
        make_hollow(final, values)

    def leave_to_others(self) -> None:
        """From now on other machines fill the shards; those under work here, which they cannot see, are dropped."""
        for path in self.building.values():
            path.unlink()
        self.building.clear()
        self._elsewhere = True

    def begin_shard(self, names: Sequence[str]) -> Store:
        store = super().begin_shard(names)
        if self._elsewhere:
            make_hollow(store.path, values_of(store))
        return open_file(store.path)

    def copy_shard(self, index: int, target: Path) -> None:
        if self._elsewhere:
            super().copy_shard(index, target)
            return
        name = self.shards[index].name
        self._mirror.bucket.fetch(name, target, self._mirror.etags[name])

    def remote(self, store: Store) -> RemoteShard:
        """A shard under work, for another machine to fill and to put into the bucket."""
        manifest = self.manifest
        file = shard_file(next(index for index, path in self.building.items() if path == store.path))
        etag = self._mirror.etags.get(file)
        return RemoteShard(
            url=self._mirror.bucket.url,
            file=file,
            etag=etag,
            names=tuple(store.names) if etag is None else (),
            recipe=self.recipe.to_json(),
            weights_sha256=manifest.weights_sha256,
            dim=manifest.dim,
            source_root=manifest.source_root,
        )

    def receive(self, remote: RemoteShard) -> Store | None:
        """The shard under work as another machine has put it into the bucket; None if it has not."""
        path = self.building[shard_index(remote.file)]
        there = self._mirror.bucket.list().get(remote.file)
        if there is None or there.etag == remote.etag:
            return None
        digests = np.array(open_file(path, names=False).name_digests)
        self._mirror.fetch_hollow(remote.file, path, there.etag)
        shard = open_file(path, names=False)
        if not np.array_equal(shard.name_digests, digests):
            raise StoreBusyError(f"{self.path / remote.file}: another run has written to this store meanwhile")
        self._mirror.etags[remote.file] = there.etag
        self._received.add(path)
        return shard

    def remove_if_empty(self) -> None:
        if not self.shards and not self.building:
            self._mirror.remove(MANIFEST)
        super().remove_if_empty()

    def begin(self) -> None:
        self._mirror.begin()
        super().begin()

    def end(self) -> None:
        super().end()
        self._mirror.remove(UNFINISHED)

    def write_view(self) -> None:
        if not self._mirror.begun:
            return  # nothing has changed
        super().write_view()
        view = self.path / VIEW
        if view.exists():
            self._mirror.put(VIEW, view)
        else:
            self._mirror.remove(VIEW)


@dataclass(frozen=True)
class RemoteShard:
    """A shard of a store in a bucket that another machine is to fill, and put there itself.

    url: of the store. file: of the shard; etag: its version if rows of a published one are described again.
    names: of a new one. recipe: as JSON.
    """

    url: str
    file: str
    etag: str | None
    names: tuple[str, ...]
    recipe: str
    weights_sha256: str
    dim: int
    source_root: str

    @contextlib.contextmanager
    def here(self) -> Iterator[Path]:
        """A file to fill, which is removed again."""
        bucket = Bucket(self.url)
        with tempfile.TemporaryDirectory(dir=_mirror(bucket, "filling")) as folder, _named(Path(folder), bucket):
            path = Path(folder) / self.file
            if self.etag is not None:
                bucket.fetch(self.file, path, self.etag)
            else:
                create_store(
                    path,
                    self.names,
                    recipe=Recipe.from_json(self.recipe),
                    weights_sha256=self.weights_sha256,
                    dim=self.dim,
                    source_root=self.source_root,
                )
            yield path

    def put(self, path: Path) -> str:
        """Publish the file, all of whose rows are described; returns its ETag."""
        values = values_of(open_file(path, names=False))
        return Bucket(self.url).put(self.file, path, replaces=self.etag, values=values)


def values_of(shard: Store) -> Values:
    """Where the descriptors are in a store file."""
    column = shard.columns["descriptors"]
    return Values(column.offset, column.row_bytes * column.shape[0])


def make_hollow(path: Path, values: Values) -> None:
    """Replace the descriptors of a store file by a hole, which takes no space. Raises StoreError."""
    with appearing(path, StoreError) as partial, open(path, "rb") as old, open(partial, "wb") as new:
        size = os.fstat(old.fileno()).st_size
        for start, end in ((0, values.offset), (sum(values), size)):
            old.seek(start)
            new.seek(start)
            for at in range(start, end, _BLOCK):
                new.write(old.read(min(_BLOCK, end - at)))
        new.truncate(size)
