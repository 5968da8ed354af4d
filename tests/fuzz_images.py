"""Damage images of every format, and hold each read against 10 s of processor time and 1.5 GB.

`python tests/fuzz_images.py --count 10000 --seed 0` is the long form: that many images in all. A child process reads
them one after the other, as extraction does; whatever is no ImageError, and a child that dies, is a failure.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
from memory import peak_kb
from PIL import Image

from sppfeat.errors import ImageError
from sppfeat.images.reading import _FORMATS
from sppfeat.images.resizing import prepare_image
from sppfeat.recipe import Recipe

MOST_SECONDS = 10.0
MOST_MEGABYTES = 1500.0


def seeds() -> dict[str, bytes]:
    """Small sound images: each format in each of its kinds."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 4), np.uint8)
    rgb, rgba = Image.fromarray(noise[..., :3].copy()), Image.fromarray(noise)
    palette, gray = rgb.quantize(16), rgb.convert("L")
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    frames = [rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT), rgb]
    kinds: dict[str, tuple[Image.Image, dict[str, object]]] = {
        "JPEG baseline": (rgb, {}),
        "JPEG progressive": (rgb, {"progressive": True}),
        "JPEG cmyk": (rgb.convert("CMYK"), {}),
        "PNG rgb": (rgb, {}),
        "PNG rgba": (rgba, {}),
        "PNG deep": (deep, {}),
        "PNG palette": (palette, {"transparency": 3}),
        "PNG animated": (rgb, {"save_all": True, "append_images": frames}),
        "WEBP lossy": (rgb, {}),
        "WEBP lossless": (rgba, {"lossless": True}),
        "WEBP animated": (rgb, {"save_all": True, "append_images": frames}),
        "GIF still": (palette, {}),
        "GIF animated": (rgb, {"save_all": True, "append_images": frames}),
        "BMP rgb": (rgb, {}),
        "BMP palette": (palette, {}),
        "TIFF deep": (deep, {}),
        "TIFF bilevel": (gray.convert("1"), {"compression": "group4"}),
    }
    for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", "lzma"):
        kinds[f"TIFF {name}"] = (rgb, {"compression": name})
    kinds["TIFF strips"] = (rgb, {"compression": "tiff_lzw", "tiffinfo": {278: 8}})
    if "AVIF" in _FORMATS:
        kinds["AVIF still"] = (rgb, {})
        kinds["AVIF animated"] = (rgb, {"save_all": True, "append_images": frames})
    result = {}
    for kind, (image, options) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, kind.split()[0], **options)
        result[kind] = buffer.getvalue()
    return result | by_hand(noise)


def by_hand(noise: np.ndarray) -> dict[str, bytes]:
    """What Pillow reads and cannot write: tiles, interlaced and 16-bit color PNG, run-length BMP."""
    gray, rgb = noise[..., 0], noise[..., :3]
    result = {}
    for name, compression in (("raw", 1), ("deflate", 8)):
        tiles = [gray[y : y + 16, x : x + 16].tobytes() for y in range(0, 48, 16) for x in range(0, 64, 16)]
        tiles = tiles if compression == 1 else [zlib.compress(tile) for tile in tiles]
        starts = [8 + sum(map(len, tiles[:i])) for i in range(len(tiles) + 1)]
        lists = struct.pack("<12I", *starts[:-1]) + struct.pack("<12I", *map(len, tiles))
        tags = [(256, 1, 64), (257, 1, 48), (258, 1, 8), (259, 1, compression), (262, 1, 1), (277, 1, 1)]
        tags += [(322, 1, 16), (323, 1, 16), (324, 12, starts[-1]), (325, 12, starts[-1] + 48)]
        directory = b"".join(struct.pack("<HHII", tag, 4, count, value) for tag, count, value in tags)
        head = b"II*\0" + struct.pack("<I", starts[-1] + len(lists))
        result[f"TIFF tiles, {name}"] = (
            head + b"".join(tiles) + lists + struct.pack("<H", len(tags)) + directory + bytes(4)
        )
    # PNG, 8.2: Adam7, first column and row, and the steps.
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    lines = [b"\0" + line.tobytes() for x, y, dx, dy in passes for line in rgb[y::dy, x::dx]]
    result["PNG interlaced"] = png(8, 2, 1, b"".join(lines))
    result["PNG deep rgba"] = png(16, 6, 0, b"".join(b"\0" + line.tobytes() for line in noise.repeat(2, axis=2)))
    for name, bits, compression in (("rle8", 8, 1), ("rle4", 4, 2)):
        rows = [b"".join(bytes([4, value]) for value in line[:16].tobytes()) for line in gray]
        runs = b"\0\0".join(rows) + b"\0\1"
        palette = bytes(range(256)) * 4 if bits == 8 else bytes(range(64))
        start = 54 + len(palette)
        head = struct.pack(
            "<IHHIIiiHHIIiiII", start + len(runs), 0, 0, start, 40, 64, 48, 1, bits, compression, *[0] * 5
        )
        result[f"BMP {name}"] = b"BM" + head + palette + runs
    return result


