"""Reject, before decoding, an image that would take far more time or memory than its format ever needs.

A file's own structure (markers, chunk lengths, tags) tells what decoding costs; reading it takes microseconds. A
damaged structure passes: the decoder reports what is wrong with it.
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, BinaryIO, Final

from PIL import Image, ImageFile

from sppfeat.errors import ImageError

# Encoders write about 10; one scan per bit of each component takes a few dozen.
MAX_SCANS: Final = 100
# Every scan of a progressive JPEG walks over the whole image: ten scans (the usual number) of 200 megapixels.
MAX_SCANNED_PIXELS: Final = 2_000_000_000
# An ICC profile takes at most 255 segments; extended XMP in segments of 64 KB may take hundreds.
MAX_JPEG_SEGMENTS: Final = 5_000
# Fill bytes (ITU T.81, B.1.1.2) align a marker or reserve a little room; Pillow reads them one by one.
MAX_FILL_BYTES: Final = 65_536
# PNG writers cut pixels into chunks of 8 KB or more: this is over 1.6 GB of them.
MAX_PNG_DATA_CHUNKS: Final = 200_000
# Text, profile, time, ...: a handful in real files. Each may inflate to 1 MB (Pillow's MAX_TEXT_CHUNK).
MAX_PNG_OTHER_CHUNKS: Final = 1_000
# Blocks of at most 255 bytes before the first frame; comments and XMP of real files are some kilobytes.
MAX_GIF_BLOCKS: Final = 10_000
# Each tag occurs once; the specification and the vendors' own tags add up to some hundreds.
MAX_TIFF_ENTRIES: Final = 1_000
# TIFF 6.0, section 15: the sides of a tile are multiples of 16.
MIN_TILE_AREA: Final = 16 * 16
# 100 megapixels in the smallest tiles; strips of one row stay far below.
MAX_TIFF_PIECES: Final = 400_000
# Pillow decodes run-length BMP in Python, run by run, and fills cut-off rows there too.
MAX_RLE_BYTES: Final = 8_000_000
MAX_RLE_PIXELS: Final = 25_000_000
# Pillow keeps everything but the pixels in memory, up to twice: profiles, XMP, the layers of an image editor.
MAX_METADATA: Final = 256 << 20
# Pillow accepts no more text from a PNG (MAX_TEXT_MEMORY), but copies a chunk up to four times before it says so.
MAX_PNG_METADATA: Final = 64 << 20
# Pillow reads these files whole, and the decoder copies them; real ones stay below even where they are animations.
MAX_WHOLE_FILE: Final = 128 << 20
# 100 megapixels of RGB in 16 bits; in the slowest packings (LZMA, Huffman codes of one bit) this takes some 8 s.
MAX_UNPACKED: Final = 640 << 20
# A decoder that looks for the next marker reads a hole in a file to its end, at about 3 s per GB. Uncompressed pixels,
# 178 megapixels at four bytes, take less.
MAX_READ: Final = 1 << 30
# Decoder's buffers, pixels and their conversion together. With Python, torch and a network it stays below 1.5 GB.
MAX_WORKING_SET: Final = 1 << 30

# Where `Image.info` of a JPEG holds what `check_structure` found.
COEFFICIENTS: Final = "coefficients"

_TIFF_SIZES: Final = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
# Of Pillow's readers; it accepts the second pair as a TIFF, too.
_TIFF_MAGIC: Final = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")
_BLOCK: Final = 1 << 20
# 100 megapixels at the highest quality take less.
_MOST_WALKED: Final = 1 << 28
# ITU T.81, table B.1: markers without a length, and fill; frames; those whose coefficients come in several scans.
_NO_SEGMENT: Final = frozenset({0x00, 0x01, 0xFF, *range(0xD0, 0xDA)})
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE: Final = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_MARKER: Final = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]", re.DOTALL)


class BoundedFile(io.RawIOBase):
    """A file of which a decoder may read only `MAX_READ` bytes, counted from when `bound` was called; then OSError.

    size: of the file in bytes. Closing it closes what it wraps.
    """

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self._left: int | None = None
        self.size = raw.seek(0, os.SEEK_END)
        raw.seek(0)

    def bound(self) -> None:
        self._left = MAX_READ

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._raw.seek(offset, whence)

    def fileno(self) -> int:
        """Of a local file, which libtiff reads by itself; OSError for any other."""
        return self._raw.fileno()

    def readinto(self, buffer: Any, /) -> int:
        count: int = self._raw.readinto(buffer) or 0
        if self._left is not None:
            self._left -= count
            if self._left < 0:
                raise OSError(f"more than {MAX_READ:,} bytes of pixels")
        return count

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


def check_structure(file: BinaryIO) -> int:
    """Raise ImageError for an opened file whose structure is far outside its format's common practice; rewinds.

    Returns the bytes that its decoder holds of the whole image beside the pixels: the coefficients of a JPEG.
    """
    start = file.read(34)
    coefficients = 0
    if start.startswith(b"\xff\xd8\xff"):
        coefficients = _check_jpeg(file)
    elif start.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(file)
    elif start.startswith(b"GIF8"):
        _check_gif(file, start)
    elif start[:4] in _TIFF_MAGIC:
        _check_tiff(file, start)
    elif _is_run_length_bmp(start):
        _check_run_length(file, start)
    elif start.startswith(b"RIFF") or start[4:8] == b"ftyp":
        size = _size(file)
        if size > MAX_WHOLE_FILE:
            kind = "WebP" if start.startswith(b"RIFF") else "AVIF"
            raise ImageError(f"{kind} file of {size:,} bytes: expected at most {MAX_WHOLE_FILE:,}")
    file.seek(0)
    return coefficients


def _size(file: BinaryIO) -> int:
    """Of a file in bytes; its position stays."""
    place = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(place)
    return size


def _is_local(file: BinaryIO) -> bool:
    try:
        return file.fileno() >= 0
    except OSError:
        return False


def working_set(image: Image.Image, *, turned: bool = False) -> int:
    """An estimate from above of the bytes that decoding an opened image to RGB, and turning it upright, takes."""
    pixels = image.width * image.height
    # Pillow's own storage: RGB takes four bytes per pixel, and a turned or converted copy exists beside the original.
    stored = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}.get(image.mode, 4)
    result = stored + (0 if image.mode == "RGB" and "transparency" not in image.info else 4) + (4 if turned else 0)
    if image.format == "WEBP":
        # libwebp: its own ARGB, two canvases of the animation decoder, which stay, and Pillow's copy of one.
        return pixels * max(stored + 16, result + 8)
    if image.format == "AVIF":
        return pixels * (result + 14)  # planes of 16 bits, RGBA, and Pillow's copy
    if image.format == "TIFF":
        # Pillow turns it while loading, with libtiff's buffer still held.
        copies = 1 if _number(image, 274, 1) == 1 else 2
        if image.info.get("compression", "raw") != "raw":
            return max(pixels * result, pixels * stored * copies + _piece_bytes(image))
        # Pillow reads up to where the next piece begins, and copies the part that it has not decoded yet.
        places = sorted(tile.offset for tile in _tiles(image))
        read = max((behind - place for place, behind in pairwise(places)), default=0)
        return max(pixels * result, pixels * stored + 2 * read)
    # For other formats `info` holds whatever the file says; a JPEG's decoder is freed before any conversion.
    coefficients = image.info.get(COEFFICIENTS, 0) if image.format in ("JPEG", "MPO") else 0
    return max(pixels * result, pixels * stored + coefficients)


def _unpacked(image: Image.Image) -> int:
    """The bytes that an opened PNG or TIFF unpacks to, pixels of the image or not; 0 for other formats."""
    tiles = _tiles(image)
    if image.format == "PNG":
        # Pillow's name of the layout: RGB, RGBA;16B, P;4, ...
        bands, _, bits = str(tiles[0].args).partition(";") if tiles else ("", "", "")
        return image.width * image.height * len(bands) * (2 if bits == "16B" else 1)
    if image.format == "TIFF":
        width, height = _number(image, 256, image.width), _number(image, 257, image.height)
        across, down = _number(image, 322, 0), _number(image, 323, 0)
        planes = _number(image, 277, 1) if _number(image, 284, 1) == 2 else 1
        if across > 0 and down > 0:
            pieces = -(-width // across) * -(-height // down) * planes
            whole = pieces * _piece_bytes(image)
        else:
            pieces = -(-height // max(1, min(_number(image, 278, height), height))) * planes
            whole = width * height * _sample_bits(image) * planes // 8
        # Pillow reads uncompressed pixels as often as there are offsets for them.
        return whole * max(1, -(-len(tiles) // max(1, pieces)))
    return 0


def _tiles(image: Image.Image) -> list[ImageFile._Tile]:
    """What Pillow will decode, piece by piece; nothing once it has."""
    return image.tile if isinstance(image, ImageFile.ImageFile) else []


def _piece_bytes(image: Image.Image) -> int:
    """What libtiff decodes at once: a strip, at most the image, or a tile, which may be larger than the image."""
    bits = _sample_bits(image)
    tile = _number(image, 322, 0) * _number(image, 323, 0)
    if tile:
        return tile * bits // 8
    width, height = _number(image, 256, image.width), _number(image, 257, image.height)
    return width * min(_number(image, 278, height), height) * bits // 8


def _sample_bits(image: Image.Image) -> int:
    """Bits of a pixel in one piece of a TIFF: all samples, or one where each has pieces of its own."""
    bits = _number(image, 258, 1) * (1 if _number(image, 284, 1) == 2 else _number(image, 277, 1))
    return max(bits, 32) if _number(image, 262, 0) == 6 else bits  # YCbCr, which libtiff gives as RGBA


def _number(image: Image.Image, tag: int, default: int) -> int:
    """A tag's number, the largest where it has several; `default` where it has none, or something else."""
    value = image.tag_v2.get(tag, default)  # type: ignore[attr-defined]
    return max(
        (each for each in (value if isinstance(value, tuple) else (value,)) if isinstance(each, int)), default=default
    )


