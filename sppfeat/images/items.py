"""The item: an image's name, a way to its bytes and its fingerprint; and how names stand for paths."""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from collections import Counter
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import numpy as np
from PIL import features

from sppfeat.errors import ImageError

# Pillow before 11.3 warns when asked about AVIF.
AVIF: Final = "avif" in features.modules and features.check("avif")
EXTENSIONS: Final = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"} | ({".avif"} if AVIF else set())
)

# Of images that nothing here decodes, such as telephones' and cameras' own. Told, so that nobody thinks they were read.
_UNREAD: Final = ".heic .heif .avif .jxl .jp2 .psd .dng .raw .cr2 .cr3 .nef .nrw .arw .orf .rw2 .raf .pef .srw"
_UNREAD_EXTENSIONS: Final = frozenset(_UNREAD.split()) - EXTENSIONS


class Fingerprint(NamedTuple):
    """Detects a changed image: its size in bytes and modification time in nanoseconds; zeros if there is none.

    Where a source has no such time, its checksum or ETag is in its place, as a number of 63 bits.
    """

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


class Content(Protocol):
    """A way to the bytes of an image that is not a local file: a reference of some hundred bytes, never the bytes.

    It can be pickled, and made of JSON (see `sppfeat.images.to_builtins`), because items are sent to other processes.
    """

    def open(self) -> tuple[io.RawIOBase, Fingerprint]:
        """The bytes, readable and seekable, and their fingerprint. Raises ImageError with a reason without the name."""

    def fingerprint(self) -> Fingerprint:
        """The fingerprint as the source lists it; `NO_FINGERPRINT` if there is nothing by now."""

    def expect(self) -> None:
        """Say that `open` follows soon: where bytes are far away, fetching them may begin."""

    def is_apart(self) -> bool:
        """Whether another process opens it at no more cost: nothing is fetched ahead, or read with its neighbors."""


@dataclass(frozen=True, slots=True)
class Item:
    """What travels from a source to a store: an image, or the windows on it that are described.

    name: a POSIX path relative to `root`. windows: [K, 4] x1, y1, x2, y2, pixels of the upright original, inclusive
    ends; None: the whole image. problem: why there is no image to read, if the source knows (a folder named x.jpg, a
    looping symlink, ...). content: the way to its bytes; None: the local file at `path`.
    """

    root: str
    name: str
    windows: np.ndarray | None = None
    problem: str | None = None
    content: Content | None = None

    @classmethod
    def at(cls, path: str | os.PathLike[str], windows: np.ndarray | None = None) -> Item:
        """The image at a path, or windows on it."""
        # Not `abspath`: what `..` means behind a link is known to the system alone.
        folder, name = os.path.split(os.path.join(os.getcwd(), os.fspath(path)))
        return cls(folder, path_to_name(name), windows)

    @property
    def path(self) -> str:
        """Where the image is: a file, a member of an archive (`a.tar/x.jpg`) or a URL."""
        return name_to_path(self.root, self.name)

    def is_there(self) -> bool:
        """Whether there is something to open, sound or not; what its source listed is."""
        return self.problem is None and (self.content is not None or os.path.lexists(self.path))

    def fingerprint(self) -> Fingerprint:
        """The fingerprint of the file as it is now, or as its archive or bucket lists it."""
        return fingerprint_of(self.path) if self.content is None else self.content.fingerprint()

    def is_apart(self) -> bool:
        """Whether another process can open it as well as this one; see `Content.is_apart`."""
        return self.problem is None and (self.content is None or self.content.is_apart())

    def expect(self) -> None:
        """Say that the image is opened soon; see `Content.expect`."""
        if self.content is not None and self.problem is None:
            self.content.expect()

    def open(self) -> tuple[io.RawIOBase, Fingerprint]:
        """The bytes and their fingerprint. Raises ImageError with the reason, without the path."""
        if self.problem is not None:
            raise ImageError(self.problem)
        return open_file(self.path) if self.content is None else self.content.open()


def open_file(path: str) -> tuple[io.RawIOBase, Fingerprint]:
    """A local regular file. Raises ImageError with the reason, without the path."""
    try:
        # Without O_NONBLOCK, opening a pipe that is named like an image would block forever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ImageError(reason_not_readable(path, error)) from None
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode):
        os.close(descriptor)
        is_folder = stat.S_ISDIR(info.st_mode)
        raise ImageError("is a folder, not an image" if is_folder else "is not a regular file")
    return io.FileIO(descriptor, "rb"), Fingerprint(info.st_size, info.st_mtime_ns)


def is_image_name(name: str) -> bool:
    """Whether a file's name has the extension of an image."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def count_unread(name: str, unread: Counter[str]) -> None:
    """Count a file that is an image of a kind that is not read, by its extension; hidden files are none."""
    end = os.path.splitext(name)[1].lower()
    if end in _UNREAD_EXTENSIONS and not os.path.basename(name).startswith("."):
        unread[end] += 1


def path_to_name(relative: str) -> str:
    r"""A file's relative path as UTF-8 text that `name_to_path` reverses: `\` becomes `\\`, a byte that is not
    UTF-8 becomes `\xNN`."""
    if relative.isascii() and "\\" not in relative:
        return relative
    escaped = relative.replace("\\", "\\\\")
    return re.sub("[\udc80-\udcff]", lambda match: f"\\x{ord(match[0]) - 0xDC00:02x}", escaped)


def member_to_name(member: str) -> str:
    r"""The name of an archive's member, below the archive's: a name that could never lead elsewhere as a path.

    As `path_to_name`, and besides: a leading `/` becomes a part `\x2f`, a part `..` becomes `\x2e.`, and NUL becomes
    `\x00`; empty parts and parts `.` are left out. `name_to_path` does not reverse these three: such a name is looked
    up among the names of its archive, and as a path it stands for nothing.
    """
    parts = [part for part in path_to_name(member).split("/") if part not in ("", ".")]
    first = ["\\x2f"] if member.startswith("/") else []
    return "/".join(first + ["\\x2e." if part == ".." else part for part in parts]).replace("\0", "\\x00")


def name_to_path(root: str, name: str) -> str:
    """The path of the file that `name` stands for."""
    relative = re.sub(
        r"\\(?:\\|x([89a-f][0-9a-f]))", lambda match: chr(0xDC00 + int(match[1], 16)) if match[1] else "\\", name
    )
    return os.path.join(root, relative)


def reason_not_readable(path: str, error: OSError) -> str:
    """Why a file cannot be opened, without its path."""
    if error.errno == errno.ELOOP:
        return "symlink loops"
    if error.errno == errno.ENOENT:
        return "symlink points to nothing" if os.path.islink(path) else "no such file"
    return f"cannot be read: {error.strerror or error}"
