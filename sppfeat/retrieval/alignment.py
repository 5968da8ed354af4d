"""Where a query is found in an image: its cells against those of every rectangle of the image's bins.

With max pooling, the elementwise maximum of the bins of a rectangle is the descriptor of that part of the image
(Tolias, Sicre, Jegou, ICLR 2016). Each rectangle has a grid of cells of its own, by the rule of bins, and so has the
query: what is compared is not only what a part shows, but also how it is laid out.

Cells are compared as they are, or whitened, which tells more about what an image shows when all of it is compared
(Jegou, Chum 2012): responses that all images share count less. A weight of each rectangle is the weak geometry: a query
that is a whole image is expected in nearly all of another.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from sppfeat.store import normalize_rows

# Cells along each side of a rectangle.
CELLS: Final = 3
# The box found is the mean of rectangles, each weighted by exp(SHARPNESS * (its score - the best one)): between the
# edges of bins. Only those count that overlap one of them by NEAR or more, that whose weight times theirs is largest:
# not what lies between two places that look the same. Chosen on crops of photographs, where half and twice of either
# give no more overlap.
SHARPNESS: Final = 60.0
NEAR: Final = 0.1
# Images at a time: their cells stay near the processor.
_BLOCK: Final = 32


@dataclass(frozen=True)
class Rectangles:
    """The rectangles of a grid of n x n bins.

    runs: [I, 2] the bins, end exclusive, that a cell can cover along one side. cells: [R, CELLS * CELLS] of each
    rectangle, row by row, as numbers among the I * I pairs of runs. boxes: [R, 4] x1, y1, x2, y2 from 0 to 1. overlaps:
    [R, R] their intersections over unions. weights: [R] float32 that their scores are multiplied by. whole: the
    rectangle of all bins.
    """

    runs: np.ndarray
    cells: np.ndarray
    boxes: np.ndarray
    overlaps: np.ndarray
    weights: np.ndarray
    whole: int


@dataclass(frozen=True)
class Whitening:
    """How cells of length 1 are whitened before they are compared. mean: [C] float32. matrix: [C, W] float32."""

    mean: np.ndarray
    matrix: np.ndarray

    def apply(self, cells: np.ndarray) -> np.ndarray:
        """[N, W] float32 of length 1, from cells [N, C] of length 1."""
        return normalize_rows(cells @ self.matrix - self.mean @ self.matrix)


class Alignment(NamedTuple):
    """The best place of a query in each of N images.

    scores: [N] float32, the mean cosine similarity of the cells times the rectangle's weight. rectangles: [N] the best
    one, by number.
    """

    scores: np.ndarray
    rectangles: np.ndarray


@functools.cache
def rectangles(n: int, least: int = 1, power: float = 0.0) -> Rectangles:
    """The rectangles of an n x n grid with sides of at least `least` bins, weighted by their part of it to a power."""
    sides = [(start, end) for start in range(n) for end in range(start + least, n + 1)]
    of_side = [
        [(start + i * (end - start) // CELLS, start - (-(i + 1) * (end - start) // CELLS)) for i in range(CELLS)]
        for start, end in sides
    ]
    runs = sorted({run for cells in of_side for run in cells}, key=lambda run: (run[1] - run[0], run))
    places = {run: place for place, run in enumerate(runs)}
    along = np.array([[places[run] for run in cells] for cells in of_side])
    count = len(sides)
    cells = along[:, None, :, None] * len(runs) + along[None, :, None, :]
    boxes = np.array([(left, top, right, bottom) for top, bottom in sides for left, right in sides])
    whole = sides.index((0, n))
    areas = ((boxes[:, 2:] - boxes[:, :2]) / n).prod(1)
    return Rectangles(
        np.array(runs),
        cells.reshape(count * count, -1),
        boxes / n,
        _overlaps(boxes),
        (areas**power).astype(np.float32),
        whole * count + whole,
    )


def _overlaps(boxes: np.ndarray) -> np.ndarray:
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(2)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    found: np.ndarray = common / (areas[:, None] + areas - common)
    return found


def cells_of(bins: np.ndarray, whitening: Whitening | None = None) -> np.ndarray:
    """[N, CELLS * CELLS, C or W] float32 cells of length 1 of whole images, from bins [N, n, n, C]."""
    shapes = rectangles(bins.shape[1])
    found = all_cells(bins, shapes)[:, shapes.cells[shapes.whole]].astype(np.float32)
    cells = normalize_rows(found.reshape(-1, bins.shape[-1]))
    return (cells if whitening is None else whitening.apply(cells)).reshape(*found.shape[:2], -1)


def align(query: np.ndarray, bins: np.ndarray, shapes: Rectangles, whitening: Whitening | None = None) -> Alignment:
    """The best rectangle of each image for a query: cells [CELLS * CELLS, C or W] of `cells_of`, or a mean of several.

    bins: [N, n, n, C] of any type; each image's may be scaled by a factor of its own. Of equal scores the first counts.
    """
    scores = np.empty(len(bins), np.float32)
    best = np.empty(len(bins), np.int64)
    for start in range(0, len(bins), _BLOCK):
        part = slice(start, start + _BLOCK)
        of_all = _scores(query, bins[part], shapes, whitening)
        best[part] = of_all.argmax(1)
        scores[part] = of_all.max(1)
    return Alignment(scores, best)


def locate(query: np.ndarray, bins: np.ndarray, shapes: Rectangles, whitening: Whitening | None = None) -> np.ndarray:
    """[N, 4] where a query is in each image: x1, y1, x2, y2, parts of the image's width and height. See SHARPNESS."""
    near = (shapes.overlaps >= NEAR).astype(np.float64)
    boxes = np.empty((len(bins), 4))
    for start in range(0, len(bins), _BLOCK):
        of_all = _scores(query, bins[start : start + _BLOCK], shapes, whitening).astype(np.float64)
        weights = np.exp(SHARPNESS * (of_all - of_all.max(1, keepdims=True)))
        weights *= near[(weights * (weights @ near)).argmax(1)]
        boxes[start : start + _BLOCK] = weights @ shapes.boxes / weights.sum(1, keepdims=True)
    return boxes