def check_working_set(image: Image.Image, *, turned: bool = False) -> None:
    """Raise ImageError for an opened image that takes more than `MAX_WORKING_SET` bytes to decode, or unpacks to more
    than `MAX_UNPACKED`."""
    needed = working_set(image, turned=turned)
    if needed > MAX_WORKING_SET:
        raise ImageError(
            f"{image.width} x {image.height} pixels ({image.format}, {image.mode}): decoding takes about "
            f"{needed / 2**20:,.0f} MiB, expected at most {MAX_WORKING_SET / 2**20:,.0f}"
        )
    unpacked = _unpacked(image)
    if unpacked > MAX_UNPACKED:
        raise ImageError(
            f"{image.width} x {image.height} pixels ({image.format}, {image.mode}): they unpack to "
            f"{unpacked / 2**20:,.0f} MiB, expected at most {MAX_UNPACKED / 2**20:,.0f}"
        )


def _check_jpeg(file: BinaryIO) -> int:
    file.seek(2)
    segments = skipped = 0
    frame = b""
    while len(head := file.read(4)) == 4:
        if head[0] != 0xFF or head[1] in _NO_SEGMENT:  # Pillow's reader skips anything else byte by byte
            skipped += 1
            if skipped > MAX_FILL_BYTES:
                raise ImageError(f"JPEG with more than {MAX_FILL_BYTES:,} fill bytes before its pixels")
            file.seek(-3, os.SEEK_CUR)
            continue
        if head[1] == 0xDA:
            break
        segments += 1
        if segments > MAX_JPEG_SEGMENTS:
            raise ImageError(f"JPEG of more than {MAX_JPEG_SEGMENTS:,} segments before its pixels")
        length = max(int.from_bytes(head[2:], "big") - 2, 0)
        if head[1] in _FRAMES:
            frame = head[1:2] + file.read(length)
        else:
            file.seek(length, os.SEEK_CUR)
    components = file.read(1)
    # A single scan of all components is decoded row by row, and nothing after it is read.
    if len(frame) > 6 and (frame[0] in _PROGRESSIVE or components != frame[6:7]):
        return _check_scans(file, frame)
    return 0


