"""Which parts of images `find_crops` finds, and what else it takes for parts, by pixels and by descriptors alone.

    python benchmarks/crops.py FOLDER [--among FOLDER...]

cuts parts of some JPEGs of the first folder, enlarges half of them to the width of the original, describes them with
all images of all folders, and prints a table; then the pairs found by pixels that were not cut here: look at them.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from retrieval_quality import overlap

from sppfeat import Recipe, RunOptions, extract_folder, find_crops, open_store

KINDS = {".jpg", ".jpeg"}


class Cut(NamedTuple):
    """Where a part was cut: whole, its name; box, x1, y1, x2, y2 in pixels of it."""

    whole: str
    box: tuple[float, float, float, float]


def random_box(image: Image.Image, least: float, most: float, draw: random.Random) -> tuple[int, int, int, int]:
    """A random part of this share of the area, from 0.8 to 1.25 times as wide for its height as the image."""
    share, stretch = draw.uniform(least, most), draw.uniform(0.8, 1.25)
    width = min(image.width, round(image.width * (share * stretch) ** 0.5))
    height = min(image.height, round(image.height * (share / stretch) ** 0.5))
    left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
    return left, top, left + width, top + height


def collect(folders: list[Path], target: Path, arguments: argparse.Namespace) -> dict[str, Cut]:
    """Link all images into a folder, and write parts of some of the first folder's; where each was cut."""
    draw, cuts = random.Random(0), {}
    for number, folder in enumerate(folders):
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in KINDS)
        chosen = set(draw.sample(files, min(arguments.parts, len(files)))) if number == 0 else set()
        for file in files:
            name = f"{number}-{'-'.join(file.relative_to(folder).parts)}"
            (target / name).symlink_to(file.resolve())
            if file in chosen:
                with Image.open(file) as image:
                    box, width = random_box(image, *arguments.area, draw), image.width
                    part = image.convert("RGB").crop(box)
                if len(cuts) % 2:
                    part = part.resize((width, round(part.height * width / part.width)), Image.Resampling.LANCZOS)
                part.save(target / f"part-{name}", quality=arguments.quality)
                left, top, right, bottom = box
                cuts[f"part-{name}"] = Cut(name, (left, top, right - 1, bottom - 1))
    return cuts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of JPEGs, of which parts are cut")
    parser.add_argument("--among", nargs="*", type=Path, default=[], help="folders of further JPEGs")
    parser.add_argument("--parts", type=int, default=300, help="parts that are cut (default: %(default)s)")
    parser.add_argument("--area", nargs=2, type=float, default=(0.3, 0.8), help="smallest and largest, of the image's")
    parser.add_argument("--quality", type=int, default=70, help="of their JPEGs (default: %(default)s)")
    parser.add_argument("--scales", default="224", help="short sides, comma separated, each a store of its own")
    parser.add_argument("--thresholds", default="1.1", help="of descriptors alone, comma separated")
    arguments = parser.parse_args()
    print("| short side | decided by | seconds | parts found | overlap of boxes | wholes as parts | other pairs |")
    print(f"|{'---|' * 7}")
    listed: set[tuple[str, str]] = set()
    with tempfile.TemporaryDirectory() as folder:
        images, path = Path(folder, "images"), Path(folder, "f.h5")
        images.mkdir()
        cuts = collect([arguments.folder, *arguments.among], images, arguments)
        for scale in map(int, arguments.scales.split(",")):
            extract_folder(images, path, Recipe(scales=(scale,)), RunOptions(), overwrite=True)
            for threshold in (None, *map(float, arguments.thresholds.split(","))):
                started = time.perf_counter()
                found = find_crops(open_store(path), threshold).found
                seconds = time.perf_counter() - started
                pairs = {(one.part.name, one.whole.name): one.box for one in found}
                cut = {(part, of.whole): of.box for part, of in cuts.items()}
                right = [overlap(pairs[pair], cut[pair]) for pair in cut.keys() & pairs.keys()]
                turned = {(whole, part) for part, whole in cut} & pairs.keys()
                others = pairs.keys() - turned - cut.keys()
                how = "pixels" if threshold is None else f"descriptors, {threshold:g}"
                shown = [scale, how, f"{seconds:.1f}", f"{len(right)} of {len(cuts)}", f"{np.mean(right):.3f}"]
                print("|", " | ".join(map(str, [*shown, len(turned), len(others)])), "|", flush=True)
                if threshold is None:
                    listed |= others
    print()
    for part, whole in sorted(listed):
        print(f"by pixels, {part} is a part of {whole}")


if __name__ == "__main__":
    main()
