"""How well parts are found and located, and what re-ranking gains.

    python benchmarks/retrieval_quality.py crops VOC2007/JPEGImages [--area 0.1,0.3]
    python benchmarks/retrieval_quality.py boxes VOC2007/JPEGImages
    python benchmarks/retrieval_quality.py same-object kth-buildings
    python benchmarks/retrieval_quality.py categories caltech101-subset
    python benchmarks/retrieval_quality.py speed VOC2007/JPEGImages
    python benchmarks/retrieval_quality.py million VOC2007/JPEGImages [--rows 1000000]

crops: 200 random parts of images, enlarged 1.6 times and saved as JPEG of quality 70, are looked for among all images.
boxes: boxes drawn on images of the gallery, which are looked for in it.
same-object, categories: images whose names or folders say what belongs together. million: parts among as many images,
of which the first are windows of the images, and the others put together from quarters of those; how many of the first
ten of an exhaustive search are found, and how fast. speed: of re-ranking. Tables are printed as Markdown.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from sppfeat import Recipe, RunOptions, extract_folder, open_store
from sppfeat.retrieval import (
    ProjectionOptions,
    RetrievalOptions,
    SearchOptions,
    create_gallery,
    describer_for,
    evaluate_retrieval,
    open_gallery,
    part_factors,
    search_descriptors,
    search_images,
)
from sppfeat.retrieval.alignment import all_cells, cells_of, rectangles
from sppfeat.retrieval.bins import (
    BinLayout,
    Bins,
    BinSource,
    bin_layout,
    learn_from,
    part_recipe,
    read_bins,
    write_bins,
)
from sppfeat.retrieval.channels import Channels
from sppfeat.retrieval.parts import PART_FACTORS, order_by_bins, part_matching, whole_matching
from sppfeat.retrieval.regions import Regions, read_regions, write_regions
from sppfeat.retrieval.rerank import RERANKINGS
from sppfeat.store import unit_rows

CPU = RunOptions(device="cpu")
MILLION_QUERIES = 20
BIN_DIMS = 128, 64
AREAS = (0.1, 0.3), (0.03, 0.1)
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


def crops(folder: Path, area: tuple[float, float], scale: int, bin_dim: int | None) -> None:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".png"))
    with tempfile.TemporaryDirectory() as work:
        here = Path(work)
        extract_folder(folder, here / "f.h5", Recipe(scales=(scale,)), CPU)
        create_gallery(open_store(here / "f.h5"), here / "g", keep_bins=True, bin_dim=bin_dim)
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


def boxes(folder: Path, area: tuple[float, float], scale: int) -> None:
    """Boxes on images of the gallery: how often the image comes first, and how well the box is found in it."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".png"))
    with tempfile.TemporaryDirectory() as work:
        here = Path(work)
        extract_folder(folder, here / "f.h5", Recipe(scales=(scale,)), CPU)
        create_gallery(open_store(here / "f.h5"), here / "g", keep_bins=True)
        gallery, options = open_gallery(here / "g"), SearchOptions(k=len(files), parts=True)
        dice = random.Random(SEED)
        describer = None
        ranks, overlaps = [], []
        for at in dice.sample(range(len(files)), CROPS):
            _, box = cut(files[at], area, dice)
            describer = describer or describer_for(gallery, CPU, factors=part_factors(options, box))
            done = search_images(gallery, [files[at]], options, CPU, describer=describer, box=box)
            found = next(one for one in done.answers[0].neighbors if one.name == files[at].name)
            ranks.append(found.rank)
            overlaps.append(overlap(found.box or (0, 0, 0, 0), box))
    print(
        f"| {area[0]:.0%} to {area[1]:.0%} | {100 * np.mean(np.array(ranks) == 1):.1f} | {np.mean(overlaps):.2f} | "
        f"{100 * np.mean(np.array(overlaps) > 0.5):.0f} % |",
        flush=True,
    )