def png(bits: int, kind: int, interlaced: int, lines: bytes) -> bytes:
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 64, 48, bits, kind, 0, 0, interlaced)
    for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")):
        content += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return content


def mutate(content: bytes, random_: random.Random) -> bytes:
    """One to three kinds of damage: anywhere, or near the front, where headers and lengths stand."""
    data = bytearray(content)
    for _ in range(random_.randint(1, 3)):
        near = min(len(data), 200) if random_.random() < 0.5 else len(data)
        at = random_.randrange(max(1, near))
        span = random_.randint(1, max(1, len(data) // 4))
        what = random_.randrange(7)
        if what == 0:  # byte flips
            for _ in range(random_.randint(1, 16)):
                if data:
                    data[random_.randrange(max(1, near))] ^= 1 << random_.randrange(8)
        elif what == 1:  # truncation
            del data[max(at, 1) :]
        elif what == 2:  # splice
            source = random_.randrange(max(1, len(data)))
            data[at : at + span] = data[source : source + span]
        elif what == 3:  # lengths and dimensions
            value = random_.choice([0, 1, 0x7F, 0xFF, 0x4000, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF])
            width = random_.choice([2, 4])
            data[at : at + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, random_.choice(["little", "big"]))
        elif what == 4:  # repeated blocks
            data[at:at] = data[at : at + span] * random_.choice([1, 2, 10, 1000 if span < 2000 else 3])
        elif what == 5:
            del data[at : at + span]
        else:
            data[at : at + span] = random_.randbytes(span)
    return bytes(data)


def cases(count: int, seed: int) -> list[tuple[str, bytes]]:
    """`count` damaged images, as many of each kind."""
    random_ = random.Random(seed)
    sound = list(seeds().items())
    return [
        (f"{kind} {i}", mutate(content, random_)) for i in range(count) for kind, content in [sound[i % len(sound)]]
    ]


def read_all(paths: list[str]) -> None:
    """The child: one line of JSON an image, with its outcome, processor seconds and the peak memory so far."""
    recipe = Recipe(scales=(64,))
    for path in paths:
        begun = time.process_time()
        try:
            prepare_image(path, recipe)
            outcome = "decoded"
        except ImageError:
            outcome = "ImageError"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        peak = peak_kb() / 1024
        print(json.dumps([path, outcome, time.process_time() - begun, peak]), flush=True)


def run(count: int, seed: int, keep: Path) -> dict[str, object]:
    """Read `count` damaged images; `keep` holds them."""
    names: dict[str, str] = {}
    for i, (name, content) in enumerate(cases(count, seed)):
        path = keep / f"{i:06d}"
        path.write_bytes(content)
        names[str(path)] = name
    # Pillow's warnings are Python's, which a program filters; what C libraries write is not.
    child = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--read"],
        input="\n".join(names),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    bad = [
        f"{names[path]} ({path}): {outcome}, {seconds:.1f} s, {peak:.0f} MB"
        for path, outcome, seconds, peak in lines
        if outcome not in ("decoded", "ImageError") or seconds > MOST_SECONDS or peak > MOST_MEGABYTES
    ]
    if len(lines) < len(names):
        path = list(names)[len(lines)]
        bad.append(f"{names[path]} ({path}): the process died ({child.returncode}): {child.stderr[-300:]}")
    elif child.stderr:
        bad.append(f"written to stderr: {child.stderr[:300]}")
    slowest = max(lines, key=lambda line: line[2], default=["", "", 0.0, 0.0])
    return {
        "images": len(lines),
        "decoded": sum(line[1] == "decoded" for line in lines),
        "slowest": [names.get(slowest[0]), slowest[2]],
        "peak_megabytes": max((line[3] for line in lines), default=0.0),
        "bad": bad,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        read_all(sys.stdin.read().splitlines())
        return 0
    with tempfile.TemporaryDirectory() as folder:
        report = run(options.count, options.seed, Path(folder))
    print(json.dumps(report, indent=1))
    return 1 if report["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
