"""The choice of C by cross-validation, within the training rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from sppfeat.errors import UsageError
from sppfeat.svm.metrics import accuracy_per_class, average_precisions, mean_over_classes
from sppfeat.svm.options import SvmOptions
from sppfeat.svm.solver import SvmProblem, SvmSolution, class_targets

FOLDS: Final = 3


@dataclass(frozen=True)
class Choice:
    """The C of each class [K], and the curve it was chosen from: every C and its mean value, as fractions of 1.

    The curve is empty where C was given. start: a solution at these C for some of the rows, where the last fit starts.
    gap: the largest relative duality gap of all SVMs that the curve was measured with.
    """

    costs: np.ndarray
    curve: list[tuple[float, float]]
    start: SvmSolution | None = None
    gap: float = 0.0


def choose_cost(problem: SvmProblem, labels: np.ndarray, rows: np.ndarray, options: SvmOptions) -> Choice:
    """One C for all classes, with the best mean per-class accuracy; of equally good ones, the one nearest to 1.

    Classes that are easy to tell apart are so at any C, but with a small one scores hardly leave the bias.
    labels: [M], the class of each of rows [M]. Raises UsageError where no class has two rows.
    """
    classes = np.unique(labels)
    if len(options.costs) == 1:
        return Choice(np.full(len(classes), options.costs[0]), [])
    fold = folds((labels[:, None] == classes).argmax(1), options)
    if not (fold > 0).any():
        raise UsageError(
            f"C cannot be chosen by cross-validation: expected a class with at least 2 training images, found 1 in "
            f"each of {len(classes)}; set one C"
        )
    costs = sorted(options.costs)
    values = np.full((FOLDS, len(costs)), np.nan)
    best: tuple[tuple[float, float], SvmSolution] | None = None
    gap = 0.0
    for number in range(FOLDS):
        fit, held = fold != number, fold == number
        if not fit.any() or not held.any():
            continue
        targets, _ = class_targets(labels[fit], classes)
        solution = None
        for at, cost in enumerate(costs):
            solution = problem.solve(
                targets, rows[fit], c=cost, positive_weight=options.positive_weight, start=solution
            )
            gap = max(gap, float(solution.gaps.max()))
            predicted = classes[problem.scores(solution, rows[held]).argmax(1)]
            values[number, at] = mean_over_classes(accuracy_per_class(labels[held], predicted, classes))
            rank = float(_mean(values[:, at])), -abs(math.log(cost))
            if number == FOLDS - 1 and (best is None or rank > best[0]):
                best = rank, solution
    mean = _mean(values)
    _, chosen = max(zip(mean.tolist(), costs, strict=True), key=lambda one: (one[0], -abs(math.log(one[1]))))
    return Choice(np.full(len(classes), chosen), list(zip(costs, mean.tolist(), strict=True)), best and best[1], gap)


def choose_cost_per_class(problem: SvmProblem, targets: np.ndarray, rows: np.ndarray, options: SvmOptions) -> Choice:
    """The C of each class, with its best mean average precision; the smallest of equally good ones.

    targets: [M, K] of +1, -1 and 0 (excluded), for rows [M]. The +1 of a class are spread evenly over its folds, as
    in the benchmarks that train class by class. A class that cannot be cross-validated for lack of +1 gets the C
    that is best for the others. Raises UsageError where that is true of every class.
    """
    count = targets.shape[1]
    if len(options.costs) == 1:
        return Choice(np.full(count, options.costs[0]), [])
    fold = np.stack([folds(column, options) for column in targets.T], 1)
    costs = sorted(options.costs)
    values = np.full((FOLDS, len(costs), count), np.nan)
    start: SvmSolution | None = None
    reached, gap = np.full(count, -np.inf), 0.0
    for number in range(FOLDS):
        # Every class excludes rows of its own: a target of 0.
        fit, held = (np.where(of, targets, 0).astype(np.int8) for of in (fold != number, fold == number))
        solution = None
        for at, cost in enumerate(costs):
            solution = problem.solve(fit, rows, c=cost, positive_weight=options.positive_weight, start=solution)
            gap = max(gap, float(solution.gaps.max()))
            found = average_precisions(held, problem.scores(solution, rows))
            values[number, at] = np.where(solution.solved, found, np.nan)
            if number == FOLDS - 1:
                mean = np.nan_to_num(_mean(values[:, at]), nan=-1.0)
                start = solution if start is None else start.with_classes(mean > reached, solution)
                reached = np.maximum(reached, mean)
    mean = _mean(values)
    overall = _mean(mean.T)
    if np.isnan(overall).all():
        raise UsageError(
            f"C cannot be chosen by cross-validation: expected a class with at least 2 positive training images, "
            f"found none among {count}; set one C"
        )
    best = np.where(np.isnan(mean).all(0), np.nanargmax(overall), np.nan_to_num(mean, nan=-1.0).argmax(0))
    return Choice(np.array(costs)[best], list(zip(costs, overall.tolist(), strict=True)), start, gap)


def folds(kinds: np.ndarray, options: SvmOptions) -> np.ndarray:
    """[M] fold of each row; every kind of row is spread evenly over the folds.

    Without shuffling, they are those of scikit-learn's StratifiedKFold.
    """
    generator = np.random.default_rng(options.seed)
    fold = np.empty(len(kinds), int)
    begin = 0
    for kind in np.unique(kinds):
        members = np.flatnonzero(kinds == kind)
        if options.shuffle:
            fold[generator.permutation(members)] = np.arange(len(members)) % FOLDS
        else:
            fold[members] = np.sort((begin + np.arange(len(members))) % FOLDS)
            begin += len(members)
    return fold


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis, ignoring NaN; NaN where there is nothing else."""
    known = ~np.isnan(values)
    count = known.sum(0)
    total = np.where(known, values, 0.0).sum(0)
    mean: np.ndarray = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return mean
