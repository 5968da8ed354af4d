"""Dense SIFT: the descriptors of square patches on a regular grid, by OpenCV.

Source: Lowe, "Distinctive Image Features from Scale-Invariant Keypoints", IJCV 2004; on a grid of patches of 16 x 16
pixels every 8 pixels, upright and at one scale, as in Lazebnik, Schmid, Ponce, CVPR 2006.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import numpy as np

from sppfeat.errors import one_line, require_extra

PATCH: Final = 16
SPACING: Final = 8
DIM: Final = 128
# Any change of what follows that changes descriptors needs another number: it is part of a vocabulary's SHA-256.
SIFT_VERSION: Final = 1

# OpenCV makes each of SIFT's 4 x 4 cells 3 * size / 2 pixels wide; at this size, four of them are as wide as the patch.
_SIZE: Final = PATCH / 4 * 2 / 3
# A patch whose gray levels (0 to 255) have a standard deviation below this has no descriptor, but zeros. SIFT brings
# every descriptor to one length: it would make as much of the noise of a blank wall as of an edge. Lazebnik's code
# leaves weak descriptors short instead, and VLFeat's `vl_phow` sets them to zero.
_LEAST_CONTRAST: Final = 1.0
# Blur of the image that gradients are taken of. Lazebnik's code takes derivatives of Gaussians of 1 pixel; OpenCV adds
# the blur of 0.5 that it takes every image to have.
_SIGMA: Final = (1 + 0.5**2) ** 0.5
_NO_MEMORY: Final = -4  # cv::Error::StsNoMem


def import_cv2() -> Any:
    """The module cv2. Raises MissingExtraError."""
    return require_extra("cv2", "detect", "backbone sift-bow")


def grid_size(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches in an image of at least 16 x 16 pixels: those that lie inside."""
    return (height - PATCH) // SPACING + 1, (width - PATCH) // SPACING + 1


def dense_sift(pixels: np.ndarray, at: np.ndarray | None = None) -> np.ndarray:
    """[P, 128] float32 whole numbers from 0 to 255, about 512 long: descriptors of the patches of an image, row by row.

    A patch without contrast has zeros. pixels: [H, W, 3] uint8 RGB, at least 16 x 16. at: indices of patches in the
    grid, at least one; None: all. Raises MissingExtraError; MemoryError; RuntimeError for other failures of OpenCV.
    """
    cv2 = import_cv2()
    rows, columns = grid_size(*pixels.shape[:2])
    chosen = np.arange(rows * columns) if at is None else at
    try:
        gray = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY)
        # Only the first image of SIFT's scale space is used, so one layer per octave is enough.
        sift = cv2.SIFT_create(nOctaveLayers=1, sigma=_SIGMA)
        points = _whole_grid(rows, columns) if at is None else _keypoints(chosen, columns)
        _, descriptors = sift.compute(gray, points)
    except cv2.error as error:
        kind = MemoryError if getattr(error, "code", None) == _NO_MEMORY else RuntimeError
        raise kind(f"OpenCV: {one_line(error)}") from None
    if (found := 0 if descriptors is None else len(descriptors)) != len(chosen):
        raise RuntimeError(f"OpenCV: expected {len(chosen)} SIFT descriptors, found {found}")
    kept: np.ndarray = descriptors
    kept[_without_contrast(gray, rows, columns).ravel()[chosen]] = 0
    return kept


# A key point takes 100 bytes; images of one size follow each other.
@functools.lru_cache(maxsize=8)
def _whole_grid(rows: int, columns: int) -> tuple[Any, ...]:
    return _keypoints(np.arange(rows * columns), columns)


def _keypoints(cells: np.ndarray, columns: int) -> tuple[Any, ...]:
    """Upright key points on the middles of patches, which OpenCV rounds to whole pixels."""
    cv2 = import_cv2()
    return tuple(
        cv2.KeyPoint(float(SPACING * x + PATCH // 2), float(SPACING * y + PATCH // 2), _SIZE, 0.0)
        for y, x in zip((cells // columns).tolist(), (cells % columns).tolist(), strict=True)
    )


def _without_contrast(gray: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """[rows, columns] whether a patch of gray levels [H, W] has nearly one gray level: from sums over squares."""
    levels = gray[: SPACING * (rows + 1), : SPACING * (columns + 1)].astype(np.int32)

    def of_patches(values: np.ndarray) -> np.ndarray:
        # A patch is four squares of its spacing.
        squares = values.reshape(rows + 1, SPACING, columns + 1, SPACING).sum((1, 3), dtype=np.int64)
        tall = squares[:-1] + squares[1:]
        whole: np.ndarray = tall[:, :-1] + tall[:, 1:]
        return whole

    pixels = PATCH * PATCH
    # Whole numbers: pixels^2 x variance.
    spread = pixels * of_patches(levels * levels) - of_patches(levels) ** 2
    flat: np.ndarray = spread < (pixels * _LEAST_CONTRAST) ** 2
    return flat
