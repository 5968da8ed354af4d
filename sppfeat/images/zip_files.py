"""Members of zip archives (PKWARE APPNOTE 6.3), read by the central directory, or header by header where it is lost."""

from __future__ import annotations

import bz2
import io
import re
import stat
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO, Final, NamedTuple

import msgspec

from sppfeat.errors import ImageError, SppFeatError, one_line
from sppfeat.images.blobs import Blob
from sppfeat.images.items import Fingerprint, count_unread, is_image_name
from sppfeat.images.members import REST, Member
from sppfeat.images.memory import check_held, hold
from sppfeat.images.read_ahead import MAX_AHEAD, read_ahead

ZIP_EXTENSIONS: Final = frozenset({".zip"})
_END: Final = b"PK\5\6"
_END_SIZE: Final = 22
_END_64: Final = b"PK\6\6"
_LOCATOR_64: Final = b"PK\6\7"
_ENTRY: Final = struct.Struct("<4s4B4HL2L5H2L")
_LOCAL: Final = struct.Struct("<4s2B4HL2L2H")
_MAX_COMMENT: Final = 1 << 16
_FULL: Final = 0xFFFFFFFF  # the value is in the zip64 record
_STORED, _DEFLATED, _BZIP2 = 0, 8, 12
_ENCRYPTED: Final = 0x1
_SIZES_FOLLOW: Final = 0x8
_UTF8: Final = 0x800
_BLOCK: Final = 1 << 16
# Deflate stores what it cannot shrink with 5 bytes for each 16 kB (RFC 1951, 3.2.4); bzip2 adds about 1 %.
_MOST_GROWN: Final = 1.02


class ZipMember(msgspec.Struct, frozen=True, tag=True):
    """An image in a zip. header: where its local header is. packed, size: its bytes, compressed and not."""

    archive: Blob
    header: int
    packed: int
    size: int
    method: int
    flags: int
    crc: int

    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self.size, self.crc + 1)  # never that of no file

    def open(self) -> tuple[io.RawIOBase, Fingerprint]:
        if self.flags & _ENCRYPTED:
            raise ImageError("is encrypted, which is not supported")
        if self.method not in (_STORED, _DEFLATED, _BZIP2):
            raise ImageError(f"is compressed by method {self.method}: expected stored, deflate or bzip2 (0, 8 or 12)")
        if self.method == _STORED and not self.archive.is_remote:
            return self.archive.part(self._data(), min(self.packed, self.size)), self.fingerprint()
        return hold(self.size, self._unpacked), self.fingerprint()

    def expect(self) -> None:
        if self.archive.is_remote and self.size <= MAX_AHEAD and self.packed <= MAX_AHEAD:
            read_ahead.expect(self, self._whole)

    def is_apart(self) -> bool:
        # Large ones, which are held whole, count among what one process holds.
        return not self.archive.is_remote and (self.method == _STORED or self.size <= MAX_AHEAD)

    def _whole(self) -> bytes:
        """From the local header to the end of the packed bytes, or a little further."""
        return self.archive.read(self.header, _LOCAL.size + 1024 + self.packed)

    def _data(self, start: bytes | None = None) -> int:
        """Where the packed bytes begin: the local header's name may have another length than the directory's."""
        header = (start if start is not None else self.archive.read(self.header, _LOCAL.size))[: _LOCAL.size]
        if len(header) < _LOCAL.size or not header.startswith(b"PK\3\4"):
            raise ImageError("has no header where its archive's directory says: damaged, or cut off")
        *_, name, extra = _LOCAL.unpack(header)
        return self.header + _LOCAL.size + int(name) + int(extra)

    def _packed(self) -> bytes:
        # Before any byte is read: as many packed bytes are a claim of the archive, too.
        if self.packed > self.size * _MOST_GROWN + 1024:
            raise ImageError(f"claims {self.packed:,} packed bytes for {self.size:,}: damaged")
        whole = (read_ahead.take(self) or self._whole()) if self.archive.is_remote else None
        data = self._data(whole)
        found = b"" if whole is None else whole[data - self.header :][: self.packed]
        if whole is None or len(found) < self.packed:
            found = self.archive.read(data, self.packed)
        if len(found) < self.packed:
            raise ImageError("its archive ends before it")
        return found

    def _unpacked(self) -> bytes:
        check_held(self.size)
        packed = self._packed()
        try:
            found = packed if self.method == _STORED else _inflate(packed, self.method, self.size + 1)
        except (zlib.error, OSError, EOFError, ValueError) as error:
            raise ImageError(f"cannot be decompressed: {one_line(error)}") from None
        if len(found) != self.size:
            found_size = f"{len(found):,}" if len(found) < self.size else "more"
            raise ImageError(f"damaged: expected {self.size:,} bytes when unpacked, as declared, found {found_size}")
        if zlib.crc32(found) != self.crc:
            raise ImageError("is damaged: its checksum (CRC-32) differs from the archive's")
        return found


