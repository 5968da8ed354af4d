"""Resizing pixels, with the values of Pillow's `Image.resize`, rows first and columns then.

Pillow 13 resizes tall images by columns first, which gives other values by one: here the order is always the same, that
of all Pillows before. `_resample` does the same arithmetic faster; where it was not compiled, or the processor lacks
AVX2, Pillow does it. `coefficients` are the whole numbers of that arithmetic, for other devices.
"""

from __future__ import annotations

import functools
import importlib
import math
from types import ModuleType
from typing import Final

import numpy as np
from PIL import Image

_FILTERS: Final = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# How far a filter reaches from its center, in inputs, or in outputs where these are fewer.
_SUPPORTS: Final = {"bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}
# Pillow's coefficients are whole numbers of 1 / 2^22 (libImaging/Resample.c, PRECISION_BITS).
PRECISION_BITS: Final = 22


def resample(pixels: Image.Image, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """RGB pixels at a size of width and height, uint8 [height, width, 3]; interpolation: a recipe's."""
    if pixels.size == size:
        return np.asarray(pixels)
    compiled = _compiled()
    resized = _by_processor(compiled, pixels, size, interpolation) if compiled is not None else None
    return _by_pillow(pixels, size, interpolation) if resized is None else resized


@functools.lru_cache(maxsize=1024)
def coefficients(length: int, target: int, interpolation: str) -> tuple[np.ndarray, np.ndarray]:
    """Pillow's coefficients for resizing lines of one length to another; interpolation: a recipe's.

    Of each output its first input, int32 [target], and the weights of this and those behind it in 1 / 2^22, int32
    [target, taps]. Weights of inputs behind the last are zero. A length that does not change has one tap, of 1.
    """
    if length == target:
        first, weights = np.arange(target, dtype=np.int32), np.full((target, 1), 1 << PRECISION_BITS, np.int32)
    else:
        first, weights = _coefficients(length, target, interpolation)
    for array in (first, weights):
        array.setflags(write=False)  # others get the same
    return first, weights


def _coefficients(length: int, target: int, interpolation: str) -> tuple[np.ndarray, np.ndarray]:
    # Every operation is Pillow's, in its order: they decide the last bit.
    scale = length / target
    stretch = max(scale, 1.0)
    support = _SUPPORTS[interpolation] * stretch
    centers = (np.arange(target) + 0.5) * scale
    first = np.maximum((centers - support + 0.5).astype(np.int32), 0)
    end = np.minimum((centers + support + 0.5).astype(np.int32), length)
    inputs = first[:, None] + np.arange((end - first).max())
    weights = _weights(interpolation, (inputs - centers[:, None] + 0.5) * (1.0 / stretch))
    weights[inputs >= end[:, None]] = 0.0
    totals = np.cumsum(weights, 1)[:, -1:]  # one after the other, unlike `sum`
    shares = weights / np.where(totals != 0.0, totals, 1.0)
    return first, (np.where(shares < 0, -0.5, 0.5) + shares * (1 << PRECISION_BITS)).astype(np.int32)


def _weights(interpolation: str, x: np.ndarray) -> np.ndarray:
    if interpolation == "lanczos":
        return np.where((x >= -3.0) & (x < 3.0), _sinc(x) * _sinc(x / 3), 0.0)
    x = np.abs(x)
    if interpolation == "bilinear":
        return np.where(x < 1.0, 1.0 - x, 0.0)
    # Keys 1981, a = -0.5.
    near, far = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _sinc(x: np.ndarray) -> np.ndarray:
    angles = x * math.pi
    # The C library's sine, as in Pillow; NumPy's own can differ in the last bit.
    sines = np.fromiter(map(math.sin, angles.flat), float, angles.size).reshape(angles.shape)
    return np.where(x == 0.0, 1.0, sines / np.where(x == 0.0, 1.0, angles))


def _by_pillow(pixels: Image.Image, size: tuple[int, int], interpolation: str) -> np.ndarray:
    resampling = _FILTERS[interpolation]
    return np.asarray(pixels.resize((size[0], pixels.height), resampling).resize(size, resampling))


def _by_processor(
    compiled: ModuleType, pixels: Image.Image, size: tuple[int, int], interpolation: str
) -> np.ndarray | None:
    """None where Pillow does not show its memory: that of large images is in several blocks."""
    try:
        _, memory = pixels.__arrow_c_array__()
    except (AttributeError, ValueError):  # early Pillows do not show it at all
        return None
    resized = np.empty((size[1], size[0], 3), np.uint8)
    compiled.resize(memory, pixels.size, resized, size, list(_FILTERS).index(interpolation))
    return resized


@functools.cache
def _compiled() -> ModuleType | None:
    """The compiled module, if it runs here and gives Pillow's values."""
    try:
        compiled = importlib.import_module("sppfeat.images._resample")
    except ImportError:
        return None
    if not compiled.runs():
        return None
    random = np.random.default_rng(0)
    for size, target in (((61, 37), (40, 52)), ((17, 90), (90, 17)), ((33, 20), (33, 9)), ((20, 33), (9, 33))):
        pixels = Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), np.uint8))
        for interpolation in _FILTERS:
            found = _by_processor(compiled, pixels, target, interpolation)
            if found is None or not np.array_equal(found, _by_pillow(pixels, target, interpolation)):
                return None
    return compiled
