"""What is learned of the channels of bins, from a sample of a gallery's images.

A whitening of cells, which whole images are compared with: see `alignment`. Without it, objects of one kind are further
apart than their descriptors are. And, if bins are to take less space, the principal components that they are kept in:
not centred, so that a factor of each image still changes nothing. They are turned back into channels before maxima are
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
_LARGEST: Final = 127


@dataclass(frozen=True)
class Channels:
    """What was learned of C channels. components: [K, C] float32 that bins are kept in; None: they are kept as they
    are."""

    whitening: Whitening
    components: np.ndarray | None

    @property
    def kept(self) -> int:
        """Values kept of a bin: K, or C."""
        return len(self.whitening.mean if self.components is None else self.components)

    def encode(self, bins: np.ndarray) -> np.ndarray:
        """[N, n, n, K] int8 of bins [N, n, n, C], each image scaled to use the whole range.

        Raises StoreError for values that are not finite.
        """
        if self.components is None:
            return to_bytes(bins)
        with np.errstate(invalid="ignore"):  # of values that are not finite, which are refused
            return to_bytes(bins.astype(np.float32) @ self.components.T)

    def decode(self, values: np.ndarray) -> np.ndarray:
        """[N, n, n, C] of values [N, n, n, K] int8: int8 if bins are kept as they are, else float32."""
        return values if self.components is None else values.astype(np.float32) @ self.components


def to_bytes(values: np.ndarray) -> np.ndarray:
    """[N, n, n, K] int8 of values, each image scaled to use the whole range. Raises StoreError if one is not finite."""
    found = values.astype(np.float32)
    largest = np.abs(found).max((1, 2, 3), keepdims=True)
    if not np.isfinite(largest).all():
        raise StoreError("expected finite descriptors; `sppfeat inspect --verify` names the rows")
    largest[largest == 0] = 1
    whole: np.ndarray = np.rint(found * (_LARGEST / largest)).astype(np.int8)
    return whole


def learn_channels(bins: np.ndarray, kept: int | None = None, least: int = 1) -> Channels:
    """Learn from the bins [N, n, n, C] of a sample of images.

    kept: components to keep; None, or as many as there are channels: keep bins as they are. least: cells are those of
    rectangles with sides of at least so many bins.
    """
    channels = bins.shape[3]
    if kept is not None and kept < 1:
        raise UsageError(f"bin_dim must be at least 1 value, found {kept}")
    shapes = rectangles(bins.shape[1], least)
    total, products, raw = np.zeros(channels), np.zeros((channels, channels)), np.zeros((channels, channels))
    count = 0
    for start in range(0, len(bins), 64):
        block = bins[start : start + 64].astype(np.float32)
        cells = normalize_rows(all_cells(block, shapes).reshape(-1, channels))
        total += cells.sum(0, dtype=np.float64)
        products += cells.T @ cells
        count += len(cells)
        images = normalize_rows(block.reshape(len(block), -1)).reshape(-1, channels)
        raw += images.T @ images
    mean = total / max(1, count)
    values, vectors = _leading(products / max(1, count) - np.outer(mean, mean), WHITENED)
    # The mean over all channels keeps those that hardly vary from being blown up.
    spread = values + max(float(np.trace(products) / max(1, count) - mean @ mean) / channels, 1e-6)
    whitening = Whitening(mean.astype(np.float32), (vectors / np.sqrt(spread)).astype(np.float32))
    components = None
    if kept is not None and kept < channels:
        components = np.ascontiguousarray(_leading(raw, kept)[1].T, np.float32)
    return Channels(whitening, components)


def _leading(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest eigenvalues of a symmetric matrix [C, C], at least 0, and their vectors [C, count]."""
    values, vectors = np.linalg.eigh(matrix)
    return np.maximum(values[::-1][:count], 0), vectors[:, ::-1][:, :count]
