"""Whether two images are copies of one: of another size, recompressed, or without color.

Cosines alone cannot tell: of the default recipe, half-size copies have 0.80 to 0.99, and different stop signs up to
0.98 (benchmarks/results/duplicates.md). So small gray versions of both are laid over each other, and the worst block
decides: a copy differs a little everywhere, another image differs much somewhere.
"""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import numpy as np
from PIL import Image

from sppfeat.errors import ImageError
from sppfeat.files import unsafe_name
from sppfeat.machine import available_cores
from sppfeat.report import small_image
from sppfeat.store import UnitRows, item_of

# Side of the gray versions, and of the blocks that are compared, in pixels.
SIDE: Final = 48
BLOCK: Final = 4
BORDER: Final = 2  # left out: a resized image is least like itself there
# See `Difference`, and benchmarks/results/duplicates.md for how far copies and others are apart.
LARGEST_NEAR: Final = 0.4
LARGEST_OVERALL: Final = 0.22
# Gray values; where there is less contrast, the noise of JPEG is not a difference.
_LEAST_DEVIATION: Final = 16.0
# Copies whose sides are rounded to whole pixels differ by less in the ratio of these.
_LARGEST_ASPECT: Final = 1.05
# Correlation of 8 x 8 pixels below which images are not compared further.
_LEAST_CORRELATION: Final = 0.6
_PAIRS: Final = 64  # compared at once
_KEPT: Final = 1 << 17  # gray versions, in 300 MB


