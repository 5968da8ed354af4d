"""Resizing pixels, with the values of Pillow's `Image.resize`, rows first and columns then.

Pillow 13 resizes tall images by columns first, which gives other values by one: here the order is always the same, that
of all Pillows before. `_resample` does the same arithmetic faster; where it was not compiled, or the processor lacks
AVX2, Pillow does it.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Final

import numpy as np
from PIL import Image

_FILTERS: Final = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def resample(pixels: Image.Image, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """RGB pixels at a size of width and height, uint8 [height, width, 3]; interpolation: a recipe's."""
    if pixels.size == size:
        return np.asarray(pixels)
    compiled = _compiled()
    resized = _by_processor(compiled, pixels, size, interpolation) if compiled is not None else None
    return _by_pillow(pixels, size, interpolation) if resized is None else resized


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
