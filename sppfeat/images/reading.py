"""Reading one image safely: any size, any common color mode, upright, as 8-bit RGB."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
from typing import Final, Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from sppfeat.errors import ImageError, one_line
from sppfeat.images.items import AVIF, Fingerprint, Item, open_file
from sppfeat.images.limits import COEFFICIENTS, BoundedFile, check_structure, check_working_set

# Only these decoders are ever tried, so no file can reach those that start programs (EPS) or follow links.
_FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", *(("AVIF",) if AVIF else ()))
# The first bytes of these formats; only to tell a damaged file from something else.
_MAGIC: Final = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"RIFF": "WebP",
    b"GIF8": "GIF",
    b"BM": "BMP",
}
_AVIF_BRANDS: Final = (b"ftypavif", b"ftypavis")  # after the length of the first box
# Kinds that nothing here decodes, by the bytes at a place in the file.
_UNREAD: Final = (
    *((4, b"ftyp" + brand, "HEIC") for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")),
    *((4, b"ftyp" + brand, "AVIF") for brand in (b"avif", b"avis")),
    (4, b"JXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"jP  ", "JPEG 2000"),
    (0, b"8BPS", "a Photoshop document"),
)
_ORIENTATION_TAG: Final = 0x0112  # EXIF 2.3, 4.6.4 A
_BITS_TAG: Final = 258  # TIFF 6.0, section 3
_PHOTOMETRIC_TAG: Final = 262
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pixels converted at a time: temporary copies are of these, not of the whole image.
_STRIP_PIXELS: Final = 4_000_000

# Pillow's blocks of 16 MB stay in glibc's per-thread heaps when they are freed: gigabytes after some large images.
# Above 32 MB (mallopt(3), M_MMAP_THRESHOLD) a block goes back to the system at once.
Image.core.set_block_size(64 << 20)  # type: ignore[attr-defined]

# Pillow logs some errors that it also raises; without any handler Python would print them, without the file's name.
logging.getLogger("PIL").addHandler(logging.NullHandler())

# libtiff writes messages to descriptor 2 itself, whatever file that is, and names no image; Pillow raises failures all
# the same. A Pillow built without libtiff has no such function.
with contextlib.suppress(AttributeError, OSError):
    _libtiff = ctypes.CDLL(Image.core.__file__)  # type: ignore[attr-defined]
    for _set_handler in (_libtiff.TIFFSetErrorHandler, _libtiff.TIFFSetWarningHandler):
        _set_handler.restype = ctypes.c_void_p
        _set_handler.argtypes = [ctypes.c_void_p]
        _set_handler(None)
_UNDO: Final = _UPRIGHT | {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


class FullImage(NamedTuple):
    """8-bit RGB pixels at full size, and their width and height."""

    pixels: Image.Image
    size: tuple[int, int]


def open_image(source: Item | str) -> tuple[Image.Image, Fingerprint]:
    """Open the header of an item's image, or a file's; close the image when done.

    Raises ImageError with the reason, without the path.
    """
    raw, fingerprint = open_file(source) if isinstance(source, str) else source.open()
    bounded = BoundedFile(raw)
    file = io.BufferedReader(bounded)
    try:
        if not bounded.size:
            raise ImageError("empty file (0 bytes)")
        coefficients = check_structure(file)
        bounded.bound()
        image = Image.open(file, formats=_FORMATS)
        image.info[COEFFICIENTS] = coefficients
        # The image now owns the file: closing one closes the other.
        image._exclusive_fp = True
        return image, fingerprint
    except ImageError:
        file.close()
        raise
    except UnidentifiedImageError:
        file.seek(0)
        start = file.read(12)
        file.close()
        kinds = [kind for magic, kind in _MAGIC.items() if start.startswith(magic)]
        if AVIF and start[4:] in _AVIF_BRANDS:
            kinds = ["AVIF"]
        if kinds:
            raise ImageError(
                f"cannot be decoded: damaged {kinds[0]} header, or unsupported kind of {kinds[0]}"
            ) from None
        expected = f"not an image: expected {', '.join(_FORMATS)}"
        for place, magic, kind in _UNREAD:
            if start.startswith(magic, place):
                raise ImageError(f"{expected}, found {kind}; convert it to JPEG or PNG") from None
        raise ImageError(f"{expected}, found a file that starts with {_readable(start)}") from None
    except Exception as error:  # a damaged header can raise almost anything inside a decoder
        file.close()
        raise ImageError(f"cannot be decoded: {one_line(error)}") from None


def _readable(start: bytes) -> str:
    """Bytes as text where they are, else as numbers."""
    text = start.decode("latin-1")
    return f"'{text}'" if text.isascii() and text.isprintable() else f"the bytes {start.hex(' ')}"


def upright_size(image: Image.Image, *, orientation: str) -> tuple[tuple[int, int], int]:
    """Width and height as `decode` will return them, and the EXIF orientation (1 to 8), before any pixel is decoded."""
    if image.format == "PNG" and "exif" not in image.info:
        _load(image)  # EXIF may follow the pixels; `getexif` would decode them, and blame their damage on EXIF
    try:
        exif = image.getexif()
        reason = "damaged" if not exif and not _is_empty_exif(image.info.get("exif") or b"") else None
    except Exception as error:  # a damaged EXIF block can raise almost anything inside its reader
        exif, reason = Image.Exif(), one_line(error)
    if reason is not None and orientation == "exif":
        raise ImageError(f"EXIF cannot be read ({reason}); orientation 'ignore' takes the pixels as stored")
    tag = exif.get(_ORIENTATION_TAG, 1)
    turn = tag if isinstance(tag, int) and tag in _UPRIGHT else 1
    # Pillow's TIFF reader turns images upright by itself, and reports the upright size from the start. It does so by
    # the TIFF's own tag alone, while `getexif` and the turning also follow XMP.
    swapped = image.format == "TIFF" and image.tag_v2.get(_ORIENTATION_TAG) in (5, 6, 7, 8)  # type: ignore[attr-defined]
    swap = (turn >= 5 and orientation == "exif") != swapped
    return (image.size[::-1] if swap else image.size), turn


def _is_empty_exif(block: bytes) -> bool:
    """Whether an EXIF block is valid but empty: no bytes, or a directory without entries, as some programs write."""
    body = block.removeprefix(b"Exif\0\0")
    order: Literal["little", "big"] = "little" if body[:2] == b"II" else "big"
    start = int.from_bytes(body[4:8], order)
    return not body or (body[:4] in (b"II*\0", b"MM\0*") and body[start : start + 2] == b"\0\0")


def _load(image: Image.Image) -> None:
    check_working_set(image)
    try:
        image.load()
    except Exception as error:  # a damaged body can raise almost anything inside a decoder
        raise ImageError(f"cannot be decoded: {one_line(error)}") from None


def decode(image: Image.Image, turn: int, *, orientation: str) -> Image.Image:
    """Decode an opened image to 8-bit RGB, upright (`exif`) or as stored (`ignore`).

    Gray and palette images become RGB; transparent pixels are laid over white; CMYK is converted without a profile;
    16-bit gray keeps its upper 8 bits; color profiles (ICC) are not applied. Raises ImageError.
    """
    turned_by_pillow = image.format == "TIFF"
    turns = turn in _UPRIGHT and (orientation == "exif") != turned_by_pillow
    check_working_set(image, turned=turns)
    _load(image)
    try:
        pixels = _to_rgb(image)
    except ImageError:
        raise
    except Exception as error:  # what a decoder accepted can still fail here
        raise ImageError(f"cannot be decoded: {one_line(error)}") from None
    if turns:
        pixels = pixels.transpose((_UNDO if turned_by_pillow else _UPRIGHT)[turn])
    return pixels


def read_image(source: Item | str, *, orientation: str = "exif") -> FullImage:
    """Read one image, an item's or a file's, at full size; see `decode`.

    Raises ImageError with the reason, without the path.
    """
    image, _ = open_image(source)
    with image:
        size, turn = upright_size(image, orientation=orientation)
        return FullImage(decode(image, turn, orientation=orientation), size)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    rows = max(1, _STRIP_PIXELS // image.width)
    if image.height <= rows:
        return _convert(image, image)
    pixels = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        pixels.paste(_convert(image.crop(box), image), box)
    return pixels


def _convert(strip: Image.Image, image: Image.Image) -> Image.Image:
    """A strip of an image, or all of it, as RGB; the image knows what the pixels mean."""
    if image.mode.startswith("I;16"):
        # Pillow returns 12-bit TIFF samples, and those that count from white, just as they are stored.
        tags = getattr(image, "tag_v2", {})
        gray = (np.asarray(strip) >> (tags.get(_BITS_TAG, (16,))[0] - 8)).astype(np.uint8)
        return Image.fromarray(255 - gray if tags.get(_PHOTOMETRIC_TAG) == 0 else gray).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit integer" if image.mode == "I" else "floating-point"
        raise ImageError(f"{kind} pixels have no fixed range: expected 8 or 16 bits per channel")
    if strip.has_transparency_data:
        rgba = strip.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return strip.convert("RGB")
