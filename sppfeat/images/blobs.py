"""A blob: a local file or an object behind a URL, of which parts are read, from any thread; opened once per process."""

from __future__ import annotations

import functools
import io
import os
import stat
import weakref
from typing import Any, BinaryIO, Final

import msgspec

from sppfeat.errors import ImageError
from sppfeat.images.items import reason_not_readable
from sppfeat.images.memory import hold
from sppfeat.images.urls import info_of, is_url, open_url, read_part

# Archives are read in order: a few files are in use at a time.
MAX_OPEN_FILES: Final = 16
# A remote archive is listed in blocks of this many bytes.
REMOTE_BLOCK: Final = 8 << 20


class Blob(msgspec.Struct, frozen=True):
    """A file or object as it was when it was listed; reading it after it changed is an error.

    place: absolute path, or URL. size: in bytes. stamp: modification time in nanoseconds, or a number made of the ETag.
    """

    place: str
    size: int
    stamp: int

    @classmethod
    def at(cls, place: str) -> Blob:
        """The blob as it is now. Raises ImageError with a reason without the place."""
        if is_url(place):
            return cls(place, *info_of(place))
        try:
            info = os.stat(place)
        except OSError as error:
            raise ImageError(reason_not_readable(place, error)) from None
        if not stat.S_ISREG(info.st_mode):
            raise ImageError("is a folder" if stat.S_ISDIR(info.st_mode) else "is not a regular file")
        return cls(place, info.st_size, info.st_mtime_ns)

    @property
    def is_remote(self) -> bool:
        return is_url(self.place)

    def read(self, start: int, size: int) -> bytes:
        """Bytes `start` to `start + size`; fewer at the end of the blob. Raises ImageError."""
        if self.is_remote:
            return read_part(self.place, start, min(size, max(0, self.size - start)))
        return _descriptor(self).read(start, size)

    def part(self, start: int, size: int) -> io.RawIOBase:
        """A part as a file. Raises ImageError."""
        if not self.is_remote:
            return _Part(_descriptor(self), start, size)

        def read() -> bytes:
            found = self.read(start, size)
            if len(found) < size:
                raise ImageError("its archive ends before it")
            return found

        return hold(size, read)

    def open(self) -> BinaryIO:
        """The whole blob as a seekable file of its own. Raises ImageError."""
        if self.is_remote:
            return open_url(self.place, size=self.size, block=REMOTE_BLOCK)
        return os.fdopen(_open(self), "rb")


def _open(blob: Blob) -> int:
    """A descriptor of a local file that is as it was listed. Raises ImageError."""
    try:
        number = os.open(blob.place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ImageError(f"its archive: {reason_not_readable(blob.place, error)}") from None
    info = os.fstat(number)
    if (info.st_size, info.st_mtime_ns) != (blob.size, blob.stamp):
        os.close(number)
        raise ImageError("its archive changed after it was listed")
    return number


class _Descriptor:
    """An open local file, closed when nothing refers to it any more."""

    def __init__(self, blob: Blob) -> None:
        self._number = number = _open(blob)
        weakref.finalize(self, os.close, number)

    def read(self, start: int, size: int) -> bytes:
        try:
            return os.pread(self._number, size, start)
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from None

    def read_into(self, buffer: Any, start: int) -> int:
        return os.preadv(self._number, [buffer], start)


_descriptor = functools.lru_cache(maxsize=MAX_OPEN_FILES)(_Descriptor)


class _Part(io.RawIOBase):
    """Bytes `start` to `start + size` of an open local file, as a file of its own."""

    def __init__(self, descriptor: _Descriptor, start: int, size: int) -> None:
        self._descriptor: _Descriptor | None = descriptor
        self._start, self._size = start, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        place = offset + (0, self._at, self._size)[whence]
        if place < 0:
            raise OSError(f"negative position {place}")
        self._at = place
        return place

    def readinto(self, buffer: Any, /) -> int:
        if self._descriptor is None:
            raise ValueError("I/O operation on closed file")
        with memoryview(buffer) as view:
            left = max(0, min(len(view), self._size - self._at))
            count = self._descriptor.read_into(view[:left], self._start + self._at) if left else 0
        self._at += count
        return count

    def close(self) -> None:
        self._descriptor = None
        super().close()
