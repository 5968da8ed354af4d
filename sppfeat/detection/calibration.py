"""Calibration of a detector: from the SVM score of a detection to the probability that it is correct.

Per class, the probability is a sigmoid of the score s, 1 / (1 + exp(-(slope s + offset))). Sources: Platt,
"Probabilistic Outputs for Support Vector Machines and Comparisons to Regularized Likelihood Methods", 1999; Lin, Lin,
Weng, "A Note on Platt's Probabilistic Outputs for Support Vector Machines", Machine Learning 2007.

SVMs separate the windows that they were trained on far better than others, so the sigmoids are fitted on held-out
detections: `training_rounds` splits the images into `FOLDS`, trains SVMs and box regression without each fold, and lets
them detect in the fold's images. What is fitted is what a user sees, detections after box regression and non-maximum
suppression, not windows: of the many windows on an object one is left, so windows are positive far more often.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Final

import numpy as np

from sppfeat.detection.annotations import Annotation
from sppfeat.detection.average_precision import Objects, voc_ranking
from sppfeat.errors import SppFeatWarning

# Platt's choice; models of two thirds of the images are close to those of all.
FOLDS: Final = 3
# The lowest score of held-out detections, the margin of the SVMs' negatives: below it lie nearly all windows and hardly
# an object, and the sigmoid would be bent to fit them instead of the scores between which a threshold chooses.
FLOOR: Final = -1.0
# Correct detections that a class needs for a sigmoid of its own.
MIN_CORRECT: Final = 5
_MAX_STEPS: Final = 100
_SHORTEST_STEP: Final = 1e-10
_RIDGE: Final = 1e-12
_SMALL_GRADIENT: Final = 1e-10


def sigmoid(values: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-values)) in double precision, without overflow."""
    small = np.exp(-np.abs(np.asarray(values, np.float64)))
    result: np.ndarray = np.where(np.asarray(values) >= 0, 1.0, small) / (1 + small)
    return result


def fit_sigmoid(scores: np.ndarray, correct: np.ndarray, *, of: str = "all classes") -> tuple[float, float]:
    """Slope and offset of the sigmoid that fits scores [N], N >= 1, best: the maximum likelihood by Newton's method.

    correct: [N] bool. As in Platt's paper, the targets are not 1 and 0 but (P + 1) / (P + 2) and 1 / (M + 2), for P
    correct scores and M others, so that the maximum is finite even where scores separate them, or all are of one kind.
    The likelihood, the step's ridge and the backtracking are those of Lin, Lin and Weng. The slope is 0 if all scores
    are equal, and below 0 if correct scores are the lower ones. of: whose scores they are, for the SppFeatWarning where
    the fit does not converge.
    """
    scores, correct = np.asarray(scores, np.float64), np.asarray(correct, bool)
    positives = int(correct.sum())
    targets = np.where(correct, (positives + 1) / (positives + 2), 1 / (len(correct) - positives + 2))
    mean = float(scores.mean())
    spread = float(np.abs(scores - mean).max())
    base = float(np.log(targets.mean() / (1 - targets.mean())))
    if spread <= 1e-12 * abs(mean):
        return 0.0, base
    # Scores of mean 0 and range 1: the Newton steps do not depend on the unit of the scores.
    scaled = (scores - mean) / spread
    rows = np.stack([scaled, np.ones(len(scaled))], 1)
    best = np.array([0.0, base])
    loss = _loss(rows @ best, targets)
    for _ in range(_MAX_STEPS):
        likely = sigmoid(rows @ best)
        gradient = rows.T @ (likely - targets)
        if np.abs(gradient).max() < _SMALL_GRADIENT * len(rows):
            break
        hessian = (rows * (likely * (1 - likely))[:, None]).T @ rows + _RIDGE * np.eye(2)
        direction = -np.linalg.solve(hessian, gradient)
        descent, step = float(gradient @ direction), 1.0
        while step >= _SHORTEST_STEP:
            reached = _loss(rows @ (best + step * direction), targets)
            if reached < loss + 1e-4 * step * descent:
                break
            step /= 2
        else:
            break  # the loss is exact to the last digit
        best, loss = best + step * direction, reached
    else:
        warnings.warn(
            f"{of}: the fit of probabilities to scores did not converge in {_MAX_STEPS} steps; they are not exact",
            SppFeatWarning,
            stacklevel=2,
        )
    slope = float(best[0] / spread)
    return slope, float(best[1] - slope * mean)


def _loss(values: np.ndarray, targets: np.ndarray) -> float:
    """The negative log-likelihood, in the form of Lin, Lin and Weng that neither overflows nor cancels."""
    tail = np.log1p(np.exp(-np.abs(values)))
    return float((np.where(values >= 0, 1 - targets, -targets) * values + tail).sum())


class HeldOut:
    """Detections in images that their SVM was not trained on, gathered image by image.

    Each has a class number, a score, whether it is correct, and the number of its image.
    """

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []

    def add(
        self,
        image: int,
        annotation: Annotation,
        classes: list[str],
        labels: np.ndarray,
        scores: np.ndarray,
        boxes: np.ndarray,
    ) -> None:
        """Add the detections of one image: labels [n], scores [n], boxes [n, 4].

        A detection is correct if it overlaps an object of its class by at least 0.5 that no better one has taken; one
        on a difficult object is left out. It is `voc_ranking`, of the images one by one.
        """
        parts = [np.zeros((0, 4))]
        for label in np.unique(labels).tolist():
            mine, of = labels == label, np.array([each == classes[label] for each in annotation.labels], bool)
            objects = Objects(
                annotation.boxes[of], annotation.difficult[of], annotation.crowd[of], boxes[mine], scores[mine]
            )
            targets, ranked, _ = voc_ranking([objects])
            counts = targets != 0
            part = np.empty((int(counts.sum()), 4))
            part[:, 0], part[:, 1], part[:, 2], part[:, 3] = image, label, ranked[counts], targets[counts] > 0
            parts.append(part)
        self._parts.append(np.concatenate(parts))

    def state(self) -> np.ndarray:
        """[n, 4] float64: image, class number, score, and 1 where correct, in the order of the images."""
        rows = np.concatenate([np.zeros((0, 4)), *self._parts])
        return rows[np.argsort(rows[:, 0], kind="stable")]

    def restore(self, state: np.ndarray) -> None:
        """Take over another one's state. Raises ValueError for anything else."""
        if state.ndim != 2 or state.shape[1] != 4 or not np.isfinite(state).all():
            raise ValueError("its held-out detections are of another kind")
        self._parts = [state]

    def calibration(self, classes: Sequence[str]) -> np.ndarray | None:
        """[K, 2] slope and offset per class; slopes are above 0, so that probabilities rank as scores do.

        A class with fewer than `MIN_CORRECT` correct detections, or scores that do not tell them from the others, gets
        the sigmoid of all classes together: their SVMs have the same costs, so their scores mean about the same.
        None if that sigmoid, too, does not rise, or there is no correct detection at all. classes: [K] names, for
        warnings.
        """
        rows = self.state()
        correct = rows[:, 3] > 0
        if not correct.any():
            return None
        together = fit_sigmoid(rows[:, 2], correct)
        if together[0] <= 0:
            return None
        result = np.tile(np.array(together), (len(classes), 1))
        for label, name in enumerate(classes):
            mine = rows[:, 1] == label
            if correct[mine].sum() >= MIN_CORRECT:
                slope, offset = fit_sigmoid(rows[mine, 2], correct[mine], of=f"class {name!r}")
                if slope > 0:
                    result[label] = slope, offset
        return result