def _inflate(packed: bytes, method: int, most: int) -> bytes:
    """At most `most` bytes."""
    if method == _BZIP2:
        return bz2.BZ2Decompressor().decompress(packed, max_length=most)
    return zlib.decompressobj(-15).decompress(packed, most)


class _Break(Exception):
    """Where an archive cannot be read further, and why."""


class _Directory(NamedTuple):
    """The central directory: where it is, and by how much all places in it are shifted (a program before the zip)."""

    start: int
    size: int
    shift: int


def zip_members(archive: Blob, unread: Counter[str]) -> Iterator[Member]:
    """The images of a zip in the order of its directory; from a break on, one member `(rest)` with the reason.

    Other files and folders are left out; links named like images have a reason. unread: see `count_unread`.
    """
    try:
        with archive.open() as file:
            directory = _find_directory(file, archive.size)
            if directory is not None:
                yield from _listed(file, archive, directory, unread)
            else:
                yield from _walked(file, archive, unread)
    except (ImageError, _Break) as error:
        yield Member(REST, problem=str(error))
    except SppFeatError:
        raise
    except Exception as error:  # of a remote file, for example
        yield Member(REST, problem=f"archive cannot be read further: {one_line(error)}")


def _find_directory(file: BinaryIO, size: int) -> _Directory | None:
    """Where the central directory is; None if the archive's end is lost."""
    tail_size = min(size, _END_SIZE + _MAX_COMMENT)
    file.seek(size - tail_size)
    tail = file.read(tail_size)
    ends = [match.start() for match in re.finditer(_END, tail) if match.start() + _END_SIZE <= len(tail)]
    if not ends:
        return None
    # A comment may hold the same bytes: the record whose comment ends where the file does is the right one.
    exact = [at for at in ends if at + _END_SIZE + int.from_bytes(tail[at + 20 : at + 22], "little") == len(tail)]
    at = (exact or ends)[-1]
    length, start = struct.unpack_from("<2L", tail, at + 12)
    end = size - tail_size + at
    if at >= 20 and tail[at - 20 : at - 16] == _LOCATOR_64:
        (place,) = struct.unpack_from("<Q", tail, at - 12)
        for place_64 in (place, end - 20 - 56):  # as it says, or right before, if something precedes the archive
            if not 0 <= place_64 <= size - 56:
                continue
            file.seek(place_64)
            record = file.read(56)
            if record.startswith(_END_64):
                length, start = struct.unpack_from("<2Q", record, 40)
                end = place_64
                break
    shift = end - length - start
    return _Directory(start + shift, length, shift) if shift >= 0 and start + shift >= 0 else None


