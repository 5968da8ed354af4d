"""How good detections are: average precision as PASCAL VOC and as COCO measure it. Plain NumPy.

Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV 2010. COCO: Lin et al., "Microsoft COCO:
Common Objects in Context", ECCV 2014, and its code, pycocotools.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from sppfeat.svm import ranked_average_precision
from sppfeat.windows import overlaps

COCO_OVERLAPS: Final = tuple(np.linspace(0.5, 0.95, 10).tolist())
COCO_DETECTIONS: Final = 100  # the best per class and image, as its `maxDets`
_COCO_RECALLS: Final = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Objects:
    """One class in one image: its objects, and what was found.

    boxes: [G, 4]; difficult, crowd: [G] bool, see `Annotation`. found: [n, 4] windows with scores [n].
    """

    boxes: np.ndarray
    difficult: np.ndarray
    crowd: np.ndarray
    found: np.ndarray
    scores: np.ndarray


def voc_ranking(images: Sequence[Objects], overlap: float = 0.5) -> tuple[np.ndarray, np.ndarray, int]:
    """Detections of a class in all images, the best score first: targets [R], scores [R], and the number of objects.

    A detection takes the object of its image that it overlaps most. It is +1 if that overlap is at least `overlap` and
    the object is not taken yet, 0 (ignored) if the object is difficult, else -1, so that a second detection of one
    object is wrong (VOCevaldet of the VOC 2007 devkit). Of equal scores the earlier image comes first.
    """
    scores = np.concatenate([one.scores for one in images]) if images else np.zeros(0)
    place = [(image, row) for image, one in enumerate(images) for row in range(len(one.scores))]
    shared = [overlaps(one.found, one.boxes) for one in images]
    taken = [np.zeros(len(one.boxes), bool) for one in images]
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
        elif not taken[image][best]:
            targets[rank] = 1
            taken[image][best] = True
    return targets, scores[order], sum(int((~one.difficult).sum()) for one in images)


def voc_average_precision(images: Sequence[Objects], *, overlap: float = 0.5, method: str = "11-point") -> float:
    """Average precision of a class, `11-point` (VOC 2007) or `area` (VOC 2010); NaN if it has no object."""
    targets, _, objects = voc_ranking(images, overlap)
    return ranked_average_precision(targets, relevant=objects, method=method)


def coco_average_precision(images: Sequence[Objects], overlap: float) -> float:
    """COCO's average precision of a class: the mean of the best precision at 101 recalls; NaN without objects.

    In every image, the 100 best detections take, in turn, the free object that they overlap most, if by at least
    `overlap`; else a difficult one, and are then ignored. The overlap with a crowd is the fraction of the detection
    inside it, and a crowd can be taken any number of times.
    """
    ranked: list[tuple[float, int]] = []
    for one in images:
        ranked += _coco_matches(one, overlap)
    objects = sum(int((~one.difficult).sum()) for one in images)
    if not objects:
        return float("nan")
    order = np.argsort([-score for score, _ in ranked], kind="stable")
    targets = np.array([target for _, target in ranked], int)[order] if ranked else np.zeros(0, int)
    hits = targets[targets != 0] > 0
    found = np.cumsum(hits)
    precision = found / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(found / objects, _COCO_RECALLS, side="left")
    return float(sum(best[i] for i in at if i < len(best)) / len(_COCO_RECALLS))


def _coco_matches(one: Objects, overlap: float) -> list[tuple[float, int]]:
    """Score and target of each detection of an image, the best first."""
    order = np.argsort(-one.scores, kind="stable")[:COCO_DETECTIONS]
    shared = overlaps(one.found[order], one.boxes, crowd=one.crowd)
    taken = np.zeros(len(one.boxes), bool)
    matches = []
    least = min(overlap, 1 - 1e-10)
    for score, near, best in zip(one.scores[order], shared, shared.max(1, initial=0), strict=True):
        target = -1
        for difficult in (False, True) if best >= least else ():
            free = (one.difficult == difficult) & (~taken | one.crowd) & (near >= least)
            if free.any():
                # Of equal overlaps the last one, as pycocotools takes them.
                of_free = np.where(free, near, -1)
                found = len(of_free) - 1 - int(of_free[::-1].argmax())
                taken[found] = True
                target = 0 if difficult else 1
                break
        matches.append((float(score), target))
    return matches