class SameImages:
    """Compares images of a store's rows, each of which is read once, by the files as they are now.

    strict: the cosine from which images that cannot be read are taken for copies. unreadable: reasons by name.
    """

    def __init__(self, rows: UnitRows, strict: float) -> None:
        self._rows = rows
        self._strict = strict
        self._small: OrderedDict[int, np.ndarray | None] = OrderedDict()
        self.unreadable: dict[str, str] = {}

    def __call__(self, one: np.ndarray, other: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """[P] which pairs of positions [P], with their cosines [P], are copies of one image."""
        found = np.zeros(len(one), bool)
        likely = np.flatnonzero(self._sides(one, other) <= _LARGEST_ASPECT)
        for start in range(0, len(likely), _KEPT // 2):
            pairs = likely[start : start + _KEPT // 2]
            self._read(np.union1d(one[pairs], other[pairs]))
            for at in range(0, len(pairs), _PAIRS):
                part = pairs[at : at + _PAIRS]
                found[part] = self._compared(one[part], other[part], scores[part])
        return found

    def _sides(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """How many times as long for its height an image is as the other; 1 for windows, whose sizes are not stored."""
        sizes = [self._rows.store.image_size[self._rows.rows[which]].astype(np.float64) for which in (one, other)]
        (w1, h1), (w2, h2) = (np.maximum(size, 1).T for size in sizes)
        ratio = (w1 * h2) / (h1 * w2)
        sides: np.ndarray = np.maximum(ratio, 1 / ratio)
        return sides

    def _read(self, which: np.ndarray) -> None:
        wanted = [at for at in which.tolist() if at not in self._small]
        with ThreadPoolExecutor(available_cores()) as pool:
            for at, found in zip(wanted, pool.map(lambda at: small_gray(self._rows, at), wanted), strict=True):
                if isinstance(found, str):
                    self.unreadable[self._rows.names[at]] = found
                self._small[at] = None if isinstance(found, str) else found
        for at in which.tolist():
            self._small.move_to_end(at)
        while len(self._small) > max(_KEPT, len(which)):
            self._small.popitem(last=False)

    def _compared(self, one: np.ndarray, other: np.ndarray, scores: np.ndarray) -> np.ndarray:
        same = scores >= self._strict
        there, left, right = [], [], []
        for at, (a, b) in enumerate(zip(one.tolist(), other.tolist(), strict=True)):
            first, second = self._small[a], self._small[b]
            if first is not None and second is not None:
                there.append(at)
                left.append(first)
                right.append(second)
        if there:
            same[there] = copies(blurred(np.stack(left)), blurred(np.stack(right)))
        return same


def gray_image(rows: UnitRows, at: int, side: int) -> Image.Image | str:
    """The image at a position among rows, without color, its longer side at most `side`; or why it cannot be read."""
    name = rows.names[at]
    if (reason := unsafe_name(name)) is not None:
        return f"its name {reason}"
    try:
        item, window = item_of(rows.store.source_root, name)
        shown, _ = small_image(item, side, window, orientation=rows.store.recipe.orientation)
    except (ImageError, OSError, ValueError) as error:  # ValueError: a path that is invalid on this system
        return str(error)
    return shown.convert("L")


def small_gray(rows: UnitRows, at: int) -> np.ndarray | str:
    """[SIDE, SIDE] uint8, or why the image cannot be read."""
    shown = gray_image(rows, at, 4 * SIDE)
    return shown if isinstance(shown, str) else np.asarray(shown.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def copies(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[P] which of the gray images [P, SIDE, SIDE] float32, slightly blurred, are copies of each other."""
    same = _correlation(_coarse(one), _coarse(other)) >= _LEAST_CORRELATION
    a, b = one[same], other[same]
    if len(a):
        found = difference(a, b)
        same[same] = (found.near <= LARGEST_NEAR) & (found.overall <= LARGEST_OVERALL)
    return same


class Difference(NamedTuple):
    """The mean difference of the worst block of P pairs, [P] each, in standard deviations, the larger ones of both.

    near: of the blocks around it: gray text beside a dark bar is not little beside the bar. overall: of the image: a
    few words, or stars, are not little where there is nothing else.
    """

    near: np.ndarray
    overall: np.ndarray


def difference(one: np.ndarray, other: np.ndarray) -> Difference:
    """Of gray images [P, SIDE, SIDE] float32, slightly blurred.

    Neither is moved to fit the other: two shots of one scene differ in where it is, and are no copies.
    """
    apart = _block_means(np.abs(other - one))
    near = np.maximum(np.maximum(_deviations(one), _deviations(other)), _LEAST_DEVIATION)
    overall = np.maximum(np.maximum(one.std((1, 2)), other.std((1, 2))), _LEAST_DEVIATION)
    return Difference((apart / near).max((1, 2)), apart.max((1, 2)) / overall)


def _block_means(images: np.ndarray) -> np.ndarray:
    """[P, n, n] of images [P, SIDE, SIDE], without their border."""
    inside = images[:, BORDER : SIDE - BORDER, BORDER : SIDE - BORDER]
    count = (SIDE - 2 * BORDER) // BLOCK
    means: np.ndarray = inside.reshape(len(images), count, BLOCK, count, BLOCK).mean((2, 4))
    return means


def _deviations(images: np.ndarray) -> np.ndarray:
    """[P, n, n] standard deviations of each block and its neighbors; at edges, those there count again."""

    def around(means: np.ndarray) -> np.ndarray:
        padded = np.pad(means, ((0, 0), (1, 1), (1, 1)), mode="edge")
        found: np.ndarray = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2)).mean((3, 4))
        return found

    variances = around(_block_means(images * images)) - around(_block_means(images)) ** 2
    found: np.ndarray = np.sqrt(np.maximum(variances, 0))
    return found


def blurred(images: np.ndarray) -> np.ndarray:
    """[P, SIDE, SIDE] float32, so that edges differ little by how an image was resized."""
    return np.asarray(_BLUR @ images.astype(np.float32, copy=False) @ _BLUR.T)


def _blur() -> np.ndarray:
    weights = np.zeros((SIDE, SIDE), np.float32)
    for step, weight in zip(range(-2, 3), (1, 4, 6, 4, 1), strict=True):
        np.add.at(weights, (np.arange(SIDE), np.clip(np.arange(SIDE) + step, 0, SIDE - 1)), weight / 16)
    return weights


_BLUR = _blur()


def _coarse(images: np.ndarray) -> np.ndarray:
    """[P, 64] the means of 8 x 8 parts."""
    part = SIDE // 8
    means: np.ndarray = images.reshape(len(images), 8, part, 8, part).mean((2, 4)).reshape(len(images), 64)
    return means


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[P] of values [P, n]; 1 where both have no contrast."""
    a, b = (values - values.mean(1, keepdims=True) for values in (one, other))
    size = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    found: np.ndarray = np.where(size > 64, (a * b).sum(1) / np.maximum(size, 1e-6), 1.0)
    return found