class Collages:
    """Bins of many images: those given [B, n, n, C], and then images whose quarters are those of four of them."""

    def __init__(self, bins: np.ndarray, layout: BinLayout, channels: Channels, rows: int) -> None:
        self.layout, self.channels, self._bins, self._rows = layout, channels, bins, rows
        self._quarters = np.random.default_rng(SEED).integers(0, len(bins), (rows, 2, 2))

    def __len__(self) -> int:
        return self._rows

    def encoded(self, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        half = self.layout.side // 2
        made = np.empty((len(which), *self._bins.shape[1:]), np.int8)
        for row, top in enumerate((0, half)):
            for column, left in enumerate((0, half)):
                part = slice(top, top + half), slice(left, left + half)
                made[:, *part] = self._bins[self._quarters[which, row, column]][:, *part]
        real = which < len(self._bins)
        made[real] = self._bins[which[real]]
        return made, np.full((len(which), 2), 500)

    def take(self, which: np.ndarray) -> np.ndarray:
        return self.channels.decode(self.encoded(which)[0])


def windows_of(path: Path, count: int, dice: np.random.Generator) -> np.ndarray:
    """The whole image and random windows of a quarter to nine tenths of its area."""
    with Image.open(path) as image:
        width, height = image.size
    found = [(0, 0, width - 1, height - 1)]
    while len(found) < count:
        size, aspect = dice.uniform(0.25, 0.9) * width * height, dice.uniform(2 / 3, 3 / 2)
        across, down = min(width, int((size * aspect) ** 0.5)), min(height, int((size / aspect) ** 0.5))
        left, top = dice.integers(0, width - across + 1), dice.integers(0, height - down + 1)
        found.append((left, top, left + across - 1, top + down - 1))
    return np.array(found)


def million(folder: Path, scale: int, rows: int, bin_dim: int | None) -> None:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".png"))
    dice = np.random.default_rng(SEED)
    with tempfile.TemporaryDirectory() as work:
        here, recipe = Path(work), Recipe(scales=(scale,), levels=(6,))
        every = {path.name: windows_of(path, 34, dice) for path in files}
        extract_folder(folder, here / "w.h5", recipe, CPU, windows=every)
        described = unit_rows(open_store(here / "w.h5"))
        layout = bin_layout(recipe, described.dim)
        channels = learn_from(layout, described, bin_dim)
        real = BinSource(layout, channels, None, described)
        source = Collages(real.encoded(np.arange(len(real)))[0], layout, channels, rows)
        started = time.perf_counter()
        write_bins(here / "bins.h5", source)  # type: ignore[arg-type]
        wrote = time.perf_counter() - started
        bins = read_bins(here / "bins.h5", rows, layout, channels)
        write_regions(here / "regions.faiss", source)  # type: ignore[arg-type]
        built = time.perf_counter() - started - wrote
        regions = Regions([(rows, read_regions(here / "regions.faiss", rows, layout))])
        (queries := here / "q").mkdir()
        for kind, area in enumerate(AREAS):
            cuts = random.Random(SEED)
            for number, at in enumerate(cuts.sample(range(len(files)), MILLION_QUERIES)):
                cut(files[at], area, cuts)[0].save(queries / f"{kind}-{number:03}.jpg", quality=QUALITY)
        extract_folder(queries, here / "q.h5", part_recipe(recipe, PART_FACTORS), CPU)
        descriptors = np.asarray(open_store(here / "q.h5").descriptors, np.float32)
        descriptors = descriptors.reshape(len(descriptors), -1, described.dim)
        cells = np.stack([cells_of(layout.take(one)).mean(0) for one in descriptors])
        size = (here / "regions.faiss").stat().st_size / rows
        started = time.perf_counter()
        best = exhaustive_search(cells, bins)
        seconds = time.perf_counter() - started
        print(
            f"{rows:,} images, {MILLION_QUERIES} parts of each size, scale {scale}, seed {SEED}. Bins take "
            f"{bins.values[0].size:,} bytes an image, written in {wrote:.0f} s; regions {size:.0f} bytes, built in "
            f"{built:.0f} s. An exhaustive search for all parts at once takes {seconds:.0f} s.\n\n"
            "| parts | candidates | recall@1 | recall@10 | regions, ms | alignment, ms | in all, ms |\n"
            "|---|---|---|---|---|---|---|"
        )
        for kind, (low, high) in enumerate(AREAS):
            which = range(kind * MILLION_QUERIES, (kind + 1) * MILLION_QUERIES)
            for candidates in (400, 2_000, 5_000, 10_000, 20_000):
                spent, found = [], []
                for _ in range(2):  # warm
                    spent, found = [], []
                    for at in which:
                        started = time.perf_counter()
                        near = regions.nearest(cells[at], candidates)
                        middle = time.perf_counter()
                        order = order_by_bins(part_matching(layout, channels), descriptors[at], near, bins.take, 10)
                        spent.append((middle - started, time.perf_counter() - middle))
                        found.append((best[at][0] in order.rows[:10], np.isin(best[at], order.rows[:10]).mean()))
                first, ten = np.mean(found, axis=0)
                a, b = 1000 * np.median(spent, axis=0)
                print(
                    f"| {low:.0%} to {high:.0%} | {candidates:,} | {first:.3f} | {ten:.3f} | {a:.0f} | {b:.0f} "
                    f"| {a + b:.0f} |",
                    flush=True,
                )


