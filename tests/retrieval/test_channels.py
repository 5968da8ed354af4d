"""What is learned of channels is what slow formulas say, for any number of images and channels."""

from __future__ import annotations

import numpy as np
import pytest
from reference import bin_edges

from sppfeat import StoreError, UsageError
from sppfeat.retrieval.bins import whole_side
from sppfeat.retrieval.channels import WHITENED, learn_channels


def cells_in(image: np.ndarray, least: int) -> list[np.ndarray]:
    """All cells of length 1 of rectangles with such sides, each once."""
    side = len(image)
    runs = set()
    for start in range(side):
        for end in range(start + least, side + 1):
            runs |= {(start + a, start + b) for a, b in bin_edges(end - start, 3)}
    found = []
    for top, bottom in sorted(runs):
        for left, right in sorted(runs):
            cell = image[top:bottom, left:right].reshape(-1, image.shape[2]).max(0)
            found.append(cell / (np.linalg.norm(cell) or 1.0))
    return found


@pytest.mark.parametrize("side", [3, 6, 7])
@pytest.mark.parametrize("channels", [1, 5, 80])
@pytest.mark.parametrize("images", [1, 70])
def test_whitening(side: int, channels: int, images: int) -> None:
    generator = np.random.default_rng(channels)
    bins = np.maximum(generator.normal(size=(images, side, side, channels)), -0.5).astype(np.float32)
    least = whole_side(side)
    found = learn_channels(bins, least=least).whitening
    cells = np.array([cell for image in bins.astype(np.float64) for cell in cells_in(image, least)])
    assert found.mean == pytest.approx(cells.mean(0), abs=1e-5)
    covariance = np.cov(cells.T, bias=True).reshape(channels, channels)
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1][:WHITENED], vectors[:, ::-1][:, :WHITENED]
    scaled = vectors / np.sqrt(np.maximum(values, 0) + max(np.trace(covariance) / channels, 1e-6))
    assert found.matrix.shape == (channels, min(channels, WHITENED))
    # The sign of a vector is free, and so are vectors of equal values: inner products of cells are not.
    centered = cells - cells.mean(0)
    wanted, got = centered @ scaled, centered @ found.matrix
    assert got @ got[:50].T == pytest.approx(wanted @ wanted[:50].T, abs=0.01 * float(np.abs(wanted).max()) ** 2)


@pytest.mark.parametrize("kept", [1, 3, 8])
def test_components(kept: int) -> None:
    """Of images whose bins lie in 3 directions, 3 components keep all."""
    generator = np.random.default_rng(0)
    bins = (generator.normal(size=(40, 6, 6, 3)) @ generator.normal(size=(3, 12))).astype(np.float32)
    found = learn_channels(bins, kept)
    assert found.dim == kept and found.encode(bins).shape == (40, 6, 6, kept)
    decoded = found.decode(found.encode(bins)).reshape(40, -1)
    wanted = bins.reshape(40, -1)
    cosines = (decoded * wanted).sum(1) / np.linalg.norm(decoded, axis=1) / np.linalg.norm(wanted, axis=1)
    assert cosines.min() > 0.9999 if kept >= 3 else 0.3 < cosines.max() < 0.99
    scaled = found.decode(found.encode(bins * generator.uniform(0.1, 9, (40, 1, 1, 1)))).reshape(40, -1)
    assert scaled == pytest.approx(
        decoded, abs=1e-3 * float(np.abs(decoded).max()) + 1
    )  # a factor changes a byte at most


def test_as_many_components_as_channels_keep_bins_as_they_are() -> None:
    bins = np.random.default_rng(0).normal(size=(4, 3, 3, 6)).astype(np.float32)
    for kept in (None, 6, 100):
        found = learn_channels(bins, kept)
        assert found.components is None and found.dim == 6 and found.decode(found.encode(bins)).dtype == np.int8


def test_images_that_are_all_black() -> None:
    bins = np.zeros((3, 6, 6, 4), np.float32)
    found = learn_channels(bins, 2)
    assert np.isfinite(found.whitening.matrix).all() and not found.decode(found.encode(bins)).any()


def test_values_that_are_refused() -> None:
    bins = np.ones((2, 3, 3, 4), np.float32)
    found = learn_channels(bins, 2)
    bins[1, 0, 0, 0] = np.inf
    with pytest.raises(StoreError, match="expected finite descriptors"):
        found.encode(bins)
    with pytest.raises(UsageError, match="bin_dim must be at least 1 value, found 0"):
        learn_channels(bins, 0)
