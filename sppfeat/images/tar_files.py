"""Members of tar archives, plain or compressed: POSIX.1-2001 (pax), ustar, GNU and old ones."""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import lzma
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Final

import msgspec

from sppfeat.errors import ImageError, SppFeatError, one_line, require_extra
from sppfeat.images.blobs import Blob
from sppfeat.images.forward import ForwardReader
from sppfeat.images.items import Fingerprint, count_unread, is_image_name
from sppfeat.images.members import REST, Member
from sppfeat.images.memory import hold
from sppfeat.images.read_ahead import MAX_AHEAD, read_ahead
from sppfeat.images.urls import url_path

TAR_EXTENSIONS: Final = {
    ".tar": "",
    ".tar.gz": "gz",
    ".tgz": "gz",
    ".tar.bz2": "bz2",
    ".tbz2": "bz2",
    ".tar.xz": "xz",
    ".txz": "xz",
    ".tar.zst": "zst",
    ".tzst": "zst",
}
_BLOCK: Final = tarfile.BLOCKSIZE
# Of all headers before one member: names and comments of real files take some kilobytes.
MAX_HEADER: Final = 1 << 20
_SKIP: Final = 1 << 20
# After the mark of the end; tar pads to 10 kB.
_MOST_PADDING: Final = 1 << 22
_REGULAR: Final = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_BYTES: Final = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.DIRTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
)
_PROBLEMS: Final = {
    tarfile.LNKTYPE: "is a hard link to another member, not an image",
    tarfile.SYMTYPE: "is a symbolic link, not an image",
    tarfile.DIRTYPE: "is a folder, not an image",
    tarfile.GNUTYPE_SPARSE: "is stored as a sparse file, which is not supported",
}


class TarMember(msgspec.Struct, frozen=True, tag=True):
    """An image in a tar. start: of its bytes in the (uncompressed) archive. compression: a value of TAR_EXTENSIONS."""

    archive: Blob
    compression: str
    start: int
    size: int
    mtime_ns: int

    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self.size, self.mtime_ns)

    def open(self) -> tuple[io.RawIOBase, Fingerprint]:
        if self.compression:
            reader = _reader(self.archive, self.compression)
            return hold(self.size, lambda: reader.read(self.start, self.size)), self.fingerprint()
        fetched = read_ahead.take(self) if self.archive.is_remote else None
        if fetched is not None:
            return hold(len(fetched), lambda: fetched), self.fingerprint()
        return self.archive.part(self.start, self.size), self.fingerprint()

    def expect(self) -> None:
        if self.archive.is_remote and not self.compression and self.size <= MAX_AHEAD:
            read_ahead.expect(self, lambda: self.archive.read(self.start, self.size))

    def is_apart(self) -> bool:
        return not self.compression and not self.archive.is_remote


@functools.lru_cache(maxsize=2)
def _reader(archive: Blob, compression: str) -> ForwardReader:
    return ForwardReader(lambda: _decompressed(archive, compression))


def _decompressed(archive: Blob, compression: str) -> BinaryIO | _Decompressed:
    """The uncompressed bytes of an archive, from the first on; closing it closes the archive."""
    file = archive.open()
    if not compression:
        return file
    try:
        return _Decompressed(file, compression)
    except BaseException:
        file.close()
        raise


