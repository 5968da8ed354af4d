"""From a JPEG file to network input, step by step: milliseconds of processor time per image.

    python benchmarks/decoding.py FOLDER... [--scale 224] [--count 200] [--parts steps,rates]

`steps`: resizing is measured as Pillow does it and as our compiled code does, of the same images, in turn; their bytes
are compared. `rates`: images per second that threads decode for a GPU that resizes, and processes, and the processor
time that this process takes for each. The images of 16 x 16 pixels, which it writes itself, take hardly any time
without Python's lock: they show what threads reach at most, however many cores there are. Files are read once before,
so that they come from memory.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path

import numpy as np
from extract import processor
from PIL import Image

from sppfeat.extraction import decoders
from sppfeat.extraction.decoders import Decoders
from sppfeat.extraction.stages import Stages
from sppfeat.images import (
    MOST_UNRESIZED,
    Decoded,
    Decoder,
    Item,
    decode,
    open_image,
    resampling,
    resizing,
    scaled_size,
    upright_size,
)
from sppfeat.images.memory import DecodingMemory
from sppfeat.machine import available_cores
from sppfeat.recipe import Recipe

AHEAD = 100
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


def rate(paths: Sequence[Path], recipe: Recipe, workers: int, *, apart: bool) -> tuple[float, float]:
    """Images per second of threads, or of processes, and milliseconds of this process for each."""
    several = Decoders(Decoder((recipe,), 1, True), workers, 3 * MOST_UNRESIZED, Stages())
    items = [Item.at(path) for path in paths]
    if apart:
        several.allow_processes([])
        while not several.submit(items[0]).result() or several.ready < workers:
            time.sleep(0.01)
    waiting: deque[Future[Decoded]] = deque()
    began, cpu = time.perf_counter(), time.process_time()
    for number in range(max(1000, len(items))):
        waiting.append(several.submit(items[number % len(items)]))
        if len(waiting) > AHEAD:
            waiting.popleft().result()
    for each in waiting:
        each.result()
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    several.end()
    return (number + 1) / took, 1e3 * cpu / (number + 1)


def part_steps(folders: dict[str, list[Path]], recipe: Recipe, repeats: int) -> None:
    print(f"\n| images | {' | '.join(STEPS)} | all by Pillow | all, compiled | times as fast |")
    print("|---|" + "---|" * (len(STEPS) + 3))
    for name, files in folders.items():
        rounds = [np.mean([steps(path, recipe) for path in files], 0) * 1e3 for _ in range(repeats)]
        shown = [statistics.median(each) for each in zip(*rounds, strict=True)]
        before, after = sum(shown[:4]), sum(shown[:3]) + shown[4]
        figures = " | ".join(f"{each:.2f}" for each in (*shown, before, after, before / after))
        print(f"| {name} | {figures} |", flush=True)


def part_rates(folders: dict[str, list[Path]], recipe: Recipe, repeats: int) -> None:
    decoders.IMAGES_BEFORE_PROCESSES = 0  # type: ignore[misc]
    memory = DecodingMemory(4 << 30)  # few cores have too little for processes
    resizing._decoding_memory = lambda: memory  # type: ignore[assignment]
    kinds = [(apart, count) for apart in (False, True) for count in (1, 2, 4, 8)]
    heads = [f"{count} {'processes' if apart else 'threads'}" for apart, count in kinds]
    print(f"\n| images/s (ms of this process per image), best of {repeats} | {' | '.join(heads)} |")
    print("|---|" + "---|" * len(heads))
    with tempfile.TemporaryDirectory() as place:
        small = [Path(place, f"{number}.jpg") for number in range(1000)]
        for path in small:
            Image.new("RGB", (16, 16)).save(path)
        for name, files in {"16 x 16 pixels": small, **folders}.items():
            cells = []
            for apart, count in kinds:
                found = [rate(files, recipe, count, apart=apart) for _ in range(repeats)]
                cells.append(f"{max(rate for rate, _ in found):,.0f} ({min(cpu for _, cpu in found):.2f})")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


PARTS = {"steps": part_steps, "rates": part_rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--scale", type=int, default=224)
    parser.add_argument("--count", type=int, default=200, help="images of each folder")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", default="steps", help=f"of {', '.join(PARTS)}")
    arguments = parser.parse_args()
    print(f"{processor()}, {available_cores()} cores, Python {platform.python_version()}, pillow {version('pillow')}")
    print(f"{arguments.count} images, short side {arguments.scale}, ms per image; medians of {arguments.repeats}")
    folders = {}
    for folder in arguments.folders:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".jpg")
        folders[folder.name] = files[:: max(1, len(files) // arguments.count)][: arguments.count]
        for path in folders[folder.name]:
            path.read_bytes()
    for part in arguments.parts.split(","):
        if part not in PARTS:
            parser.error(f"unknown part {part!r}: expected one of {', '.join(PARTS)}")
        PARTS[part](folders, Recipe(scales=(arguments.scale,)), arguments.repeats)


if __name__ == "__main__":
    main()
