"""What a detector gets wrong from its default threshold on: detections that are not correct, and objects not found.

Kinds of wrong detections: Hoiem, Chodpathumwan, Dai, "Diagnosing Error in Object Detectors", ECCV 2012.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from sppfeat.detection.annotations import AnnotatedImages, Annotation
from sppfeat.detection.average_precision import Objects, Ranking
from sppfeat.images import Item
from sppfeat.windows import overlaps

SHOWN: Final = 24
# Less is background, in the paper.
_LEAST_OVERLAP: Final = 0.1
REPEATED: Final = "found before"
MISPLACED: Final = "badly placed"
CONFUSED: Final = "on another class"
BACKGROUND: Final = "on background"
KINDS: Final = (REPEATED, MISPLACED, CONFUSED, BACKGROUND)


@dataclass(frozen=True)
class WrongDetection:
    """A detection of `label` that is not correct. box, other_box: [4].

    kind: of KINDS; `found before`: another detection has its object; `badly placed`: on an object of its class, which
    it overlaps by 0.1 at least, but not enough. other: the class of the object that it overlaps, by `overlap` (IoU),
    and that object's box; None on background.
    """

    item: Item
    label: str
    score: float
    box: np.ndarray
    kind: str
    other: str | None
    other_box: np.ndarray | None
    overlap: float


@dataclass(frozen=True)
class MissedObject:
    """An object of `label` that no detection finds. near: [4] the detection of its class that overlaps it most, by
    `overlap` (IoU), with its score; None where none overlaps it."""

    item: Item
    label: str
    box: np.ndarray
    near: np.ndarray | None
    overlap: float
    score: float


@dataclass(frozen=True)
class Mistakes:
    """The SHOWN most confident wrong detections, and how many there are of each kind; and the SHOWN missed objects that
    take most of their image, and how many there are."""

    wrong: list[WrongDetection]
    kinds: dict[str, int]
    missed: list[MissedObject]
    missing: int

    @property
    def wrong_count(self) -> int:
        return sum(self.kinds.values())


def find_mistakes(
    annotated: AnnotatedImages,
    classes: Sequence[str],
    objects: Sequence[Sequence[Objects]],
    rankings: Sequence[Ranking],
    kept: Sequence[int],
    overlap: float,
) -> Mistakes:
    """The mistakes of an evaluation. objects: by class, of each annotated image in order; rankings, kept: by class, and
    how many of the first detections count. overlap: from which a detection is correct."""
    names = list(annotated.images)
    wrong: list[WrongDetection] = []
    for label, ranking in enumerate(rankings):
        for rank in np.flatnonzero(ranking.targets[: kept[label]] < 0).tolist():
            image, row = int(ranking.images[rank]), int(ranking.rows[rank])
            one = objects[label][image]
            score = float((one.scores if one.probabilities is None else one.probabilities)[row])
            annotation, item = annotated.images[names[image]], annotated.item(names[image])
            wrong.append(_wrong(item, annotation, classes[label], score, one.found[row], overlap))
    wrong.sort(key=lambda one: (-one.score, one.item.name))
    kinds = Counter(one.kind for one in wrong)
    missed = [
        (label, image, at)
        for label, ranking in enumerate(rankings)
        for image, takers in enumerate(ranking.takers)
        for at in np.flatnonzero(((takers < 0) | (takers >= kept[label])) & ~objects[label][image].difficult).tolist()
    ]

    def share(place: tuple[int, int, int]) -> float:
        label, image, at = place
        sides = objects[label][image].boxes[at]
        width, height = annotated.images[names[image]].size
        return float((sides[2] - sides[0] + 1) * (sides[3] - sides[1] + 1)) / max(width * height, 1)

    missed.sort(key=lambda place: (-share(place), names[place[1]], place))
    shown = [
        _missed(annotated.item(names[i]), classes[label], objects[label][i], at) for label, i, at in missed[:SHOWN]
    ]
    return Mistakes(wrong[:SHOWN], {kind: kinds[kind] for kind in KINDS}, shown, len(missed))


def _wrong(
    item: Item, annotation: Annotation, label: str, score: float, box: np.ndarray, overlap: float
) -> WrongDetection:
    shared = overlaps(box[None], annotation.boxes)[0]
    own = np.array([name == label for name in annotation.labels], bool)
    of_own, of_others = np.where(own, shared, -1.0), np.where(own, -1.0, shared)
    most, other_most = float(of_own.max(initial=0)), float(of_others.max(initial=0))
    if most >= overlap:
        kind, at = REPEATED, int(of_own.argmax())
    elif most >= _LEAST_OVERLAP:
        kind, at = MISPLACED, int(of_own.argmax())
    elif other_most >= _LEAST_OVERLAP:
        kind, at = CONFUSED, int(of_others.argmax())
    else:
        return WrongDetection(item, label, score, box, BACKGROUND, None, None, 0.0)
    return WrongDetection(item, label, score, box, kind, annotation.labels[at], annotation.boxes[at], float(shared[at]))


def _missed(item: Item, label: str, one: Objects, at: int) -> MissedObject:
    box = one.boxes[at]
    shared = overlaps(one.found, box[None])[:, 0]
    if not shared.max(initial=0) >= _LEAST_OVERLAP:
        return MissedObject(item, label, box, None, 0.0, 0.0)
    near = int(shared.argmax())
    score = float((one.scores if one.probabilities is None else one.probabilities)[near])
    return MissedObject(item, label, box, one.found[near], float(shared[near]), score)
