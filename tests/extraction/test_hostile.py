"""A folder of everything that goes wrong, among good images: each bad one is one failed row with a reason, each good
one is described as if it were alone."""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import pickle
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from sppfeat import Describer, Extraction, Recipe, RunOptions, Status, Store, extract_folder, open_store, verify_store
from sppfeat.backbones import backbone
from sppfeat.backbones.backbone import load_backbone
from sppfeat.images import name_to_path, path_to_name
from sppfeat_cli.progress import LISTED

PHOTOS = Path(__file__).parents[2] / "photos"
RECIPE = Recipe(backbone="timm:test_resnet", weights="random", scales=(64,), levels=(2, 1))
OPTIONS = RunOptions(device="cpu", num_workers=2)
FLAGS = ["--backbone", RECIPE.backbone, "--weights", "random", "--scales", "64", "--levels", "2,1", "--device", "cpu"]
# Python, torch and the network take about 0.6 GB; the bomb alone would be 3.6 GB of pixels.
MOST_MEMORY_KB = 1_500_000

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="file names are Unicode, and devices differ")


def encoded(kind: str, size: tuple[int, int] = (96, 80), seed: int = 0, **options) -> bytes:
    """A noisy image as bytes: noise does not compress, so that cutting a file anywhere cuts pixels."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *chunks, (b"IEND", b"")):
        content += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return content


def png_bomb(side: int) -> bytes:
    """`side` x `side` black pixels in about a thousandth of their size; deflated once and repeated, to be quick."""
    packer = zlib.compressobj()
    row = bytes(1 + 3 * side)
    head = packer.compress(row) + packer.flush(zlib.Z_FULL_FLUSH)
    packed = zlib.compressobj(wbits=-15)
    block = packed.compress(row * 100) + packed.flush(zlib.Z_FULL_FLUSH)
    return png(side, side, (b"IDAT", head + block * (side // 100)))


def tiff_header(width: int, height: int, *, at: int = 8) -> bytes:
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: height, 279: width * height % 2**32}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", at, len(tags)) + entries + bytes(100)


def bmp_header(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 0, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(50)


def gif_header(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + b"\x2c" + bytes(20)


def flipped(content: bytes, at: float, count: int = 64) -> bytes:
    start = int(len(content) * at)
    return content[:start] + bytes(b ^ 0x5A for b in content[start : start + count]) + content[start + count :]


class Trap:
    """Unpickling this would leave a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


JPEG, PNG, WEBP, GIF = (encoded(kind) for kind in ("JPEG", "PNG", "WEBP", "GIF"))
TIFF, LZW, BMP = encoded("TIFF"), encoded("TIFF", compression="tiff_lzw"), encoded("BMP")
PROGRESSIVE = encoded("JPEG", progressive=True)
BAD_EXIF = {
    "garbage": b"Exif\0\0what is this",
    "cut": b"Exif\0\0MM\0*\0\0\0\x08\0\x05\1\x12",
    "outside": b"Exif\0\0II*\0\xff\xff\xff\x7f\0\0",
    "zeros": b"Exif\0\0" + bytes(64),
}
NOT_AN_IMAGE, UNDECODABLE = "not an image: expected JPEG", "cannot be decoded: "

