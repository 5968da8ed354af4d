"""The manifest of a folder store, and the names of the folder's files.

manifest.json        what the store is made with, and its shards; replaced atomically, so it is always the truth
shard-00000.h5       a published shard: a store file of at most SHARD_ROWS rows, none of them pending
.building-00007.h5   a shard under work: of new rows, or a copy of a published one in which some rows change
.publishing-00007    that shard is being renamed to shard-00007.h5, or the manifest does not say so yet
all.h5               an HDF5 virtual dataset over the shards, for other programs
.unfinished          a run writes to the store, or ended before all its images were described
.lock                held by the one writer
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from sppfeat.errors import StoreError, UsageError
from sppfeat.files import STORE, appearing, decode_document, os_reason
from sppfeat.images import found_instead
from sppfeat.recipe import Recipe

MANIFEST: Final = "manifest.json"
VIEW: Final = "all.h5"
LOCK: Final = ".lock"
UNFINISHED: Final = ".unfinished"
# A shard of 65,536 rows is some 100 MB to 2 GB: few enough files for 10^8 rows, and little work to lose.
SHARD_ROWS: Final = 1 << 16
MANIFEST_VERSION: Final = 1
_NUMBER: Final = r"(\d{5}|[1-9]\d{5,8})"
_SHARD: Final = re.compile(rf"shard-{_NUMBER}\.h5", re.ASCII)
_BUILDING: Final = re.compile(rf"\.building-{_NUMBER}\.h5", re.ASCII)
_PUBLISHING: Final = re.compile(rf"\.publishing-{_NUMBER}", re.ASCII)
# What a killed writer may leave: see `files.appearing`.
_LEFT: Final = re.compile(
    rf"\.(manifest\.json|all\.h5|{_SHARD.pattern}|{_BUILDING.pattern})\.(partial|writable)", re.ASCII
)

Rows = Annotated[int, msgspec.Meta(ge=0, le=SHARD_ROWS)]


class _Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of `manifest.json`: exactly these keys."""


class ShardEntry(_Document, frozen=True):
    """A published shard: its file in the folder, and its rows by state."""

    file: str
    rows: Rows
    done: Rows
    failed: Rows

    @property
    def index(self) -> int:
        """The number of the shard."""
        return shard_index(self.file)


class Manifest(_Document, frozen=True, kw_only=True, omit_defaults=True):
    """The contents of `manifest.json`.

    recipe: see `Recipe.from_json`. source_root: bytes that are not UTF-8 as lone surrogates, as Python has them.
    part: the part i of n of the images that this store describes. merged: the parts that were merged into it.
    shards: in the order of their numbers, which is the order of the rows.
    """

    format: str
    format_version: int
    dim: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]
    recipe: dict[str, Any]
    recipe_hash: str
    weights_sha256: str
    source_root: str
    versions: dict[str, str]
    part: tuple[int, int] | None
    merged: list[tuple[int, int]] = []
    shards: list[ShardEntry]

    def read_recipe(self) -> Recipe:
        """The recipe, checked."""
        return Recipe.from_json(json.dumps(self.recipe))

    def counts(self) -> dict[str, int]:
        """Rows of the published shards by state: pending, done, failed."""
        return {
            "pending": 0,
            "done": sum(entry.done for entry in self.shards),
            "failed": sum(entry.failed for entry in self.shards),
        }

    def with_shard(self, entry: ShardEntry) -> Manifest:
        """The manifest with a shard added or replaced."""
        shards = {one.index: one for one in self.shards} | {entry.index: entry}
        return msgspec.structs.replace(self, shards=[shards[index] for index in sorted(shards)])

    def without_shard(self, index: int) -> Manifest:
        """The manifest without a shard."""
        return msgspec.structs.replace(self, shards=[one for one in self.shards if one.index != index])


class _Version(msgspec.Struct):
    format: str
    format_version: int


def shard_file(index: int) -> str:
    """The file of a published shard."""
    return f"shard-{index:05}.h5"


def building_file(index: int) -> str:
    """The file of a shard under work."""
    return f".building-{index:05}.h5"


def publishing_file(index: int) -> str:
    """The mark of a shard that is being published."""
    return f".publishing-{index:05}"


def is_shard(path: Path) -> bool:
    """Whether a path is that of a shard in a folder store."""
    named = _SHARD.fullmatch(path.name) or _BUILDING.fullmatch(path.name)
    return named is not None and (path.parent / MANIFEST).exists()


def is_shard_file(name: str) -> bool:
    """Whether a file name is that of a published shard."""
    return _SHARD.fullmatch(name) is not None


