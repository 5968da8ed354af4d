"""Joining stores of disjoint images into one folder, without copying shards on the same file system.

New shards appear in the folder first and are named in its manifest last, all at once: readers see the store as it was
or as it will be. After a kill the same command goes on: shards that are there already are recognized by their content.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from sppfeat.errors import StoreError, UsageError
from sppfeat.files import appearing, os_reason, sync_folder
from sppfeat.images import is_url
from sppfeat.store.digests import repeated_digests
from sppfeat.store.locking import lock_store
from sppfeat.store.manifest import (
    MANIFEST,
    SHARD_ROWS,
    Manifest,
    building_files,
    foreign_files,
    read_manifest,
    remove_marks,
    shard_file,
    write_manifest,
)
from sppfeat.store.reading import Store, open_file, open_shard, open_store, require_complete, shard_entry
from sppfeat.store.shards import Folder, copy_file, new_manifest, recovered_manifest
from sppfeat.store.unit_vectors import short_names
from sppfeat.store.writing import check_output

# What linking says where it cannot: another file system, one without links, another user's file, too many links.
_NO_LINK: Final = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

_SHOWN: Final = 3  # names in a message


@dataclass(frozen=True)
class Merged:
    """What `merge_stores` did.

    images, done, failed: rows of the whole store. shards: of the whole store. linked, copied: shards that were added.
    missing: numbers of the parts of a collection that are not merged yet; of: the number of its parts, if it has any.
    """

    store: str
    images: int
    done: int
    failed: int
    shards: int
    linked: int
    copied: int
    missing: list[int]
    of: int | None


@dataclass(frozen=True)
class _Shard:
    """A shard of a part. file: a single store, which may change in place later; so it is copied, never linked."""

    part: Path
    path: Path
    rows: int
    file: bool
    identity: bytes


def merge_stores(output: str | os.PathLike[str], parts: Sequence[str | os.PathLike[str]]) -> Merged:
    """Join finished stores, folders or files of at most SHARD_ROWS rows, into the folder store `output`.

    The folder is created, or holds what was merged before; the parts are not changed. Raises StoreError for parts of
    other recipes, weights or source roots, for unfinished ones, and for images that two of them have; then nothing is
    merged.
    """
    # The folder itself, not a link to it, as an extraction takes it; else as it was given, for messages.
    path = Path(os.path.realpath(output)) if os.path.islink(output) else Path(output)
    if not parts:
        raise UsageError("expected parts to merge, found none")
    for place in (output, *parts):
        if isinstance(place, str) and is_url(place):
            raise UsageError(f"{place}: expected folders that this machine has, found a URL; only those are merged")
    stores = [_open_part(Path(part)) for part in parts]
    _check_apart(path, stores)
    with lock_store(path, folder=True):
        incoming = [shard for store in stores for shard in _shards(store)]
        current, manifest = _target(path, stores[0], incoming)
        for store in stores:
            _check_same(stores[0].path if current is None else path, manifest, store)
        there = {_identity(open_shard(path, manifest, at)) for at in range(len(manifest.shards))}
        new = [shard for shard in incoming if shard.identity not in there]
        manifest = msgspec.structs.replace(manifest, merged=_all_parts(path, manifest, stores))
        _check_overlap(path, manifest, new)
        copied = 0
        for index, shard in enumerate(new, 1 + max((entry.index for entry in manifest.shards), default=-1)):
            final = path / shard_file(index)
            copied += _place(shard, final)
            manifest = manifest.with_shard(shard_entry(open_file(final, names=False)))
        if manifest != current:
            sync_folder(path)
            write_manifest(path, manifest)
        remove_marks(path)
        Folder(path, manifest, {}).finish()
    counts, have = manifest.counts(), {number for number, _ in manifest.merged}
    of = manifest.merged[0][1] if manifest.merged else None
    expected = range(of or 0) if 0 in have else range(1, (of or 0) + 1)
    return Merged(
        store=str(output),
        images=sum(counts.values()),
        done=counts["done"],
        failed=counts["failed"],
        shards=len(manifest.shards),
        linked=len(new) - copied,
        copied=copied,
        missing=sorted({*expected} - have),
        of=of,
    )


def _open_part(path: Path) -> Store:
    store = open_store(path)
    require_complete(store)
    if store.manifest is None and len(store) > SHARD_ROWS:
        raise StoreError(
            f"{path}: expected a folder of shards, or a file of at most {SHARD_ROWS} images, found a file of "
            f"{len(store)}; extract it again into a folder"
        )
    return store


def _check_apart(path: Path, stores: Sequence[Store]) -> None:
    """Raise UsageError for a part that is given twice, or is the output."""
    seen = {Path(os.path.realpath(path)): "the output"}
    for store in stores:
        real = Path(os.path.realpath(store.path))
        if real in seen:
            raise UsageError(f"{store.path}: expected a part of its own, found that it is also {seen[real]}")
        seen[real] = f"given as {store.path}"


def _all_parts(path: Path, manifest: Manifest, stores: Sequence[Store]) -> list[tuple[int, int]]:
    """The numbers of the parts merged before and now. Raises StoreError unless they are of one collection."""
    owner = {part: path for part in manifest.merged}
    given: dict[tuple[int, int], Path] = {}
    for store in stores:
        if store.manifest is None:
            continue
        if (part := store.manifest.part) is not None:
            if part in given:
                raise StoreError(f"{store.path}: is part {part[0]} of {part[1]}, and so is {given[part]}")
            given[part] = store.path
            owner[part] = store.path
        for before in store.manifest.merged:
            owner[before] = store.path
    counts = {count: holder for (_, count), holder in owner.items()}
    if len(counts) > 1:
        (one, first), (other, second), *_ = counts.items()
        raise StoreError(f"{second}: expected a part of {one}, as {first} is, found a part of {other}")
    return sorted(owner)


def _check_same(path: Path, manifest: Manifest, store: Store) -> None:
    """Raise StoreError for a store whose rows cannot be among those of a folder."""
    weights, dims = (manifest.weights_sha256, store.weights_sha256), (manifest.dim, store.dim)
    names, recipe = short_names(str(path), store.place), manifest.read_recipe()
    differences = recipe.differences(store.recipe, names, weights=weights, dims=dims)
    if manifest.recipe_hash != store.recipe_hash or differences:
        what = "; ".join(differences) or "recipe_hash"
        raise StoreError(f"{store.path}: was made with another recipe than {path} ({what}); nothing is merged")
    if manifest.source_root != store.source_root:
        raise StoreError(
            f"{store.path}: expected images below {manifest.source_root}, as in {path}, found images below "
            f"{store.source_root}; nothing is merged"
        )


def _shards(store: Store) -> Iterator[_Shard]:
    if store.manifest is None:
        yield _Shard(store.path, store.path, len(store), True, _identity(store))
        return
    for at, entry in enumerate(store.manifest.shards):
        identity = _identity(open_shard(store.path, store.manifest, at))
        yield _Shard(store.path, store.path / entry.file, entry.rows, False, identity)


def _identity(shard: Store) -> bytes:
    """What two shards with the same rows have in common: names, states and values."""
    digest = hashlib.blake2b(digest_size=16)
    for column in (shard.name_digests, shard.states, shard.checksum):
        digest.update(np.ascontiguousarray(column).data)
    return digest.digest()


def _target(path: Path, first: Store, incoming: Sequence[_Shard]) -> tuple[Manifest | None, Manifest]:
    """The output's manifest, None if it has none yet, and the manifest with the shards that a killed merge placed."""
    if (path / MANIFEST).exists():
        check_output(path, overwrite=False, resume=True)
        store = open_store(path)
        require_complete(store)
        current = read_manifest(path)
        return current, recovered_manifest(path, current)
    if foreign := foreign_files(path) or [file.name for file in building_files(path).values()]:
        raise StoreError(
            f"{path}: expected a store or an empty folder, found {foreign[0]!r} in it; it is left as it is"
        )
    manifest = new_manifest(
        recipe=first.recipe,
        weights_sha256=first.weights_sha256,
        dim=first.dim,
        source_root=first.source_root,
        part=None,
    )
    recovered = recovered_manifest(path, manifest)
    known = {shard.identity for shard in incoming}
    for at, entry in enumerate(recovered.shards):
        if _identity(open_shard(path, recovered, at)) not in known:
            raise StoreError(
                f"{path}: expected a store or an empty folder, found {entry.file} without a {MANIFEST}, which "
                "none of the parts has; it is left as it is"
            )
    return None, recovered


