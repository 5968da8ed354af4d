"""Whether an image is a part of another one, and where, by their pixels.

The part is laid over the whole at many sizes and all places, where both correlate best, and then moved and stretched
until it fits to less than a pixel (Gauss-Newton steps, after Lucas, Kanade 1981). As with copies, the worst block
decides: of a part, all blocks differ a little; of a second photograph of the same thing, some differ much
(benchmarks/results/duplicates.md).
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from PIL import Image

from sppfeat.retrieval.same_images import BORDER, SIDE, blurred, difference

# The longer side of the gray versions that are laid over each other, in pixels.
PART_SIDE: Final = 192
WHOLE_SIDE: Final = 256
# See `Difference`. Near: at most 0.1 in parts saved as JPEG 70, also at half the size, 0.2 in those saved as JPEG 20;
# 0.31 and more between shots of a building, or parts of them, moved and stretched to fit. Overall: 0.08, 0.13; 0.12.
LARGEST_NEAR: Final = 0.25
LARGEST_OVERALL: Final = 0.15
# Gray values, of what is not a sum of rows and columns. One color, or a gradient or stripes along the sides, fits in
# many places, and is a part of nothing; photographs have 8 or more.
_LEAST_DEVIATION: Final = 4.0
# Sides of the whole where all places are tried: the longer one, or more if the shorter one would be less than this.
_COARSE: Final = 64
_COARSE_LEAST: Final = 12
# The sizes of the part there, of the largest that fits, and their steps.
_SMALLEST: Final = 0.35
_STEP: Final = 1.05
# Correlation there: of parts 0.83 or more. Places that are tried further, best first, and steps.
_LEAST_CORRELATION: Final = 0.7
_TRIED: Final = 3
_STEPS: Final = 8
# How far an edge moves in one step, of the side, at most; and from where on it has arrived.
_LARGEST_STEP: Final = 0.1
_SMALLEST_STEP: Final = 1e-4


class Placed(NamedTuple):
    """Where a part is: box, [4] x1, y1, x2, y2 from 0 to 1 of the whole. near, overall: see `Difference`."""

    near: float
    overall: float
    box: np.ndarray


def place_part(part: Image.Image, whole: Image.Image) -> Placed | None:
    """Where a gray image is a part of another one; None if it is none, or shows too little to tell.

    It may have been resized, both sides by nearly the same factor, but not turned, mirrored, brightened or darkened.
    """
    shown = _view(part, (0, 0, 1, 1))
    if (shown - shown.mean(0) - shown.mean(1, keepdims=True)).std() < _LEAST_DEVIATION:
        return None
    for correlation, box in _likely(part, whole)[:_TRIED]:
        if correlation < _LEAST_CORRELATION:
            break
        found = _fitted(shown, whole, np.array(box))
        if found.near <= LARGEST_NEAR and found.overall <= LARGEST_OVERALL:
            return found
    return None


def _likely(part: Image.Image, whole: Image.Image) -> list[tuple[float, tuple[float, ...]]]:
    """The best place of the part for each of its sizes: the correlation, and the box; by falling correlation."""
    scale = min(max(_COARSE / max(whole.size), _COARSE_LEAST / min(whole.size)), 1)
    width, height = (max(1, round(side * scale)) for side in whole.size)
    pixels = _resized(whole, width, height)
    shape = (2 * height, 2 * width)  # no place wraps around
    spectrum = np.fft.rfft2(pixels, shape)
    sums, squares = (np.pad(values.cumsum(0).cumsum(1), ((1, 0), (1, 0))) for values in (pixels, pixels * pixels))
    largest = factor = min(width / part.width, height / part.height)
    small = part.copy()
    small.thumbnail((max(1, round(part.width * factor)), max(1, round(part.height * factor))))
    found = []
    while factor >= _SMALLEST * largest:
        w, h = (min(most, max(1, round(side * factor))) for side, most in zip(part.size, (width, height), strict=True))
        template = _resized(small, w, h)
        template -= template.mean()
        products = np.fft.irfft2(spectrum * np.conj(np.fft.rfft2(template, shape)), shape)
        variances = _of_boxes(squares, w, h) - _of_boxes(sums, w, h) ** 2 / (w * h)
        lengths = np.sqrt(np.maximum(variances, 1) * max((template * template).sum(), 1))
        correlations = products[: height - h + 1, : width - w + 1] / lengths
        y, x = np.unravel_index(correlations.argmax(), correlations.shape)
        box = (x / width, y / height, (x + w) / width, (y + h) / height)
        found.append((float(correlations[y, x]), tuple(map(float, box))))
        factor /= _STEP
    return sorted(found, reverse=True)


def _fitted(shown: np.ndarray, whole: Image.Image, box: np.ndarray) -> Placed:
    """The box moved and stretched until what the whole shows there is nearest to the part."""
    inside = slice(BORDER, SIDE - BORDER)
    best = Placed(np.inf, np.inf, box)
    for _ in range(_STEPS):
        there = _view(whole, box)
        near, overall = (float(each[0]) for each in difference(shown[None], there[None]))
        if near < best.near:
            best = Placed(near, overall, box)
        sides = np.tile(box[2:] - box[:2], 2)
        # Inwards, where there are pixels.
        moves = np.diag(sides / SIDE * (1, 1, -1, -1))
        slopes = [(_view(whole, box + move) - there)[inside, inside].ravel() / move.sum() for move in moves]
        step = _least_squares(np.stack(slopes), (shown - there)[inside, inside].ravel())
        step = np.clip(step, -_LARGEST_STEP * sides, _LARGEST_STEP * sides)
        box = np.clip(box + step, 0, 1)
        if np.abs(step).max() < _SMALLEST_STEP or min(box[2:] - box[:2]) < _SMALLEST / 4:
            break
    return best


def _least_squares(slopes: np.ndarray, left: np.ndarray) -> np.ndarray:
    """[4] the step that leaves least, from the slopes [4, N]; 0 along what changes nothing."""
    step: np.ndarray = np.linalg.lstsq(slopes @ slopes.T, slopes @ left, rcond=None)[0]
    return step


def _view(image: Image.Image, box: np.ndarray | tuple[float, ...]) -> np.ndarray:
    """[SIDE, SIDE] float32 what an image shows in a box, slightly blurred."""
    width, height = image.size
    corners = (box[0] * width, box[1] * height, min(width, box[2] * width), min(height, box[3] * height))
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=corners), np.float32)
    shown: np.ndarray = blurred(pixels[None])[0]
    return shown


def _resized(image: Image.Image, width: int, height: int) -> np.ndarray:
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.float64)


def _of_boxes(sums: np.ndarray, width: int, height: int) -> np.ndarray:
    """Sums over all boxes of a size, from cumulative sums."""
    rows = sums[height:] - sums[:-height]
    found: np.ndarray = rows[:, width:] - rows[:, :-width]
    return found