def exhaustive_search(queries: np.ndarray, bins: Bins) -> np.ndarray:
    """[Q, 10] the best images for queries [Q, 9, C], as `align` scores them, for all queries at once."""
    count, side = bins.values.shape[:2]
    shapes = rectangles(side)
    flat = queries.reshape(-1, queries.shape[2])
    best, score = np.zeros((len(queries), 0), np.int64), np.zeros((len(queries), 0), np.float32)
    for start in range(0, count, 32):
        cells = all_cells(bins.take(np.arange(start, min(start + 32, count))), shapes).astype(np.float32)
        images, places, channels = cells.shape
        rows = cells.reshape(-1, channels)
        lengths = np.sqrt(np.einsum("nc,nc->n", rows, rows))
        similar = ((rows @ flat.T) / np.where(lengths > 0, lengths, 1)[:, None]).reshape(
            images, places, len(queries), -1
        )
        found = sum(similar[:, shapes.cells[:, cell], :, cell] for cell in range(shapes.cells.shape[1])) / 9
        score = np.hstack([score, found.max(0).T])
        best = np.hstack([best, np.tile(np.arange(start, start + images), (len(queries), 1))])
        if best.shape[1] > 2000 or start + 32 >= count:
            order = np.lexsort((best, -score), axis=1)[:, :10]
            best, score = np.take_along_axis(best, order, 1), np.take_along_axis(score, order, 1)
    return best


def rerank(server: Path, client: Path, relevant: str, scale: int) -> None:
    """mAP in percent of every way to order images again; queries of the gallery are left out of their rankings."""
    with tempfile.TemporaryDirectory() as work:
        here, recipe = Path(work), Recipe(scales=(scale,))
        extract_folder(server, here / "s.h5", recipe, CPU)
        gallery, queries = open_store(here / "s.h5"), None
        if client != server:
            extract_folder(client, here / "c.h5", recipe, CPU)
            queries = open_store(here / "c.h5")
        print(f"{len(queries or gallery)} queries, {len(gallery)} images, scale {scale}\n")
        print("| `--rerank` | mAP | seconds |\n|---|---|---|")
        for name, dim in [*((name, None) for name in RERANKINGS), *(("bins", dim) for dim in BIN_DIMS)]:
            started = time.perf_counter()
            options = RetrievalOptions(relevant=relevant, rerank=name, bin_dim=dim)
            found = evaluate_retrieval(gallery, queries, options)
            seconds = time.perf_counter() - started
            label = name if dim is None else f"{name} --bin-dim {dim}"
            print(f"| {label} | {found.mean_average_precision:.2f} | {seconds:.1f} |", flush=True)


def speed(folder: Path, scale: int) -> None:
    """Milliseconds to order 400 candidates again, warm, of the default recipe and of 512 projected values."""
    with tempfile.TemporaryDirectory() as work:
        here = Path(work)
        extract_folder(folder, here / "s.h5", Recipe(scales=(scale,)), CPU)
        store = open_store(here / "s.h5")
        queries = np.asarray(store.descriptors[:25], np.float32)
        print(
            "| values | `--rerank` | search and re-ranking, ms | the search alone, ms | re-ranking, ms |\n"
            "|---|---|---|---|---|"
        )
        for projection, dim in ((None, None), (ProjectionOptions(dims=512), None), (ProjectionOptions(dims=512), 64)):
            create_gallery(store, here / "g", projection=projection, keep_bins=True, bin_dim=dim, overwrite=True)
            gallery = open_gallery(here / "g")
            layout, kept = bin_layout(gallery.recipe, gallery.dim), gallery.bins
            assert kept is not None
            for name in RERANKINGS[1:] if dim is None else ("bins",):
                plain, both = [], []
                for _ in range(3):
                    for query in queries:
                        started = time.perf_counter()
                        rows, _ = search_descriptors(gallery, query[None], SearchOptions(k=400))
                        middle = time.perf_counter()
                        if name == "bins":
                            matching = whole_matching(layout, kept.channels)
                            order_by_bins(matching, query[None], np.sort(rows[0]), kept.take, 10)
                            end = time.perf_counter() + middle - started
                        else:
                            search_descriptors(gallery, query[None], SearchOptions(k=10, rerank=name))
                            end = time.perf_counter()
                        plain.append(middle - started)
                        both.append(end - middle)
                one, two = 1000 * float(np.median(plain)), 1000 * float(np.median(both))
                values = gallery.dim if projection is None else 512
                label = name if dim is None else f"{name} --bin-dim {dim}"
                print(f"| {values:,} | {label} | {two:.1f} | {one:.1f} | {two - one:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("crops", "boxes", "same-object", "categories", "million", "speed"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--area", default="0.1,0.3")
    parser.add_argument("--scale", type=int)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--bin-dim", type=int)
    given = parser.parse_args()
    if given.what == "crops":
        low, high = map(float, given.area.split(","))
        crops(given.folder, (low, high), given.scale or 448, given.bin_dim)
    elif given.what == "boxes":
        print("| area of the box | recall@1 | mean IoU | IoU over 0.5 |\n|---|---|---|---|")
        for area in AREAS:
            boxes(given.folder, area, given.scale or 448)
    elif given.what == "million":
        million(given.folder, given.scale or 448, given.rows, given.bin_dim)
    elif given.what == "same-object":
        rerank(given.folder / "server", given.folder / "client", r"regex:(obj\d+)_", given.scale or 224)
    elif given.what == "categories":
        rerank(given.folder, given.folder, r"regex:([^/]+)/[^/]+$", given.scale or 224)
    else:
        speed(given.folder, given.scale or 224)


if __name__ == "__main__":
    main()
