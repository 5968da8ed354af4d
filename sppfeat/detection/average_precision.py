"""How good detections are: average precision as PASCAL VOC and as COCO measure it. Plain NumPy.

Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV 2010. COCO: Lin et al., "Microsoft COCO:
Common Objects in Context", ECCV 2014, and its code, pycocotools.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Final

import numpy as np

from sppfeat.svm import ranked_average_precision
from sppfeat.windows import overlaps

COCO_OVERLAPS: Final = tuple(np.linspace(0.5, 0.95, 10).tolist())
COCO_DETECTIONS: Final = 100  # the best per class and image, as its `maxDets`
_COCO_RECALLS: Final = np.linspace(0, 1, 101)
_COCO_MOST: Final = (1, 10, COCO_DETECTIONS)
_COCO_SIZES: Final = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}


@dataclass(frozen=True)
class Objects:
    """One class in one image: its objects, and what was found.

    boxes: [G, 4]; difficult, crowd: [G] bool, areas: [G], see `Annotation`. found: [n, 4] windows; scores: [n],
    which order them. probabilities: [n] what is told of them; None: the scores.
    """

    boxes: np.ndarray
    difficult: np.ndarray
    crowd: np.ndarray
    found: np.ndarray
    scores: np.ndarray
    areas: np.ndarray | None = None
    probabilities: np.ndarray | None = None


@dataclass(frozen=True)
class Ranking:
    """Detections of a class in all images, the best score first.

    images, rows: [R] which detection of which image. targets: [R], see `voc_ranking`. scores: [R]. takers: for each
    image [G] the rank of the detection that found the object, from 0; -1 for one that is not found. objects: how many.
    """

    images: np.ndarray
    rows: np.ndarray
    targets: np.ndarray
    scores: np.ndarray
    takers: list[np.ndarray]
    objects: int


def voc_ranking(images: Sequence[Objects], overlap: float = 0.5) -> tuple[np.ndarray, np.ndarray, int]:
    """Detections of a class in all images, the best score first: targets [R], scores [R], and the number of objects.

    A detection takes the object of its image that it overlaps most. It is +1 if that overlap is at least `overlap` and
    the object is not taken yet, 0 (ignored) if the object is difficult, else -1, so that a second detection of one
    object is wrong (VOCevaldet of the VOC 2007 devkit). Of equal scores the earlier image comes first.
    """
    ranking = rank_detections(images, overlap)
    return ranking.targets, ranking.scores, ranking.objects


def rank_detections(images: Sequence[Objects], overlap: float = 0.5) -> Ranking:
    """What `voc_ranking` gives, and which detection found which object."""
    scores = np.concatenate([one.scores for one in images]) if images else np.zeros(0)
    place = [(image, row) for image, one in enumerate(images) for row in range(len(one.scores))]
    shared = [overlaps(one.found, one.boxes) for one in images]
    takers = [np.full(len(one.boxes), -1) for one in images]
    order = np.argsort(-scores, kind="stable")
    targets = np.full(len(order), -1, np.int8)
    for rank, at in enumerate(order):
        image, row = place[at]
        near = shared[image][row]
        if not len(near):
            continue
        best = int(near.argmax())
        if near[best] < overlap:
            continue
        if images[image].difficult[best]:
            targets[rank] = 0
        elif takers[image][best] < 0:
            targets[rank] = 1
            takers[image][best] = rank
    which = np.array(place, np.int64).reshape(-1, 2)[order]
    objects = sum(int((~one.difficult).sum()) for one in images)
    return Ranking(which[:, 0], which[:, 1], targets, scores[order], takers, objects)


def voc_average_precision(images: Sequence[Objects], *, overlap: float = 0.5, method: str = "11-point") -> float:
    """Average precision of a class, `11-point` (VOC 2007) or `area` (VOC 2010); NaN if it has no object."""
    targets, _, objects = voc_ranking(images, overlap)
    return ranked_average_precision(targets, relevant=objects, method=method)


@dataclass(frozen=True)
class CocoFigures:
    """COCO's twelve figures of a class, or their means over classes, as fractions of 1; NaN without objects of a kind.

    ap: average precision over overlaps 0.5, 0.55 .. 0.95; ap50, ap75: at one. small, medium, large: of objects of up
    to 32 x 32 pixels, up to 96 x 96, and above. ar1, ar10, ar100: recall of the best 1, 10 and 100 detections per class
    and image, over the same overlaps, and of the 100 best by the objects' sizes.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    ar10: float
    ar100: float
    ar_small: float
    ar_medium: float
    ar_large: float


