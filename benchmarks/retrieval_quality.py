"""How well parts are found and located, and what re-ranking gains.

    python benchmarks/retrieval_quality.py crops VOC2007/JPEGImages [--area 0.1,0.3]
    python benchmarks/retrieval_quality.py same-object kth-buildings
    python benchmarks/retrieval_quality.py categories caltech101-subset/test

crops: 200 random parts of images, enlarged 1.6 times and saved as JPEG of quality 70, are looked for among all images.
same-object, categories: images whose names or folders say what belongs together. Tables are printed as Markdown.
"""

from __future__ import annotations

import argparse
import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from sppfeat import Recipe, RunOptions, extract_folder, open_store
from sppfeat.retrieval import Gallery, SearchOptions, create_gallery, open_gallery, search_images, search_store

CPU = RunOptions(device="cpu")
CROPS, SEED, ENLARGED, QUALITY = 200, 7, 1.6, 70


def cut(path: Path, area: tuple[float, float], dice: random.Random) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """A random part of an image, and its box in pixels, inclusive ends."""
    image = Image.open(path).convert("RGB")
    size = dice.uniform(*area) * image.width * image.height
    aspect = dice.uniform(2 / 3, 3 / 2)
    width = min(image.width, round((size * aspect) ** 0.5))
    height = min(image.height, round((size / aspect) ** 0.5))
    left, top = dice.randint(0, image.width - width), dice.randint(0, image.height - height)
    part = image.crop((left, top, left + width, top + height))
    larger = round(width * ENLARGED), round(height * ENLARGED)
    return part.resize(larger, Image.Resampling.BICUBIC), (left, top, left + width - 1, top + height - 1)


def with_logo(image: Image.Image) -> Image.Image:
    changed = image.copy()
    width, height = changed.width // 3, changed.height // 4
    draw = ImageDraw.Draw(changed)
    draw.rectangle((0, 0, width, height), fill="white")
    draw.ellipse((width // 4, height // 4, 3 * width // 4, 3 * height // 4), fill="red")
    return changed


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "as it is": lambda image: image,
    "brightness x 1.4": lambda image: ImageEnhance.Brightness(image).enhance(1.4),
    "contrast x 0.6": lambda image: ImageEnhance.Contrast(image).enhance(0.6),
    "blur, radius 2": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    "rotated by 10 degrees": lambda image: image.rotate(10, Image.Resampling.BICUBIC),
    "a logo pasted on": with_logo,
}


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Intersection over union of two boxes with inclusive ends."""
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]) + 1)
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]) + 1)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (one, other)]
    return width * height / (sum(areas) - width * height)


def crops(folder: Path, area: tuple[float, float], scale: int) -> None:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".png"))
    with tempfile.TemporaryDirectory() as work:
        here = Path(work)
        extract_folder(folder, here / "f.h5", Recipe(scales=(scale,)), CPU)
        create_gallery(open_store(here / "f.h5"), here / "g", keep_bins=True)
        gallery = open_gallery(here / "g")
        print(f"{CROPS} parts of {area[0]:.0%} to {area[1]:.0%} of {len(files)} images, scale {scale}, seed {SEED}\n")
        print("| crop | whole: recall@1 | mAP | `--parts`: recall@1 | mAP | mean IoU | IoU over 0.5 | search, ms |")
        print("|---|---|---|---|---|---|---|---|")
        for name, change in CHANGES.items():
            dice = random.Random(SEED)
            (queries := here / name.replace(" ", "-")).mkdir()
            truth = []
            for number, at in enumerate(dice.sample(range(len(files)), CROPS)):
                part, box = cut(files[at], area, dice)
                change(part).save(queries / f"{number:03}.jpg", quality=QUALITY)
                truth.append((files[at].name, box))
            cells = []
            for parts in (False, True):
                done = search_images(gallery, [queries], SearchOptions(k=len(files), parts=parts), CPU)
                ranks, overlaps = [], []
                for answer, (wanted, box) in zip(done.answers, truth, strict=True):
                    found = next(one for one in answer.neighbors if one.name == wanted)
                    ranks.append(found.rank)
                    overlaps.append(overlap(found.box or (0, 0, 0, 0), box))
                firsts = 100 * np.mean(np.array(ranks) == 1)
                cells += [f"{firsts:.1f}", f"{100 * np.mean(1 / np.array(ranks)):.1f}"]
            cells += [f"{np.mean(overlaps):.2f}", f"{100 * np.mean(np.array(overlaps) > 0.5):.0f} %"]
            print(f"| {name} | {' | '.join(cells)} | {1000 * done.searching / CROPS:.0f} |", flush=True)


def average_precision(gallery: Gallery, store: Path, group: Callable[[str], str], **options: object) -> float:
    """mAP in percent of a store's rows as queries, each without itself."""
    chosen = SearchOptions(k=len(gallery), exclude_self=True, **options)  # type: ignore[arg-type]
    found = []
    for answer in search_store(gallery, open_store(store), chosen).answers:
        relevant = np.array([group(one.name) == group(answer.query) for one in answer.neighbors])
        if relevant.any():
            precision = np.cumsum(relevant) / np.arange(1, len(relevant) + 1)
            found.append(precision[relevant].mean())
    return 100 * float(np.mean(found))


def rerank(server: Path, client: Path, group: Callable[[str], str], scale: int) -> None:
    with tempfile.TemporaryDirectory() as work:
        here = Path(work)
        extract_folder(server, here / "s.h5", Recipe(scales=(scale,)), CPU)
        create_gallery(open_store(here / "s.h5"), here / "g", keep_bins=True)
        queries = here / "s.h5"
        if client != server:
            extract_folder(client, queries := here / "c.h5", Recipe(scales=(scale,)), CPU)
        gallery = open_gallery(here / "g")
        print(f"{len(open_store(queries))} queries, {len(gallery)} images, scale {scale}\n\n| | mAP |\n|---|---|")
        for name, options in {
            "plain": {},
            "--rerank bins": {"rerank": "bins"},
            "--expand 5": {"expand": 5},
        }.items():
            print(f"| {name} | {average_precision(gallery, queries, group, **options):.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("crops", "same-object", "categories"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--area", default="0.1,0.3")
    parser.add_argument("--scale", type=int)
    given = parser.parse_args()
    if given.what == "crops":
        low, high = map(float, given.area.split(","))
        crops(given.folder, (low, high), given.scale or 448)
    elif given.what == "same-object":
        names = re.compile(r"(obj\d+)_")
        rerank(given.folder / "server", given.folder / "client", lambda name: names.search(name)[1], given.scale or 224)  # type: ignore[index]
    else:
        rerank(given.folder, given.folder, lambda name: name.split("/")[-2], given.scale or 224)


if __name__ == "__main__":
    main()
