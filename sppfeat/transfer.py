"""Transfer evaluation: how well linear SVMs tell classes apart by the descriptors of a store.

A protocol fixes splits into training and test rows. The cost C is chosen by cross-validation inside the training rows
only, unless it is given. All splits, folds and costs of a store share one `SvmProblem`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from sppfeat.errors import StoreError, UsageError, unknown_name
from sppfeat.labels import Labels, VocLabels, labels_from_folders
from sppfeat.metrics import accuracy_per_class, average_precisions, mean_over_classes
from sppfeat.recipe import Recipe
from sppfeat.selection import SvmOptions, choose_cost, choose_cost_per_class
from sppfeat.store import Store
from sppfeat.svm import SvmProblem, class_targets
from sppfeat.views import DescriptorView

PROTOCOLS: Final = ("random", "caltech101", "split", "voc2007")
MISTAKES: Final = 48


@dataclass(frozen=True, kw_only=True)
class TransferOptions(SvmOptions):
    """How a transfer evaluation is done.

    protocol: `random`, half of each class to train and the rest to test, 5 trials; `caltech101`, 30 rows a class to
    train, up to 50 of the rest to test, 10 trials (Fei-Fei, Fergus, Perona 2004; the SPP-net paper); `split`, by the
    first folder of the names, `train` or `test`, or by the labels file; `voc2007`, the lists of a VOC folder, where an
    image can be of several classes.
    per_class, max_test, trials: of the random protocols; None: those of the protocol.
    Raises UsageError, naming the field, when a value cannot be.
    """

    protocol: str = "random"
    per_class: int | None = None
    max_test: int | None = None
    trials: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protocol not in PROTOCOLS:
            raise UsageError(unknown_name("protocol", self.protocol, PROTOCOLS))
        for name in ("per_class", "max_test", "trials"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, found {value}")
            if value is not None and self.protocol in ("split", "voc2007"):
                raise UsageError(f"{name} does not apply to protocol {self.protocol}, whose parts are given")


@dataclass(frozen=True)
class Mistake:
    """A test image that was predicted wrong: by how much the score of `predicted` exceeded that of `label`.

    With several classes an image, label is empty, and margin the score of a class that is not there.
    """

    name: str
    label: str
    predicted: str
    margin: float


@dataclass(frozen=True)
class Transfer:
    """What one store reached; values in percent.

    metric: `mean_per_class_accuracy`, or `mAP` (11 points, as VOC 2007 counts it). trials: its value in each.
    costs: [K] C of each class, for each trial. curve: every C of the grid and its mean value in cross-validation.
    per_class: mean over the trials, by class. area_per_class: for mAP, AP as the area under the curve; else empty.
    confusion: [K, K] test images by class and predicted class, over all trials; empty for mAP.
    mistakes: the most confident ones, worst first. rows, left_out: used, and failed or without a label.
    recipe: what the descriptors were, after cutting levels out. route: of the solver.
    """

    store: str
    source_root: str
    recipe: Recipe
    protocol: str
    metric: str
    trials: list[float]
    costs: list[np.ndarray]
    curve: list[tuple[float, float]]
    per_class: dict[str, float]
    area_per_class: dict[str, float]
    confusion: np.ndarray
    mistakes: list[Mistake]
    rows: int
    left_out: int
    dim: int
    route: str
    seconds: float

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
    that the protocol cannot use.
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
                f"{store.path}: expected the images of {first.path}, found {len(other)} that are in one only, "
                f"such as {min(other)!r}"
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


def require_complete(store: Store) -> None:
    """Raise StoreError for a store with images that are still to be described."""
    if pending := store.counts()["pending"]:
        raise StoreError(
            f"{store.path}: {pending} of {len(store)} images are still to be described; run its extract again"
        )


def labelled_names(store: Store, labels: Labels, failed: set[str]) -> list[str]:
    """The names of a store that have a label and have not failed. Raises UsageError for labels that match no row."""
    if not any(name in labels.classes for name in store.names):
        raise UsageError(
            f"{store.path}: none of its {len(store.names)} names has a label; give a folder a class, or a labels file"
        )
    if unknown := labels.classes.keys() - set(store.names):
        raise UsageError(f"{len(unknown)} labels match no row of {store.path}, such as {min(unknown)!r}")
    return [name for name in store.names if name in labels.classes and name not in failed]


_Split = tuple[np.ndarray, np.ndarray]  # training and test rows, as positions in the names


@dataclass(frozen=True)
class _Task:
    """Images, what they are, and how they are split; the same for every store that is compared.

    labels: [N] the class of each name; or [N, K] +1, -1 and 0, where an image can be of several.
    """

    names: list[str]
    classes: np.ndarray
    labels: np.ndarray
    splits: list[_Split]


def _voc_task(store: Store, failed: set[str], labels: VocLabels) -> _Task:
    names: dict[str, str] = {}
    for name in store.names:
        number = name.rpartition("/")[2].rpartition(".")[0]
        if number in labels.targets:
            if number in names:
                raise UsageError(f"{store.path}: expected one image {number!r}, found {names[number]!r} and {name!r}")
            names[number] = name
    if lacking := labels.targets.keys() - names.keys():
        raise UsageError(
            f"{len(lacking)} of {len(labels.targets)} images of the VOC lists match no row of {store.path}, such as "
            f"{min(lacking)!r}"
        )
    numbers = [number for number, name in names.items() if name not in failed]
    parts = np.array([labels.splits[number] for number in numbers])
    targets = np.stack([labels.targets[number] for number in numbers])
    train, test = np.flatnonzero(parts == "train"), np.flatnonzero(parts == "test")
    for part, rows in (("train with", train), ("test", test)):
        if (lacking_class := ~(targets[rows] == 1).any(0)).any():
            raise UsageError(f"class {labels.classes[int(lacking_class.argmax())]!r}: has no image to {part}")
    return _Task([names[number] for number in numbers], np.array(labels.classes), targets, [(train, test)])


def _task(store: Store, failed: set[str], known: Labels, options: TransferOptions) -> _Task:
    names = labelled_names(store, known, failed)
    labels = np.array([known.classes[name] for name in names])
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise UsageError(f"expected images of at least two classes, found {len(classes)}: {', '.join(classes)}")
    if options.protocol == "split":
        parts = np.array([known.splits.get(name, "") for name in names])
        for part in ("train", "test"):
            if not (parts == part).any():
                raise UsageError(
                    f"protocol split: expected names in train/... and test/..., or a split, found no {part}"
                )
        train, test = np.flatnonzero(parts == "train"), np.flatnonzero(parts == "test")
        if untrained := set(labels[test]) - set(labels[train]):
            raise UsageError(f"class {min(untrained)!r}: has test images, and none to train with")
        return _Task(names, classes, labels, [(train, test)])
    caltech = options.protocol == "caltech101"
    per_class = options.per_class or (30 if caltech else None)
    max_test = options.max_test or (50 if caltech else None)
    needed = (per_class or 1) + 1
    if (few := counts < needed).any():
        shown = ", ".join(f"{name} {count}" for name, count in zip(classes[few][:5], counts[few][:5], strict=True))
        raise UsageError(
            f"protocol {options.protocol}: expected at least {needed} images a class, found fewer in {few.sum()} of "
            f"{len(classes)} ({shown}); a smaller per_class takes fewer"
        )
    generator = np.random.default_rng(options.seed)
    splits = []
    for _ in range(options.trials or (10 if caltech else 5)):
        parts_of = [generator.permutation(np.flatnonzero(labels == name)) for name in classes]
        sizes = [per_class or len(rows) // 2 for rows in parts_of]
        train = np.concatenate([rows[:size] for rows, size in zip(parts_of, sizes, strict=True)])
        test = np.concatenate([rows[size:][:max_test] for rows, size in zip(parts_of, sizes, strict=True)])
        splits.append((np.sort(train), np.sort(test)))
    return _Task(names, classes, labels, splits)


@dataclass(frozen=True)
class _Trial:
    value: float
    per_class: np.ndarray
    area_per_class: np.ndarray
    confusion: np.ndarray
    mistakes: list[Mistake]
    costs: np.ndarray
    curve: list[tuple[float, float]]


def _evaluate(store: Store, task: _Task, options: TransferOptions) -> Transfer:
    began = time.perf_counter()
    place = {name: row for row, name in enumerate(store.names)}
    view = DescriptorView(store, np.array([place[name] for name in task.names]), options.levels)
    problem = SvmProblem(view, device=options.device, names=task.names)
    several = task.labels.ndim == 2
    run = _run_several_classes if several else _run_one_class
    trials = [run(problem, task, split, options) for split in task.splits]
    classes = task.classes.tolist()
    worst = sorted((mistake for trial in trials for mistake in trial.mistakes), key=lambda one: -one.margin)
    areas = np.mean([trial.area_per_class for trial in trials], 0)
    return Transfer(
        store=str(store.path),
        source_root=store.source_root,
        recipe=view.recipe,
        protocol=options.protocol,
        metric="mAP" if several else "mean_per_class_accuracy",
        trials=[trial.value for trial in trials],
        costs=[trial.costs for trial in trials],
        curve=[
            (trials[0].curve[at][0], float(np.mean([trial.curve[at][1] for trial in trials])))
            for at in range(len(trials[0].curve))
        ],
        per_class=dict(zip(classes, np.nanmean([trial.per_class for trial in trials], 0).tolist(), strict=True)),
        area_per_class=dict(zip(classes, areas.tolist(), strict=True)) if several else {},
        confusion=np.sum([trial.confusion for trial in trials], 0),
        mistakes=_once(worst)[:MISTAKES],
        rows=len(task.names),
        left_out=len(store) - len(task.names),
        dim=view.shape[1],
        route=problem.route,
        seconds=time.perf_counter() - began,
    )


def _once(mistakes: list[Mistake]) -> list[Mistake]:
    """Without repetitions: an image can be taken for the same class in several trials."""
    seen: dict[tuple[str, str], Mistake] = {}
    for one in mistakes:
        seen.setdefault((one.name, one.predicted), one)
    return list(seen.values())


def _run_one_class(problem: SvmProblem, task: _Task, split: _Split, options: TransferOptions) -> _Trial:
    train, test = split
    classes = task.classes
    choice = choose_cost(problem, task.labels[train], train, options)
    targets, _ = class_targets(task.labels[train], classes)
    solution = problem.solve(targets, train, c=choice.costs[0], positive_weight=options.positive_weight)
    scores = problem.scores(solution, test)
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
    return _Trial(
        value=100 * mean_over_classes(per_class),
        per_class=100 * per_class,
        area_per_class=np.zeros(0),
        confusion=confusion,
        mistakes=mistakes,
        costs=np.full(len(classes), choice.costs[0]),
        curve=[(cost, 100 * value) for cost, value in choice.curve],
    )


def _run_several_classes(problem: SvmProblem, task: _Task, split: _Split, options: TransferOptions) -> _Trial:
    train, test = split
    choice = choose_cost_per_class(problem, task.labels[train], train, options)
    solution = problem.solve(task.labels[train], train, c=choice.costs, positive_weight=options.positive_weight)
    scores, targets = problem.scores(solution, test), task.labels[test]
    points, areas = (average_precisions(targets, scores, method=method) for method in ("11-point", "area"))
    wrong = np.where(targets == -1, scores, -np.inf)
    worst = np.argsort(-wrong, axis=None, kind="stable")[:MISTAKES]
    mistakes = [
        Mistake(task.names[test[row]], "", str(task.classes[column]), float(wrong[row, column]))
        for row, column in zip(*np.unravel_index(worst, wrong.shape), strict=True)
        if wrong[row, column] > 0
    ]
    return _Trial(
        value=100 * mean_over_classes(points),
        per_class=100 * points,
        area_per_class=100 * areas,
        confusion=np.zeros((0, 0), np.int64),
        mistakes=mistakes,
        costs=choice.costs,
        curve=[(cost, 100 * value) for cost, value in choice.curve],
    )