# Content by file name, and what the reason must say.
BAD_FILES: dict[bytes, tuple[bytes, str]] = {
    b"zero.jpg": (b"", r"empty file \(0 bytes\)"),
    b"one byte.jpg": (b"\xff", NOT_AN_IMAGE),
    b"text.jpg": (b"this is no image\n" * 50, NOT_AN_IMAGE + r".* starts with 'this is no i'"),
    b"error page.png": (b"<!DOCTYPE html><html>404</html>", NOT_AN_IMAGE),
    b"lfs pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", NOT_AN_IMAGE),
    b"._resource fork.jpg": (b"\0\5\x16\7" + bytes(100), NOT_AN_IMAGE),
    b"nothing but zeros.png": (bytes(5000), NOT_AN_IMAGE),
    b"random after a JPEG start.jpg": (b"\xff\xd8\xff\xe0" + random.Random(1).randbytes(4000), ""),
    b"random after a JFIF header.jpg": (JPEG[:20] + random.Random(2).randbytes(4000), ""),
    b"random after a PNG start.png": (PNG[:8] + random.Random(3).randbytes(4000), ""),
    b"random.webp": (b"RIFF\0\1\0\0WEBPVP8 " + random.Random(4).randbytes(4000), ""),
    b"svg.jpg": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', NOT_AN_IMAGE),
    b"ppm.jpg": (b"P6 2 2 255 " + bytes(12), NOT_AN_IMAGE),
    b"photo.jpg": (encoded("JPEG", (1, 1)), r"1 x 1 pixels: expected a short side of at least 8"),
    b"long.png": (encoded("PNG", (20000, 50)), r"20000 x 50 pixels: aspect ratio 400 exceeds 20"),
    b"high.jpg": (encoded("JPEG", (10, 3000)), r"10 x 3000 pixels: aspect ratio 300 exceeds 20"),
    b"bomb.png": (png_bomb(30000), UNDECODABLE + r".*900000000 pixels.* exceeds limit"),
    b"text bomb.png": (
        png(16, 16, (b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 26))), (b"IDAT", zlib.compress(bytes(49 * 16)))),
        UNDECODABLE + ".*[Dd]ecompressed data too large",
    ),
    b"huge.tif": (tiff_header(200000, 200000), UNDECODABLE + "Image size .* exceeds limit"),
    b"large.tif": (tiff_header(13000, 13000), UNDECODABLE + ".*truncated"),
    b"loop.tif": (tiff_header(64, 64, at=0), ""),
    b"directory behind the end.tif": (b"II*\0\xff\xff\xff\x7f" + bytes(50), ""),
    b"huge.bmp": (bmp_header(2**31 - 1, 2**31 - 1), UNDECODABLE + "Image size .* exceeds limit"),
    b"large.bmp": (bmp_header(13000, 13000), UNDECODABLE + ".*truncated"),
    b"negative.bmp": (bmp_header(-64, 64), ""),
    b"huge.gif": (gif_header(65535, 65535), UNDECODABLE + "Image size .* exceeds limit"),
    b"flat.png": (png(64, 0, (b"IDAT", b"")), ""),
    b"no pixels.png": (png(64, 64), ""),
    b"pixels of another size.png": (png(64, 64, (b"IDAT", zlib.compress(bytes(99)))), UNDECODABLE),
    b"float.tif": (b"", "floating-point pixels have no fixed range"),
    b"damaged.png": (flipped(PNG, 0.5), UNDECODABLE),
    b"damaged header.png": (flipped(PNG, 0, 20), NOT_AN_IMAGE),
    b"damaged.webp": (WEBP[:12] + flipped(WEBP[12:], 0, 60), ""),
    b"cut.webp": (WEBP[: len(WEBP) // 2], ""),
    b"cut.gif": (GIF[: len(GIF) // 2], UNDECODABLE),
    b"cut.bmp": (BMP[: len(BMP) // 2], UNDECODABLE + ".*truncated"),
    b"cut.tif": (LZW[:8] + LZW[8:][: len(LZW) // 2], ""),
    b"damaged.tif": (flipped(LZW, 0.3, 2000), UNDECODABLE),
    b"cut raw.tif": (TIFF[: len(TIFF) // 2], ""),
    # A name is an input too: a line break, an escape sequence, bytes that are no text, text that runs backwards.
    b"two\nlines.jpg": (b"", "empty"),
    b"\x1b[2J\x1b]0;title\x07\r.jpg": (b"", "empty"),
    b"\xff\xfe.jpg": (b"", "empty"),
    b"\xed\xa0\x80.jpg": (b"", "empty"),
    "\u202egpj.exe\u2028.jpg".encode(): (b"", "empty"),
    b"n" * 251 + b".jpg": (b"", "empty"),
}
for _cut in (1, 2, 3, 20, 100, 170, 400, len(JPEG) // 2, len(JPEG) * 9 // 10):
    BAD_FILES[b"cut at %d.jpg" % _cut] = (JPEG[:_cut], "")
    BAD_FILES[b"cut at %d, progressive.jpg" % _cut] = (PROGRESSIVE[:_cut], "")
for _kind, _block in BAD_EXIF.items():
    BAD_FILES[f"EXIF {_kind}.jpg".encode()] = (encoded("JPEG", exif=_block), r"EXIF cannot be read \(.+\)")
    BAD_FILES[f"EXIF {_kind}.png".encode()] = (encoded("PNG", exif=_block), r"EXIF cannot be read \(.+\)")

# All but the numbers of these is sound.
GOOD_FILES: dict[bytes, bytes] = {
    b"plain.jpg": encoded("JPEG", (90, 70), 1),
    b"UPPER.JPG": encoded("JPEG", (70, 90), 2, progressive=True),
    b"with space.png": encoded("PNG", (64, 64), 3),
    b"two\nlines, and good.png": encoded("PNG", (64, 64), 4),
    "ü日本 \u202e.webp".encode(): encoded("WEBP", (80, 64), 5),
    b"latin \xe9t\xe9.gif": encoded("GIF", (33, 50), 6),
    rb"back\slash \xff.tif": encoded("TIFF", (100, 31), 7, compression="tiff_lzw"),
    b" -dash.bmp": encoded("BMP", (8, 8), 8),
    b".hidden.png": encoded("PNG", (160, 8), 9),
    b"deep/er/PNG inside.jpg": encoded("PNG", (77, 77), 10),
    b"folder.jpg/inside.jpg": encoded("JPEG", (64, 64), 11),
    b"bytes behind the end.jpg": encoded("JPEG", (64, 64), 12) + b"appended" * 100,
    b"empty EXIF.jpg": encoded("JPEG", (64, 64), 13, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"),
    b"damaged profile.png": encoded("PNG", (64, 64), 14, icc_profile=b"no profile"),
    b"zz last.jpg": encoded("JPEG", (90, 70), 15),
}


@dataclass
class Hostile:
    """A folder, the reason that each bad name must have, and the good names."""

    folder: Path
    traps: Path
    reasons: dict[str, str] = field(default_factory=dict)
    good: list[str] = field(default_factory=list)

    def path(self, name: str) -> str:
        return name_to_path(str(self.folder), name)

    def bad(self, raw: bytes, reason: str) -> bytes:
        self.reasons[path_to_name(os.fsdecode(raw))] = reason
        return os.path.join(os.fsencode(self.folder), raw)


def build(folder: Path, traps: Path) -> Hostile:
    it = Hostile(folder, traps)
    folder.mkdir()
    for raw, content in GOOD_FILES.items():
        path = os.path.join(os.fsencode(folder), raw)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
        it.good.append(path_to_name(os.fsdecode(raw)))
    for raw, (content, reason) in BAD_FILES.items():
        with open(it.bad(raw, reason), "wb") as file:
            file.write(content)
    Image.fromarray(np.ones((40, 40), np.float32)).save(folder / "float.tif")
    Path(os.fsdecode(it.bad(b"pickle.jpg", NOT_AN_IMAGE))).write_bytes(pickle.dumps(Trap(traps / "pickle")))
    postscript = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n({traps}/eps) (w) file closefile showpage\n"
    Path(os.fsdecode(it.bad(b"eps.jpg", NOT_AN_IMAGE))).write_text(postscript)
    os.mkfifo(it.bad(b"pipe.jpg", "not a regular file"))
    os.symlink("/dev/zero", it.bad(b"endless.jpg", "not a regular file"))
    os.symlink("nowhere.jpg", it.bad(b"dangling.jpg", "points to nothing"))
    os.symlink("loop.jpg", it.bad(b"loop.jpg", "symlink loops"))
    os.symlink(".", it.bad(b"folder loop", "symlink loops back"))
    os.symlink("..", it.bad(b"deep/er/up.jpg", "symlink loops back"))
    it.reasons[path_to_name("folder.jpg")] = "is a folder, not an image"
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(folder)  # the path of a socket must be short
        listener.bind(it.bad(b"socket.jpg", "cannot be read")[len(os.fsencode(folder)) + 1 :])
        os.chdir(here)
    with open(it.bad(b"sparse.jpg", NOT_AN_IMAGE), "wb") as file:
        file.truncate(1 << 40)  # a terabyte that takes no room
    if os.geteuid() != 0:
        with open(it.bad(b"unreadable.jpg", "Permission denied"), "wb") as file:
            os.fchmod(file.fileno(), 0)
    # The same photograph by another way is one more image.
    os.symlink(PHOTOS / "animals/cat.jpg", folder / "link.jpg")
    it.good.append("link.jpg")
    return it


_load_once = functools.cache(load_backbone)


@pytest.fixture(autouse=True)
def one_network(monkeypatch):
    # Building the network is most of a small run's time, and nothing here is about it.
    monkeypatch.setattr(backbone, "load_backbone", _load_once)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Hostile:
    base = tmp_path_factory.mktemp("hostile")
    (base / "traps").mkdir()
    return build(base / "images", base / "traps")


@pytest.fixture(scope="module")
def alone(hostile) -> dict[str, np.ndarray]:
    """The descriptor of each good image, in a run of its own."""
    describer = Describer(RECIPE, RunOptions(device="cpu", num_workers=1, batch_size=1))
    found = {name: next(iter(describer.describe([hostile.path(name)]))) for name in hostile.good}
    assert [name for name, row in found.items() if row.error] == []
    return {name: done.row()[0] for name, done in found.items()}


def check(store: Store, hostile: Hostile, alone: dict[str, np.ndarray]) -> None:
    assert sorted(store.names) == sorted([*hostile.reasons, *hostile.good])
    errors = store.errors()
    rows = {name: row for row, name in enumerate(store.names)}
    assert {name for name in rows if store.status[rows[name]] == Status.DONE} == set(hostile.good)
    assert set(errors) == set(hostile.reasons)
    for name, reason in errors.items():
        assert reason.isprintable(), name
        assert len(reason) > 8, name
        assert re.search(hostile.reasons[name], reason), (name, reason)
        assert "EXIF" not in reason or "EXIF" in name
        assert not store.descriptors[rows[name]].any()
    for name, expected in alone.items():
        np.testing.assert_allclose(store.descriptors[rows[name]], expected, rtol=1e-3, atol=1e-6, err_msg=name)
    assert verify_store(store) == []
    assert os.listdir(hostile.traps) == []


def test_bad_images_fail_and_change_nothing(hostile, alone, tmp_path):
    told: list[tuple[str, str | None]] = []

    class Observer:
        def started(self, **_):
            pass

        def row(self, name, error):
            told.append((name, error))

    done = extract_folder(hostile.folder, tmp_path / "x.h5", RECIPE, OPTIONS, observer=Observer())
    assert (done.images, done.described, done.failed) == (
        len(hostile.good) + len(hostile.reasons),
        len(hostile.good),
        len(hostile.reasons),
    )
    assert (done.pending, done.repeated, done.interrupted) == (0, 0, False)
    assert sorted(name for name, error in told if error) == sorted(hostile.reasons)
    assert sorted(name for name, error in told if not error) == sorted(hostile.good)
    check(open_store(tmp_path / "x.h5"), hostile, alone)


# The peak of this process alone: `ru_maxrss` would also count what the test's own process took before.
SCRIPT = """
import sys
from sppfeat_cli import main
try:
    main()
finally:
    with open("/proc/self/status") as status:
        peak = [line.split()[1] for line in status if line.startswith("VmHWM")]
    with open(sys.argv.pop(), "w") as file:
        file.write(peak[0])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")
def test_the_command_line_over_bad_images(hostile, alone, tmp_path):
    script = SCRIPT.replace("sys.argv.pop()", repr(str(tmp_path / "peak")))
    command = [sys.executable, "-c", script, "extract", str(hostile.folder), "-o", str(tmp_path / "x.h5"), "--json"]
    result = subprocess.run([*command, *FLAGS], capture_output=True, timeout=120)
    assert result.returncode == 3, result.stderr.decode()
    document = json.loads(result.stdout)
    assert (document["described"], document["failed"]) == (len(hostile.good), len(hostile.reasons))
    check(open_store(tmp_path / "x.h5"), hostile, alone)
    # Pillow lets libtiff speak for itself, in two writes that other threads' lines can come between.
    stderr = re.sub(r"tempfile\.tif: |Using code not yet in table\.\n", "", result.stderr.decode("utf-8"))
    lines = stderr.removesuffix("\n").split("\n")
    assert all(line.isprintable() for line in lines)
    assert lines.pop(0) == f"{len(hostile.good) + len(hostile.reasons)} images to describe on cpu"
    # A line for each of the first bad images, how many more there are, and nothing else: no warning, no traceback.
    errors = open_store(tmp_path / "x.h5").errors()
    escaped = {
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name): reason
        for name, reason in errors.items()
    }
    listed_by = f"`sppfeat inspect {tmp_path / 'x.h5'} --failures` lists them all"
    assert lines.pop() == f"... and {len(errors) - LISTED} more failed; {listed_by}"
    lines.remove("... more failed, counted at the end")
    assert len(lines) == LISTED and set(lines) < {f"failed: {name}: {reason}" for name, reason in escaped.items()}
    assert int((tmp_path / "peak").read_text()) < MOST_MEMORY_KB


def cli(monkeypatch, *arguments: str) -> int:
    from sppfeat_cli import main

    monkeypatch.setattr(sys, "argv", ["sppfeat", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture
def some(tmp_path) -> Path:
    """A small folder: one good image, and three bad ones, of which one is known to be bad without opening it."""
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "good.jpg").write_bytes(JPEG)
    (folder / "text.jpg").write_text("no image")
    (folder / "cut.jpg").write_bytes(JPEG[:1000])
    (folder / "dangling.jpg").symlink_to("nowhere")
    return folder


def extract(folder: Path, **options) -> Extraction:
    return extract_folder(folder, folder.parent / "x.h5", RECIPE, OPTIONS, **options)


def test_a_second_run_keeps_everything_and_still_exits_with_3(some, monkeypatch, capsys):
    arguments = ["extract", str(some), "-o", str(some.parent / "x.h5"), *FLAGS, "--json"]
    assert cli(monkeypatch, *arguments) == 3
    first, content = json.loads(capsys.readouterr().out), (some.parent / "x.h5").read_bytes()
    assert cli(monkeypatch, *arguments) == 3
    second = json.loads(capsys.readouterr().out)
    assert [first[key] for key in ("described", "reused", "failed")] == [1, 0, 3]
    assert [second[key] for key in ("described", "reused", "failed")] == [0, 1, 3]
    assert (some.parent / "x.h5").read_bytes() == content


def test_retry_failed_opens_the_bad_ones_again(some, monkeypatch):
    opened: list[str] = []
    original = os.open

    def spy(path, *rest, **named):
        opened.append(os.path.basename(os.fsdecode(path)))
        return original(path, *rest, **named)

    extract(some)
    monkeypatch.setattr(os, "open", spy)
    extract(some)
    assert not {"text.jpg", "cut.jpg", "good.jpg"} & set(opened)
    again = extract(some, retry_failed=True)
    assert {"text.jpg", "cut.jpg"} <= set(opened)
    assert "good.jpg" not in opened
    assert (again.described, again.reused, again.failed) == (0, 1, 3)


@pytest.mark.parametrize("name", ["text.jpg", "cut.jpg", "dangling.jpg"])
def test_a_bad_file_that_became_good_is_described_without_a_flag(some, name):
    extract(some)
    (some / name).unlink()
    (some / name).write_bytes(JPEG)
    done = extract(some)
    assert (done.described, done.reused, done.failed) == (1, 1, 2)
    store = open_store(some.parent / "x.h5")
    same = [store.descriptors[store.names.index(each)] for each in (name, "good.jpg")]
    np.testing.assert_allclose(*same, rtol=1e-3, atol=1e-6)
    assert name not in store.errors()


@pytest.mark.parametrize("become", ["text", "folder", "pipe"])
def test_a_good_file_that_became_bad_loses_its_descriptor(some, become):
    extract(some)
    good = some / "good.jpg"
    good.unlink()
    make: dict[str, Callable[[], object]] = {
        "text": lambda: good.write_text("no image"),
        "folder": good.mkdir,
        "pipe": lambda: os.mkfifo(good),
    }
    make[become]()
    done = extract(some)
    assert (done.described, done.reused, done.failed) == (0, 0, 4)
    store = open_store(some.parent / "x.h5")
    assert "good.jpg" in store.errors()
    assert not store.descriptors.any()


def test_a_link_whose_target_went_away_keeps_its_descriptor(some):
    """The image is missing, not bad: perhaps a disk is not mounted today."""
    good = some / "good.jpg"
    good.rename(some.parent / "away.jpg")
    good.symlink_to(some.parent / "away.jpg")
    extract(some)
    (some.parent / "away.jpg").unlink()
    done = extract(some)
    assert (done.described, done.reused, done.failed, done.gone) == (0, 0, 3, 1)
    assert open_store(some.parent / "x.h5").counts()["done"] == 1


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), MemoryError(), RecursionError("too\ndeep")])
@pytest.mark.parametrize("where", ["open", "load", "resize"])
def test_any_exception_inside_pillow_is_a_failed_row(some, monkeypatch, where, error):
    home = {"open": Image, "load": ImageFile.ImageFile, "resize": Image.Image}[where]
    original = getattr(home, where)
    (some / "cut.jpg").write_bytes(encoded("JPEG", (111, 99)))

    def broken(first, *rest, **named):
        # Only for the one file, which the other must not notice.
        if (where == "open" and os.fstat(first.fileno()).st_size != len(JPEG)) or getattr(first, "width", 0) == 111:
            raise error
        return original(first, *rest, **named)

    monkeypatch.setattr(home, where, broken)
    if where == "resize":  # where Pillow does it
        monkeypatch.setattr("sppfeat.images.resampling._compiled", lambda: None)
    done = extract(some)
    assert (done.described, done.failed) == (1, 3)
    reason = open_store(some.parent / "x.h5").errors()["cut.jpg"]
    assert re.fullmatch(r"cannot be (decoded|resized to 64 x 64): (by zero|MemoryError|too)", reason)


def test_a_failing_disk_is_a_failed_row(some, monkeypatch):
    def broken(self, *_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(ImageFile.ImageFile, "load", broken)
    assert extract(some).failed == 4
    assert "Input/output error" in open_store(some.parent / "x.h5").errors()["good.jpg"]


def test_native_scale_with_an_image_too_small_for_the_backbone(tmp_path):
    (tmp_path / "images").mkdir()
    for side in (8, 31, 32, 33, 100):
        (tmp_path / f"images/{side:03}.png").write_bytes(encoded("PNG", (side + 20, side)))
    recipe = Recipe(backbone=RECIPE.backbone, weights="random", scales=("native",), levels=(2, 1))
    done = extract_folder(tmp_path / "images", tmp_path / "x.h5", recipe, OPTIONS)
    assert (done.described, done.failed) == (3, 2)
    assert open_store(tmp_path / "x.h5").errors() == {
        "008.png": "28 x 8 pixels: the backbone needs at least 32 per side at native scale",
        "031.png": "51 x 31 pixels: the backbone needs at least 32 per side at native scale",
    }


def test_a_list_of_bad_entries(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jpg").write_bytes(JPEG)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.md").write_text("no image")
    lines = [
        "good.jpg",
        "folder",
        "text.md",
        "missing.jpg",
        "good.jpg/x.jpg",
        "x" * 5000,
        "/dev/null",
        "./good.jpg",
        " ",
    ]
    (tmp_path / "list.txt").write_text("\r\n".join(lines))
    done = extract_folder(tmp_path / "list.txt", tmp_path / "x.h5", RECIPE, OPTIONS)
    assert (done.images, done.described, done.failed, done.repeated) == (8, 1, 7, 1)
    prefix = str(tmp_path).lstrip("/") + "/"
    found = {name.removeprefix(prefix)[:20]: text for name, text in open_store(tmp_path / "x.h5").errors().items()}
    assert found.pop("text.md").startswith(NOT_AN_IMAGE)
    assert found == {
        "folder": "is a folder, not an image",
        "missing.jpg": "no such file",
        "good.jpg/x.jpg": "cannot be read: Not a directory",
        "x" * 20: "cannot be read: File name too long",
        "dev/null": "is not a regular file",
        " ": "no such file",
    }


def test_nothing_but_bad_images_is_still_a_store(some):
    (some / "good.jpg").unlink()
    done = extract(some)
    assert (done.described, done.failed) == (0, 3)
    assert verify_store(open_store(some.parent / "x.h5")) == []


def test_files_that_vanish_during_the_run_are_failed_rows(some):
    class Vanish:
        def started(self, **_):
            shutil.rmtree(some)

        def row(self, name, error):
            pass

    done = extract(some, observer=Vanish())
    assert (done.described, done.failed, done.pending) == (0, 4, 0)
    assert open_store(some.parent / "x.h5").errors()["good.jpg"] == "no such file"
