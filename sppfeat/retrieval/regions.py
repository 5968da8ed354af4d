"""Which images of a large gallery are worth aligning with a part: a few regions of each in one small index.

An alignment's score is an inner product: of the query's cells and of a rectangle's, all of them one after the other. So
nine rectangles of each image, the whole and its four corners of two thirds and of half of the sides, are projected
onto their principal components and kept as product codes that are compared in registers (Andre, Kermarrec, Le Scouarnec
2017): 64 bytes each. The images of the nearest ones are then aligned with all their rectangles.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from sppfeat.errors import GalleryError
from sppfeat.files import appearing
from sppfeat.retrieval.alignment import CELLS, rectangles
from sppfeat.retrieval.bins import BinLayout, BinSource
from sppfeat.retrieval.faiss_files import read_index_file
from sppfeat.retrieval.faiss_library import faiss_errors, load_faiss

# Rectangles of each image.
COUNT: Final = 9
# Values that a region is projected onto, two to a code of 4 bits. With 128, and on 20,000 images, a tenth of the true
# first ten are missed among 400 candidates.
_PROJECTED: Final = 256
_TRAINING_IMAGES: Final = 2000
# Images whose regions are in memory at a time: 53 MB of the default recipe's.
_BLOCK: Final = 512
_SEED: Final = 1234


@dataclass(frozen=True)
class Regions:
    """The regions of a gallery's images. parts: runs of images: how many, and their index, or None if they are few.

    The regions of image i of a run are the COUNT rows of its index from COUNT * i on.
    """

    parts: list[tuple[int, Any]]

    def nearest(self, query: np.ndarray, count: int) -> np.ndarray:
        """Ascending numbers of the `count` images of each run that have the nearest regions; of a run without an index,
        of all of them. query: [CELLS * CELLS, C]."""
        found, start = [], 0
        for images, index in self.parts:
            near = np.arange(images) if index is None else _nearest(index, query, min(count, images))
            found.append(near + start)
            start += images
        return np.concatenate(found)


def _nearest(index: Any, query: np.ndarray, count: int) -> np.ndarray:
    # Each image has COUNT regions: this many belong to at least `count` images.
    _, found = index.search(query.reshape(1, -1).astype(np.float32), count * COUNT)
    ordered = found[0][found[0] >= 0] // COUNT
    _, first = np.unique(ordered, return_index=True)
    nearest: np.ndarray = np.sort(ordered[np.sort(first)[:count]])
    return nearest


def region_vectors(bins: np.ndarray) -> np.ndarray:
    """[N, COUNT, CELLS * CELLS * C] float32 cells of length 1 of each region, from bins [N, n, n, C]."""
    cells, places = _region_cells(bins.shape[1])
    found = np.empty((len(bins), len(cells), bins.shape[3]), np.float32)
    for at, (top, bottom, left, right) in enumerate(cells):
        found[:, at] = bins[:, top:bottom, left:right].max((1, 2))
    lengths = np.sqrt(np.einsum("npc,npc->np", found, found))
    lengths[lengths == 0] = 1
    found /= lengths[:, :, None]
    return found[:, places].reshape(len(bins), COUNT, -1)


@functools.cache
def _region_cells(side: int) -> tuple[list[tuple[int, int, int, int]], np.ndarray]:
    """The cells of all regions as top, bottom, left and right in bins, each once, and [COUNT, 9] which are whose."""
    shapes = rectangles(side)
    squares = [(0, 0, side)]
    for part in (-(-2 * side // 3), -(-side // 2)):
        squares += [(x, y, part) for y in (0, side - part) for x in (0, side - part)]
    boxes = np.rint(shapes.boxes * side).astype(int).tolist()
    of_regions = shapes.cells[[boxes.index([x, y, x + part, y + part]) for x, y, part in squares]]
    numbers, places = np.unique(of_regions, return_inverse=True)
    cells = []
    for number in numbers.tolist():
        row, column = divmod(number, len(shapes.runs))
        cells.append((*shapes.runs[row].tolist(), *shapes.runs[column].tolist()))
    return cells, places.reshape(COUNT, CELLS * CELLS)


def write_regions(file: Path, source: BinSource, index: Any = None) -> None:
    """Write the regions of images to a file. index: that of the first of them, to be continued; None: a new one."""
    faiss = load_faiss()
    index = _trained(source) if index is None else index
    with faiss_errors("regions"):
        for start in range(index.ntotal // COUNT, len(source), _BLOCK):
            values = source.take(np.arange(start, min(start + _BLOCK, len(source))))
            index.add(region_vectors(values).reshape(-1, index.d))
        with appearing(file, GalleryError) as partial:
            faiss.write_index(index, str(partial))


def read_regions(file: Path, images: int, layout: BinLayout) -> Any:
    """The index of the regions of `images` images. Raises GalleryError for any other file."""
    return read_index_file(file, images * COUNT, CELLS * CELLS * layout.channels)


def _trained(source: BinSource) -> Any:
    """An empty index, trained on a sample of the images."""
    faiss = load_faiss()
    which = np.random.default_rng(_SEED).choice(len(source), min(_TRAINING_IMAGES, len(source)), replace=False)
    regions = region_vectors(source.take(np.sort(which)))
    regions = regions.reshape(-1, regions.shape[-1])
    dim = regions.shape[1]
    kept = min(_PROJECTED, dim) // 2 * 2
    centered = regions - regions.mean(0)
    components = np.linalg.eigh(centered.T @ centered)[1][:, ::-1][:, :kept]
    # Turned at random, so that every code has the same to say.
    turn = np.linalg.qr(np.random.default_rng(_SEED).normal(size=(kept, kept)))[0]
    # Not centered, unlike FAISS's own: the mean adds the same to all inner products with a query.
    transform = faiss.LinearTransform(dim, kept, False)
    faiss.copy_array_to_vector(np.ascontiguousarray((components @ turn).T, np.float32).ravel(), transform.A)
    transform.is_trained = True
    codes = faiss.IndexPQFastScan(kept, kept // 2, 4, faiss.METRIC_INNER_PRODUCT)
    index = faiss.IndexPreTransform(transform, codes)
    # FAISS keeps pointers alone; these belong to the index from now on.
    transform.this.disown()
    codes.this.disown()
    index.own_fields = True
    with faiss_errors("regions"):
        index.train(regions)
    return index
