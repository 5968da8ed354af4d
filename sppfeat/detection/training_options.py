"""How a detector is trained: the options, checked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sppfeat.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a detector is trained; the defaults are those of R-CNN's code, whose hinge, unlike ours, is not squared.

    c, positive_weight: of the SVMs, see `train_linear_svm`; c is for descriptors scaled to mean norm `mean_norm`.
    negative_overlap: windows that overlap every object of a class by less are its negatives.
    box_regression: learn to move boxes, from windows that overlap an object by at least `box_overlap`, regularized
    by `box_ridge`. calibration: turn scores into probabilities, which takes one more pass over the images.
    passes: the most over the images for hard negatives. memory: bytes for rows; box rows take half as much more.
    seed: of all randomness.
    """

    c: float = 0.001
    positive_weight: float = 2.0
    mean_norm: float = 20.0
    negative_overlap: float = 0.3
    box_regression: bool = True
    box_overlap: float = 0.6
    box_ridge: float = 1000.0
    calibration: bool = True
    passes: int = 3
    memory: int = 1 << 30
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("c", "positive_weight", "mean_norm", "box_ridge"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise UsageError(f"{name} must be a number above 0, found {value!r}")
        for name in ("negative_overlap", "box_overlap"):
            if not 0 < getattr(self, name) <= 1:
                raise UsageError(f"{name} must be above 0 and at most 1, found {getattr(self, name)!r}")
        for name, low, high in (("passes", 1, 100), ("memory", 1 << 20, 1 << 40), ("seed", 0, 1 << 31)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise UsageError(f"{name} must be a whole number from {low} to {high}, found {value!r}")
