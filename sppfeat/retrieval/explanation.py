"""Why an image scored as it did: how much each of its bins, and each of the query's, adds to the score.

The score of an alignment is a mean over cells of sums over channels, and each channel of a cell is the maximum of one
bin: so every product belongs to a pair of bins, one of the query and one of the image. All pairs add up to the score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from sppfeat.retrieval.alignment import CELLS, Rectangles, rectangles

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


def explain(query: np.ndarray, image: np.ndarray, shapes: Rectangles, rectangle: int) -> Explanation:
    """Explain the score of one of `shapes`, by number, of an image's bins [n, n, C] for a query's bins [F, n, n, C].

    F: scales, whose cells are averaged. The image's bins may be scaled by any factor.
    """
    side = len(image)
    whole = rectangles(side)
    pairs = np.zeros((side * side, side * side))
    for cell in range(CELLS * CELLS):
        there, values = _cell(image, shapes, rectangle, cell)
        for one in query:
            here, asked = _cell(one, whole, whole.whole, cell)
            np.add.at(pairs, (here, there), asked * values)
    pairs /= len(query) * CELLS * CELLS
    grid = side, side
    return Explanation(pairs.sum(1).reshape(grid), pairs.sum(0).reshape(grid), _links(pairs, side))


def _cell(bins: np.ndarray, shapes: Rectangles, rectangle: int, cell: int) -> tuple[np.ndarray, np.ndarray]:
    """[C] the bins, by number, that the maxima of a cell come from, and the maxima, of length 1 together."""
    row, column = divmod(int(shapes.cells[rectangle, cell]), len(shapes.runs))
    (top, bottom), (left, right) = shapes.runs[row].tolist(), shapes.runs[column].tolist()
    part = bins[top:bottom, left:right].astype(np.float64)
    flat = part.reshape(-1, part.shape[-1])
    first = flat.argmax(0)
    values = flat.max(0)
    length = np.sqrt(values @ values) or 1.0
    return (top + first // (right - left)) * len(bins) + left + first % (right - left), values / length


def _links(pairs: np.ndarray, side: int) -> list[Link]:
    found: list[Link] = []
    free = pairs.copy()
    while len(found) < _LINKS and free.max() > 0:
        query, image = divmod(int(free.argmax()), side * side)
        found.append(Link(divmod(query, side), divmod(image, side), float(pairs[query, image])))
        free[query], free[:, image] = 0, 0
    return found
