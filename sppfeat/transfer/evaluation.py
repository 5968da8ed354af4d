"""Transfer evaluation: how well linear SVMs tell classes apart from a store's descriptors.

A protocol fixes splits into training and test rows. The cost C is chosen by cross-validation within the training rows
unless it is given. All folds and costs of a split share one `SvmProblem`, of its training rows.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from sppfeat.errors import SppFeatWarning, StoreError, UsageError
from sppfeat.recipe import Recipe
from sppfeat.store import DescriptorView, Store, require_complete
from sppfeat.svm import Convergence, accuracy_per_class, average_precisions, mean_over_classes
from sppfeat.svm.cost_selection import choose_cost, choose_cost_per_class
from sppfeat.svm.solver import SvmProblem, class_targets
from sppfeat.transfer.labels import TEST_PARTS, Labels, VocLabels, labels_from_folders
from sppfeat.transfer.options import TransferOptions

MISTAKES: Final = 48


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
class Transfer:
    """The result of one store; values in percent.

    recipe, weights_sha256: of the descriptors, after cutting levels out, and of the network that made them.
    metric: `mean_per_class_accuracy`, or `mAP` (11 points, as VOC 2007 counts it). trials: its value in each.
    costs: [K] C of each class, for each trial. curve: every C of the grid and its mean value in cross-validation.
    per_class: mean over the trials, by class; NaN for a class without a test image, which no mean includes.
    area_per_class: for mAP, AP as the area under the curve; else empty.
    confusion: [K, K] test images by class and predicted class, over all trials; empty for mAP.
    mistakes: the most confident ones, worst first. rows: images in the splits. train, test: images of
    each part, in one trial. test_part: the name of that part, for protocol split; else None. left_out_by_reason: how
    many images are in no part of any trial, by reason. convergence: of the SVMs of the classes, and of those that C
    was chosen with. route: of the solver.
    """

    store: str
    source_root: str
    recipe: Recipe
    weights_sha256: str
    options: TransferOptions
    metric: str
    trials: list[float]
    costs: list[np.ndarray]
    curve: list[tuple[float, float]]
    per_class: dict[str, float]
    area_per_class: dict[str, float]
    confusion: np.ndarray
    mistakes: list[Mistake]
    rows: int
    train: int
    test: int
    test_part: str | None
    left_out_by_reason: dict[str, int]
    convergence: Convergence
    dim: int
    route: str
    seconds: float

    @property
    def left_out(self) -> int:
        """Images of the store that are in no part of any trial."""
        return sum(self.left_out_by_reason.values())

    @property
    def untested(self) -> list[str]:
        """Classes without a test image."""
        return [name for name, value in self.per_class.items() if np.isnan(value)]

    @property
    def value(self) -> float:
        """Mean over the trials."""
        return float(np.mean(self.trials))

    @property
    def std(self) -> float:
        """Standard deviation over the trials (n - 1); 0 for one trial."""
        return float(np.std(self.trials, ddof=1)) if len(self.trials) > 1 else 0.0

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
    task: _Task
    if options.protocol == "voc2007":
        if not isinstance(labels, VocLabels):
            raise UsageError("protocol voc2007: expected the lists of a VOC folder (--voc), found none")
        task = _voc_task(first, failed, labels)
    else:
        if isinstance(labels, VocLabels):
            raise UsageError(f"protocol {options.protocol}: expected no VOC folder; protocol voc2007 takes one")
        task = _task(first, failed, labels or labels_from_folders(first.names), options)
    return [_evaluate(store, task, options) for store in stores]


def labelled_names(store: Store, labels: Labels, failed: set[str]) -> list[str]:
    """The names of a store that have a label and have not failed; warns about classes whose images all failed.

    Raises UsageError for labels that match no row, and if every row with a label failed.
    """
    if not any(name in labels.classes for name in store.names):
        raise UsageError(
            f"{store.place}: none of its {len(store)} names has a label; use one folder per class, or a labels file"
        )
    if unknown := labels.classes.keys() - set(store.names):
        raise UsageError(f"{len(unknown)} labels match no row of {store.place}, such as {min(unknown)!r}")
    names = [name for name in store.names if name in labels.classes and name not in failed]
    if not names:
        labelled = sum(name in labels.classes for name in store.names)
        raise UsageError(f"{store.place}: expected described images with a label, found none: all {labelled} failed")
    known = set(labels.classes.values())
    if lost := known - {labels.classes[name] for name in names}:
        shown = ", ".join(map(repr, sorted(lost)[:5])) + ", ..." * (len(lost) > 5)
        warnings.warn(
            f"{store.place}: {len(lost)} of {len(known)} classes skipped, because all their images failed: {shown}",
            SppFeatWarning,
            stacklevel=3,
        )
    return names


_Split = tuple[np.ndarray, np.ndarray]  # training and test rows, as positions in the names


@dataclass(frozen=True)
class _Task:
    """Images, their classes and splits; the same for every store that is compared.

    labels: [N] the class of each name; or [N, K] +1, -1 and 0, where an image can have several. left_out, test_part:
    as in `Transfer`.
    """

    names: list[str]
    classes: np.ndarray
    labels: np.ndarray
    splits: list[_Split]
    left_out: Counter[str]
    test_part: str | None = None


def _voc_task(store: Store, failed: set[str], labels: VocLabels) -> _Task:
    names: dict[str, str] = {}
    for name in store.names:
        number = name.rpartition("/")[2].rpartition(".")[0]
        if number in labels.targets:
            if number in names:
                raise UsageError(f"{store.place}: expected one image {number!r}, found {names[number]!r} and {name!r}")
            names[number] = name
    if lacking := labels.targets.keys() - names.keys():
        raise UsageError(
            f"{len(lacking)} of {len(labels.targets)} images of the VOC lists match no row of {store.place}, such as "
            f"{min(lacking)!r}"
        )
    numbers = [number for number, name in names.items() if name not in failed]
    parts = np.array([labels.splits[number] for number in numbers])
    targets = np.stack([labels.targets[number] for number in numbers])
    train, test = np.flatnonzero(parts == "train"), np.flatnonzero(parts == "test")
    for part, rows in (("train with", train), ("test", test)):
        if (lacking_class := ~(targets[rows] == 1).any(0)).any():
            raise UsageError(f"class {labels.classes[int(lacking_class.argmax())]!r}: has no image to {part}")
    left_out = Counter("failed" if name in failed else "in no list" for name in set(store.names) - set(names.values()))
    left_out["failed"] += len(names) - len(numbers)
    return _Task([names[number] for number in numbers], np.array(labels.classes), targets, [(train, test)], +left_out)


def _task(store: Store, failed: set[str], known: Labels, options: TransferOptions) -> _Task:
    names = labelled_names(store, known, failed)
    left_out = Counter(
        "failed" if name in failed else "without a label"
        for name in store.names
        if name in failed or name not in known.classes
    )
    if options.protocol == "split":
        return _split_task(names, left_out, known)
    labels, classes = _labels(names, known)
    counts = (labels[:, None] == classes).sum(0)
    caltech = options.protocol == "caltech101"
    per_class = options.per_class or (30 if caltech else None)
    max_test = options.max_test or (50 if caltech else None)
    needed = (per_class or 1) + 1
    if (few := counts < needed).any():
        shown = ", ".join(f"{name} {count}" for name, count in zip(classes[few][:5], counts[few][:5], strict=True))
        raise UsageError(
            f"protocol {options.protocol}: expected at least {needed} images per class, found fewer in {few.sum()} of "
            f"{len(classes)} ({shown}); use a smaller per_class"
        )
    generator = np.random.default_rng(options.seed)
    splits = []
    for _ in range(options.trials or (10 if caltech else 5)):
        parts_of = [generator.permutation(np.flatnonzero(labels == name)) for name in classes]
        sizes = [per_class or len(rows) // 2 for rows in parts_of]
        train = np.concatenate([rows[:size] for rows, size in zip(parts_of, sizes, strict=True)])
        test = np.concatenate([rows[size:][:max_test] for rows, size in zip(parts_of, sizes, strict=True)])
        splits.append((np.sort(train), np.sort(test)))
    return _Task(names, classes, labels, splits, left_out)


def _split_task(names: list[str], left_out: Counter[str], known: Labels) -> _Task:
    part_of = {name: known.splits.get(name, "") for name in names}
    found = set(part_of.values())
    test_part = next((part for part in TEST_PARTS if part in found), None)
    if "train" not in found or test_part is None:
        lacking = "train" if "train" not in found else f"{', '.join(TEST_PARTS[:-1])} or {TEST_PARTS[-1]}"
        raise UsageError(f"protocol split: expected names in train/... and test/..., or a split, found no {lacking}")
    used = [name for name in names if part_of[name] in ("train", test_part)]
    left_out = left_out + Counter(
        f"of part {part}" if part else "in neither part"
        for part in part_of.values()
        if part not in ("train", test_part)
    )
    labels, classes = _labels(used, known)
    parts = np.array([part_of[name] for name in used])
    train, test = np.flatnonzero(parts == "train"), np.flatnonzero(parts == test_part)
    if untrained := set(labels[test].tolist()) - set(labels[train].tolist()):
        raise UsageError(f"class {min(untrained)!r}: has {test_part} images, but none to train with")
    return _Task(used, classes, labels, [(train, test)], left_out, test_part)


def _labels(names: list[str], known: Labels) -> tuple[np.ndarray, np.ndarray]:
    """The class of each name [N], and the classes in rising order."""
    labels = np.array([known.classes[name] for name in names])
    classes = np.unique(labels)
    if len(classes) < 2:
        raise UsageError(f"expected images of at least two classes, found {len(classes)}: {', '.join(classes)}")
    return labels, classes


@dataclass(frozen=True)
class _Verdict:
    """How good the scores of the test rows are; as in `Transfer`, for one trial."""

    value: float
    per_class: np.ndarray
    area_per_class: np.ndarray
    confusion: np.ndarray
    mistakes: list[Mistake]


@dataclass(frozen=True)
class _Trial:
    verdict: _Verdict
    costs: np.ndarray
    curve: list[tuple[float, float]]
    choice_gap: float
    gaps: np.ndarray
    route: str


def _evaluate(store: Store, task: _Task, options: TransferOptions) -> Transfer:
    began = time.perf_counter()
    place = {name: row for row, name in enumerate(store.names)}
    view = DescriptorView(store, np.array([place[name] for name in task.names]), options.levels)
    trials = [_run(view, task, split, options) for split in task.splits]
    verdicts = [trial.verdict for trial in trials]
    classes = task.classes.tolist()
    several = task.labels.ndim == 2
    worst = sorted((mistake for verdict in verdicts for mistake in verdict.mistakes), key=lambda one: -one.margin)
    convergence = Convergence(
        classes, np.stack([trial.gaps for trial in trials]), max(trial.choice_gap for trial in trials)
    )
    for text in convergence.warnings():
        warnings.warn(f"{store.place}: {text}", SppFeatWarning, stacklevel=3)
    return Transfer(
        store=store.place,
        source_root=store.source_root,
        recipe=view.recipe,
        weights_sha256=store.weights_sha256,
        options=options,
        metric="mAP" if several else "mean_per_class_accuracy",
        trials=[verdict.value for verdict in verdicts],
        costs=[trial.costs for trial in trials],
        curve=[
            (trials[0].curve[at][0], float(np.mean([trial.curve[at][1] for trial in trials])))
            for at in range(len(trials[0].curve))
        ],
        # The test part has the same number of images per class in every trial: if one value is NaN, all are.
        per_class=dict(zip(classes, np.mean([one.per_class for one in verdicts], 0).tolist(), strict=True)),
        area_per_class=dict(zip(classes, np.mean([one.area_per_class for one in verdicts], 0).tolist(), strict=True))
        if several
        else {},
        confusion=np.sum([verdict.confusion for verdict in verdicts], 0),
        mistakes=_once(worst)[:MISTAKES],
        rows=len(task.names),
        train=len(task.splits[0][0]),
        test=len(task.splits[0][1]),
        test_part=task.test_part,
        left_out_by_reason=dict(sorted(task.left_out.items())),
        convergence=convergence,
        dim=view.shape[1],
        route=trials[0].route,
        seconds=time.perf_counter() - began,
    )


def _once(mistakes: list[Mistake]) -> list[Mistake]:
    """Drop repetitions: an image can be mistaken for the same class in several trials."""
    seen: dict[tuple[str, str], Mistake] = {}
    for one in mistakes:
        seen.setdefault((one.name, one.predicted), one)
    return list(seen.values())


def _run(view: DescriptorView, task: _Task, split: _Split, options: TransferOptions) -> _Trial:
    train, test = split
    several = task.labels.ndim == 2
    labels = task.labels[train]
    problem = SvmProblem(view, train, device=options.device, names=task.names)
    choose = choose_cost_per_class if several else choose_cost
    choice = choose(problem, labels, np.arange(len(train)), options)
    targets = labels if several else class_targets(labels, task.classes)[0]
    solution = problem.solve(targets, c=choice.costs, positive_weight=options.positive_weight, start=choice.start)
    scores = problem.svm(solution, task.classes).scores(view, test, device=options.device, names=task.names)
    judge = _judge_several_classes if several else _judge_one_class
    return _Trial(
        verdict=judge(scores, task, test),
        costs=choice.costs,
        curve=[(cost, 100 * value) for cost, value in choice.curve],
        choice_gap=choice.gap,
        gaps=solution.gaps,
        route=problem.route,
    )


def _judge_one_class(scores: np.ndarray, task: _Task, test: np.ndarray) -> _Verdict:
    classes = task.classes
    best = scores.argmax(1)
    right = (task.labels[test][:, None] == classes).argmax(1)
    per_class = accuracy_per_class(task.labels[test], classes[best], classes)
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (right, best), 1)
    each = np.arange(len(test))
    margins = scores[each, best] - scores[each, right]
    mistakes = [
        Mistake(task.names[test[at]], str(classes[right[at]]), str(classes[best[at]]), float(margins[at]))
        for at in np.argsort(-margins, kind="stable")[:MISTAKES]
        if best[at] != right[at]
    ]
    return _Verdict(
        value=100 * mean_over_classes(per_class),
        per_class=100 * per_class,
        area_per_class=np.zeros(0),
        confusion=confusion,
        mistakes=mistakes,
    )


def _judge_several_classes(scores: np.ndarray, task: _Task, test: np.ndarray) -> _Verdict:
    targets = task.labels[test]
    points, areas = (average_precisions(targets, scores, method=method) for method in ("11-point", "area"))
    wrong = np.where(targets == -1, scores, -np.inf)
    worst = np.argsort(-wrong, axis=None, kind="stable")[:MISTAKES]
    mistakes = [
        Mistake(task.names[test[row]], "", str(task.classes[column]), float(wrong[row, column]))
        for row, column in zip(*np.unravel_index(worst, wrong.shape), strict=True)
        if wrong[row, column] > 0
    ]
    return _Verdict(
        value=100 * mean_over_classes(points),
        per_class=100 * points,
        area_per_class=100 * areas,
        confusion=np.zeros((0, 0), np.int64),
        mistakes=mistakes,
    )
