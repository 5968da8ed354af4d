"""Sources of images: folders, files, lists, archives and URLs, as streams of items in a stable order."""

from __future__ import annotations

import codecs
import functools
import io
import itertools
import os
import re
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO, Final

from sppfeat.errors import ImageError, UsageError, near_path
from sppfeat.images.archives import ARCHIVE_EXTENSIONS, archive_items, is_archive, member_at, places_within
from sppfeat.images.blobs import Blob
from sppfeat.images.extent import Extent
from sppfeat.images.items import (
    EXTENSIONS,
    Item,
    count_unread,
    is_image_name,
    name_to_path,
    path_to_name,
)
from sppfeat.images.members import REST
from sppfeat.images.parquet_files import DEFAULT_COLUMNS, Columns
from sppfeat.images.remote import UrlFile
from sppfeat.images.urls import (
    PROTOCOLS,
    absolute,
    check_protocol,
    is_url,
    leads_out,
    protocol_of,
    unknown_protocol,
    url_path,
    walk_url,
)
from sppfeat.images.walking import Found, walk

LIST_EXTENSIONS: Final = frozenset({".txt", ".lst"})
MAX_RANGE: Final = 1_000_000
_RANGE: Final = re.compile(r"\{(\d{1,12})\.\.(\d{1,12})\}")


class Sources:
    """The images of sources as a stream of items, which can be iterated again and holds no list of them.

    Iterating twice gives the same order. The same name may come twice, where sources overlap or a list repeats a line:
    who keeps rows by name leaves out the second. root: the folder or URL that names are relative to. extent: what was
    listed, known once the stream has come to its end; before, nothing.
    Iterating raises UsageError for what only reading shows: a prefix that cannot be listed, a parquet file without the
    columns, a list that changed meanwhile.
    """

    def __init__(self, sources: Sequence[_Source], root: str, columns: Columns) -> None:
        self.root = root
        self.extent = Extent(root)
        self._sources = sources
        self._columns = columns
        self._prefix = root if root.endswith("/") else root + "/"

    def prefixes(self) -> Iterator[str]:
        """What the names begin with of everything below the folders, prefixes and archives among the sources."""
        for source in self._sources:
            if (place := source.whole()) is not None:
                yield self._start(place)

    def _start(self, place: str) -> str:
        """What the names begin with of everything below a place."""
        return "" if place == self.root else path_to_name(place.removeprefix(self._prefix)) + "/"

    def __iter__(self) -> Iterator[Item]:
        self.extent = Extent(self.root)
        unlisted = []
        for source in self._sources:
            sound = cut = False
            source.unread.clear()
            for item in self._items(source):
                sound = sound or item.problem is None
                cut = cut or (item.problem is not None and item.name.endswith(f"/{REST}"))
                yield item
            if (place := source.whole()) is not None and (cut or not sound):
                unlisted.append(self._start(place))
        unread = sum((source.unread for source in self._sources), Counter[str]())
        self.extent = Extent(self.root, tuple(self.prefixes()), tuple(unlisted), tuple(sorted(unread.items())))

    def _items(self, source: _Source) -> Iterator[Item]:
        for found in source:
            if not found.place.startswith(self._prefix):  # a list that changed after its root was found
                raise UsageError(f"{found.place}: expected a path below the root {self.root}")
            name = path_to_name(found.place.removeprefix(self._prefix))
            if is_url(found.place):
                name = "/".join("\\x2e." if part == ".." else part for part in name.split("/"))
            if found.problem is not None:
                yield Item(self.root, name, problem=found.problem)
            elif is_archive(found.place):
                yield from archive_items(self.root, name, found.place, self._columns, source.unread)
            elif is_url(found.place):
                content = UrlFile(found.place, *(found.fingerprint or ()))
                yield Item(self.root, name, content=content)
            else:
                yield Item(self.root, name)


@dataclass(frozen=True)
class ImageList:
    """The images of sources, in a stable order, with unique names relative to `root`.

    repeated: how many listed paths were left out because they name a file already listed. extent: what was listed.
    """

    root: str
    items: list[Item]
    repeated: int
    extent: Extent | None = None

    @property
    def names(self) -> list[str]:
        """The names of all items."""
        return [item.name for item in self.items]

    @property
    def problems(self) -> dict[str, str]:
        """Reasons by name, for items that are already known not to be images."""
        return {item.name: item.problem for item in self.items if item.problem is not None}

    def has(self, name: str) -> bool:
        """Whether an image of that name exists, listed or not. Behind a URL it is taken to exist: nobody asks."""
        return is_url(self.root) or is_there(self.root, name)

    def below(self, root: str) -> ImageList:
        """The same images, named from a folder further up."""
        prefix = path_to_name(os.path.relpath(self.root, root)) + "/"
        items = [replace(item, root=root, name=prefix + item.name) for item in self.items]
        return ImageList(root, items, self.repeated, None if self.extent is None else self.extent.below(prefix, root))


