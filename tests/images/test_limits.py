"""Images that would take minutes or gigabytes are rejected by their structure; real ones are decoded as before."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import fuzz_images
import numpy as np
import pytest
from PIL import Image

from sppfeat.errors import ImageError
from sppfeat.images import limits as decoding_limits
from sppfeat.images import resizing as preprocess
from sppfeat.images.limits import MAX_WORKING_SET, working_set
from sppfeat.images.reading import _FORMATS, open_image, read_image
from sppfeat.recipe import Recipe

PHOTOS = sorted(path for path in (Path(__file__).parents[2] / "photos").rglob("*.jpg"))


def noise(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], bands), np.uint8)
    return Image.fromarray(pixels, mode) if bands > 1 else Image.fromarray(pixels[..., 0])


def encoded(kind: str, image: Image.Image | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    (image or noise()).save(buffer, kind, **options)
    return buffer.getvalue()


def scans(count: int) -> bytes:
    content = encoded("JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * count + b"\xff\xd9"


def png_chunks(count: int) -> bytes:
    content = encoded("PNG")
    body = b"teXt"
    return content[:33] + (struct.pack(">I", 0) + body + struct.pack(">I", zlib.crc32(body))) * count + content[33:]


def tiff(entries: list[tuple[int, int, int, int]]) -> bytes:
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(2000)


def shared_strips(count: int, size: int) -> bytes:
    """A TIFF of JPEG strips that are all the same bytes."""
    places, lengths = struct.pack("<I", 8) * count, struct.pack("<I", size) * count
    values = {256: 64, 257: 8 * count, 258: 8, 259: 7, 262: 1, 277: 1, 278: 8}
    entries = [(tag, 4, 1, value) for tag, value in values.items()]
    entries += [(273, 4, count, 8 + size), (279, 4, count, 8 + size + len(places))]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    head = b"II*\0" + struct.pack("<I", 8 + size + len(places + lengths))
    return head + bytes(size) + places + lengths + struct.pack("<H", len(entries)) + directory + bytes(4)


JPEG = encoded("JPEG")
COMMENT = b"\xff\xfe\x00\x04\xff\xd9"  # holds the bytes of an end marker
HOSTILE = {
    "scans": (scans(5000), r"progressive JPEG of 5,\d{3} scans: expected at most 100"),
    "hidden scans": (scans(5000).replace(b"\xff\xda", COMMENT + b"\xff\xda"), "progressive JPEG of 5,"),
    "fill": (JPEG[:2] + b"\xff" * 20_000_000 + JPEG[2:], "JPEG with more than 65,536 fill bytes"),
    "junk": (JPEG[:2] + b"\xff\xfe\0\2" + bytes(20_000_000) + JPEG[2:], "JPEG with more than 65,536 fill bytes"),
    "segments": (JPEG[:2] + b"\xff\xfe\0\2" * 1_000_000 + JPEG[2:], "JPEG of more than 5,000 segments"),
    "chunks": (png_chunks(1_000_000), "PNG of more than 1,000 other chunks"),
    "blocks": (b"GIF89a" + bytes(7) + b"!\xfe" + b"\1a" * 1_000_000, "GIF of more than 10,000 blocks"),
    "tiles": (
        tiff([(256, 4, 1, 4000), (257, 4, 1, 4000), (322, 3, 1, 1), (323, 3, 1, 1)]),
        "TIFF tiles of 1 x 1 pixels: expected at least 16 x 16",
    ),
    "values": (tiff([(256, 4, 1, 4000), (700, 1, 2000, 8), (701, 1, 2000, 8)]), "TIFF directory claims 4,"),
    "entries": (b"II*\0" + struct.pack("<IH", 8, 60_000) + bytes(720_000), "TIFF directory of 60,000 entries"),
    "shared strips": (shared_strips(5_000, 1 << 20), "TIFF with 5,242,880,000 bytes in strips or tiles of JPEG"),
    "runs": (b"BM" + bytes(28) + b"\1\0\0\0" + bytes(9_000_000), "run-length BMP of 9,"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_structure_is_refused_at_once(tmp_path, name):
    content, reason = HOSTILE[name]
    path = tmp_path / "image"
    path.write_bytes(content)
    begun = time.thread_time()
    with pytest.raises(ImageError, match=reason):
        open_image(str(path))
    assert time.thread_time() - begun < 2


def test_what_follows_the_end_of_a_jpeg_is_not_counted(tmp_path):
    path = tmp_path / "motion.jpg"
    path.write_bytes(JPEG + b"\xff\xda" * 5000)
    assert read_image(str(path)).size == (64, 48)


@pytest.mark.parametrize(
    ("kind", "mode", "side", "passes"),
    [
        ("JPEG", "RGB", 10_000, True),
        ("PNG", "RGBA", 10_000, True),
        ("PNG", "RGBA", 13_000, False),
        ("WEBP", "RGBA", 5_000, True),
        ("WEBP", "RGBA", 13_000, False),
    ],
)
def test_memory_is_bounded_by_format_mode_and_size(tmp_path, kind, mode, side, passes):
    path = tmp_path / "image"
    path.write_bytes(encoded(kind, noise(mode)))
    image, _ = open_image(str(path))
    with image:
        image._size = (side, side)
        assert (working_set(image) <= MAX_WORKING_SET) == passes
        if not passes:
            with pytest.raises(ImageError, match=r"13000 x 13000 pixels .*MiB, expected at most 1,024"):
                decoding_limits.check_working_set(image)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "L"])
def test_converting_in_strips_changes_no_pixel(tmp_path, monkeypatch, mode):
    image = noise("RGB").quantize(16) if mode == "P" else noise(mode)
    path = tmp_path / "image"
    image.save(path, "TIFF" if mode == "CMYK" else "PNG", **({"transparency": 3} if mode == "P" else {}))
    with Image.open(path) as opened:
        if mode in ("RGBA", "LA", "P"):
            rgba = opened.convert("RGBA")
            plain = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
        else:
            plain = opened.convert("RGB")
    monkeypatch.setattr("sppfeat.images.reading._STRIP_PIXELS", 64 * 5)
    assert np.array_equal(read_image(str(path)).pixels, plain)


def test_photos_are_decoded_as_pillow_does():
    for path in PHOTOS:
        with Image.open(path) as image:
            plain = np.asarray(image.convert("RGB"))
        assert np.array_equal(read_image(str(path), orientation="ignore").pixels, plain)
    assert PHOTOS


@pytest.mark.skipif("AVIF" not in _FORMATS, reason="this Pillow reads no AVIF")
def test_a_damaged_avif_is_named(tmp_path):
    path = tmp_path / "image.avif"
    path.write_bytes(encoded("AVIF")[:40])
    with pytest.raises(ImageError, match="damaged AVIF header"):
        open_image(str(path))


def test_libtiff_writes_nothing_itself(tmp_path):
    content = bytearray(encoded("TIFF", compression="tiff_lzw"))
    content[100:600] = b"\xff" * 500
    path = tmp_path / "image.tif"
    path.write_bytes(content)
    code = (
        "import sys\nfrom PIL import Image\n"
        "if sys.argv[2] == 'ours':\n    from sppfeat.images.reading import read_image as read\n"
        "else:\n    read = lambda path: Image.open(path).load()\n"
        "try:\n    read(sys.argv[1])\nexcept Exception:\n    print('failed')\n"
    )
    for reader, silent in (("ours", True), ("pillow", False)):
        run = subprocess.run([sys.executable, "-c", code, path, reader], capture_output=True, text=True, check=True)
        assert run.stdout == "failed\n"
        assert (run.stderr == "") == silent


@pytest.mark.parametrize(
    ("name", "draft", "waits"),
    [
        ("baseline.jpg", True, False),
        ("baseline.jpg", False, True),
        ("progressive.jpg", True, True),  # coefficients of the whole image, behind whatever draft
        ("small.png", False, False),
        ("small.webp", False, True),
    ],
)
def test_an_image_waits_for_the_memory_that_decoding_takes(tmp_path, monkeypatch, name, draft, waits):
    memory = preprocess.DecodingMemory(2 << 20)
    monkeypatch.setattr(preprocess, "_decoding_memory", lambda: memory)
    side = 1600 if name.endswith("jpg") else 300
    Image.new("RGB", (side, side)).save(tmp_path / name, progressive=name == "progressive.jpg")
    recipe = Recipe(scales=(64,), jpeg_draft=draft)
    thread = threading.Thread(target=preprocess.prepare_image, args=(str(tmp_path / name), recipe), daemon=True)
    with memory.take(1 << 20):
        thread.start()
        thread.join(0.3 if waits else 10)
        assert thread.is_alive() == waits
    thread.join(10)
    assert not thread.is_alive()


def test_images_under_decoding_take_no_more_than_their_memory_or_one_is_alone():
    memory, taken, peaks = preprocess.DecodingMemory(10), list[int](), list[list[int]]()
    lock = threading.Lock()

    def decode(amount: int) -> None:
        with memory.take(amount):
            with lock:
                taken.append(amount)
                peaks.append(list(taken))
            time.sleep(0.001)
            with lock:
                taken.remove(amount)

    threads = [threading.Thread(target=decode, args=(amount,)) for amount in [3, 4, 20, 1, 6, 2] * 8]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(peaks) == 48
    assert all(sum(peak) <= 10 or peak == [20] for peak in peaks)
    assert any(len(peak) > 1 for peak in peaks)


def test_the_images_to_damage_are_sound_and_named_correctly(tmp_path):
    for kind, content in fuzz_images.seeds().items():
        path = tmp_path / "image"
        path.write_bytes(content)
        image, _ = open_image(str(path))
        with image:
            assert image.format == kind.split()[0]
            assert ("tiles" in kind) == (image.format == "TIFF" and 322 in image.tag_v2)  # type: ignore[attr-defined]
            assert ("interlaced" in kind) == bool(image.info.get("interlace"))
            assert kind != "TIFF strips" or len(image.tag_v2[273]) == 6  # type: ignore[attr-defined]
        assert read_image(str(path)).size == (64, 48)


def test_damaged_images_of_every_kind_are_decoded_or_refused(tmp_path):
    kinds = len(fuzz_images.seeds())
    report = fuzz_images.run(150 * kinds, 1, tmp_path)  # a few seconds: 300 of every format, at least
    assert report["bad"] == []
    assert report["images"] == 150 * kinds
    assert report["decoded"] > kinds


@pytest.mark.parametrize("pages", [1, 40])
def test_pages_that_are_not_decoded_are_not_counted(tmp_path: Path, pages: int) -> None:
    """A scanned document: JPEG in strips, page by page."""
    page = Image.effect_noise((600, 600), 50).convert("RGB")
    page.save(tmp_path / "a.tif", compression="jpeg", save_all=True, append_images=[page] * (pages - 1))
    assert read_image(str(tmp_path / "a.tif")).size == (600, 600)


def test_pixels_that_look_like_run_length_in_the_oldest_bmp(tmp_path: Path) -> None:
    pixels = bytearray(bytes(4 * 24))
    pixels[4:8] = b"\1\0\0\0"
    head = b"BM" + struct.pack("<IHHI", 26 + len(pixels), 0, 0, 26) + struct.pack("<IHHHH", 12, 8, 4, 1, 24)
    (tmp_path / "a.bmp").write_bytes(head + pixels)
    assert read_image(str(tmp_path / "a.bmp")).size == (8, 4)