def shard_index(file: str) -> int:
    """The number of a published shard's file."""
    match = _SHARD.fullmatch(file)
    if match is None:
        raise ValueError(f"expected a name such as {shard_file(0)}, found {file!r}")
    return int(match[1])


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder. Raises StoreError unless it is one of a store, consistent, and no newer than this."""
    path = folder / MANIFEST
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except FileNotFoundError:
        found = found_instead(folder, STORE) or f"a folder without {MANIFEST}"
        raise StoreError(f"{folder}: expected a store, found {found}") from None
    except OSError as error:
        raise StoreError(f"{path}: could not be read: {os_reason(error)}") from None


def parse_manifest(content: bytes, path: str) -> Manifest:
    """The manifest in a file or object, which errors name by its path; raises them as `read_manifest` does."""
    what = f"{path}: damaged: expected the manifest of a store"
    about = decode_document(content, _Version, what=what, error=StoreError, lenient=True)
    if about.format != STORE:
        raise StoreError(f"{path}: expected the manifest of a store (format {STORE!r}), found {about.format!r}")
    if about.format_version > MANIFEST_VERSION:
        raise StoreError(
            f"{path}: format {about.format_version} is newer than this sppfeat reads ({MANIFEST_VERSION}): "
            "update sppfeat"
        )
    found = decode_document(content, Manifest, what=what, error=StoreError, lenient=True)
    try:
        for fault in _faults(found):
            raise StoreError(f"{what}, found: {fault}")
    except (UsageError, ValueError) as error:
        raise StoreError(f"{what}, found: {error}") from None
    return found


def _faults(manifest: Manifest) -> Iterator[str]:
    indices = [entry.index for entry in manifest.shards]
    if indices != sorted(set(indices)):
        yield "shards that are repeated, or not in order"
    for entry in manifest.shards:
        if not entry.rows or entry.done + entry.failed != entry.rows:
            yield f"{entry.file} with {entry.rows} rows, {entry.done} of them done and {entry.failed} failed"
    for number, count in [*manifest.merged, *([manifest.part] if manifest.part else [])]:
        if not 0 <= number <= count or count < 1:
            yield f"part {number} of {count}"
    if "\0" in manifest.source_root:
        yield "a source_root with a NUL byte"
    os.fsencode(manifest.source_root)
    if manifest.recipe_hash != manifest.read_recipe().identity(manifest.weights_sha256):
        yield "a recipe_hash of another recipe or other weights"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest atomically. Raises StoreError."""
    with appearing(folder / MANIFEST, StoreError) as partial:
        # Python's json, because msgspec writes no lone surrogates.
        partial.write_text(json.dumps(msgspec.to_builtins(manifest), indent=1) + "\n", "ascii")


def building_files(folder: Path) -> dict[int, Path]:
    """The shards under work, by number."""
    found = {}
    for name in os.listdir(folder):
        match = _BUILDING.fullmatch(name)
        if match is not None:
            found[int(match[1])] = folder / name
    return dict(sorted(found.items()))


def publishing_shards(folder: Path) -> list[int]:
    """Numbers of the shards that are being published, or were when their writer was killed."""
    found = [match for name in os.listdir(folder) if (match := _PUBLISHING.fullmatch(name)) is not None]
    return sorted(int(match[1]) for match in found)


def remove_marks(folder: Path) -> None:
    """Remove the marks of shards that were published, once the manifest names them. Hold the folder's lock."""
    for index in publishing_shards(folder):
        (folder / publishing_file(index)).unlink(missing_ok=True)


def unlisted_shards(folder: Path, manifest: Manifest | None) -> list[int]:
    """Numbers of the shards that the manifest does not name."""
    known = set() if manifest is None else {entry.file for entry in manifest.shards}
    found = []
    for name in set(os.listdir(folder)) - known:
        match = _SHARD.fullmatch(name)
        if match is not None:
            found.append(int(match[1]))
    return sorted(found)


def remove_leftovers(folder: Path) -> None:
    """Remove the partial files of killed writers. Hold the folder's lock."""
    for name in os.listdir(folder):
        if _LEFT.fullmatch(name):
            (folder / name).unlink(missing_ok=True)


def foreign_files(folder: Path) -> list[str]:
    """What is in a folder and not a part of a store, in order."""
    return sorted(name for name in os.listdir(folder) if not is_part_of_store(name))


def is_part_of_store(name: str) -> bool:
    """Whether a file or object of this name in a folder store is one of the store's own."""
    kinds = (_SHARD, _BUILDING, _PUBLISHING, _LEFT)
    return name in (MANIFEST, VIEW, LOCK, UNFINISHED) or any(kind.fullmatch(name) for kind in kinds)