def open_sources(
    sources: Sequence[str | os.PathLike[str]],
    *,
    root: str | os.PathLike[str] | None = None,
    columns: Columns = DEFAULT_COLUMNS,
) -> Sources:
    """The images of folders, images, text lists, `-` (a list on standard input), archives and URLs, as a stream.

    Folders are walked in name order, symlinked folders included; lists keep their order, one path or URL per line,
    paths relative to the current folder. Archives (tar, zip, parquet) are read in their own order; those that a folder
    contains are not opened. `{00..99}` in a name stands for each number. Prefixes of buckets are walked as folders are.
    Names are relative to `root`, by default the one folder given, or the deepest folder that holds all sources; members
    of an archive are named as if it were a folder. Whatever looks like an image but is none becomes a problem, not a
    gap. columns: of parquet files.
    Raises UsageError for a source that is missing, of an unknown kind, or outside `root`; MissingExtraError.
    """
    if not sources:
        raise UsageError("no source: expected folders, images, text lists, archives, URLs or -")
    opened: list[_Source] = []
    for source in sources:
        for one in _expanded(os.fspath(source)):
            opened.append(_open_source(one))
    base = None
    if root is not None:
        root = os.fspath(root)
        base = re.sub("([^:/])/+$", r"\1", _url(root)) if is_url(root) else absolute(root)
    common: str | None = None
    for each in opened:
        for folder, example in each.folders():
            if base is not None:
                if not _is_within(folder, base):
                    raise UsageError(f"{example}: expected a path below the root {base}")
            elif common is None:
                common = folder
            elif common != folder:
                common = _common(common, folder, example)
    return Sources(opened, base or common or os.getcwd(), columns)


def find_images(
    sources: Sequence[str | os.PathLike[str]],
    *,
    root: str | os.PathLike[str] | None = None,
    columns: Columns = DEFAULT_COLUMNS,
) -> ImageList:
    """All images of sources at once, each name once; see `open_sources`."""
    stream = open_sources(sources, root=root, columns=columns)
    items: dict[str, Item] = {}
    count = 0
    for item in stream:
        count += 1
        known = items.get(item.name)
        if known is None or (known.problem is None and item.problem is not None):
            items[item.name] = item
    return ImageList(stream.root, list(items.values()), count - len(items), stream.extent)


def item_at(root: str, name: str) -> Item:
    """The item that a row's name stands for: a local file, a member of an archive, or what is behind a URL.

    Nothing but the archive is opened, and nothing above the root is reached for a name that `unsafe_name` accepts. A
    connection is made only if the root itself is a URL. What is not there has a problem.
    """
    remote = is_url(root)
    if remote and leads_out(name):
        return Item(root, name, problem="its name leads out of its URL")
    for archive in places_within(name):
        place = name_to_path(root, archive)
        if remote or os.path.isfile(place):
            return member_at(root, archive, place, name) or Item(root, name, problem="is not in its archive")
    return Item(root, name, content=UrlFile(name_to_path(root, name)) if remote else None)


def is_there(root: str, name: str) -> bool:
    """Whether an image of that name exists, a broken one included. Of what is behind a URL nobody asks: it does not."""
    return not is_url(root) and item_at(root, name).is_there()


class _Source(ABC):
    """One source: what it names, each time it is iterated."""

    @functools.cached_property
    def unread(self) -> Counter[str]:
        """Images of kinds that are not read, by extension, as far as it was iterated."""
        return Counter()

    @abstractmethod
    def __iter__(self) -> Iterator[Found]: ...

    @abstractmethod
    def folders(self) -> Iterator[tuple[str, str]]:
        """The folders that hold what it names, and an example of each; found without listing them."""

    def whole(self) -> str | None:
        """The folder, prefix or archive of which it names every image."""
        return None


@dataclass(frozen=True)
class _Single(_Source):
    """An image or an archive, at a path or a URL."""

    place: str

    def __iter__(self) -> Iterator[Found]:
        yield Found(self.place)

    def folders(self) -> Iterator[tuple[str, str]]:
        yield _folder_of(self.place), self.place

    def whole(self) -> str | None:
        return self.place if is_archive(self.place) else None


@dataclass(frozen=True)
class _Folder(_Source):
    top: str

    def __iter__(self) -> Iterator[Found]:
        return walk(self.top, self.unread)

    def folders(self) -> Iterator[tuple[str, str]]:
        yield self.top, self.top

    def whole(self) -> str | None:
        return self.top


@dataclass(frozen=True)
class _Prefix(_Source):
    """Everything below the prefix of a bucket."""

    url: str

    def __iter__(self) -> Iterator[Found]:
        try:
            for url, fingerprint, problem in walk_url(self.url):
                if problem is not None or is_image_name(url):
                    yield Found(url, problem, fingerprint)
                else:
                    count_unread(url, self.unread)
        except ImageError as error:
            raise UsageError(f"{self.url}: expected a prefix that can be listed, found: {error}") from None

    def folders(self) -> Iterator[tuple[str, str]]:
        yield self.url, self.url

    def whole(self) -> str | None:
        return self.url


