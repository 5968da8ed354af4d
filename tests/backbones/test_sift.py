"""Dense SIFT: where patches lie, what they see, and patches without contrast."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from textures import texture

from sppfeat.backbones import sift
from sppfeat.backbones.sift import dense_sift, grid_size

cv2 = pytest.importorskip("cv2")


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth color noise of full contrast."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    smooth = cv2.GaussianBlur(noise, (0, 0), 1.5).astype(float)
    pixels: np.ndarray = np.clip((smooth - 128) * 4 + 128, 0, 255).astype(np.uint8)
    return pixels


@pytest.mark.parametrize(("size", "expected"), [((16, 16), (1, 1)), ((23, 24), (1, 2)), ((31, 40), (2, 4))])
def test_patches_lie_inside(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert grid_size(*size) == expected
    assert dense_sift(photograph(*size)).shape == (expected[0] * expected[1], 128)


def test_descriptors_are_bytes_of_one_length() -> None:
    found = dense_sift(photograph(100, 140))
    assert found.dtype == np.float32 and found.min() >= 0 and found.max() <= 255
    np.testing.assert_array_equal(found, np.rint(found))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 512, rtol=0.02)


def test_a_grid_that_moves_by_its_spacing_sees_the_same() -> None:
    pixels = photograph(120, 136)
    rows, columns = grid_size(120, 136)
    whole = dense_sift(pixels).reshape(rows, columns, 128)
    moved = dense_sift(pixels[8:, 16:]).reshape(rows - 1, columns - 2, 128)
    # Near the border, blurring and the patch's soft edge see that the image ends.
    np.testing.assert_array_equal(whole[3:-1, 4:-1], moved[2:-1, 2:-1])


def test_a_patch_is_sixteen_pixels_wide() -> None:
    """Its weights fall to nothing two pixels beyond its edges, where SIFT's outermost cells end softly."""
    pixels = photograph(96, 96)
    rows, columns = grid_size(96, 96)
    middle = dense_sift(pixels).reshape(rows, columns, 128)[5, 5]  # pixels 40 to 55
    for margin, same in ((8, True), (-2, False)):
        inside = np.s_[40 - margin : 56 + margin, 40 - margin : 56 + margin]
        alone = np.zeros_like(pixels)
        alone[inside] = pixels[inside]
        change = np.abs(dense_sift(alone).reshape(rows, columns, 128)[5, 5] - middle).max()
        assert (change == 0) == same


def test_some_patches_are_those_of_the_whole_grid() -> None:
    pixels = photograph(60, 90)
    chosen = np.array([0, 7, 31, 44])
    np.testing.assert_array_equal(dense_sift(pixels, chosen), dense_sift(pixels)[chosen])


def test_patches_without_contrast_have_zeros() -> None:
    assert not dense_sift(np.full((40, 40, 3), 200, np.uint8)).any()
    noise = np.random.default_rng(0).integers(199, 201, (40, 40, 1), np.uint8).repeat(3, 2)
    assert not dense_sift(noise).any()
    half = noise.copy()
    half[:, 24:] = texture("down", 40, 16, 0)
    found = dense_sift(half).reshape(*grid_size(40, 40), 128).any(2)
    assert not found[:, :2].any() and found[:, 2:].all()


def test_contrast_is_the_standard_deviation_of_each_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    gray = np.random.default_rng(1).integers(0, 256, (45, 51), np.uint8)
    deviations = np.array([[gray[y : y + 16, x : x + 16].std() for x in range(0, 36, 8)] for y in range(0, 30, 8)])
    least = float(np.median(deviations))
    monkeypatch.setattr(sift, "_LEAST_CONTRAST", least)
    np.testing.assert_array_equal(sift._without_contrast(gray, 4, 5), deviations < least)


@pytest.mark.parametrize(("code", "kind"), [(-4, MemoryError), (-215, RuntimeError)])
def test_failures_of_opencv_are_told_apart(code: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        error = cv2.error("something failed")
        error.code = code
        raise error

    monkeypatch.setattr(cv2, "SIFT_create", fail)
    with pytest.raises(kind, match="OpenCV: something failed"):
        dense_sift(photograph(20, 20))
