"""Archives of images, of any kind: their members as items, and the way back from an item's name."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from sppfeat.errors import ImageError, MissingExtraError
from sppfeat.images.blobs import Blob
from sppfeat.images.items import Content, Item
from sppfeat.images.members import REST, Member, MemberNames
from sppfeat.images.parquet_files import (
    DEFAULT_COLUMNS,
    PARQUET_EXTENSIONS,
    Columns,
    ParquetRow,
    has_one_column,
    parquet_members,
)
from sppfeat.images.remote import UrlFile
from sppfeat.images.tar_files import TAR_EXTENSIONS, TarMember, tar_members
from sppfeat.images.urls import url_path
from sppfeat.images.zip_files import ZIP_EXTENSIONS, ZipMember, zip_members

ARCHIVE_EXTENSIONS: Final = frozenset({*TAR_EXTENSIONS, *ZIP_EXTENSIONS, *PARQUET_EXTENSIONS})
# Behind the extension there may be the query of a URL, see `url_path`.
_WITHIN: Final = re.compile(rf"(?i:{'|'.join(map(re.escape, sorted(ARCHIVE_EXTENSIONS)))})(?:[?#][^/]*)?(?=/)")
_Kinds = TarMember | ZipMember | ParquetRow | UrlFile


def is_archive(place: str) -> bool:
    """Whether a path or URL names an archive, by its extension."""
    return url_path(place).lower().endswith(tuple(ARCHIVE_EXTENSIONS))


def archive_items(root: str, name: str, place: str, columns: Columns, unread: Counter[str]) -> Iterator[Item]:
    """The images of an archive in its order. name: of the archive, relative to `root`; members are named below it.
    unread: see `count_unread`.

    What cannot be listed is one item with a problem. Raises UsageError for columns that a parquet file does not have.
    """
    names = MemberNames()
    for member in _members(place, columns, unread):
        own = names.name(member.name) if member.name != REST else REST
        yield Item(root, f"{name}/{own}", problem=member.problem, content=member.content)


def _members(place: str, columns: Columns, unread: Counter[str]) -> Iterator[Member]:
    try:
        archive = Blob.at(place)
    except ImageError as error:
        yield Member(REST, problem=str(error))
        return
    if _is_parquet(place):
        yield from parquet_members(archive, columns)
    elif url_path(place).lower().endswith(tuple(ZIP_EXTENSIONS)):
        yield from zip_members(archive, unread)
    else:
        yield from tar_members(archive, unread)


def _is_parquet(place: str) -> bool:
    return url_path(place).lower().endswith(tuple(PARQUET_EXTENSIONS))


def places_within(name: str) -> Iterator[str]:
    """The beginnings of an image's name that name an archive, the shortest first."""
    for match in _WITHIN.finditer(name):
        yield name[: match.end()]


def member_at(root: str, archive: str, place: str, name: str) -> Item | None:
    """The item of a name in an archive; None if there is none. archive: its name. place: its path or URL."""
    try:
        blob = Blob.at(place)
        if _is_parquet(place) and not has_one_column(blob):
            return Item(root, name, problem="its archive has several columns of images, or none")
        content = _index(blob).get(name[len(archive) + 1 :])
    except (ImageError, MissingExtraError) as error:
        return Item(root, name, problem=str(error))
    return None if content is None else Item(root, name, content=content)


@functools.lru_cache(maxsize=2)
def _index(archive: Blob) -> dict[str, Content]:
    """The contents of an archive by the names of its members; built where single members are looked up."""
    items = archive_items("", "", archive.place, DEFAULT_COLUMNS, Counter())
    return {item.name[1:]: item.content for item in items if item.content is not None}


def to_builtins(content: Content | None) -> Any:
    """A content as what JSON can hold, for another process."""
    return msgspec.to_builtins(content)


def from_builtins(told: Any) -> Content | None:
    """The content that `to_builtins` made this of."""
    found: Content | None = msgspec.convert(told, type=_Kinds | None)
    return found
