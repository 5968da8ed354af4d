"""Why an image scored as it did: how much each of its bins, and each of the query's, adds to the score.

The score of an alignment is a mean over cells of inner products, and each channel of a cell is the maximum of one bin:
so every product of two channels, which whitening mixes, belongs to a pair of bins, one of the query and one of the
image. All pairs add up to the score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from sppfeat.retrieval.alignment import CELLS, Rectangles, Whitening, rectangles, weight_of

# As many as can be told apart on a small image.
_LINKS: Final = 5


@dataclass(frozen=True)
class Link:
    """A bin of the query and a bin of the image, row and column from 0, and what they add to the score."""

    query: tuple[int, int]
    image: tuple[int, int]
    score: float


@dataclass(frozen=True)
class Explanation:
    """What adds up to a score. query: [n, n] of each bin of the query. image: [n, n] of each bin of the image.

    links: the pairs of bins that add most, the largest first, each bin in one of them.
    """

    query: np.ndarray
    image: np.ndarray
    links: list[Link]


def explain(
    query: np.ndarray, image: np.ndarray, shapes: Rectangles, rectangle: int, whitening: Whitening | None = None
) -> Explanation:
    """Explain the score of one of `shapes`, by number, of an image's bins [n, n, C] for a query's bins [F, n, n, C].

    F: scales, whose cells are averaged. The image's bins may be scaled by any factor.
    """
    side = len(image)
    whole = rectangles(side)
    pairs = np.zeros((side * side, side * side))
    for cell in range(CELLS * CELLS):
        there = _cell(image, shapes, rectangle, cell, whitening)
        for one in query:
            pairs += _cell(one, whole, whole.whole, cell, whitening) @ there.T
    pairs /= len(query) * CELLS * CELLS
    pairs *= weight_of(pairs.sum(), shapes.weights[rectangle])
    grid = side, side
    return Explanation(pairs.sum(1).reshape(grid), pairs.sum(0).reshape(grid), _links(pairs, side))


def _cell(bins: np.ndarray, shapes: Rectangles, rectangle: int, cell: int, whitening: Whitening | None) -> np.ndarray:
    """[n * n, C or W] what each bin is of a cell that is compared, which is their sum."""
    row, column = divmod(int(shapes.cells[rectangle, cell]), len(shapes.runs))
    (top, bottom), (left, right) = shapes.runs[row].tolist(), shapes.runs[column].tolist()
    part = bins[top:bottom, left:right].astype(np.float64)
    flat = part.reshape(-1, part.shape[-1])
    first = flat.argmax(0)
    values = flat.max(0)
    values /= np.sqrt(values @ values) or 1.0
    if whitening is not None:
        values -= whitening.mean
    of_bins = np.zeros((len(bins) ** 2, len(values)))
    from_bins = (top + first // (right - left)) * len(bins) + left + first % (right - left)
    of_bins[from_bins, np.arange(len(values))] = values
    if whitening is not None:
        of_bins = of_bins @ whitening.matrix
        of_bins /= np.linalg.norm(of_bins.sum(0)) or 1.0
    return of_bins


def _links(pairs: np.ndarray, side: int) -> list[Link]:
    found: list[Link] = []
    free = pairs.copy()
    while len(found) < _LINKS and free.max() > 0:
        query, image = divmod(int(free.argmax()), side * side)
        found.append(Link(divmod(query, side), divmod(image, side), float(pairs[query, image])))
        free[query], free[:, image] = 0, 0
    return found