def _scores(query: np.ndarray, bins: np.ndarray, shapes: Rectangles, whitening: Whitening | None) -> np.ndarray:
    """[N, R] float32 scores of all rectangles."""
    cells = all_cells(bins, shapes).astype(np.float32, copy=False)
    count, places, channels = cells.shape
    flat = cells.reshape(-1, channels)
    lengths = _lengths(flat)
    if whitening is not None:
        flat = flat @ whitening.matrix
        flat /= lengths[:, None]
        flat -= whitening.mean @ whitening.matrix
        lengths = _lengths(flat)
    similar = np.ascontiguousarray(((flat @ query.T) / lengths[:, None]).T).reshape(-1, count, places)
    found = np.take(similar[0], shapes.cells[:, 0], axis=1)
    for cell in range(1, shapes.cells.shape[1]):
        found += np.take(similar[cell], shapes.cells[:, cell], axis=1)
    found /= shapes.cells.shape[1]
    found *= weight_of(found, shapes.weights)
    return found


def weight_of(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What scores are multiplied by to count less by these weights: below 0, that is to grow."""
    return np.where(scores > 0, weights, 1 / weights)


def _lengths(rows: np.ndarray) -> np.ndarray:
    """[N] of rows [N, C]; 1 for a row of zeros."""
    lengths: np.ndarray = np.sqrt(np.einsum("nc,nc->n", rows, rows))
    lengths[lengths == 0] = 1
    return lengths


def all_cells(bins: np.ndarray, shapes: Rectangles) -> np.ndarray:
    """[N, I * I, C] maxima over all pairs of runs, from bins [N, n, n, C]."""
    both = _maxima(_maxima(bins, shapes, 1), shapes, 2)
    return both.reshape(len(bins), -1, bins.shape[-1])


def _maxima(bins: np.ndarray, shapes: Rectangles, axis: int) -> np.ndarray:
    """The maxima over the runs of one axis, which replace that axis."""
    source = np.moveaxis(bins, axis, 0)
    shape = (*bins.shape[:axis], len(shapes.runs), *bins.shape[axis + 1 :])
    out = np.empty(shape, bins.dtype)
    target = np.moveaxis(out, axis, 0)
    places = {(start, end): place for place, (start, end) in enumerate(shapes.runs.tolist())}
    for (start, end), place in places.items():  # a longer run is a shorter one and one more bin
        before = places.get((start, end - 1))
        found, first = (source[start], start + 1) if before is None else (target[before], end - 1)
        if first == end:
            target[place] = found
        for more in range(first, end):
            found = np.maximum(found, source[more], out=target[place])
    return out