def _listed(file: BinaryIO, archive: Blob, directory: _Directory, unread: Counter[str]) -> Iterator[Member]:
    at, end = directory.start, directory.start + directory.size
    file.seek(at)
    while at < end:
        head = file.read(_ENTRY.size)
        if len(head) < _ENTRY.size or not head.startswith(b"PK\1\2"):
            raise _Break(f"archive is damaged: its directory at byte {at:,} has no entry where one is expected")
        (_, _, system, _, _, flags, method, _, _, crc, packed, size, name_size, extra_size, comment_size, *rest) = (
            _ENTRY.unpack(head)
        )
        attributes, header = rest[-2], rest[-1]
        raw = file.read(name_size)
        extra = file.read(extra_size)
        file.read(comment_size)
        at += _ENTRY.size + name_size + extra_size + comment_size
        size, packed, header = _wide(extra, [size, packed, header])
        name = _decoded(raw, flags)
        if not is_image_name(name.rstrip("/")):
            count_unread(name, unread)
            continue
        mode = attributes >> 16
        if name.endswith("/") or (system == 3 and stat.S_ISDIR(mode)):
            yield Member(name.rstrip("/"), problem="is a folder, not an image")
        elif system == 3 and stat.S_ISLNK(mode):
            yield Member(name, problem="is a symbolic link, not an image")
        else:
            yield Member(name, ZipMember(archive, header + directory.shift, packed, size, method, flags, crc))


def _wide(extra: bytes, values: list[Any]) -> list[int]:
    """Sizes and place, from the zip64 record where they do not fit 32 bits (APPNOTE 4.5.3)."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            record = extra[at + 4 : at + 4 + size]
            for number, value in enumerate(values):
                if value == _FULL and len(record) >= 8:
                    (values[number],) = struct.unpack_from("<Q", record)
                    record = record[8:]
        at += 4 + size
    return values


def _decoded(raw: bytes, flags: int) -> str:
    """A name: UTF-8, or code page 437, which every byte belongs to."""
    return raw.decode("utf-8", "surrogateescape") if flags & _UTF8 else raw.decode("cp437")


def _walked(file: BinaryIO, archive: Blob, unread: Counter[str]) -> Iterator[Member]:
    """Members by their local headers, up to where they end."""
    at = 0
    while True:
        file.seek(at)
        head = file.read(_LOCAL.size)
        if len(head) < _LOCAL.size or not head.startswith(b"PK\3\4"):
            break
        (_, _, _, flags, method, _, _, crc, packed, size, name_size, extra_size) = _LOCAL.unpack(head)
        name = _decoded(file.read(name_size), flags)
        size, packed = _wide(file.read(extra_size), [size, packed])
        data = at + _LOCAL.size + name_size + extra_size
        if flags & _SIZES_FOLLOW:
            measured = _measured(file, data, method)
            if measured is None:
                raise _Break(f"archive has lost its directory, and {name!r} says nothing of its length: it is cut off")
            packed, size, crc = measured
        if data + packed > archive.size:
            raise _Break(f"archive of {archive.size:,} bytes is cut off within {name!r}")
        if is_image_name(name) and not name.endswith("/"):
            yield Member(name, ZipMember(archive, at, packed, size, method, flags, crc))
        else:
            count_unread(name, unread)
        at = data + packed
        if flags & _SIZES_FOLLOW:
            file.seek(at)
            descriptor = file.read(24)
            signed = descriptor.startswith(b"PK\7\x08")
            # 32 bits for each size, or 64; the next header tells.
            at += next((n for n in ((16, 24) if signed else (12, 20)) if descriptor[n : n + 2] == b"PK"), 16)
    if not at:
        raise _Break("is not a zip archive" + (": it is empty (0 bytes)" if not archive.size else ""))
    raise _Break(f"archive of {archive.size:,} bytes has no directory at its end: it is cut off")


def _measured(file: BinaryIO, data: int, method: int) -> tuple[int, int, int] | None:
    """Packed and unpacked size and checksum of deflated bytes of unknown length, unpacked block by block; or None."""
    if method != _DEFLATED:
        return None
    file.seek(data)
    packer, packed, size, crc = zlib.decompressobj(-15), 0, 0, 0
    while not packer.eof:
        block = packer.unconsumed_tail or file.read(_BLOCK)
        if not block:
            return None
        packed += 0 if packer.unconsumed_tail else len(block)
        try:
            found = packer.decompress(block, 1 << 20)
        except zlib.error:
            return None
        size += len(found)
        crc = zlib.crc32(found, crc)
    return packed - len(packer.unused_data), size, crc
