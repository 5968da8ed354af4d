"""How good the scores of test images are: the figures of one split, with what is needed to say how far they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from sppfeat.svm import accuracy_per_class, average_precisions, mean_over_classes
from sppfeat.transfer.splits import Task

MISTAKES: Final = 48
_TOP: Final = 5


@dataclass(frozen=True)
class Mistake:
    """A misclassified test image; margin: by how much the score of `predicted` exceeds that of `label`.

    With several classes per image, label is empty, and margin is the score of an absent class.
    """

    name: str
    label: str
    predicted: str
    margin: float


@dataclass(frozen=True)
class Verdict:
    """The figures of one split, in percent.

    value: mean accuracy per class, or mAP. per_class: [K] of each class, NaN for one without a test image.
    area_per_class: [K] AP as the area under the curve, where an image can have several classes; else empty. top1, top5:
    images whose class is the first, or among the first five, of all; NaN with several classes. confusion: as in
    `Transfer`. mistakes: the most confident of them; mistaken: how many there are. right: [M] which test images are
    classified correctly; empty with several classes. labels: [M] the number of each test image's class; or [M, K] +1,
    -1 and 0, then with their scores [M, K] and the method of average precision. `strata` and `resampled` are what
    `sppfeat.svm.interval` takes.
    """

    value: float
    per_class: np.ndarray
    area_per_class: np.ndarray
    top1: float
    top5: float
    confusion: np.ndarray
    mistakes: list[Mistake]
    mistaken: int
    right: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    method: str = ""

    @property
    def images(self) -> int:
        """Test images."""
        return len(self.labels)

    @property
    def strata(self) -> np.ndarray:
        """[M] what test images are drawn within, for an interval: their class, or all where they can have several.

        The figure is a mean over classes, of which each split tests a fixed number of images.
        """
        return self.labels if self.labels.ndim == 1 else np.zeros(len(self.labels), int)

    def resampled(self, times: np.ndarray) -> float:
        """The value over the classes that are drawn, had each test image been drawn so many times [M]."""
        if self.labels.ndim == 2:
            rows = np.repeat(np.arange(len(times)), times)
            tested = ~np.isnan(self.per_class)
            found = average_precisions(self.labels[rows][:, tested], self.scores[rows][:, tested], method=self.method)
            return _mean_of_known(found)
        drawn = np.bincount(self.labels, times, minlength=len(self.per_class))
        right = np.bincount(self.labels, times * self.right, minlength=len(self.per_class))
        tested = ~np.isnan(self.per_class)
        with np.errstate(invalid="ignore"):
            shares: np.ndarray = right[tested] / drawn[tested]
        return _mean_of_known(shares)


def _mean_of_known(shares: np.ndarray) -> float:
    """The mean in percent of those that are not NaN; NaN if all are."""
    known = shares[~np.isnan(shares)]
    return 100 * float(known.mean()) if len(known) else float("nan")


def judge(scores: np.ndarray, task: Task, test: np.ndarray, threshold: float = 0.0) -> Verdict:
    """The verdict on scores [M, K] of test rows [M].

    threshold: the score above which a class counts as predicted, where an image can have several.
    """
    if task.several:
        return _judge_several_classes(scores, task, test, threshold)
    return _judge_one_class(scores, task, test)


def _judge_one_class(scores: np.ndarray, task: Task, test: np.ndarray) -> Verdict:
    classes = task.classes
    best = scores.argmax(1)
    of = (task.labels[test][:, None] == classes).argmax(1)
    per_class = accuracy_per_class(task.labels[test], classes[best], classes)
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (of, best), 1)
    each = np.arange(len(test))
    own = scores[each, of]
    margins = scores[each, best] - own
    mistakes = [
        Mistake(task.names[test[at]], str(classes[of[at]]), str(classes[best[at]]), float(margins[at]))
        for at in np.argsort(-margins, kind="stable")[:MISTAKES]
        if best[at] != of[at]
    ]
    # Of equal scores the first class counts, as in the choice of the best one.
    equal = (scores == own[:, None]) & (np.arange(len(classes)) < of[:, None])
    before = ((scores > own[:, None]) | equal).sum(1)
    return Verdict(
        value=100 * mean_over_classes(per_class),
        per_class=100 * per_class,
        area_per_class=np.zeros(0),
        top1=100 * float((before == 0).mean()),
        top5=100 * float((before < _TOP).mean()),
        confusion=confusion,
        mistakes=mistakes,
        mistaken=int((best != of).sum()),
        right=best == of,
        labels=of,
        scores=np.zeros((0, 0), np.float32),
    )


def _judge_several_classes(scores: np.ndarray, task: Task, test: np.ndarray, threshold: float) -> Verdict:
    targets = task.labels[test]
    points, areas = (average_precisions(targets, scores, method=method) for method in ("11-point", "area"))
    values = areas if task.method == "area" else points
    wrong = np.where(targets == -1, scores, -np.inf)
    worst = np.argsort(-wrong, axis=None, kind="stable")[:MISTAKES]
    mistakes = [
        Mistake(task.names[test[row]], "", str(task.classes[column]), float(wrong[row, column]))
        for row, column in zip(*np.unravel_index(worst, wrong.shape), strict=True)
        if wrong[row, column] > threshold
    ]
    return Verdict(
        value=100 * mean_over_classes(values),
        per_class=100 * values,
        area_per_class=100 * areas,
        top1=float("nan"),
        top5=float("nan"),
        confusion=np.zeros((0, 0), np.int64),
        mistakes=mistakes,
        mistaken=int((wrong > threshold).sum()),
        right=np.zeros(0, bool),
        labels=targets,
        scores=scores,
        method=task.method,
    )
