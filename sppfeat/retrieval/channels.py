"""What is learned of the channels of bins, from a sample of a gallery's images.

A whitening of cells, which whole images are compared with: see `alignment`. Without it, objects of one kind are further
apart than their descriptors are. And, if bins are to take less space, the principal components that they are kept in:
not centered, so that a factor of each image still changes nothing. They are turned back into channels before maxima are
taken, since maxima of components mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from sppfeat.errors import StoreError, UsageError
from sppfeat.retrieval.alignment import Whitening, all_cells, rectangles
from sppfeat.store import normalize_rows

# Values of a whitened cell. 128 of the default recipe's 320 tell buildings apart as well and cost twice the time.
WHITENED: Final = 64
SAMPLE_IMAGES: Final = 1000
SEED: Final = 1234
NOT_FINITE: Final = "expected finite descriptors; `sppfeat inspect --verify` names the rows"
_LARGEST: Final = 127
# Images at a time.
_BLOCK: Final = 64


@dataclass(frozen=True)
class Channels:
    """What was learned of C channels. components: [K, C] float32 that bins are kept in; None: they are kept as they
    are."""

    whitening: Whitening
    components: np.ndarray | None

    @property
    def dim(self) -> int:
        """Values kept of a bin: K, or C."""
        return len(self.whitening.mean if self.components is None else self.components)

    def encode(self, bins: np.ndarray) -> np.ndarray:
        """[N, n, n, K] int8 of bins [N, n, n, C], each image scaled to use the whole range.

        Raises StoreError for values that are not finite.
        """
        return to_bytes(bins) if self.components is None else _encode(bins, self.components)

    def decode(self, values: np.ndarray) -> np.ndarray:
        """[N, n, n, C] of values [N, n, n, K] int8: int8 if bins are kept as they are, else float32."""
        return values if self.components is None else _decode(values, self.components)

    def as_kept(self, bins: np.ndarray) -> np.ndarray:
        """[N, n, n, C] of a query's bins, without what components leave out, as those that they are compared with."""
        return bins if self.components is None else self.decode(self.encode(bins))


def to_bytes(values: np.ndarray) -> np.ndarray:
    """[N, n, n, K] int8 of values, each image scaled to use the whole range. Raises StoreError if one is not finite."""
    found = values.astype(np.float32)
    largest = np.abs(found).max((1, 2, 3), keepdims=True)
    if not np.isfinite(largest).all():
        raise StoreError(NOT_FINITE)
    largest[largest == 0] = 1
    whole: np.ndarray = np.rint(_LARGEST * (found / largest)).astype(np.int8)
    return whole


def check_bin_dim(dim: int | None) -> None:
    """Raise UsageError unless so many values can be kept of a bin."""
    if dim is not None and dim < 1:
        raise UsageError(f"bin_dim must be at least 1 value, found {dim}")


def learn_channels(bins: np.ndarray, dim: int | None = None, least: int = 1) -> Channels:
    """Learn from the bins [N, n, n, C] of a sample of images.

    dim: components to keep; None, or as many as there are channels: bins are kept as they are. least: cells are those
    of rectangles with sides of at least so many bins. Raises UsageError for fewer than 1, StoreError for values that
    are not finite.
    """
    check_bin_dim(dim)
    components = None
    if dim is not None and dim < bins.shape[3]:
        components = learn_components(bins, dim)
        bins = _decode(_encode(bins, components), components)
    return Channels(learn_whitening(bins, least), components)


def learn_whitening(bins: np.ndarray, least: int = 1) -> Whitening:
    """A whitening of the cells of these images: see `learn_channels`."""
    channels = bins.shape[3]
    shapes = rectangles(bins.shape[1], least)
    total, products, count = np.zeros(channels), np.zeros((channels, channels)), 0
    for start in range(0, len(bins), _BLOCK):
        cells = all_cells(bins[start : start + _BLOCK].astype(np.float32), shapes).reshape(-1, channels)
        cells = _units(cells)
        total += cells.sum(0, dtype=np.float64)
        products += cells.T @ cells
        count += len(cells)
    mean = total / max(1, count)
    covariance = products / max(1, count) - np.outer(mean, mean)
    values, vectors = _leading(covariance, WHITENED)
    # The mean over all channels keeps those that hardly vary from being blown up.
    spread = values + max(float(np.trace(covariance)) / channels, 1e-6)
    return Whitening(mean.astype(np.float32), (vectors / np.sqrt(spread)).astype(np.float32))


def learn_components(bins: np.ndarray, dim: int) -> np.ndarray:
    """[dim, C] float32 principal components of bins [N, n, n, C], images scaled to equal length."""
    channels = bins.shape[3]
    products = np.zeros((channels, channels))
    for start in range(0, len(bins), _BLOCK):
        block = bins[start : start + _BLOCK].astype(np.float32)
        images = _units(block.reshape(len(block), -1)).reshape(-1, channels)
        products += images.T @ images
    return np.ascontiguousarray(_leading(products, dim)[1].T, np.float32)


def _encode(bins: np.ndarray, components: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # of values that are not finite, which are refused
        return to_bytes(bins.astype(np.float32) @ components.T)


def _decode(values: np.ndarray, components: np.ndarray) -> np.ndarray:
    found: np.ndarray = values.astype(np.float32) @ components
    return found


def _units(rows: np.ndarray) -> np.ndarray:
    """Rows [N, C] of length 1. Raises StoreError if a value is not finite."""
    if not np.isfinite(rows.sum(dtype=np.float64)):
        raise StoreError(NOT_FINITE)
    return normalize_rows(rows)


def _leading(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest eigenvalues of a symmetric matrix [C, C], at least 0, and their vectors [C, count]."""
    values, vectors = np.linalg.eigh(matrix)
    return np.maximum(values[::-1][:count], 0), vectors[:, ::-1][:, :count]
