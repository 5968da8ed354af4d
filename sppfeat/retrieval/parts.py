"""Where in the images of a gallery a query is found, by its cells against their bins: see `alignment`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from sppfeat.errors import GalleryError
from sppfeat.retrieval.alignment import Rectangles, align, cells_of, locate, rectangles
from sppfeat.retrieval.bins import BinLayout, Bins
from sppfeat.retrieval.gallery import Gallery
from sppfeat.store import Box

# Sides of a query that may be a part of an image, and of a part of the query, in those at which the gallery was
# described: things are smaller in the whole than in a part of it that was enlarged.
PART_FACTORS: Final = (0.35, 0.5)
BOX_FACTORS: Final = (0.7, 1.0)
# Images whose bins are in memory at a time: 12 MB of the default recipe's.
_BLOCK: Final = 1024


def require_bins(gallery: Gallery) -> Bins:
    """The bins of a gallery. Raises GalleryError, with the command that keeps them, for a gallery without."""
    if gallery.bins is None:
        raise GalleryError(
            f"{gallery.path}: keeps no bins, which parts and re-ranking need; build it again with "
            f"`sppfeat index STORE -o {gallery.path} --keep-bins --overwrite`"
        )
    return gallery.bins


class Located(NamedTuple):
    """Rows [N] of a gallery, the best first, with their scores and best rectangles, by number; boxes: [M, 4] where the
    query is in the first M of them, x1, y1, x2, y2, parts of the image's width and height."""

    rows: np.ndarray
    scores: np.ndarray
    rectangles: np.ndarray
    boxes: np.ndarray


def rectangles_for(layout: BinLayout, *, parts: bool) -> Rectangles:
    """Where a query is looked for: as a part, in all rectangles; as a whole, in those of two thirds of each side."""
    return rectangles(layout.side, 1 if parts else -(-2 * layout.side // 3))


def order_by_bins(
    layout: BinLayout,
    descriptors: np.ndarray,
    rows: np.ndarray,
    bins_of: Callable[[np.ndarray], np.ndarray],
    shapes: Rectangles,
    shown: int,
) -> Located:
    """Rows [N] by falling score of their best rectangle, equal ones in the order of the rows.

    descriptors: [F, D] of a query at F scales, whose cells are averaged. bins_of: the bins [n, side, side, channels] of
    n rows. shown: find boxes in this many.
    """
    query = cells_of(layout.take(descriptors)).mean(0)
    scores, best = np.empty(len(rows), np.float32), np.empty(len(rows), np.int64)
    for start in range(0, len(rows), _BLOCK):
        part = slice(start, start + _BLOCK)
        scores[part], best[part] = align(query, bins_of(rows[part]), shapes)
    order = np.lexsort((rows, -scores))
    first = rows[order[:shown]]
    boxes = np.concatenate(
        [np.zeros((0, 4))]
        + [locate(query, bins_of(first[at : at + _BLOCK]), shapes) for at in range(0, len(first), _BLOCK)]
    )
    return Located(rows[order], scores[order], best[order], boxes)


def in_pixels(part: np.ndarray, whole: Box) -> Box:
    """A part x1, y1, x2, y2 from 0 to 1 of a window, in pixels of its image, inclusive ends; at least one pixel."""
    left, top, right, bottom = whole
    width, height = right - left + 1, bottom - top + 1
    x1, y1 = left + math.floor(part[0] * width), top + math.floor(part[1] * height)
    x2, y2 = left + math.ceil(part[2] * width) - 1, top + math.ceil(part[3] * height) - 1
    return min(x1, right), min(y1, bottom), max(x1, min(x2, right)), max(y1, min(y2, bottom))
