"""Decoded images that the network's device resizes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from sppfeat.images.resampling import resample


@dataclass(frozen=True, eq=False)
class Unresized:
    """A decoded image, and the part of it, resized, that is a network's input.

    pixels: uint8 [H, W, 3]. size: width and height after resizing. interpolation: a recipe's. corner: top and left of
    the part, and shape: its [height, width, 3], both in resized pixels.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    interpolation: str
    corner: tuple[int, int]
    shape: tuple[int, int, int]

    @property
    def nbytes(self) -> int:
        """What it takes while it waits."""
        return self.pixels.nbytes

    def resized(self) -> np.ndarray:
        """The input, by the processor: uint8, of this shape."""
        top, left = self.corner
        resized = resample(Image.fromarray(self.pixels), self.size, self.interpolation)
        return resized[top : top + self.shape[0], left : left + self.shape[1]]


# What a network gets of an image: resized pixels [height, width, 3], or those to be resized.
Input = np.ndarray | Unresized
