"""Files that only look small: holes in a file, buffers larger than the image, a second copy."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import time
import zlib

import fuzz_images
import numpy as np
import pytest
from PIL import Image

from sppfeat.errors import ImageError
from sppfeat.images import limits as decoding_limits
from sppfeat.images.limits import MAX_WORKING_SET, check_structure, check_working_set, working_set
from sppfeat.images.reading import _FORMATS, decode, open_image, read_image

NEEDS_AVIF = pytest.mark.skipif("AVIF" not in _FORMATS, reason="this Pillow reads no AVIF")


def encoded(kind: str, mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (64, 48)).save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(magic: bytes, *entries: tuple[int, int, int, int]) -> bytes:
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return magic + struct.pack("<IH", 8, len(entries)) + directory + bytes(2000)


def run_length(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHII", 0, 0, 0, 1078, 40, width, height, 1, 8, 1, 0) + bytes(2000)


PNG = encoded("PNG")
TAG = (256, 4, 1, 64), (257, 4, 1, 48)
# Content, the size that a hole brings the file to, and what the reason must say.
HOSTILE = {
    "WebP": (encoded("WEBP"), 3 << 30, "WebP file of 3,221,225,472 bytes"),
    "chunk": (
        PNG[:33] + struct.pack(">I", 2 * 10**9) + b"prVt",
        2 * 10**9 + 100,
        "PNG with 2,000,000,013 bytes of meta",
    ),
    "text": (PNG[:33] + struct.pack(">I", 70 << 20) + b"iTXt", 80 << 20, "PNG with 73,400,333 bytes of meta"),
    "tag": (tiff(b"II*\0", *TAG, (700, 7, 2 * 10**9, 300)), 3 << 30, "TIFF with 2,000,000,008 bytes of metadata"),
    "other TIFF magic": (tiff(b"II\0*", *TAG, (322, 3, 1, 1), (323, 3, 1, 1)), 0, "TIFF tiles of 1 x 1 pixels"),
    "junk": (b"GIF89a" + bytes(7), 40 << 20, "GIF with more than 65,536 fill bytes"),
    "behind the pixels": (
        PNG[:-12] + struct.pack(">I", 1 << 30) + b"IDAT",
        3 << 29,
        r"PNG with 1,073,7\d\d,\d\d\d bytes of packed pixels: expected at most 1,0",
    ),
    "blocks behind junk": (b"GIF89a" + bytes(8) + b"!\xfe" + b"\1a" * 20_000, 0, "GIF of more than 10,000 blocks"),
    "cut-off rows": (run_length(13000, 13000), 0, "run-length BMP of 13000 x 13000 pixels"),
    "rows from the top": (run_length(13000, -13000), 0, "run-length BMP of 13000 x 13000 pixels"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_held_in_memory_is_bounded(tmp_path, name):
    content, size, reason = HOSTILE[name]
    path = tmp_path / "image"
    path.write_bytes(content)
    if size:
        os.truncate(path, size)
    begun = time.thread_time()
    with pytest.raises(ImageError, match=reason):
        open_image(str(path))
    assert time.thread_time() - begun < 2


@NEEDS_AVIF
def test_an_avif_is_held_in_memory_too(tmp_path):
    path = tmp_path / "image.avif"
    path.write_bytes(encoded("AVIF"))
    os.truncate(path, 3 << 30)
    with pytest.raises(ImageError, match="AVIF file of 3,221,225,472 bytes"):
        open_image(str(path))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_is_not_read_to_the_end_of_a_hole(tmp_path, progressive):
    path = tmp_path / "image.jpg"
    path.write_bytes(encoded("JPEG", progressive=progressive))
    os.truncate(path, 1 << 40)
    begun = time.thread_time()
    assert read_image(str(path)).size == (64, 48)
    assert time.thread_time() - begun < 4


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"restart_marker_blocks": 4}), ("GIF", {})])
def test_a_hole_in_the_midst_of_the_pixels_is_not_read_to_its_end(tmp_path, monkeypatch, kind, options):
    monkeypatch.setattr(decoding_limits, "MAX_READ", 1 << 24)
    path = tmp_path / "image"
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (640, 640), np.uint8))
    pixels.save(path, kind, **options)
    os.truncate(path, path.stat().st_size // 2)
    os.truncate(path, 1 << 40)
    begun = time.thread_time()
    with pytest.raises(ImageError, match="cannot be decoded: more than 16,777,216 bytes of pixels"):
        read_image(str(path))
    assert time.thread_time() - begun < 2


def test_a_jpeg_inside_a_tiff_is_not_read_to_the_end_of_a_hole(tmp_path):
    path = tmp_path / "image.tif"
    Image.new("RGB", (64, 48)).save(path, compression="jpeg")
    os.truncate(path, 1 << 40)
    begun = time.thread_time()
    assert read_image(str(path)).size == (64, 48)
    assert time.thread_time() - begun < 4


def test_several_scans_that_do_not_end_are_refused(tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(encoded("JPEG", progressive=True)[:-2])
    os.truncate(path, 1 << 40)
    with pytest.raises(ImageError, match="JPEG of several scans in more than 268,435,456 bytes"):
        open_image(str(path))


def sized(content: bytes, width: int, height: int) -> bytes:
    """A JPEG with another size in its header."""
    frame = next(at for at in range(len(content)) if content[at : at + 2] in (b"\xff\xc0", b"\xff\xc2"))
    return content[: frame + 5] + struct.pack(">HH", height, width) + content[frame + 9 :]


@pytest.mark.parametrize(
    ("side", "subsampling", "passes"), [(10_000, 0, True), (11_000, 0, False), (12_000, 2, True), (13_000, 2, False)]
)
def test_coefficients_count_by_their_subsampling(tmp_path, side, subsampling, passes):
    path = tmp_path / "image.jpg"
    path.write_bytes(sized(encoded("JPEG", progressive=True, subsampling=subsampling), side, side))
    with open(path, "rb") as file:
        if passes:
            check_structure(file)
        else:
            with pytest.raises(ImageError, match=r"JPEG of several scans\): decoding takes about 1,\d{3} MiB"):
                check_structure(file)


def tiled(width: int, height: int, side: int) -> bytes:
    """A gray TIFF of one deflated tile, which Pillow cannot write."""
    tile = zlib.compress(bytes(64 * 64))
    tags = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 200, 325: len(tile)}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory).ljust(200, b"\0") + tile


def test_a_tile_larger_than_its_image_counts(tmp_path):
    path = tmp_path / "image.tif"
    path.write_bytes(tiled(64, 48, 64))
    assert read_image(str(path)).size == (64, 48)
    path.write_bytes(tiled(64, 48, 43_008))
    with pytest.raises(ImageError, match=r"64 x 48 pixels \(TIFF, L\): decoding takes about 1,764 MiB"):
        read_image(str(path))


@pytest.mark.parametrize(
    ("kind", "mode", "side"), [("PNG", "RGBA", 11_500), ("PNG", "L", 13_300), ("JPEG", "CMYK", 11_500)]
)
def test_turning_takes_one_copy_more(tmp_path, kind, mode, side):
    path = tmp_path / "image"
    path.write_bytes(encoded(kind, mode))
    image, _ = open_image(str(path))
    with image:
        image._size = (side, side)
        assert working_set(image) <= MAX_WORKING_SET < working_set(image, turned=True)
        with pytest.raises(ImageError, match="decoding takes about 1,5"):
            decode(image, 6, orientation="exif")


GRAY = (258, 4, 1, 8), (262, 4, 1, 1), (277, 4, 1, 1)
SIDES = (256, 4, 1, 4000), (257, 4, 1, 4000)
# Tags, offsets of the pieces, and what the reason must say.
MULTIPLIED = {
    "wide tiles": (
        [(256, 4, 1, 64), (257, 4, 1, 640), (259, 4, 1, 1), (322, 4, 1, 1 << 24), (323, 4, 1, 16)],
        [2000] * 40,
        r"64 x 640 pixels \(TIFF, L\): they unpack to 10,240 MiB, expected at most 640",
    ),
    "wide tiles, deflated": (
        [(256, 4, 1, 64), (257, 4, 1, 640), (259, 4, 1, 8), (322, 4, 1, 1 << 24), (323, 4, 1, 16)],
        [2000] * 40,
        r"64 x 640 pixels \(TIFF, L\): they unpack to 10,240 MiB",
    ),
    "the same strips again and again": (
        [*SIDES, (259, 4, 1, 1), (278, 4, 1, 2000)],
        [2000] * 4000,
        r"4000 x 4000 pixels \(TIFF, L\): they unpack to 30,518 MiB",
    ),
    "strips far apart": (
        [*SIDES, (259, 4, 1, 1), (278, 4, 1, 2000)],
        [2000, 3_000_002_000],
        r"4000 x 4000 pixels \(TIFF, L\): decoding takes about 5,737 MiB",
    ),
}


@pytest.mark.parametrize("name", MULTIPLIED)
def test_a_tiff_takes_no_more_than_its_pixels(tmp_path, name):
    tags, places, reason = MULTIPLIED[name]
    first = 324 if tags[-1][0] == 323 else 273
    lists = [(first, 4, len(places), 300), (325 if first == 324 else 279, 4, len(places), 300)]
    content = tiff(b"II*\0", *sorted([*GRAY, *tags, *lists]))[:300] + struct.pack(f"<{len(places)}I", *places)
    path = tmp_path / "image.tif"
    path.write_bytes(content)
    os.truncate(path, max(places) + 300_000_000)
    begun = time.thread_time()
    with pytest.raises(ImageError, match=reason):
        read_image(str(path))
    assert time.thread_time() - begun < 2


@pytest.mark.parametrize(("side", "passes"), [(9000, True), (10_000, False)])
def test_16_bits_of_four_channels_unpack_to_twice_as_much(tmp_path, side, passes):
    path = tmp_path / "image.png"
    path.write_bytes(fuzz_images.seeds()["PNG deep rgba"])
    image, _ = open_image(str(path))
    with image:
        image._size = (side, side)
        assert working_set(image) <= MAX_WORKING_SET
        if passes:
            check_working_set(image)
        else:
            with pytest.raises(ImageError, match="they unpack to 763 MiB, expected at most 640"):
                check_working_set(image)


def test_what_sound_images_unpack_to_is_their_pixels(tmp_path, monkeypatch):
    seeds = fuzz_images.seeds() | {"TIFF planar": by_plane(64, 48)}
    expected = {"PNG rgb": 3, "PNG rgba": 4, "PNG deep": 2, "PNG palette": 1, "PNG interlaced": 3}
    expected |= {"TIFF raw": 3, "TIFF strips": 3, "TIFF tiff_lzw": 3, "TIFF jpeg": 3, "TIFF deep": 2, "TIFF planar": 3}
    expected |= {"TIFF tiles, raw": 1, "TIFF tiles, deflate": 1}
    for kind, depth in expected.items():
        path = tmp_path / "image"
        path.write_bytes(seeds[kind])
        monkeypatch.setattr(decoding_limits, "MAX_UNPACKED", 64 * 48 * depth)
        assert read_image(str(path)).size == (64, 48), kind
        monkeypatch.setattr(decoding_limits, "MAX_UNPACKED", 64 * 48 * depth - 1)
        with pytest.raises(ImageError, match="they unpack to"):
            read_image(str(path))


def by_plane(width: int, height: int) -> bytes:
    """An uncompressed TIFF of three planes in strips of 16 rows, which Pillow cannot write."""
    strips = 3 * height // 16
    size = width * 16
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 2, 277: 3, 278: 16, 284: 2}
    entries = [(tag, 4, 1, value) for tag, value in tags.items() if tag != 258]
    entries += [(258, 3, 3, 400), (273, 4, strips, 500), (279, 4, strips, 600)]
    content = tiff(b"II*\0", *sorted(entries))[:400].ljust(400, b"\0") + struct.pack("<3H", 8, 8, 8)
    content = content.ljust(500, b"\0") + struct.pack(f"<{strips}I", *(1000 + size * i for i in range(strips)))
    content = content.ljust(600, b"\0") + struct.pack(f"<{strips}I", *[size] * strips)
    return content.ljust(1000, b"\0") + bytes(strips * size)


def test_tags_of_another_type_cause_no_traceback(tmp_path):
    path = tmp_path / "image.tif"
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(path, compression="tiff_lzw", tiffinfo={278: 48})
    content = bytearray(path.read_bytes())
    at = next(
        at for at in range(len(content)) if content[at : at + 2] == struct.pack("<H", 278) and content[at + 3] == 0
    )
    content[at + 2 : at + 12] = struct.pack("<HI", 2, 4) + b"abc\0"
    path.write_bytes(content)
    try:
        assert read_image(str(path)).size == (64, 48)
    except ImageError as error:
        assert str(error).startswith("cannot be decoded")


MEASURE = """
import sys
from sppfeat.images.limits import working_set
from sppfeat.images.reading import open_image, read_image