def coco_figures(images: Sequence[Objects]) -> CocoFigures:
    """The twelve figures of a class, as pycocotools counts them."""
    precision, recall = {}, {}
    for kind, (low, high) in _COCO_SIZES.items():
        sized = [_of_size(one, low, high) for one in images]
        found = [_coco_curve(sized, overlap) for overlap in COCO_OVERLAPS]
        precision[kind] = np.array([ap for ap, _ in found])
        recall[kind] = np.array([recalls for _, recalls in found]).mean(0)
    every = precision["all"]
    return CocoFigures(
        ap=float(every.mean()),
        ap50=float(every[0]),
        ap75=float(every[5]),
        ap_small=float(precision["small"].mean()),
        ap_medium=float(precision["medium"].mean()),
        ap_large=float(precision["large"].mean()),
        ar1=float(recall["all"][0]),
        ar10=float(recall["all"][1]),
        ar100=float(recall["all"][2]),
        ar_small=float(recall["small"][2]),
        ar_medium=float(recall["medium"][2]),
        ar_large=float(recall["large"][2]),
    )


def coco_means(classes: Sequence[CocoFigures]) -> CocoFigures:
    """The mean of each figure over the classes that have one."""
    values = np.array([astuple(one) for one in classes], np.float64).reshape(-1, len(fields(CocoFigures)))
    known = ~np.isnan(values)
    total = np.where(known, values, 0).sum(0)
    means = np.divide(total, known.sum(0), out=np.full(len(total), np.nan), where=known.any(0))
    return CocoFigures(*means.tolist())


def coco_average_precision(images: Sequence[Objects], overlap: float) -> float:
    """COCO's average precision of a class: the mean of the best precision at 101 recalls; NaN without objects.

    In every image, the 100 best detections take, in turn, the free object that they overlap most, if by at least
    `overlap`; else a difficult one, and are then ignored. The overlap with a crowd is the fraction of the detection
    inside it, and a crowd can be taken any number of times.
    """
    return _coco_curve([_of_size(one, *_COCO_SIZES["all"]) for one in images], overlap)[0]


@dataclass(frozen=True)
class _Sized:
    """Objects of a range of sizes. ignored: [G] difficult ones and others. apart: [n] detections of another size, which
    are ignored unless they take an object; the best first. shared: [n, G] overlaps."""

    ignored: np.ndarray
    crowd: np.ndarray
    scores: np.ndarray
    apart: np.ndarray
    shared: np.ndarray


def _of_size(one: Objects, low: float, high: float) -> _Sized:
    order = np.argsort(-one.scores, kind="stable")[:COCO_DETECTIONS]
    areas = _areas(one.boxes) if one.areas is None else one.areas
    found = _areas(one.found[order])
    return _Sized(
        one.difficult | (areas < low) | (areas > high),
        one.crowd,
        one.scores[order],
        (found < low) | (found > high),
        overlaps(one.found[order], one.boxes, crowd=one.crowd),
    )


def _areas(boxes: np.ndarray) -> np.ndarray:
    areas: np.ndarray = (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)
    return areas


def _coco_curve(images: Sequence[_Sized], overlap: float) -> tuple[float, list[float]]:
    """Average precision, and the recalls of the best `_COCO_MOST` detections of each image."""
    matches = [_coco_matches(one, overlap) for one in images]
    objects = sum(int((~one.ignored).sum()) for one in images)
    if not objects:
        return float("nan"), [float("nan")] * len(_COCO_MOST)
    recalls = [sum(int((targets[:most] == 1).sum()) for targets in matches) / objects for most in _COCO_MOST]
    scores = np.concatenate([one.scores for one in images])
    targets = np.concatenate(matches)[np.argsort(-scores, kind="stable")]
    hits = targets[targets != 0] > 0
    found = np.cumsum(hits)
    precision = found / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(found / objects, _COCO_RECALLS, side="left")
    return float(sum(best[i] for i in at if i < len(best)) / len(_COCO_RECALLS)), recalls


def _coco_matches(one: _Sized, overlap: float) -> np.ndarray:
    """[n] target of each detection of an image, the best first: +1, -1, or 0 (ignored)."""
    taken = np.zeros(len(one.ignored), bool)
    targets = np.where(one.apart, 0, -1).astype(np.int8)
    least = min(overlap, 1 - 1e-10)
    for row in np.flatnonzero(one.shared.max(1, initial=0) >= least):
        near = one.shared[row]
        for ignored in (False, True):
            free = (one.ignored == ignored) & (~taken | one.crowd) & (near >= least)
            if free.any():
                # Of equal overlaps the last one, as pycocotools takes them.
                of_free = np.where(free, near, -1)
                found = len(of_free) - 1 - int(of_free[::-1].argmax())
                taken[found] = True
                targets[row] = 0 if ignored else 1
                break
    return targets
