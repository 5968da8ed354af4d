"""How near copies of images are to them, how near other images are, and which of both `find_duplicates` finds.

    python benchmarks/copies.py ../shared/data/caltech101-subset ../shared/data/voc2007-subset/VOC2007/JPEGImages

prints a table for each folder, and the groups in which images are that are not copies made here: look at them.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sppfeat import RunOptions, Store, extract_folder, find_duplicates, open_store
from sppfeat.recipes import named_recipe
from sppfeat.retrieval.duplicates import COMPARED_FROM, DEFAULT_THRESHOLD
from sppfeat.retrieval.same_images import blurred, difference, small_gray
from sppfeat.store import unit_rows

ORIGINALS = "originals"


def smaller(image: Image.Image, factor: int) -> Image.Image:
    """An image of half, or less, of the size."""
    return image.resize((max(1, image.width // factor), max(1, image.height // factor)), Image.Resampling.LANCZOS)


def cut(image: Image.Image, part: float) -> Image.Image:
    """The middle of an image, this part of both sides."""
    width, height = round(image.width * part), round(image.height * part)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


# What is done to an image, and the quality of its JPEG.
KINDS: dict[str, tuple[Callable[[Image.Image], Image.Image], int]] = {
    "half the size": (lambda image: smaller(image, 2), 90),
    "a quarter of the size": (lambda image: smaller(image, 4), 90),
    "half the size, JPEG quality 20": (lambda image: smaller(image, 2), 20),
    "JPEG quality 50": (lambda image: image, 50),
    "JPEG quality 20": (lambda image: image, 20),
    "95 % of each side": (lambda image: cut(image, 0.95), 90),
    "90 % of each side": (lambda image: cut(image, 0.9), 90),
    "gray": (lambda image: image.convert("L"), 90),
    "mirrored (no copy)": (ImageOps.mirror, 90),
}


def make_copies(source: Path, target: Path, count: int) -> None:
    """Link all images of a folder, and write copies of every kind of some of them."""
    files = sorted(file for file in source.rglob("*") if file.suffix.lower() == ".jpg")
    chosen = set(random.Random(0).sample(files, min(count, len(files))))
    for kind in (ORIGINALS, *KINDS):
        (target / kind).mkdir()
    for file in files:
        name = "-".join(file.relative_to(source).parts)
        (target / ORIGINALS / name).symlink_to(file.resolve())
        if file in chosen:
            with Image.open(file) as image:
                whole = image.convert("RGB")
            for kind, (change, quality) in KINDS.items():
                change(whole).save(target / kind / name, quality=quality)


def show(store: Store) -> None:
    """Print the cosines of copies and of other images, and what is found of them."""
    rows = unit_rows(store)
    kinds, names = zip(*(name.split("/", 1) for name in rows.names), strict=True)
    units = rows.take(np.arange(len(rows)))
    place = {name: at for at, (kind, name) in enumerate(zip(kinds, names, strict=True)) if kind == ORIGINALS}
    started = time.perf_counter()
    found = find_duplicates(store)
    seconds = time.perf_counter() - started
    group_of = {one.name: number for number, group in enumerate(found.groups) for one in group}
    originals = units[list(place.values())]
    others = originals @ originals.T
    np.fill_diagonal(others, -1)
    nearest = np.sort(others.max(1))
    print(f"{len(place)} images; nearest other image: median {np.median(nearest):.3f}, 95 % below ", end="")
    print(f"{nearest[int(0.95 * len(nearest))]:.3f}, 99 % {nearest[int(0.99 * len(nearest))]:.3f}; {seconds:.1f} s\n")
    gray = blurred(np.stack([np.asarray(small_gray(rows, at)) for at in range(len(rows))]))
    print(f"| copies | lowest cosine | 1 % below | median | at {DEFAULT_THRESHOLD:g}, % ", end="")
    print(f"| near: median | 99 % below | largest | overall: largest | found, % |\n|{'---|' * 10}")
    for kind in KINDS:
        mine = [at for at, one in enumerate(kinds) if one == kind]
        cosines = np.array([float(units[at] @ units[place[names[at]]]) for at in mine])
        together = [group_of.get(f"{kind}/{names[at]}", -1) == group_of.get(f"{ORIGINALS}/{names[at]}") for at in mine]
        shown = [cosines.min(), np.quantile(cosines, 0.01), np.median(cosines)]
        shares = [100 * np.mean(cosines >= DEFAULT_THRESHOLD), 100 * np.mean(together)]
        apart = difference(gray[mine], gray[[place[names[at]] for at in mine]])
        print(f"| {kind} | {' | '.join(f'{value:.3f}' for value in shown)} | {shares[0]:.0f} | ", end="")
        print(" | ".join(f"{np.quantile(apart.near, share):.3f}" for share in (0.5, 0.99, 1)), end="")
        print(f" | {apart.overall.max():.3f} | {shares[1]:.1f} |")
    print()
    pairs = np.argwhere(np.triu(others, 1) >= COMPARED_FROM)
    one, other = (np.array(list(place.values()))[pairs[:, side]] for side in (0, 1))
    print(f"{len(pairs)} pairs of originals are near enough to be compared; the smallest differences:")
    for which, apart in difference(gray[one], gray[other])._asdict().items():
        print(f"{which} {', '.join(f'{value:.2f}' for value in np.sort(apart)[:12])}")
    print()
    for group in found.groups:
        images = sorted({one.name.split("/", 1)[1] for one in group})
        if len(images) > 1:
            print(f"together: {', '.join(images)}", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders of JPEGs")
    parser.add_argument("--copied", type=int, default=300, help="images that are copied (default: %(default)s)")
    parser.add_argument("--recipes", default="default", help="named recipes, comma separated")
    arguments = parser.parse_args()
    for source in arguments.folders:
        with tempfile.TemporaryDirectory() as folder:
            images = Path(folder, "images")
            images.mkdir()
            make_copies(source, images, arguments.copied)
            for name in arguments.recipes.split(","):
                recipe = None if name == "default" else named_recipe(name)
                extract_folder(images, Path(folder, "f.h5"), recipe, RunOptions(), overwrite=True)
                print(f"**{source.name}, recipe {name}**: ", end="")
                show(open_store(Path(folder, "f.h5")))


if __name__ == "__main__":
    main()
