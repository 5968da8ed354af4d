"""Sources of images: folders, files and lists, and the names that images go by."""

from __future__ import annotations

import codecs
import errno
import os
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np
from PIL import features

from sppfeat.errors import UsageError

# Pillow before 11.3 warns when asked about AVIF.
AVIF: Final = "avif" in features.modules and features.check("avif")
EXTENSIONS: Final = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"} | ({".avif"} if AVIF else set())
)
LIST_EXTENSIONS: Final = frozenset({".txt", ".lst"})


class Fingerprint(NamedTuple):
    """Detects a changed file: its size in bytes and modification time in nanoseconds; zeros if unreadable."""

    file_size: int
    mtime_ns: int


NO_FINGERPRINT: Final = Fingerprint(0, 0)


def fingerprint_of(path: str) -> Fingerprint:
    """The fingerprint of a file as it is now; `NO_FINGERPRINT` if there is no file."""
    try:
        info = os.stat(path)
    except OSError:
        return NO_FINGERPRINT
    return Fingerprint(info.st_size, info.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class Item:
    """What travels from a source to a store: an image, or the windows on it that are described.

    name: a POSIX path relative to `root`. windows: [K, 4] x1, y1, x2, y2, pixels of the upright original, inclusive
    ends; None: the whole image. problem: why there is no image to read, if the source knows (a folder named x.jpg, a
    looping symlink, ...).
    """

    root: str
    name: str
    windows: np.ndarray | None = None
    problem: str | None = None

    @classmethod
    def at(cls, path: str | os.PathLike[str], windows: np.ndarray | None = None) -> Item:
        """The image at a path, or windows on it."""
        # Not `abspath`: what `..` means behind a link is known to the system alone.
        folder, name = os.path.split(os.path.join(os.getcwd(), os.fspath(path)))
        return cls(folder, path_to_name(name), windows)

    @property
    def path(self) -> str:
        """The file that holds the image."""
        return name_to_path(self.root, self.name)

    def fingerprint(self) -> Fingerprint:
        """The fingerprint of the file as it is now."""
        return fingerprint_of(self.path)


@dataclass(frozen=True)
class ImageList:
    """The images of sources, in a stable order, with unique names relative to `root`.

    repeated: how many listed paths were left out because they name a file already listed.
    """

    root: str
    items: list[Item]
    repeated: int

    @property
    def names(self) -> list[str]:
        """The names of all items."""
        return [item.name for item in self.items]

    @property
    def problems(self) -> dict[str, str]:
        """Reasons by name, for items that are already known not to be images."""
        return {item.name: item.problem for item in self.items if item.problem is not None}

    def has(self, name: str) -> bool:
        """Whether a file of that name exists, listed or not."""
        return os.path.lexists(name_to_path(self.root, name))

    def below(self, root: str) -> ImageList:
        """The same images, named from a folder further up."""
        prefix = path_to_name(os.path.relpath(self.root, root)) + "/"
        items = [replace(item, root=root, name=prefix + item.name) for item in self.items]
        return ImageList(root, items, self.repeated)


def find_images(sources: Sequence[str | os.PathLike[str]], *, root: str | None = None) -> ImageList:
    """List the images of folders (recursive), single files, text lists, and `-` (a list on standard input).

    Folders are walked in name order, symlinked folders included; lists keep their order, one path per line, relative
    to the current folder. Names are relative to `root`, by default the one folder given, or the deepest folder that
    holds all sources. Whatever looks like an image but is none becomes a problem, not a gap.
    Raises UsageError for a source that is missing, of an unknown kind, or outside `root`.
    """
    if not sources:
        raise UsageError("no source: expected folders, images, text lists or -")
    paths: list[str] = []
    reasons: dict[str, str] = {}
    roots: list[str] = []
    for source in [os.fspath(source) for source in sources]:
        found = list(_list_source(source))
        for path, reason in found:
            paths.append(path)
            if reason is not None:
                reasons[path] = reason
        if source != "-" and os.path.isdir(source):
            roots.append(_absolute(source))
        else:
            roots.extend({os.path.dirname(path) for path, _ in found})
    base = _absolute(root) if root is not None else (os.path.commonpath(roots) if roots else os.getcwd())
    prefix = base.rstrip("/") + "/"
    unique = dict.fromkeys(paths)
    for path in unique:
        if not path.startswith(prefix):
            raise UsageError(f"{path}: expected a path below the root {base}")
    items = [Item(base, path_to_name(path[len(prefix) :]), problem=reasons.get(path)) for path in unique]
    return ImageList(base, items, repeated=len(paths) - len(unique))


def path_to_name(relative: str) -> str:
    r"""A file's relative path as UTF-8 text that `name_to_path` reverses: `\` becomes `\\`, a byte that is not
    UTF-8 becomes `\xNN`."""
    if relative.isascii() and "\\" not in relative:
        return relative
    escaped = relative.replace("\\", "\\\\")
    return re.sub("[\udc80-\udcff]", lambda match: f"\\x{ord(match[0]) - 0xDC00:02x}", escaped)


def name_to_path(root: str, name: str) -> str:
    """The path of the file that `name` stands for."""
    relative = re.sub(
        r"\\(?:\\|x([89a-f][0-9a-f]))", lambda match: chr(0xDC00 + int(match[1], 16)) if match[1] else "\\", name
    )
    return os.path.join(root, relative)


def _absolute(path: str) -> str:
    # abspath keeps two leading slashes, to which POSIX allows a special meaning; here they have none.
    return "/" + os.path.abspath(path).lstrip("/")


def _list_source(source: str) -> Iterator[tuple[str, str | None]]:
    if source == "-":
        if sys.stdin is None:
            raise UsageError("-: expected a list on standard input, but it is closed")
        yield from _list_lines("standard input", sys.stdin.buffer.read())
    elif os.path.isdir(source):
        yield from _walk(_absolute(source))
    elif not os.path.lexists(source):
        raise UsageError(f"{source}: no such file or folder")
    elif os.path.splitext(source)[1].lower() in LIST_EXTENSIONS:
        try:
            with open(source, "rb") as file:
                content = file.read()
        except OSError as error:
            raise UsageError(f"{source}: expected a readable text list, found: {error.strerror}") from None
        yield from _list_lines(source, content)
    elif os.path.splitext(source)[1].lower() in EXTENSIONS:
        yield _absolute(source), None
    else:
        raise UsageError(
            f"{source}: expected a folder, an image ({', '.join(sorted(EXTENSIONS))}) "
            f"or a text list ({', '.join(sorted(LIST_EXTENSIONS))})"
        )


def _list_lines(source: str, content: bytes) -> Iterator[tuple[str, str | None]]:
    # No path contains a NUL; a list in UTF-16, or one made for `xargs -0`, is full of them.
    if b"\0" in content:
        raise UsageError(f"{source}: expected a UTF-8 list with one path per line, found NUL bytes")
    for line in content.removeprefix(codecs.BOM_UTF8).split(b"\n"):
        line = line.removesuffix(b"\r")
        if line:
            yield _absolute(os.fsdecode(line)), None


def _walk(top: str) -> Iterator[tuple[str, str | None]]:
    # A stack instead of recursion: depth is bounded by the file system, not by Python. Each entry carries the
    # identities of the folders above it, to detect symlinks that loop back to one of them.
    stack: list[tuple[str, frozenset[tuple[int, int]]]] = [(top, frozenset())]
    while stack:
        path, above = stack.pop()
        is_image = path != top and os.path.splitext(path)[1].lower() in EXTENSIONS
        try:
            info = os.stat(path)
            is_folder = stat.S_ISDIR(info.st_mode)
        except OSError as error:
            # What stat cannot read may be a folder of images. A dangling symlink is not.
            if is_image or error.errno != errno.ENOENT:
                yield path, reason_not_readable(path, error)
            continue
        if not is_folder:
            if is_image:
                yield path, None
            continue
        reason = "is a folder, not an image" if is_image else None
        identity = (info.st_dev, info.st_ino)
        entries: list[str] = []
        if identity in above:
            reason = "symlink loops back to a folder that contains it"
        else:
            try:
                entries = sorted(os.listdir(path), key=os.fsencode, reverse=True)
            except OSError as error:
                reason = reason_not_readable(path, error)
        if reason is not None:
            yield path, reason
        inside = above | {identity}
        stack.extend((os.path.join(path, entry), inside) for entry in entries)


def reason_not_readable(path: str, error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "symlink loops"
    if error.errno == errno.ENOENT:
        return "symlink points to nothing" if os.path.islink(path) else "no such file"
    return f"cannot be read: {error.strerror or error}"
