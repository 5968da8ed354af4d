"""Classification by the nearest training images, each voting by how similar it is, as DINO is evaluated.

Every test image is compared with all training images by the cosine of their descriptors; the k nearest vote for their
classes with weight exp(similarity / temperature) (Wu, Xiong, Yu, Lin 2018; Caron et al. 2021).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from sppfeat.store import Matrix, normalize_rows

# Training rows are compared in blocks of this size, with so many test rows at a time.
_BLOCK_BYTES: Final = 1 << 26
_TESTED: Final = 1024


def knn_scores(
    descriptors: Matrix,
    train: np.ndarray,
    test: np.ndarray,
    targets: np.ndarray,
    *,
    neighbors: int = 20,
    temperature: float = 0.07,
) -> np.ndarray:
    """[M, K] float32 shares of the votes, from 0 to 1, of each class for test rows [M].

    targets: [N, K] of the training rows [N]: +1 where a row is of the class. Rows are read in blocks. Of equally
    similar training rows the first count.
    """
    k = min(neighbors, len(train))
    size = max(1, _BLOCK_BYTES // (4 * max(descriptors.shape[1], _TESTED)))
    votes_for = (targets == 1).astype(np.float32)
    scores = np.empty((len(test), targets.shape[1]), np.float32)
    for first in range(0, len(test), _TESTED):
        rows = _unit(descriptors, test[first : first + _TESTED])
        best, nearest = np.empty((len(rows), 0), np.float32), np.empty((len(rows), 0), np.int64)
        for start in range(0, len(train), size):
            similar = rows @ _unit(descriptors, train[start : start + size]).T
            places = _largest(similar, k)
            best = np.concatenate([best, np.take_along_axis(similar, places, 1)], 1)
            nearest = np.concatenate([nearest, places + start], 1)
            order = _largest(best, k)
            best, nearest = np.take_along_axis(best, order, 1), np.take_along_axis(nearest, order, 1)
        # Relative to the most similar one, so that no weight overflows.
        weights = np.exp((best - best[:, :1]) / np.float32(temperature))
        weights /= weights.sum(1, keepdims=True)
        scores[first : first + _TESTED] = np.einsum("mk,mkc->mc", weights, votes_for[nearest])
    return scores


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """[M, k] the places of the largest of each row's values [M, N], in falling order; of equal ones the first."""
    if k >= values.shape[1]:
        return np.argsort(-values, axis=1, kind="stable")
    places = np.sort(torch.topk(torch.from_numpy(values), k, sorted=False).indices.numpy(), axis=1)
    found = np.take_along_axis(values, places, 1)
    # Where equal values are on both sides of the cut, it is not said which of them were taken.
    tied = np.flatnonzero((values >= found.min(1, keepdims=True)).sum(1) > k)
    places = np.take_along_axis(places, np.argsort(-found, axis=1, kind="stable"), 1)
    places[tied] = np.argsort(-values[tied], axis=1, kind="stable")[:, :k]
    return places


def _unit(descriptors: Matrix, rows: np.ndarray) -> np.ndarray:
    return normalize_rows(np.asarray(descriptors[rows], np.float32))
