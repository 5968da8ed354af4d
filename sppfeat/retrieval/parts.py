"""Where in the images of a gallery a query is found, by its cells against their bins: see `alignment`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from sppfeat.errors import GalleryError
from sppfeat.retrieval.alignment import align, cells_of
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
    """Rows [N] of a gallery, the best first, with what `Alignment` says of each."""

    rows: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    rectangles: np.ndarray


def order_by_bins(
    layout: BinLayout, descriptors: np.ndarray, rows: np.ndarray, bins_of: Callable[[np.ndarray], np.ndarray]
) -> Located:
    """Rows [N] by falling score of their best rectangle, equal ones in the order of the rows.

    descriptors: [F, D] of a query at F scales, whose cells are averaged. bins_of: the bins [n, side, side, channels] of
    n rows.
    """
    query = cells_of(layout.take(descriptors)).mean(0)
    scores, boxes = np.empty(len(rows), np.float32), np.empty((len(rows), 4))
    best = np.empty(len(rows), np.int64)
    for start in range(0, len(rows), _BLOCK):
        part = slice(start, start + _BLOCK)
        scores[part], boxes[part], best[part] = align(query, bins_of(rows[part]))
    order = np.lexsort((rows, -scores))
    return Located(rows[order], scores[order], boxes[order], best[order])


def in_pixels(part: np.ndarray, whole: Box) -> Box:
    """A part x1, y1, x2, y2 from 0 to 1 of a window, in pixels of its image, inclusive ends; at least one pixel."""
    left, top, right, bottom = whole
    width, height = right - left + 1, bottom - top + 1
    x1, y1 = left + math.floor(part[0] * width), top + math.floor(part[1] * height)
    x2, y2 = left + math.ceil(part[2] * width) - 1, top + math.ceil(part[3] * height) - 1
    return min(x1, right), min(y1, bottom), max(x1, min(x2, right)), max(y1, min(y2, bottom))
