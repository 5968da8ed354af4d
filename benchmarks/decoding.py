"""From a JPEG file to network input, step by step: milliseconds of processor time per image.

    python benchmarks/decoding.py FOLDER... [--scale 224] [--count 200]

Resizing is measured as Pillow does it and as our compiled code does, of the same images, in turn; their bytes are
compared. Files are read once before, so that they come from memory.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from extract import processor

from sppfeat.images import Item, decode, open_image, resampling, scaled_size, upright_size
from sppfeat.machine import available_cores
from sppfeat.recipe import Recipe

STEPS = ("open", "EXIF", "decode", "resize by Pillow", "resize, compiled")


def steps(path: Path, recipe: Recipe) -> list[float]:
    """Seconds of each step."""
    compiled = resampling._compiled()
    if compiled is None:
        raise SystemExit("the compiled module is not there, or this processor lacks AVX2")
    clock = [time.process_time()]
    image, _ = open_image(Item.at(path))
    clock.append(time.process_time())
    with image:
        size, turn = upright_size(image, orientation=recipe.orientation)
        clock.append(time.process_time())
        pixels = decode(image, turn, orientation=recipe.orientation)
        clock.append(time.process_time())
        target = scaled_size(size, recipe.scales[0], recipe)
        expected = resampling._by_pillow(pixels, target, "bicubic")
        clock.append(time.process_time())
        found = resampling._by_processor(compiled, pixels, target, "bicubic")
        clock.append(time.process_time())
    if not np.array_equal(found, expected):
        raise SystemExit(f"{path}: resized to other bytes")
    return np.diff(clock).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--scale", type=int, default=224)
    parser.add_argument("--count", type=int, default=200, help="images of each folder")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{processor()}, {available_cores()} cores, Python {platform.python_version()}, pillow {version('pillow')}")
    print(f"{arguments.count} images, short side {arguments.scale}, ms per image; medians of {arguments.repeats}\n")
    print(f"| images | {' | '.join(STEPS)} | all by Pillow | all, compiled | times as fast |")
    print("|---|" + "---|" * (len(STEPS) + 3))
    recipe = Recipe(scales=(arguments.scale,))
    for folder in arguments.folders:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".jpg")
        files = files[:: max(1, len(files) // arguments.count)][: arguments.count]
        for path in files:
            path.read_bytes()
        rounds = [np.mean([steps(path, recipe) for path in files], 0) * 1e3 for _ in range(arguments.repeats)]
        shown = [statistics.median(each) for each in zip(*rounds, strict=True)]
        before, after = sum(shown[:4]), sum(shown[:3]) + shown[4]
        figures = " | ".join(f"{each:.2f}" for each in (*shown, before, after, before / after))
        print(f"| {folder.name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
