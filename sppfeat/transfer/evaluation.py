"""Transfer evaluation: how well a simple classifier tells classes apart from a store's descriptors.

A protocol fixes splits into training and test rows. The cost C is chosen by cross-validation within the training rows
unless it is given. All folds and costs of a split share one `SvmProblem` or `LogisticProblem`, of its training rows.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from sppfeat.errors import SppFeatWarning, StoreError, UsageError
from sppfeat.recipe import Recipe
from sppfeat.store import DescriptorView, Store, require_complete
from sppfeat.svm import Convergence, LinearSvm, corrected_t_test, interval, mcnemar, paired_bootstrap
from sppfeat.svm.cost_selection import FOLDS, choose_cost, choose_cost_per_class
from sppfeat.svm.logistic import LogisticProblem, choose_regularization
from sppfeat.svm.solver import SvmProblem, class_targets
from sppfeat.transfer.judging import MISTAKES, Mistake, Verdict, judge
from sppfeat.transfer.knn import knn_scores
from sppfeat.transfer.labels import Labels, VocLabels, labels_from_folders
from sppfeat.transfer.options import TransferOptions
from sppfeat.transfer.splits import Split, Task, folder_task, voc_task

# How often few training images are drawn where the split is fixed.
_DRAWS: Final = 3
# C with fewer images of a class than folds.
_FEW_SHOT_COST: Final = 1.0


class _Trials:
    """Values in percent, one for each trial."""

    trials: list[float]

    @property
    def value(self) -> float:
        """Mean over the trials."""
        return float(np.mean(self.trials))

    @property
    def std(self) -> float:
        """Standard deviation over the trials (n - 1); 0 for one trial."""
        return float(np.std(self.trials, ddof=1)) if len(self.trials) > 1 else 0.0


@dataclass(frozen=True)
class Shots(_Trials):
    """The value with `count` training images of each class, in each trial; every C used, and the largest gap."""

    count: int
    trials: list[float]
    costs: list[float]
    gap: float


@dataclass(frozen=True)
class Comparison:
    """By how many percentage points a store is better than the first, over the trials; and the p-value of a test that
    they are equal: `corrected t-test` for several splits, `McNemar` or `bootstrap` over the images of one."""

    difference: float
    std: float | None
    test: str
    p: float


@dataclass(frozen=True)
class Transfer(_Trials):
    """The result of one store; values in percent.

    recipe, weights_sha256: of the descriptors, after cutting levels out, and of the network that made them.
    metric: `mean_per_class_accuracy`, or `mAP` (11 points as VOC 2007 counts it, or the area). trials: its values.
    interval: that 95 % of draws of test images give. top1, top5: images whose class comes first, or among the first
    five; NaN for mAP. shots: with few training images. comparison: to the first store; None for itself.
    costs: [K] C of each class, for each trial; empty for knn. curve: every C of the grid and its mean value in
    cross-validation.
    per_class: mean over the trials, by class; NaN for a class without a test image, which no mean includes.
    area_per_class: for mAP, AP as the area under the curve; else empty.
    confusion: [K, K] test images by class and predicted class, over all trials; empty for mAP.
    mistakes: the most confident ones, worst first. mistaken: how many there are, in all trials. rows: images in the
    splits. train, test: images of each part, in one trial. test_part: the name of that part, for protocol split; else
    None. left_out_by_reason: how many images are in no part of any trial, by reason. convergence: of the SVMs of the
    classes, and of those that C was chosen with. route: of the solver.
    """

    store: str
    source_root: str
    recipe: Recipe
    weights_sha256: str
    options: TransferOptions
    metric: str
    trials: list[float]
    interval: tuple[float, float]
    top1: float
    top5: float
    shots: list[Shots]
    costs: list[np.ndarray]
    curve: list[tuple[float, float]]
    per_class: dict[str, float]
    area_per_class: dict[str, float]
    confusion: np.ndarray
    mistakes: list[Mistake]
    mistaken: int
    rows: int
    train: int
    test: int
    test_part: str | None
    left_out_by_reason: dict[str, int]
    convergence: Convergence
    dim: int
    route: str
    seconds: float
    comparison: Comparison | None = None

    @property
    def left_out(self) -> int:
        """Images of the store that are in no part of any trial."""
        return sum(self.left_out_by_reason.values())

    @property
    def untested(self) -> list[str]:
        """Classes without a test image."""
        return [name for name, value in self.per_class.items() if np.isnan(value)]

    @property
    def area(self) -> float:
        """Mean of `area_per_class`; NaN where that is empty."""
        return float(np.nanmean(list(self.area_per_class.values()))) if self.area_per_class else float("nan")


def evaluate_transfer(
    stores: Sequence[Store], options: TransferOptions | None = None, *, labels: Labels | VocLabels | None = None
) -> list[Transfer]:
    """Evaluate stores of the same images on the same splits, so that their trials can be compared one by one.

    labels: None: from the names (`labels_from_folders`); for protocol voc2007, those of `read_voc_labels`.
    Raises StoreError for stores with pending rows or of other images than the first, UsageError for labels or classes
    that the protocol cannot use. Warns, as SppFeatWarning, about SVMs that do not converge and classes that failed.
    """
    options = options or TransferOptions()
    if not stores:
        raise UsageError("expected at least one store")
    for store in stores:
        require_complete(store)
    first = stores[0]
    for store in stores[1:]:
        if other := set(store.names) ^ set(first.names):
            raise StoreError(
                f"{store.place}: expected the images of {first.place}, found {len(other)} that are in only one of "
                f"them, such as {min(other)!r}"
            )
    failed = set().union(*(store.errors() for store in stores))
    if options.several:
        if not isinstance(labels, VocLabels):
            raise UsageError(f"protocol {options.protocol}: expected the lists of a VOC folder (--voc), found none")
        task = voc_task(first, failed, labels, options)
    else:
        if isinstance(labels, VocLabels):
            raise UsageError(f"protocol {options.protocol}: expected no VOC folder; protocol voc2007 takes one")
        task = folder_task(first, failed, labels or labels_from_folders(first.names), options)
    return _compared([_evaluate(store, task, options) for store in stores])


@dataclass(frozen=True)
class _Fitted:
    """Scores of test rows [M, K], and how they came about: see `Transfer`. gaps: [K] of the last fits, or [1].

    threshold: the score above which an image counts as of a class, where it can have several.
    """

    scores: np.ndarray
    costs: np.ndarray
    curve: list[tuple[float, float]]
    choice_gap: float
    gaps: np.ndarray
    route: str
    threshold: float = 0.0


@dataclass(frozen=True)
class _Trial:
    verdict: Verdict
    fitted: _Fitted


def _evaluate(store: Store, task: Task, options: TransferOptions) -> tuple[Transfer, list[Verdict]]:
    began = time.perf_counter()
    place = {name: row for row, name in enumerate(store.names)}
    view = DescriptorView(store, np.array([place[name] for name in task.names]), options.levels, options.only)
    trials = [_run(view, task, split, options) for split in task.splits]
    verdicts, fits = [trial.verdict for trial in trials], [trial.fitted for trial in trials]
    classes = task.classes.tolist()
    worst = sorted((mistake for verdict in verdicts for mistake in verdict.mistakes), key=lambda one: -one.margin)
    convergence = _convergence(fits, classes, options)
    for text in convergence.warnings():
        warnings.warn(f"{store.place}: {text}", SppFeatWarning, stacklevel=3)
    shots = [_with_shots(view, task, count, options) for count in options.shots]
    found = Transfer(
        store=store.place,
        source_root=store.source_root,
        recipe=view.recipe,
        weights_sha256=view.weights_sha256,
        options=options,
        metric="mAP" if task.several else "mean_per_class_accuracy",
        trials=[verdict.value for verdict in verdicts],
        interval=interval([(verdict.strata, verdict.resampled) for verdict in verdicts]),
        top1=float(np.mean([verdict.top1 for verdict in verdicts])),
        top5=float(np.mean([verdict.top5 for verdict in verdicts])),
        shots=shots,
        costs=[fit.costs for fit in fits],
        curve=[
            (fits[0].curve[at][0], 100 * float(np.mean([fit.curve[at][1] for fit in fits])))
            for at in range(len(fits[0].curve))
        ],
        # The test part has the same number of images per class in every trial: if one value is NaN, all are.
        per_class=dict(zip(classes, np.mean([one.per_class for one in verdicts], 0).tolist(), strict=True)),
        area_per_class=dict(zip(classes, np.mean([one.area_per_class for one in verdicts], 0).tolist(), strict=True))
        if task.several
        else {},
        confusion=np.sum([verdict.confusion for verdict in verdicts], 0),
        mistakes=_once(worst)[:MISTAKES],
        mistaken=sum(verdict.mistaken for verdict in verdicts),
        rows=len(task.names),
        train=len(task.splits[0][0]),
        test=len(task.splits[0][1]),
        test_part=task.test_part,
        left_out_by_reason=dict(sorted(task.left_out.items())),
        convergence=convergence,
        dim=view.shape[1],
        route=fits[0].route,
        seconds=time.perf_counter() - began,
    )
    return found, verdicts


def _with_shots(view: DescriptorView, task: Task, shots: int, options: TransferOptions) -> Shots:
    """The value with few training images of each class."""
    if len(task.splits) == 1:
        task = replace(task, splits=task.splits * (options.trials or _DRAWS))
    few = task.with_shots(shots, options.seed)
    # Cross-validation needs an image of each class in each fold.
    cost = options.costs[0] if len(options.costs) == 1 else _FEW_SHOT_COST
    chosen = options if shots >= FOLDS or options.classifier == "knn" else replace(options, costs=(cost,))
    trials = [_run(view, few, split, chosen) for split in few.splits]
    values = [trial.verdict.value for trial in trials]
    costs = sorted({float(cost) for trial in trials for cost in trial.fitted.costs})
    convergence = _convergence([trial.fitted for trial in trials], task.classes.tolist(), options)
    for text in convergence.warnings():
        warnings.warn(f"with {shots} training images per class: {text}", SppFeatWarning, stacklevel=4)
    return Shots(shots, values, costs, max(convergence.largest_gap, convergence.choice_gap))


def _convergence(fits: Sequence[_Fitted], classes: list[str], options: TransferOptions) -> Convergence:
    """How near all trials came to the optimum. Logistic regression fits all classes at once: one gap per trial."""
    together = options.classifier == "logistic"
    return Convergence(
        ["all classes"] if together else classes,
        np.stack([fit.gaps for fit in fits]),
        max(fit.choice_gap for fit in fits),
        "fits" if together else "SVMs",
    )


def _compared(done: list[tuple[Transfer, list[Verdict]]]) -> list[Transfer]:
    """The results, each but the first with how it differs from the first."""
    first, of_first = done[0]
    found = [first]
    for one, of_one in done[1:]:
        pairs = [a - b for a, b in zip(one.trials, first.trials, strict=True)]
        if len(pairs) > 1:
            test, p = "corrected t-test", corrected_t_test(pairs, first.train, first.test)
        elif first.metric == "mAP":
            test, p = "bootstrap", paired_bootstrap(of_one[0].images, of_one[0].resampled, of_first[0].resampled)
        else:
            test, p = "McNemar", mcnemar(of_one[0].right, of_first[0].right)
        spread = float(np.std(pairs, ddof=1)) if len(pairs) > 1 else None
        found.append(replace(one, comparison=Comparison(float(np.mean(pairs)), spread, test, p)))
    return found


def _once(mistakes: list[Mistake]) -> list[Mistake]:
    """Drop repetitions: an image can be mistaken for the same class in several trials."""
    seen: dict[tuple[str, str], Mistake] = {}
    for one in mistakes:
        seen.setdefault((one.name, one.predicted), one)
    return list(seen.values())


def _run(view: DescriptorView, task: Task, split: Split, options: TransferOptions) -> _Trial:
    train, test = split
    fit = {"svm": _fit_svm, "knn": _fit_knn, "logistic": _fit_logistic}[options.classifier]
    fitted = fit(view, task, train, test, options)
    return _Trial(judge(fitted.scores, task, test, fitted.threshold), fitted)


def _fit_svm(
    view: DescriptorView, task: Task, train: np.ndarray, test: np.ndarray, options: TransferOptions
) -> _Fitted:
    labels, svm_options = task.labels[train], options.svm
    problem = SvmProblem(view, train, device=options.device, names=task.names)
    choose = choose_cost_per_class if task.several else choose_cost
    choice = choose(problem, labels, np.arange(len(train)), svm_options)
    targets = labels if task.several else class_targets(labels, task.classes)[0]
    solution = problem.solve(targets, c=choice.costs, positive_weight=svm_options.positive_weight, start=choice.start)
    scores = problem.svm(solution, task.classes).scores(view, test, device=options.device, names=task.names)
    return _Fitted(scores, choice.costs, choice.curve, choice.gap, solution.gaps, problem.route)


def _fit_knn(
    view: DescriptorView, task: Task, train: np.ndarray, test: np.ndarray, options: TransferOptions
) -> _Fitted:
    labels = task.labels[train]
    targets = labels if task.several else class_targets(labels, task.classes)[0]
    scores = knn_scores(view, train, test, targets, neighbors=options.neighbors, temperature=options.temperature)
    return _Fitted(scores, np.zeros(0), [], 0.0, np.zeros(len(task.classes)), "", threshold=0.5)  # half of the votes


def _fit_logistic(
    view: DescriptorView, task: Task, train: np.ndarray, test: np.ndarray, options: TransferOptions
) -> _Fitted:
    labels = np.searchsorted(task.classes, task.labels[train])
    problem = LogisticProblem(view, train, device=options.device, names=task.names)
    choice = choose_regularization(problem, labels, len(task.classes), options)
    solution = problem.solve(labels, len(task.classes), c=choice.cost, start=choice.start)
    weights, biases = problem.weights(solution)
    svm = LinearSvm(
        weights=weights,
        biases=biases,
        classes=task.classes,
        costs=np.full(len(biases), choice.cost),
        route=problem.route,
        gaps=np.full(len(biases), solution.gap),
    )
    scores = svm.scores(view, test, device=options.device, names=task.names)
    return _Fitted(scores, svm.costs, choice.curve, choice.gap, svm.gaps[:1], problem.route)
