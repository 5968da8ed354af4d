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
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec
import numpy as np

from sppfeat.errors import SppFeatError, StoreError, UsageError
from sppfeat.files import appearing, cache_folder, decode_document, os_reason, partial_path
from sppfeat.images import is_image_name
from sppfeat.recipe import Recipe
from sppfeat.store.buckets import Bucket, Object
from sppfeat.store.hollow import make_hollow, values_of
from sppfeat.store.locking import lock_store
from sppfeat.store.manifest import (
    MANIFEST,
    UNFINISHED,
    VIEW,
    Manifest,
    building_file,
    building_files,
    is_part_of_store,
    is_shard_file,
    parse_manifest,
    publishing_file,
    shard_file,
    shard_index,
    unlisted_shards,
)
from sppfeat.store.reading import Store, check_shard, join_shards, open_file
from sppfeat.store.shards import Folder
from sppfeat.store.writing import create_store

_READING: Final = re.compile(r"[0-9a-f]{16}-shard-\d{5,9}\.h5", re.ASCII)
# A file that is being fetched is written to more often: each request has a minute, and some tries.
_DEAD_SECONDS: Final = 3600
_LOOKS: Final = 10


def open_bucket(url: str) -> Store:
    """Open a store in a bucket, such as s3://bucket/feats/, for reading.

    Raises StoreError if it is not an intact store; for a damaged shard, when that shard is first read.
    """
    bucket = Bucket(url)
    folder = _mirror(bucket, "reading")
    there, content = _look(bucket)
    if content is None:
        raise StoreError(f"{bucket.url}: expected a store, found no {MANIFEST} there")
    manifest = parse_manifest(content, bucket.url + MANIFEST)
    for entry in manifest.shards:
        if entry.file not in there:
            raise StoreError(
                f"{bucket.url}: damaged: its manifest names {entry.file} with {entry.rows} rows, found no such object"
            )
    kept = {entry.file: folder / _reading_file(entry.file, there[entry.file].etag) for entry in manifest.shards}
    for path in {path for path in folder.iterdir() if _READING.fullmatch(path.name)} - set(kept.values()):
        path.unlink(missing_ok=True)  # replaced since
    for path in folder.glob(".*.partial"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _DEAD_SECONDS:
                path.unlink()  # of a reader that was killed

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


def _look(bucket: Bucket) -> tuple[dict[str, Object], bytes | None]:
    """The objects and the content of the manifest, if there is one, as they were at one moment."""
    for _ in range(_LOOKS):
        there, found = bucket.list(), bucket.read(MANIFEST)
        # Otherwise a run went on in between.
        if (None if found is None else found[1]) == (there[MANIFEST].etag if MANIFEST in there else None):
            return there, None if found is None else found[0]
    raise StoreError(f"{bucket.url}{MANIFEST}: changed while it was read; run the command again")


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
        # There while other machines fill shards: then those under work here are without descriptors.
        self._lent = self.path.with_name("lent")
        self._overwrite = overwrite
        self._stack = contextlib.ExitStack()
        # The ETag of this run's own mark.
        self._mark: str | None = None
        self.objects: dict[str, Object] = {}
        self.etags: dict[str, str] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_named(self.path, self.bucket))
            stack.enter_context(lock_store(self.path, folder=True))
            try:
                self._take_over()
            except OSError as error:
                raise StoreError(f"{self.path}: cannot be kept in the cache: {os_reason(error)}") from None
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)

    def put(self, name: str, content: Path | bytes) -> None:
        """Put an object that nobody else has written since this run began, or wrote it."""
        self.keep(name, self.bucket.put(name, content, replaces=self.etags.get(name)))

    def keep(self, name: str, etag: str) -> None:
        """Remember that this is the object as it is here."""
        self.etags[name] = etag
        self._keep_known()

    def remove(self, name: str) -> None:
        """Remove an object, if it is there and nobody else has written it since."""
        etag = self.etags.pop(name, None)
        if etag is not None and self._has(name, etag):
            self.bucket.remove(name)
        self._keep_known()

    @property
    def begun(self) -> bool:
        """Whether the bucket says so, by this run or one that was interrupted."""
        return UNFINISHED in self.etags

    def begin(self) -> None:
        """Say in the bucket that this run writes to the store. Raises StoreBusyError if another has begun since."""
        if self._mark is None:
            run = uuid.uuid4().hex  # so that no two marks have one ETag
            self.put(UNFINISHED, f"A run writes to this store, or was interrupted: {run}\n".encode())
            self._mark = self.etags[UNFINISHED]
        elif (found := self.bucket.read(UNFINISHED)) is None or found[1] != self._mark:
            raise self.bucket.busy(UNFINISHED)

    def end(self) -> None:
        """Say that the store is finished, unless another run has begun, or has gone on, since."""
        if self.begun and self._has(MANIFEST, self.etags.get(MANIFEST)):
            self.remove(UNFINISHED)
        self._mark = None

    def lend(self) -> None:
        """Other machines fill the shards from now on."""
        with appearing(self._lent, StoreError) as partial:
            partial.touch()

    def _has(self, name: str, etag: str | None) -> bool:
        there = self.bucket.list().get(name)
        return etag == (None if there is None else there.etag)

    def _take_over(self) -> None:
        """Make the folder what the bucket has."""
        self.objects, manifest = _look(self.bucket)
        shards = {name: found.etag for name, found in self.objects.items() if is_shard_file(name)}
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
            parse_manifest(manifest, self.bucket.url + MANIFEST)
            with appearing(self.path / MANIFEST, StoreError) as partial:
                partial.write_bytes(manifest)
        known = self._read_known()
        for index in unlisted_shards(self.path, None):
            if shard_file(index) not in shards:
                (self.path / shard_file(index)).unlink()
        here = {name: known.get(name) for name in shards if (self.path / name).exists()}
        if here != shards or self._lent.exists():
            # Another machine went on: the images of shards under work here may be in shards of its own.
            for path in building_files(self.path).values():
                path.unlink()
            self._lent.unlink(missing_ok=True)
        for name, etag in shards.items():
            if here.get(name) != etag:
                self.fetch_hollow(name, self.path / name, etag)
                # Its rows may be others than the manifest says, if the other run was killed before it said so.
                (self.path / publishing_file(shard_index(name))).touch()
        others = (MANIFEST, VIEW, UNFINISHED)
        self.etags = shards | {name: self.objects[name].etag for name in others if name in self.objects}
        if self.begun:
            (self.path / UNFINISHED).touch()
        else:
            (self.path / UNFINISHED).unlink(missing_ok=True)
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
        # Shards under work that other machines have put into the bucket already, and their ETags.
        self._received: dict[Path, str] = {}

    def clear(self) -> None:
        mirror = self._mirror
        if foreign := sorted(name for name in mirror.objects if not is_part_of_store(name)):
            raise StoreError(f"{self.path}: expected a store or nothing, found {foreign[0]!r} there")
        mirror.begin()
        # The manifest first, as in a folder.
        for name in sorted(mirror.objects.keys() - {UNFINISHED}, key=lambda name: name != MANIFEST):
            mirror.bucket.remove(name)
            mirror.etags.pop(name, None)
        super().clear()

    def recover(self) -> None:
        for index in unlisted_shards(self.path, self.manifest):
            if self._is_repeated(index):
                # Of a run that was overtaken: no manifest of it can follow. Its images are described or will be.
                self.begin()
                self._mirror.remove(shard_file(index))
                (self.path / shard_file(index)).unlink()
                (self.path / publishing_file(index)).unlink(missing_ok=True)
        super().recover()

    def _is_repeated(self, index: int) -> bool:
        """Whether an image of an unlisted shard is in a shard of the manifest, or in an unlisted one before it."""
        listed = [entry.index for entry in self.manifest.shards]
        before = [number for number in unlisted_shards(self.path, self.manifest) if number < index]
        own = self._words(index)
        return any(bool(np.isin(own, self._words(number)).any()) for number in (*listed, *before))

    def _words(self, index: int) -> np.ndarray:
        """[n] uint64, half of each digest: a shard that is dropped for two names with one is described again."""
        return np.asarray(open_file(self.path / shard_file(index), names=False).name_digests)[:, 0]

    def write(self, manifest: Manifest) -> None:
        super().write(manifest)
        self._mirror.put(MANIFEST, (self.path / MANIFEST).read_bytes())

    def place(self, shard: Store, final: Path) -> None:
        etag = self._received.pop(shard.path, None)
        if etag is not None:
            super().place(shard, final)
        elif self._elsewhere:
            raise StoreError(f"{shard.path}: expected a shard that a worker has put into the bucket, found none")
        else:
            values = values_of(shard)
            before = self._mirror.etags.get(final.name)
            etag = self._mirror.bucket.put(final.name, shard.path, replaces=before, values=values)
            super().place(shard, final)
            make_hollow(final, values)
        # Only now: after a kill before, the file here is another than the object.
        self._mirror.keep(final.name, etag)

    @contextlib.contextmanager
    def whole_shard(self, index: int) -> Iterator[Path]:
        whole = partial_path(self.path / building_file(index))
        try:
            self.copy_shard(index, whole)
            yield whole
        finally:
            whole.unlink(missing_ok=True)

    def drop(self, final: Path) -> None:
        self._mirror.remove(final.name)
        super().drop(final)

    def leave_to_others(self) -> None:
        """From now on other machines fill the shards; those under work here, which they cannot see, are dropped."""
        for path in self.building.values():
            path.unlink()
        self.building.clear()
        self._mirror.lend()
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
            raise self._mirror.bucket.busy(remote.file)
        self._received[path] = there.etag
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
        self._mirror.end()

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

    def put(self, path: Path) -> None:
        """Publish the file, all of whose rows are described."""
        values = values_of(open_file(path, names=False))
        Bucket(self.url).put(self.file, path, replaces=self.etag, values=values)
