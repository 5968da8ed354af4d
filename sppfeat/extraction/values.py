"""The arithmetic of rows: normalizing the descriptor of each part, fusing scales, and rounding to the stored type.

`_half` rounds as NumPy does, 15 times as fast; where it was not compiled, or the processor lacks F16C, NumPy does it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import numpy as np


def normalize(descriptors: np.ndarray, kind: str) -> np.ndarray:
    """Normalize rows [N, D]: `l2`, `signed-sqrt-l2` (signed square root, then l2) or `none`. Zeros stay zeros."""
    if kind == "none":
        return descriptors
    if kind == "signed-sqrt-l2":
        descriptors = np.copysign(np.sqrt(np.abs(descriptors)), descriptors)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller that stores rows reports values that are not finite
        lengths = np.sqrt(np.einsum("nd,nd->n", descriptors, descriptors))
        unit: np.ndarray = descriptors / np.maximum(lengths, 1e-12)[:, None]
    return unit


def fuse(parts: Sequence[np.ndarray], kind: str) -> np.ndarray:
    """Fuse the descriptors [.., D] of one image or its windows at each scale, by `mean`, `max` or `concat`."""
    if len(parts) == 1:
        return parts[0]
    if kind == "concat":
        return np.concatenate(parts, axis=-1)
    together: np.ndarray = np.max(parts, axis=0) if kind == "max" else np.mean(parts, axis=0)
    return together


def to_stored(descriptors: np.ndarray, dtype: str) -> list[np.ndarray | str]:
    """Rows [N, D] of float32 in the store's type; for a row that is not finite in it, the reason instead."""
    return finite_rows(as_stored(descriptors, dtype), np.maximum(descriptors.max(1), -descriptors.min(1)), dtype)


def finite_rows(stored: np.ndarray, largest: np.ndarray, dtype: str) -> list[np.ndarray | str]:
    """Rows [N, D] in the store's type; for one that is not finite, the reason instead.

    largest: [N] the largest absolute value of each, float32, before it was rounded; not finite if a value was not.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        # Rounding keeps order: all values are finite if the largest is.
        finite = np.isfinite(largest.astype(dtype))
    rows: list[np.ndarray | str] = list(stored)
    for at in np.flatnonzero(~finite):
        rows[at] = f"the descriptor is not finite as {dtype} (largest value {largest[at]:.3g})"
    return rows


def as_stored(descriptors: np.ndarray, dtype: str) -> np.ndarray:
    """Values of float32 in the store's type; those beyond its range are infinite."""
    compiled = _compiled() if dtype == "float16" and descriptors.dtype == np.float32 else None
    if compiled is None:
        with np.errstate(over="ignore", invalid="ignore"):
            return descriptors.astype(dtype, copy=False)
    stored = np.empty(descriptors.shape, np.float16)
    compiled.to_half(np.ascontiguousarray(descriptors), stored)
    return stored


@functools.cache
def _compiled() -> ModuleType | None:
    """The compiled module, if it runs here."""
    try:
        compiled = importlib.import_module("sppfeat.extraction._half")
    except ImportError:
        return None
    return compiled if compiled.runs() else None