class _Decompressed(io.RawIOBase):
    """A decompressor and the file below it, closed together."""

    def __init__(self, file: BinaryIO, compression: str) -> None:
        self._file = file
        self._stream: Any
        if compression == "zst":
            arrow = require_extra("pyarrow", "data", "a tar compressed with Zstandard")
            self._stream = arrow.CompressedInputStream(arrow.PythonFile(file, mode="r"), "zstd")
        else:
            openers: dict[str, Callable[..., Any]] = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}
            self._stream = openers[compression](file, "rb")

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes: what is there before a break comes before its error."""
        return bytes(self._stream.read1(size) if hasattr(self._stream, "read1") else self._stream.read(size))

    def close(self) -> None:
        if not self.closed:
            try:
                self._stream.close()
            finally:
                self._file.close()
        super().close()


def compression_of(place: str) -> str:
    """The compression of a tar by the extension of its path or URL, a value of TAR_EXTENSIONS."""
    lower = url_path(place).lower()
    return next(kind for end, kind in TAR_EXTENSIONS.items() if lower.endswith(end))


def tar_members(archive: Blob, unread: Counter[str]) -> Iterator[Member]:
    """The images of a tar in its order, read header by header; from a break on, one member `(rest)` with the reason.

    Other files, folders and devices are left out; links named like images have a reason. unread: see `count_unread`.
    """
    compression = compression_of(archive.place)
    try:
        with _decompressed(archive, compression) as file:
            yield from _scan(_Walker(file, archive, compression), archive, compression, unread)
    except (ImageError, _Break) as error:
        yield Member(REST, problem=str(error))
    except SppFeatError:
        raise
    except Exception as error:  # a damaged stream can raise almost anything inside a decompressor
        yield Member(REST, problem=f"archive cannot be read further: {one_line(error) or type(error).__name__}")


class _Break(Exception):
    """Where an archive cannot be read further, and why."""


class _Walker:
    """Reads on and skips in an archive, and knows where it is."""

    def __init__(self, file: BinaryIO | _Decompressed, archive: Blob, compression: str) -> None:
        self._file, self._size = file, None if compression else archive.size
        self.at = 0

    def read(self, size: int) -> bytes:
        parts = []
        while size and (part := self._file.read(size)):
            parts.append(part)
            size -= len(part)
            self.at += len(part)
        return b"".join(parts)

    def skip(self, size: int, what: Callable[[], str]) -> None:
        if self._size is not None:
            self.at += size
            if self.at > self._size:
                raise _Break(f"archive of {self._size:,} bytes is cut off within {what()}")
            self._file.seek(self.at)
            return
        end = self.at + size
        while self.at < end:
            if not self.read(min(_SKIP, end - self.at)):
                raise _Break(f"archive is cut off within {what()}")


def _scan(walker: _Walker, archive: Blob, compression: str, unread: Counter[str]) -> Iterator[Member]:
    extended: dict[str, str] = {}
    held = 0
    while True:
        begin = walker.at
        header = walker.read(_BLOCK)
        if not header and not begin:
            raise _Break("is not a tar archive: it is empty (0 bytes)")
        if not header:
            raise _Break(f"archive ends after {begin:,} bytes without the mark of its end: it is cut off")
        if not header.strip(b"\0"):
            if compression:  # the checksum of what was read comes after the padding
                while walker.at < begin + _MOST_PADDING and walker.read(_SKIP):
                    pass
            return
        if len(header) < _BLOCK and begin:
            raise _Break(f"archive is cut off within the header at byte {begin:,}")
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            if info.size < 0:
                raise tarfile.HeaderError("negative size")
        except tarfile.HeaderError as error:
            if begin:
                raise _Break(f"archive is damaged: header at byte {begin:,}: {one_line(error)}") from None
            raise _Break(f"is not a tar archive: {one_line(error)}") from None
        size = info.size
        if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            held += size
            if held > MAX_HEADER:
                raise _Break(f"archive is damaged: headers of {held:,} bytes at byte {begin:,}")
            content = walker.read(size)
            if len(content) < size:
                raise _Break(f"archive is cut off within the header at byte {begin:,}")
            if info.type == tarfile.GNUTYPE_LONGNAME:
                extended["path"] = content.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            else:
                extended.update(_pax(content, begin))
            _skip_padding(walker, size)
            continue
        name = extended.get("path", info.name)
        if info.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            walker.skip(size, lambda: "a header")
            _skip_padding(walker, size)
            continue
        size = _pax_number(extended, "size", begin, size)
        if info.type in _WITHOUT_BYTES:
            size = 0  # some writers give links the size of what they lead to
        more = info.type == tarfile.GNUTYPE_SPARSE and header[482] != 0
        while more:  # tables of holes between header and bytes, each with a mark whether another follows
            table = walker.read(_BLOCK)
            more = len(table) == _BLOCK and table[504] != 0
        start = walker.at
        walker.skip(size, lambda name=name: repr(name))  # type: ignore[misc]
        if is_image_name(name.rstrip("/")):
            sparse = any(key.startswith("GNU.sparse") for key in extended)
            if info.type in _REGULAR and not sparse and not name.endswith("/"):
                mtime = _pax_time(extended, info.mtime) or archive.stamp
                yield Member(name, TarMember(archive, compression, start, size, mtime))
            else:
                kind = tarfile.GNUTYPE_SPARSE if sparse else tarfile.DIRTYPE if name.endswith("/") else info.type
                yield Member(name.rstrip("/"), problem=_PROBLEMS.get(kind, "is not a regular file"))
        elif info.type in _REGULAR:
            count_unread(name, unread)
        _skip_padding(walker, size)
        extended, held = {}, 0


def _skip_padding(walker: _Walker, size: int) -> None:
    """To the next block; the last padding may be missing where the archive is cut off, which the next header shows."""
    walker.read(-size % _BLOCK)


def _pax(content: bytes, begin: int) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n` of an extended header (POSIX.1-2001, pax Interchange Format)."""
    found: dict[str, str] = {}
    at = 0
    while at < len(content) and content[at : at + 1] != b"\0":
        space = content.find(b" ", at, at + 20)
        length = content[at:space] if space > at else b""
        if not length.isdigit() or not space - at < int(length) <= len(content) - at:
            raise _Break(f"archive is damaged: extended header at byte {begin:,}")
        key, _, value = content[space + 1 : at + int(length) - 1].partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at += int(length)
    return found


def _pax_number(extended: dict[str, str], key: str, begin: int, default: int) -> int:
    text = extended.get(key, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise _Break(f"archive is damaged: extended header at byte {begin:,}: {key} {text!r}")
    return int(text)


def _pax_time(extended: dict[str, str], default: float) -> int:
    """Nanoseconds that fit 63 bits; 0 if there is no time."""
    try:
        seconds, _, part = extended.get("mtime", "").partition(".")
        whole = int(seconds) if seconds else int(default)
        nanoseconds = int(part[:9].ljust(9, "0")) if part else 0
    except ValueError:
        whole, nanoseconds = int(default), 0
    return min(max(whole * 1_000_000_000 + nanoseconds, 0), (1 << 63) - 1)