def _check_overlap(path: Path, manifest: Manifest, new: Sequence[_Shard]) -> None:
    """Raise StoreError for images that are in two shards, or twice in one, of the folder and those that are new."""
    holders = [(path, path / entry.file, entry.rows) for entry in manifest.shards]
    holders += [(shard.part, shard.path, shard.rows) for shard in new]
    ends = np.cumsum([rows for *_, rows in holders])

    def blocks() -> Iterator[np.ndarray]:
        for _, file, _ in holders:
            yield np.asarray(open_file(file, names=False).name_digests)

    def part(row: int) -> Path:
        return holders[int(np.searchsorted(ends, row, "right"))][0]

    def name(row: int) -> str:
        at = int(np.searchsorted(ends, row, "right"))
        _, file, rows = holders[at]
        return repr(open_file(file, names=False).names[row - int(ends[at]) + rows])

    repeated = repeated_digests(blocks)
    if (first := next(repeated, None)) is None:
        return
    one, other = map(part, first)
    shown, count = [first[1]], 1
    for before, row in repeated:
        if (part(before), part(row)) == (one, other):
            count += 1
            if len(shown) < _SHOWN:
                shown.append(row)
    where = "twice in it" if one == other else f"also in {one}"
    raise StoreError(
        f"{other}: expected images that no other part has, found {count} that are {where}, such as "
        f"{', '.join(map(name, sorted(shown)))}; nothing is merged"
    )


def _place(shard: _Shard, final: Path) -> bool:
    """Link a shard into the folder, or copy it where that cannot be done; returns whether it was copied."""
    if not shard.file:
        try:
            os.link(os.path.realpath(shard.path), final)
            return False
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise StoreError(f"{final}: cannot be linked to {shard.path}: {os_reason(error)}") from None
    with appearing(final, StoreError) as partial:
        copy_file(shard.path, partial)
        if _identity(open_file(partial, names=False)) != shard.identity:
            raise StoreError(f"{shard.path}: changed while it was copied; merge again")
    return True