@dataclass(frozen=True)
class _List(_Source):
    """A list: a file, a URL, or what was read from standard input."""

    name: str
    content: bytes | None = None

    def __iter__(self) -> Iterator[Found]:
        for place in self._places():
            yield Found(place)

    def folders(self) -> Iterator[tuple[str, str]]:
        last = None
        for place in self._places():
            if (folder := _folder_of(place)) != last:
                last = folder
                yield folder, place

    def _places(self) -> Iterator[str]:
        with self._open() as file:
            try:
                for number, raw in enumerate(file):
                    line = raw.removeprefix(codecs.BOM_UTF8) if not number else raw
                    line = line.removesuffix(b"\n").removesuffix(b"\r")
                    # No path contains a NUL; a list in UTF-16, or one made for `xargs -0`, is full of them.
                    if b"\0" in line:
                        raise UsageError(f"{self.name}: expected a UTF-8 list with one path per line, found NUL bytes")
                    if line:
                        text = os.fsdecode(line)
                        for one in _expanded(text) if "{" in text else (text,):
                            yield _url(one) if is_url(one) else absolute(one)
            except (OSError, ImageError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                raise UsageError(f"{self.name}: expected a readable text list, found: {reason}") from None

    def _open(self) -> BinaryIO:
        if self.content is not None:
            return io.BytesIO(self.content)
        try:
            if is_url(self.name):
                return Blob.at(self.name).open()
            return open(self.name, "rb")
        except OSError as error:
            raise UsageError(f"{self.name}: expected a readable text list, found: {error.strerror}") from None
        except ImageError as error:
            raise UsageError(f"{self.name}: expected a readable text list, found: {error}") from None


def _open_source(source: str) -> _Source:
    if source == "-":
        if sys.stdin is None:
            raise UsageError("-: expected a list on standard input, but it is closed")
        return _List("standard input", sys.stdin.buffer.read())
    if is_url(source):
        check_protocol(source)
        url, end = _url(source), os.path.splitext(url_path(source))[1].lower()
        if end in LIST_EXTENSIONS:
            return _List(url)
        is_file = end in EXTENSIONS or is_archive(url) or protocol_of(url) in ("http", "https")
        return _Single(url) if is_file else _Prefix(url.rstrip("/"))
    if os.path.isdir(source):
        return _Folder(absolute(source))
    if not os.path.lexists(source):
        if (protocol := unknown_protocol(source)) is not None:
            raise UsageError(f"{source}: unknown protocol {protocol}: expected one of {', '.join(PROTOCOLS)}")
        raise UsageError(f"{source}: no such file or folder{near_path(source)}")
    end = os.path.splitext(source)[1].lower()
    if end in LIST_EXTENSIONS:
        return _List(source)
    if end in EXTENSIONS or is_archive(source):
        return _Single(absolute(source))
    from sppfeat.files import NOUNS, format_of  # h5py, which images do not need

    raise UsageError(
        f"{source}: expected a folder, an image ({', '.join(sorted(EXTENSIONS))}), an archive "
        f"({', '.join(sorted(ARCHIVE_EXTENSIONS))}) or a text list ({', '.join(sorted(LIST_EXTENSIONS))})"
        + (f", found {NOUNS[kind]}" if (kind := format_of(source)) is not None else "")
    )


def _expanded(source: str) -> Iterator[str]:
    """A source, or several where it contains ranges such as `{000..099}` and is no file by itself."""
    if _RANGE.search(source) and (is_url(source) or not os.path.lexists(source)):
        return _in_range(source)
    return iter((source,))


def _in_range(text: str) -> Iterator[str]:
    match = _RANGE.search(text)
    if match is None:
        yield text
        return
    first, last = int(match[1]), int(match[2])
    width = max(len(match[1]), len(match[2])) if match[1][0] == "0" or match[2][0] == "0" else 0
    step = 1 if first <= last else -1
    if abs(last - first) >= MAX_RANGE:
        raise UsageError(f"{match[0]}: expected a range of at most {MAX_RANGE:,}, found {abs(last - first) + 1:,}")
    for number in range(first, last + step, step):
        for rest in _in_range(text[match.end() :]):
            yield f"{text[: match.start()]}{number:0{width}d}{rest}"


def _url(text: str) -> str:
    protocol, _, rest = text.partition("://")
    return f"{protocol.lower()}://{rest}"


def _folder_of(place: str) -> str:
    """The folder of a file, or what is before the last slash of a URL's path: at least its protocol."""
    if not is_url(place):
        return os.path.dirname(place)
    protocol, _, rest = url_path(place).partition("://")
    return f"{protocol}://{rest.rpartition('/')[0]}"


def _is_within(folder: str, base: str) -> bool:
    return folder == base or folder.startswith(base if base.endswith("/") else base + "/")


def _common(one: str, other: str, example: str) -> str:
    """The deepest folder, or URL, that holds two of them."""
    if not is_url(one) and not is_url(other):
        return os.path.commonpath([one, other])
    if protocol_of(one) != protocol_of(other):
        raise UsageError(f"{example}: expected local sources only, or URLs of one protocol, found {one} as well")
    both = zip(one.split("/")[3:], other.split("/")[3:], strict=False)
    same_host = one.split("/")[2] == other.split("/")[2]
    parts = [a for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], both)]
    return "/".join([*one.split("/")[:3], *parts]) if same_host else f"{protocol_of(one)}://"
