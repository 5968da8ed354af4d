"""Boxes: areas and overlaps, regression from windows, and non-maximum suppression (NMS).

Box regression: Girshick, Donahue, Darrell, Malik, "Rich feature hierarchies for accurate object detection and semantic
segmentation", CVPR 2014 (arXiv:1311.2524), appendix C.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

# No box grows by more than this in one step (as Faster R-CNN's code clips log sizes at log(1000 / 16)).
_MAX_LOG: Final = math.log(1000 / 16)


def overlaps(windows: np.ndarray, others: np.ndarray, *, crowd: np.ndarray | None = None) -> np.ndarray:
    """[K, G] intersection over union of windows [K, 4] with others [G, 4]; pixels count whole, as in VOC's devkit.

    crowd: [G] bool, others that hold many objects: for these, the part of the window inside them, as in COCO.
    """
    low = np.maximum(windows[:, None, :2], others[None, :, :2])
    high = np.minimum(windows[:, None, 2:], others[None, :, 2:])
    common = np.clip(high - low + 1, 0, None).prod(2)
    own = areas(windows)[:, None]
    whole = own + areas(others)[None] - common
    result: np.ndarray = common / (whole if crowd is None else np.where(crowd, own, whole))
    return result


def areas(windows: np.ndarray) -> np.ndarray:
    """[K] pixels of windows [K, 4]."""
    result: np.ndarray = (windows[:, 2] - windows[:, 0] + 1) * (windows[:, 3] - windows[:, 1] + 1)
    return result


def box_targets(windows: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """[N, 4] targets that move windows [N, 4] to boxes [N, 4]: shifts in window sizes, and logs of size ratios."""
    size, box_size = (each[:, 2:] - each[:, :2] + 1 for each in (windows, boxes))
    middle, box_middle = (each[:, :2] + each[:, 2:] for each in (windows, boxes))
    return np.concatenate([(box_middle - middle) / 2 / size, np.log(box_size / size)], 1)


def moved_boxes(windows: np.ndarray, targets: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[N, 4] windows [N, 4] moved by targets [N, 4], clipped to the image of `size`; the inverse of `box_targets`.

    A box that shrinks to less than a pixel is one pixel, as both ends are inclusive.
    """
    window_size = windows[:, 2:] - windows[:, :2] + 1
    middle = (windows[:, :2] + windows[:, 2:]) / 2 + targets[:, :2] * window_size
    sides = window_size * np.exp(np.clip(targets[:, 2:], -_MAX_LOG, _MAX_LOG))
    half = (np.maximum(sides, 1) - 1) / 2
    moved = np.concatenate([middle - half, middle + half], 1)
    clipped: np.ndarray = np.clip(moved, 0, [size[0] - 1, size[1] - 1] * 2)
    return clipped


def fit_ridge(rows: np.ndarray, targets: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights [T, D] and biases [T] that minimize |rows w + b - targets|^2 + ridge |w|^2, b free.

    rows: [N, D], targets: [N, T]. Solved in double precision in the smaller of N and D.
    """
    mean, target_mean = rows.mean(0, dtype=np.float64), targets.mean(0, dtype=np.float64)
    centered = rows.astype(np.float64)
    centered -= mean
    wanted = targets - target_mean
    if len(rows) <= rows.shape[1]:
        gram = centered @ centered.T
        gram.flat[:: len(gram) + 1] += ridge
        weights = centered.T @ np.linalg.solve(gram, wanted)
    else:
        gram = centered.T @ centered
        gram.flat[:: len(gram) + 1] += ridge
        weights = np.linalg.solve(gram, centered.T @ wanted)
    return weights.T.astype(np.float32), (target_mean - mean @ weights).astype(np.float32)


def voted_boxes(kept: np.ndarray, boxes: np.ndarray, votes: np.ndarray, overlap: float) -> np.ndarray:
    """[K, 4] each kept box [K, 4] moved to the mean, weighted by votes [N] of at least 0, of those of the boxes [N, 4]
    that overlap it by more than `overlap`; unmoved where there are no votes.

    Source: Gidaris, Komodakis, "Object Detection via a Multi-Region & Semantic Segmentation-Aware CNN Model", ICCV 2015
    (arXiv:1505.01749), section 5.
    """
    shares = np.where(overlaps(kept, boxes) > overlap, votes, 0.0)
    total = shares.sum(1, keepdims=True)
    voted: np.ndarray = np.where(total > 0, shares @ boxes / np.where(total > 0, total, 1), kept)
    return voted


def suppress(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, overlap: float) -> np.ndarray:
    """Indices of the boxes [N, 4] that stay, the best score first: greedily, within each label, none overlaps a better
    one by more than `overlap`, as intersection over union; pixels count whole."""
    order = np.argsort(-scores, kind="stable")
    stays = np.ones(len(boxes), bool)
    for label in np.unique(labels):
        ranked = order[labels[order] == label]
        too_close = overlaps(boxes[ranked], boxes[ranked]) > overlap
        for at in range(len(ranked)):
            if stays[ranked[at]]:
                stays[ranked[at + 1 :][too_close[at, at + 1 :]]] = False
    kept: np.ndarray = order[stays[order]]
    return kept