def peak():
    with open("/proc/self/status") as status:
        return [int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM")][0]

small, large = sys.argv[1:]
read_image(small)
before = peak()
image, _ = open_image(large)
needed = working_set(image, turned=True)
image.close()
read_image(large)
print(peak() - before, needed)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")
def test_memory_of_real_reads_stays_below_the_estimate(tmp_path):
    """In separate processes, 9 megapixels each: how good the estimate is."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, mode, options in (
        ("rgb.jpg", "RGB", {}),
        ("cmyk.jpg", "CMYK", {}),
        ("rgba.png", "RGBA", {"compress_level": 1}),
        ("l.png", "L", {"compress_level": 1}),
        ("rgb.tif", "RGB", {"compression": "tiff_lzw", "tiffinfo": {278: 3000, 274: 6}}),
        ("rgba.webp", "RGBA", {"lossless": True, "method": 0}),
    ):
        turned = {} if "tiffinfo" in options else {"exif": exif}
        Image.new(mode, (64, 64)).save(tmp_path / f"small-{name}", **turned, **options)
        Image.new(mode, (3000, 3000)).save(tmp_path / name, **turned, **options)
        run = subprocess.run(
            [sys.executable, "-c", MEASURE, tmp_path / f"small-{name}", tmp_path / name],
            capture_output=True,
            text=True,
            check=True,
        )
        taken, needed = map(int, run.stdout.split())
        # Strips under conversion, some megabytes, weigh in an image as small as this.
        assert taken < needed + (48 << 20), (name, taken, needed)
        assert taken > needed / 3, (name, taken, needed)


KEPT = """
import sys, threading
from sppfeat.images.reading import read_image

def resident():
    with open("/proc/self/status") as status:
        return [int(line.split()[1]) for line in status if line.startswith("VmRSS")][0]

read_image(sys.argv[1])
before = resident()
for _ in range(3):
    thread = threading.Thread(target=lambda: read_image(sys.argv[2]).size)
    thread.start()
    thread.join()
print(resident() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
def test_the_memory_of_large_images_goes_back_to_the_system(tmp_path):
    for side in (64, 7000):
        Image.new("P", (side, side)).save(tmp_path / f"{side}.png", compress_level=1)
    run = subprocess.run(
        [sys.executable, "-c", KEPT, tmp_path / "64.png", tmp_path / "7000.png"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout) < 100 << 10  # kB, of 245 MB