def _check_scans(file: BinaryIO, frame: bytes) -> int:
    """The bytes of a JPEG's coefficients, where it has several scans.

    frame: the marker and what follows its length (ITU T.81, B.2.2).
    """
    height, width = int.from_bytes(frame[2:4], "big"), int.from_bytes(frame[4:6], "big")
    factors = [(factor >> 4, factor & 15) for factor in frame[8::3]]
    full = max((h for h, _ in factors), default=1) * max((v for _, v in factors), default=1)
    # libjpeg keeps the coefficients (16 bits) of the whole image beside the pixels, whatever the draft size.
    samples = width * height * sum(h * v for h, v in factors) // max(1, full)
    coefficients = 2 * samples
    needed = coefficients + width * height * (1 if len(factors) == 1 else 4)
    if needed > MAX_WORKING_SET:
        raise ImageError(
            f"{width} x {height} pixels (JPEG of several scans): decoding takes about {needed / 2**20:,.0f} MiB, "
            f"expected at most {MAX_WORKING_SET / 2**20:,.0f}"
        )
    most = min(MAX_SCANS, max(1, MAX_SCANNED_PIXELS // max(1, width * height)))
    start, size = file.tell(), _size(file)
    # Within the pixels 0xFF is escaped, so counting the marker's bytes counts all scans, and perhaps some more.
    if size - start <= _MOST_WALKED and 1 + _count_scans(file) <= most:
        return coefficients
    file.seek(start)
    scans = _walk_scans(file.read(_MOST_WALKED))
    if scans is None:
        raise ImageError(f"JPEG of several scans in more than {_MOST_WALKED:,} bytes")
    if scans > most:
        raise ImageError(f"progressive JPEG of {scans:,} scans: expected at most {most}")
    return coefficients


def _count_scans(file: BinaryIO) -> int:
    """How often the marker's bytes occur in the next `_MOST_WALKED` bytes: a hole in a file can be endless."""
    scans, last = 0, b""
    for _ in range(_MOST_WALKED // _BLOCK):
        block = file.read(_BLOCK)
        scans += (last + block).count(b"\xff\xda")
        last = b"\xff" if block.endswith(b"\xff") else b""
        if len(block) < _BLOCK:
            break
    return scans


def _walk_scans(content: bytes) -> int | None:
    """Scans up to the end of the image: a video, a depth map or a thumbnail may hold the same bytes.

    None where `_MOST_WALKED` bytes do not reach that end.
    """
    scans, at = 1, 0
    while match := _MARKER.search(content, at):
        if match[0] == b"\xff\xd9":
            return scans
        scans += match[0] == b"\xff\xda"
        at = match.end() + int.from_bytes(content[match.end() : match.end() + 2], "big")
    return scans if len(content) < _MOST_WALKED else None


def _check_png(file: BinaryIO) -> None:
    file.seek(8)
    data = other = metadata = packed = 0
    most_packed = MAX_UNPACKED
    while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
        if head[4:] in (b"IDAT", b"fdAT", b"fcTL"):
            data += 1
            packed += int.from_bytes(head[:4], "big") if head[4:] == b"IDAT" else 0
            # Pillow skips what follows the pixels by reading it into memory twice.
            if packed > most_packed:
                raise ImageError(f"PNG with {packed:,} bytes of packed pixels: expected at most {most_packed:,}")
        else:
            other += 1
            if head[4:] == b"IHDR":
                header = file.read(10)
                most_packed = _most_packed(header)
                file.seek(-len(header), os.SEEK_CUR)
            metadata += int.from_bytes(head[:4], "big")
            if metadata > MAX_PNG_METADATA:
                raise ImageError(f"PNG with {metadata:,} bytes of metadata: expected at most {MAX_PNG_METADATA:,}")
        if data > MAX_PNG_DATA_CHUNKS or other > MAX_PNG_OTHER_CHUNKS:
            kind, most = (
                ("data", MAX_PNG_DATA_CHUNKS) if data > MAX_PNG_DATA_CHUNKS else ("other", MAX_PNG_OTHER_CHUNKS)
            )
            raise ImageError(f"PNG of more than {most:,} {kind} chunks")
        file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)


def _most_packed(header: bytes) -> int:
    """Bytes that a PNG's pixels can take, from the first ten of its header: packing adds little (RFC 1951, 3.2.4)."""
    height = int.from_bytes(header[4:8], "big")
    bits = int.from_bytes(header[8:9], "big") * {2: 3, 4: 2, 6: 4}.get(int.from_bytes(header[9:], "big"), 1)
    row = 1 + int.from_bytes(header[:4], "big") * bits // 8
    return height * row * 5 // 4 + _BLOCK


def _check_gif(file: BinaryIO, start: bytes) -> None:
    flags = start[10] if len(start) > 10 else 0
    file.seek(13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0))
    blocks = skipped = 0
    while (byte := file.read(1)) and byte not in b",;":
        if byte != b"!":  # Pillow's reader skips it
            skipped += 1
            if skipped > MAX_FILL_BYTES:
                raise ImageError(f"GIF with more than {MAX_FILL_BYTES:,} fill bytes before its first frame")
            continue
        file.read(1)
        while (size := file.read(1)) and size != b"\0":
            blocks += 1
            if blocks > MAX_GIF_BLOCKS:
                raise ImageError(f"GIF of more than {MAX_GIF_BLOCKS:,} blocks before its first frame")
            file.seek(size[0], os.SEEK_CUR)


def _is_run_length_bmp(start: bytes) -> bool:
    # The oldest header, of 12 bytes, has no compression field; pixels may be in its place.
    oldest = int.from_bytes(start[14:18], "little") == 12
    return start.startswith(b"BM") and not oldest and start[30:34] in (b"\1\0\0\0", b"\2\0\0\0")


def _check_run_length(file: BinaryIO, start: bytes) -> None:
    size = _size(file)
    if size > MAX_RLE_BYTES:
        raise ImageError(f"run-length BMP of {size:,} bytes: expected at most {MAX_RLE_BYTES:,}")
    width, height = (abs(side) for side in struct.unpack_from("<ii", start, 18))
    if width * height > MAX_RLE_PIXELS:
        raise ImageError(f"run-length BMP of {width} x {height} pixels: expected at most {MAX_RLE_PIXELS:,}")


def _check_tiff(file: BinaryIO, start: bytes) -> None:
    order = "<" if start[:1] == b"I" else ">"
    big = start[2:3] == b"+"  # as Pillow has it
    step = 20 if big else 12
    try:
        (offset,) = struct.unpack_from(order + ("Q" if big else "I"), start, 8 if big else 4)
        file.seek(offset)
        (entries,) = struct.unpack(order + ("Q" if big else "H"), file.read(8 if big else 2))
        if entries > MAX_TIFF_ENTRIES:
            raise ImageError(f"TIFF directory of {entries:,} entries: expected at most {MAX_TIFF_ENTRIES:,}")
        directory = file.read(entries * step)
        total = 0
        values: dict[int, int] = {}
        counts: dict[int, int] = {}
        arrays: dict[int, tuple[int, int, bytes]] = {}
        for at in range(0, len(directory), step):
            tag, kind, count = struct.unpack_from(order + ("HHQ" if big else "HHI"), directory, at)
            total += count * _TIFF_SIZES.get(kind, 0)
            counts[tag] = count
            arrays[tag] = kind, count, directory[at + (12 if big else 8) : at + step]
            code = {3: "H", 4: "I", 16: "Q" if big else ""}.get(kind)
            if count == 1 and code:
                (values[tag],) = struct.unpack_from(order + code, directory, at + (12 if big else 8))
    except (struct.error, OSError, OverflowError, ValueError):
        return
    size = _size(file)
    if total > size:
        raise ImageError(f"TIFF directory claims {total:,} bytes of values, found a file of {size:,}")
    if total > MAX_METADATA:
        raise ImageError(f"TIFF with {total:,} bytes of metadata: expected at most {MAX_METADATA:,}")
    if 322 in values and 323 in values and 0 < values[322] * values[323] < MIN_TILE_AREA:
        raise ImageError(f"TIFF tiles of {values[322]} x {values[323]} pixels: expected at least 16 x 16")
    # What is compressed libtiff reads by itself from a local file; Pillow gives it any other whole.
    if size > MAX_WHOLE_FILE and values.get(259, 1) != 1 and not _is_local(file):
        raise ImageError(f"compressed TIFF of {size:,} bytes in an archive: expected at most {MAX_WHOLE_FILE:,}")
    pieces = max(counts.get(273, 0), counts.get(324, 0))
    if pieces > MAX_TIFF_PIECES:
        raise ImageError(f"TIFF of {pieces:,} strips or tiles: expected at most {MAX_TIFF_PIECES:,}")
    # JPEG inside: each strip or tile is one, usually of one scan; libtiff allows 100 scans in each.
    if values.get(259) in (6, 7):
        found = list(_pieces(file, arrays, order))
        # They may all be the same bytes, which are read here and by libtiff as often as they are named.
        read = sum(min(length, max(0, size - place)) for place, length in found)
        if read > MAX_READ:
            raise ImageError(f"TIFF with {read:,} bytes in strips or tiles of JPEG: expected at most {MAX_READ:,}")
        scans = sum(_scans_within(file, *piece) for piece in found)
        most = MAX_SCANS + 10 * pieces
        if scans > most:
            raise ImageError(f"TIFF of {scans:,} JPEG scans in {pieces:,} strips or tiles")


def _pieces(file: BinaryIO, arrays: dict[int, tuple[int, int, bytes]], order: str) -> Iterator[tuple[int, int]]:
    """Offset and length of each strip or tile of a TIFF's first image; other pages are not decoded."""
    places, lengths = (324, 325) if 324 in arrays else (273, 279)
    try:
        found = [_integers(file, *arrays[tag], order) for tag in (places, lengths)]
    except (KeyError, struct.error, OSError):
        return
    yield from zip(*found, strict=False)


def _integers(file: BinaryIO, kind: int, count: int, held: bytes, order: str) -> tuple[int, ...]:
    code = {3: "H", 4: "I", 16: "Q"}[kind]
    size = struct.calcsize(f"{order}{count}{code}")
    if size > len(held):
        file.seek(int.from_bytes(held, "little" if order == "<" else "big"))
        held = file.read(size)
    return struct.unpack_from(f"{order}{count}{code}", held)


def _scans_within(file: BinaryIO, place: int, length: int) -> int:
    file.seek(place)
    scans, last = 0, b""
    while length > 0 and (block := file.read(min(_BLOCK, length))):
        scans += (last + block).count(b"\xff\xda")
        last = b"\xff" if block.endswith(b"\xff") else b""
        length -= len(block)
    return scans
