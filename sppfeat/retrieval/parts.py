"""Where in the images of a gallery a query is found, by its cells against their bins: see `alignment`."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from sppfeat.errors import GalleryError
from sppfeat.retrieval.alignment import Rectangles, Whitening, align, cells_of, locate, rectangles
from sppfeat.retrieval.bins import BinLayout, Bins, whole_side
from sppfeat.retrieval.channels import Channels
from sppfeat.retrieval.gallery import Gallery
from sppfeat.store import Box

# Sides of a query that may be a part of an image, and of a part of the query, in those at which the gallery was
# described: things are smaller in the whole than in a part of it that was enlarged.
PART_FACTORS: Final = (0.35, 0.5)
BOX_FACTORS: Final = (0.7, 1.0)
# The power of a rectangle's area that weighs its score when whole images are compared: weak geometry. Half of it
# changes mAP on buildings and on kinds of objects by 0.3 points, and twice of it by 0.7.
AREA_POWER: Final = 0.4
# Images whose bins are in memory at a time: 12 MB of the default recipe's.
_BLOCK: Final = 1024


def require_bins(gallery: Gallery) -> Bins:
    """The bins of a gallery. Raises GalleryError, with the command that keeps them, for a gallery without."""
    if gallery.bins is None:
        raise GalleryError(
            f"{gallery.path}: keeps no bins, which parts and re-ranking by bins need; build it again with "
            f"`{_rebuilding(gallery)}`"
        )
    return gallery.bins


def _rebuilding(gallery: Gallery) -> str:
    """The command that builds a gallery again, with bins."""
    stores = [shlex.quote(source.store) for source in gallery.about.sources] or ["STORE"]
    place = shlex.quote(str(gallery.path))
    projected = ""
    if (projection := gallery.projection) is not None:
        projected = f" --project {projection.dim}{' --whiten' if projection.power else ''}"
    first = f"sppfeat index {stores[0]} -o {place}{projected} --keep-bins --overwrite"
    return " && ".join([first, *(f"sppfeat index {store} --add-to {place}" for store in stores[1:])])


class Located(NamedTuple):
    """Rows [N] of a gallery, the best first, with their scores and best rectangles, by number; boxes: [M, 4] where the
    query is in the first M of them, x1, y1, x2, y2, parts of the image's width and height."""

    rows: np.ndarray
    scores: np.ndarray
    rectangles: np.ndarray
    boxes: np.ndarray


@dataclass(frozen=True)
class Matching:
    """How a query is looked for in images: where, and by what of their cells. channels: None if bins are kept as they
    are. whitening: None: cells are compared as they are."""

    layout: BinLayout
    shapes: Rectangles
    channels: Channels | None = None
    whitening: Whitening | None = None

    def bins(self, descriptors: np.ndarray) -> np.ndarray:
        """[F, side, side, C] of a query's descriptors [F, D] at F scales, as those of images are kept."""
        found = self.layout.take(descriptors)
        return found if self.channels is None else self.channels.as_kept(found)

    def query(self, descriptors: np.ndarray) -> np.ndarray:
        """[CELLS * CELLS, C or W] of a query's descriptors [F, D] at F scales, whose cells are averaged."""
        found: np.ndarray = cells_of(self.bins(descriptors), self.whitening).mean(0)
        return found


def part_matching(layout: BinLayout, channels: Channels | None) -> Matching:
    """A query that may be a part of an image, in all rectangles, by cells as they are: whitening tells apart less of
    the little that a small part has to say."""
    return Matching(layout, rectangles(layout.side), channels)


def whole_matching(layout: BinLayout, channels: Channels) -> Matching:
    """A query that is a whole image, in the largest rectangles, by whitened cells."""
    shapes = rectangles(layout.side, whole_side(layout.side), AREA_POWER)
    return Matching(layout, shapes, channels, channels.whitening)


def order_by_bins(
    matching: Matching,
    descriptors: np.ndarray,
    rows: np.ndarray,
    bins_of: Callable[[np.ndarray], np.ndarray],
    shown: int,
) -> Located:
    """Rows [N] by falling score of their best rectangle, equal ones in the order of the rows.

    descriptors: [F, D] of a query at F scales. bins_of: the bins [n, side, side, channels] of n rows. shown: find boxes
    in this many.
    """
    query, how = matching.query(descriptors), (matching.shapes, matching.whitening)
    scores, best = np.empty(len(rows), np.float32), np.empty(len(rows), np.int64)
    for start in range(0, len(rows), _BLOCK):
        part = slice(start, start + _BLOCK)
        scores[part], best[part] = align(query, bins_of(rows[part]), *how)
    order = np.lexsort((rows, -scores))
    first = rows[order[:shown]]
    boxes = np.concatenate(
        [np.zeros((0, 4))]
        + [locate(query, bins_of(first[at : at + _BLOCK]), *how) for at in range(0, len(first), _BLOCK)]
    )
    return Located(rows[order], scores[order], best[order], boxes)


def in_pixels(part: np.ndarray, whole: Box) -> Box:
    """A part x1, y1, x2, y2 from 0 to 1 of a window, in pixels of its image, inclusive ends; at least one pixel."""
    left, top, right, bottom = whole
    width, height = right - left + 1, bottom - top + 1
    x1, y1 = left + math.floor(part[0] * width), top + math.floor(part[1] * height)
    x2, y2 = left + math.ceil(part[2] * width) - 1, top + math.ceil(part[3] * height) - 1
    return min(x1, right), min(y1, bottom), max(x1, min(x2, right)), max(y1, min(y2, bottom))
