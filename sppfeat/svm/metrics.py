"""How good scores and rankings are: accuracy per class, average precision, recall@k. Plain NumPy.

Everywhere, targets are +1 (relevant), -1 (not), and 0: ignored (VOC's "difficult", the junk of Oxford, Paris and
Holidays). Equal scores keep the order of the rows unless noted otherwise.
All values are fractions of 1. A class without any row that counts has the value NaN; `mean_over_classes` skips it.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from sppfeat.errors import UsageError, unknown_name

AP_METHODS: Final = ("step", "area", "11-point", "trapezoid")


def accuracy_per_class(labels: np.ndarray, predicted: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """[K] fraction of the rows of each class that are predicted correctly, from labels [N] and predicted [N]."""
    if labels.shape != predicted.shape or labels.ndim != 1:
        raise UsageError(
            f"labels and predicted must both be [N], found {list(labels.shape)} and {list(predicted.shape)}"
        )
    right = labels == predicted
    return np.array([right[of].mean() if (of := labels == one).any() else np.nan for one in classes])


def mean_over_classes(values: np.ndarray) -> float:
    """Mean of the values [K], ignoring NaN: mean per-class accuracy, or mAP. Raises UsageError if all are NaN."""
    known = values[~np.isnan(values)]
    if not len(known):
        raise UsageError(f"expected at least one class with rows to evaluate, found {len(values)} without")
    return float(known.mean())


def average_precision(targets: np.ndarray, scores: np.ndarray, *, method: str = "step") -> float:
    """Average precision of scores [N] for targets [N]; NaN without a +1.

    method: as in `ranked_average_precision`. For `step`, rows of equal score enter together, as in scikit-learn's
    `average_precision_score`; for the others one by one in the order of the rows, as in the devkits.
    """
    targets, scores = np.asarray(targets), np.asarray(scores)
    if targets.shape != scores.shape or targets.ndim != 1:
        raise UsageError(f"targets and scores must both be [N], found {list(targets.shape)} and {list(scores.shape)}")
    if np.isnan(scores).any():
        raise UsageError(f"scores must be numbers, found NaN in row {int(np.isnan(scores).argmax())}")
    counted = targets != 0
    targets, scores = targets[counted], scores[counted]
    order = np.argsort(-scores, kind="stable")
    if method != "step":
        return ranked_average_precision(targets[order], method=method)
    relevant = targets[order] > 0
    last = np.append(np.diff(scores[order]) != 0, True)[: len(order)]  # of the rows with the same score
    found = np.cumsum(relevant)[last]
    precision = found / (np.flatnonzero(last) + 1)
    return float(np.diff(found, prepend=0) @ precision / relevant.sum()) if relevant.any() else float("nan")


def average_precisions(targets: np.ndarray, scores: np.ndarray, *, method: str = "step") -> np.ndarray:
    """[K] `average_precision` of each column of targets [N, K] and scores [N, K]."""
    return np.array([average_precision(t, s, method=method) for t, s in zip(targets.T, scores.T, strict=True)])


def ranked_average_precision(ranked: np.ndarray, *, relevant: int | None = None, method: str = "step") -> float:
    """Average precision of a ranking: targets [R], the best first; NaN where nothing is relevant.

    relevant: how many +1 there are in total, where the ranking is cut short; None: those in it.
    method, with precision p and recall r after every rank:
    step: mean of p at the relevant ranks; the area under the curve of p over r, taken in steps.
    area: the same, p replaced by the best p at this or a higher recall (VOC 2010 and later).
    11-point: mean over recalls 0, 0.1 .. 1 of the best p at this or a higher recall (VOCevalcls of the VOC 2007 devkit;
        recalls are compared as fractions, so that 3 of 10 does reach 0.3).
    trapezoid: the area between the precisions before and after each relevant rank (Oxford, Paris, Holidays).
    """
    if method not in AP_METHODS:
        raise UsageError(unknown_name("method", method, AP_METHODS))
    hits = ranked[ranked != 0] > 0
    total = int(hits.sum()) if relevant is None else relevant
    if total < hits.sum():
        raise UsageError(f"relevant must be at least the {int(hits.sum())} in the ranking, found {relevant}")
    if not total:
        return float("nan")
    ranks = np.flatnonzero(hits)
    found = np.arange(1, len(ranks) + 1)
    precision = found / (ranks + 1)
    if method == "trapezoid":
        before = np.divide(found - 1, ranks, out=np.ones(len(ranks)), where=ranks > 0)
        return float((before + precision).sum() / 2 / total)
    if method != "step":
        precision = np.maximum.accumulate(precision[::-1])[::-1]  # only relevant ranks raise precision
    if method == "11-point":
        first = [int(np.searchsorted(10 * found, tenth * total)) for tenth in range(11)]
        return float(sum(precision[at] for at in first if at < len(precision)) / 11)
    return float(precision.sum() / total)


def precision_at(ranked: np.ndarray, k: int) -> float:
    """Precision of the first k of a ranking [R] with a +1, or up to its last +1 where that comes earlier.

    This way a query with few relevant images can reach 1 (Radenovic, Iscen, Tolias, Avrithis, Chum 2018).
    """
    hits = ranked[ranked != 0] > 0
    last = min(int(np.flatnonzero(hits)[-1]) + 1, k)
    return float(hits[:last].sum() / last)


def recall_at(ranked: np.ndarray, k: int) -> float:
    """Recall@k of one query as used in image search: 1 if any of the first k of a ranking [R] is relevant, else 0."""
    return float((ranked[ranked != 0][:k] > 0).any())
