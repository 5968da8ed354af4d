"""What `gallery.json` says of a gallery: exactly these keys."""

from __future__ import annotations

from typing import Annotated

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class _Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of `gallery.json`: exactly these keys."""


class FileEntry(_Document, frozen=True):
    """A file of the gallery as written: its name in the folder, length and CRC-32."""

    file: str
    bytes: Count
    crc32: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class AddedEntries(_Document, frozen=True, omit_defaults=True):
    """The files of the rows that were added and have not joined the base, and their number."""

    count: Annotated[int, msgspec.Meta(ge=1, le=1 << 48)]
    index: FileEntry
    rows: FileEntry
    bins: FileEntry | None = None
    regions: FileEntry | None = None


class FileEntries(_Document, frozen=True, omit_defaults=True):
    """All files of a gallery: of the base, what was learned once, of added rows, and the map of all rows."""

    index: FileEntry
    rows: FileEntry
    projection: FileEntry | None = None
    channels: FileEntry | None = None
    bins: FileEntry | None = None
    regions: FileEntry | None = None
    map: FileEntry | None = None
    added: AddedEntries | None = None


class IndexEntry(_Document, frozen=True):
    """How the index was made. recall: of 10 neighbors, when it was built, 0 to 1."""

    factory: str
    why: str
    effort: dict[str, int]
    recall: Share | None = msgspec.field(name="recall@10")


class ProjectionEntry(_Document, frozen=True):
    """Facts about a projection; see `Projection`."""

    dim: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]
    kept: Share
    power: Share
    shrinkage: Share
    learned_from: str
    rows: Count
    route: str


class BinsEntry(_Document, frozen=True):
    """Facts about bins. dim: values kept of each. whitened: values of a whitened cell. bytes: of an image's bins."""

    dim: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]
    whitened: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]
    bytes: Count


class SourceEntry(_Document, frozen=True):
    """A store that rows came from; paths as `path_text` gives them. fingerprint: CRC-32 of its rows' checksums."""

    store: str
    source_root: str
    rows: Count
    fingerprint: Count


class About(_Document, frozen=True):
    """The contents of `gallery.json`. rows, dim: of descriptors, before projection. recipe: see `Recipe.from_json`."""

    format: str
    format_version: int
    rows: Annotated[int, msgspec.Meta(ge=1, le=1 << 48)]
    dim: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]
    recipe: msgspec.Raw
    recipe_hash: str
    weights_sha256: str
    index: IndexEntry
    projection: ProjectionEntry | None
    sources: list[SourceEntry]
    generation: Count
    files: FileEntries
    versions: dict[str, str]
    bins: BinsEntry | None = None

    @property
    def base_rows(self) -> int:
        """The number of rows of the base; those after it were added later."""
        return self.rows if self.files.added is None else self.rows - self.files.added.count

    @property
    def row_state(self) -> str:
        """A text that changes with the rows alone, also where another gallery replaced this one."""
        kept = [self.files.rows, *([] if self.files.added is None else [self.files.added.rows])]
        return "-".join(f"{entry.crc32:08x}" for entry in kept)

    @property
    def index_bytes(self) -> int:
        """The size of the index, that of added rows included."""
        return self.files.index.bytes + (0 if self.files.added is None else self.files.added.index.bytes)

    @property
    def entries(self) -> list[FileEntry]:
        """All files of the gallery except this one."""
        kept, added = self.files, self.files.added
        entries = [kept.index, kept.rows, kept.projection, kept.channels, kept.bins, kept.regions, kept.map]
        entries += [] if added is None else [added.index, added.rows, added.bins, added.regions]
        return [entry for entry in entries if entry is not None]


class Version(msgspec.Struct):
    """What is read first of a description: the version of its format."""

    format_version: int
