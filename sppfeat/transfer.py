"""Transfer evaluation: how well linear SVMs tell classes apart by the descriptors of a store.

A protocol fixes splits into training and test rows. The cost C is chosen by cross-validation inside the training rows
only, unless it is given. All splits, folds and costs of a store share one `SvmProblem`.
"""

from __future__ import annotations

import csv
import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from sppfeat.errors import StoreError, UsageError, unknown_name
from sppfeat.metrics import accuracy_per_class, mean_over_classes
from sppfeat.store import Store
from sppfeat.svm import SvmProblem, class_targets

PROTOCOLS: Final = ("random", "caltech101", "split")
# One cost a decade: on L2-normalised descriptors accuracy changes little within one.
C_GRID: Final = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
FOLDS: Final = 3


@dataclass(frozen=True, kw_only=True)
class TransferOptions:
    """How a transfer evaluation is done.

    protocol: `random`, half of each class to train and the rest to test, 5 trials; `caltech101`, 30 rows a class to
    train, up to 50 of the rest to test, 10 trials (Fei-Fei, Fergus, Perona 2004; the SPP-net paper); `split`, by the
    first folder of the names, `train` or `test`, or by the labels file.
    costs: one C, or the grid to choose from. per_class, max_test, trials: None: those of the protocol.
    Raises UsageError, naming the field, when a value cannot be.
    """

    protocol: str = "random"
    costs: tuple[float, ...] = C_GRID
    positive_weight: float = 1.0
    per_class: int | None = None
    max_test: int | None = None
    trials: int | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise UsageError(unknown_name("protocol", self.protocol, PROTOCOLS))
        for name, values in (("c", self.costs), ("positive_weight", (self.positive_weight,))):
            if not values or not all(np.isfinite(value) and value > 0 for value in values):
                raise UsageError(f"{name} must be above 0, found {','.join(map(str, values))}")
        for name in ("per_class", "max_test", "trials"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, found {value}")


@dataclass(frozen=True)
class Transfer:
    """What one store reached. Accuracies are means over the classes, in percent.

    accuracies, costs: of each trial. per_class: mean over the trials, by class. rows, left_out: used, and failed or
    without a label. route: of the solver.
    """

    store: str
    protocol: str
    accuracies: list[float]
    costs: list[float]
    per_class: dict[str, float]
    rows: int
    left_out: int
    dim: int
    route: str

    @property
    def value(self) -> float:
        """Mean over the trials."""
        return float(np.mean(self.accuracies))

    @property
    def std(self) -> float:
        """Standard deviation over the trials (n - 1); 0 for one trial."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else 0.0


@dataclass(frozen=True)
class Labels:
    """Class, and `train` or `test` where a split is known, by name."""

    classes: dict[str, str]
    splits: dict[str, str]


def labels_from_folders(names: Sequence[str]) -> Labels:
    """Labels from names: the folder that holds an image; the split from the first folder, where it is one."""
    classes = {name: posixpath.basename(posixpath.dirname(name)) for name in names if "/" in name}
    splits = {name: name.split("/")[0] for name in names if name.split("/")[0] in ("train", "test")}
    return Labels(classes, splits)


def read_labels(path: str | os.PathLike[str]) -> Labels:
    """Read a CSV file with the columns name,label and, if wanted, split (train or test). Raises UsageError."""
    classes: dict[str, str] = {}
    splits: dict[str, str] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not {"name", "label"} <= set(rows.fieldnames or ()):
                found = ",".join(rows.fieldnames or ()) or "nothing"
                raise UsageError(f"{path}: expected the columns name,label[,split], found {found}")
            for row in rows:
                name, label, split = row["name"], row["label"], row.get("split") or ""
                if not name or not label or name in classes:
                    fault = "a name that stands twice" if name in classes else "an empty name or label"
                    raise UsageError(f"{path}, line {rows.line_num}: found {fault} ({name!r})")
                if split not in ("", "train", "test"):
                    raise UsageError(f"{path}, line {rows.line_num}: expected split train or test, found {split!r}")
                classes[name] = label
                splits |= {name: split} if split else {}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: expected a readable CSV file, found: {error}") from None
    return Labels(classes, splits)


def evaluate_transfer(
    stores: Sequence[Store], options: TransferOptions | None = None, *, labels: Labels | None = None
) -> list[Transfer]:
    """Evaluate stores of the same images on the same splits, so that their trials can be compared one by one.

    labels: None: from the names (`labels_from_folders`). Raises StoreError for stores with pending rows or of other
    images than the first, UsageError for labels or classes that the protocol cannot use.
    """
    options = options or TransferOptions()
    if not stores:
        raise UsageError("expected at least one store")
    for store in stores:
        if pending := store.counts()["pending"]:
            raise StoreError(
                f"{store.path}: {pending} of {len(store)} images are still to be described; run its extract again"
            )
    failed = set().union(*(store.errors() for store in stores))
    first = stores[0]
    for store in stores[1:]:
        if other := set(store.names) ^ set(first.names):
            raise StoreError(
                f"{store.path}: expected the images of {first.path}, found {len(other)} that are in one only, "
                f"such as {min(other)!r}"
            )
    labels = labels or labels_from_folders(first.names)
    if not any(name in labels.classes for name in first.names):
        raise UsageError(
            f"{first.path}: none of its {len(first)} names has a label; give a folder a class, or a labels file"
        )
    if unknown := labels.classes.keys() - set(first.names):
        raise UsageError(f"{len(unknown)} labels match no row of {first.path}, such as {min(unknown)!r}")
    names = [name for name in first.names if name in labels.classes and name not in failed]
    known = np.array([labels.classes[name] for name in names])
    splits = _splits(names, known, labels, options)
    return [_evaluate(store, names, known, splits, options) for store in stores]


_Split = tuple[np.ndarray, np.ndarray]  # training and test rows, as positions in the names


def _splits(names: list[str], labels: np.ndarray, known: Labels, options: TransferOptions) -> list[_Split]:
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
        return [(train, test)]
    caltech = options.protocol == "caltech101"
    per_class = options.per_class or (30 if caltech else None)
    max_test = options.max_test or (50 if caltech else None)
    needed = (per_class or 1) + 1
    if (few := counts < needed).any():
        shown = ", ".join(f"{name} {count}" for name, count in zip(classes[few][:5], counts[few][:5], strict=True))
        raise UsageError(
            f"protocol {options.protocol}: expected at least {needed} images a class, found {few.sum()} classes with "
            f"fewer ({shown}); a smaller per_class takes fewer"
        )
    generator = np.random.default_rng(options.seed)
    splits = []
    for _ in range(options.trials or (10 if caltech else 5)):
        parts_of = [generator.permutation(np.flatnonzero(labels == name)) for name in classes]
        sizes = [per_class or len(rows) // 2 for rows in parts_of]
        train = np.concatenate([rows[:size] for rows, size in zip(parts_of, sizes, strict=True)])
        test = np.concatenate([rows[size:][:max_test] for rows, size in zip(parts_of, sizes, strict=True)])
        splits.append((np.sort(train), np.sort(test)))
    return splits


def _evaluate(
    store: Store, names: list[str], labels: np.ndarray, splits: list[_Split], options: TransferOptions
) -> Transfer:
    place = {name: row for row, name in enumerate(store.names)}
    rows = np.array([place[name] for name in names])
    # Rows that stand as they are need no copy: the solver reads them block by block from the file.
    descriptors = store.descriptors if np.array_equal(rows, np.arange(len(store))) else store.descriptors[rows]
    problem = SvmProblem(descriptors, device=options.device, names=names)
    classes = np.unique(labels)
    accuracies, costs, per_class = [], [], []
    for train, test in splits:
        cost = _choose_cost(problem, labels, train, options)
        targets, _ = class_targets(labels[train], classes)
        solution = problem.solve(targets, train, c=cost, positive_weight=options.positive_weight)
        predicted = classes[problem.scores(solution, test).argmax(1)]
        per_class.append(100 * accuracy_per_class(labels[test], predicted, classes))
        accuracies.append(mean_over_classes(per_class[-1]))
        costs.append(cost)
    return Transfer(
        store=str(store.path),
        protocol=options.protocol,
        accuracies=accuracies,
        costs=costs,
        per_class=dict(zip(classes.tolist(), np.nanmean(per_class, 0).tolist(), strict=True)),
        rows=len(names),
        left_out=len(store) - len(names),
        dim=store.dim,
        route=problem.route,
    )


def _choose_cost(problem: SvmProblem, labels: np.ndarray, train: np.ndarray, options: TransferOptions) -> float:
    """The cost of the best mean per-class accuracy in cross-validation; the smallest of equally good ones."""
    if len(options.costs) == 1:
        return options.costs[0]
    classes = np.unique(labels[train])
    generator = np.random.default_rng(options.seed)
    fold = np.empty(len(train), int)
    for name in classes:
        members = np.flatnonzero(labels[train] == name)
        fold[generator.permutation(members)] = np.arange(len(members)) % FOLDS
    scores = np.zeros(len(options.costs))
    costs = sorted(options.costs)
    for number in range(FOLDS):
        fit, held = train[fold != number], train[fold == number]
        if not len(held) or not len(fit):
            continue
        targets, _ = class_targets(labels[fit], classes)
        solution = None
        for at, cost in enumerate(costs):
            solution = problem.solve(targets, fit, c=cost, positive_weight=options.positive_weight, start=solution)
            predicted = classes[problem.scores(solution, held).argmax(1)]
            scores[at] += mean_over_classes(accuracy_per_class(labels[held], predicted, classes))
    return costs[int(scores.argmax())]
