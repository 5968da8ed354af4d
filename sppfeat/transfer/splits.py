"""Which images of a store a protocol trains with and which it tests on."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from sppfeat.errors import SppFeatWarning, UsageError, nearest_names
from sppfeat.store import Store
from sppfeat.transfer.labels import TEST_PARTS, Labels, VocLabels
from sppfeat.transfer.options import TransferOptions


def labeled_names(store: Store, labels: Labels, failed: set[str]) -> list[str]:
    """The names of a store that have a label and have not failed; warns about classes whose images all failed.

    Raises UsageError for labels that match no row, and if every row with a label failed.
    """
    if not any(name in labels.classes for name in store.names):
        hint = "use one folder per class, or a labels file"
        if labels.classes:
            hint = f"the store has {store.names[0]!r}, the labels {next(iter(labels.classes))!r}"
        raise UsageError(f"{store.place}: none of its {len(store)} names has a label; {hint}")
    if unknown := labels.classes.keys() - set(store.names):
        example = min(unknown)
        near = nearest_names(example, store.names, most=1)
        raise UsageError(
            f"{len(unknown)} labels match no row of {store.place}, such as {example!r}; "
            + (f"did you mean {near[0]!r}?" if near else f"the store has {store.names[0]!r}")
        )
    names = [name for name in store.names if name in labels.classes and name not in failed]
    if not names:
        labeled = sum(name in labels.classes for name in store.names)
        raise UsageError(f"{store.place}: expected described images with a label, found none: all {labeled} failed")
    known = set(labels.classes.values())
    if lost := known - {labels.classes[name] for name in names}:
        shown = ", ".join(map(repr, sorted(lost)[:5])) + ", ..." * (len(lost) > 5)
        warnings.warn(
            f"{store.place}: {len(lost)} of {len(known)} classes skipped, because all their images failed: {shown}",
            SppFeatWarning,
            stacklevel=3,
        )
    return names


Split = tuple[np.ndarray, np.ndarray]  # training and test rows, as positions in the names


@dataclass(frozen=True)
class Task:
    """Images, their classes and splits; the same for every store that is compared.

    labels: [N] the class of each name; or [N, K] +1, -1 and 0, where an image can have several. left_out, test_part:
    as in `Transfer`. method: of average precision, where an image can have several classes.
    """

    names: list[str]
    classes: np.ndarray
    labels: np.ndarray
    splits: list[Split]
    left_out: Counter[str]
    test_part: str | None = None
    method: str = "11-point"

    @property
    def several(self) -> bool:
        """Whether an image can have several classes."""
        return self.labels.ndim == 2

    def with_shots(self, shots: int, seed: int) -> Task:
        """The same splits, with that many training images of each class, drawn anew in each.

        Raises UsageError, naming the class, for fewer images than that.
        """
        generator = np.random.default_rng((seed, shots))
        splits = []
        for train, test in self.splits:
            kept = []
            for name in self.classes:
                rows = train[self.labels[train] == name]
                if len(rows) < shots:
                    raise UsageError(
                        f"shots {shots}: class {str(name)!r} has {len(rows)} training images; expected at least {shots}"
                    )
                kept.append(generator.permutation(rows)[:shots])
            splits.append((np.sort(np.concatenate(kept)), test))
        return replace(self, splits=splits)


def voc_task(store: Store, failed: set[str], labels: VocLabels, options: TransferOptions) -> Task:
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
            f"{min(lacking)!r}; the store has {store.names[0]!r}"
        )
    numbers = [number for number, name in names.items() if name not in failed]
    if not numbers:
        raise UsageError(f"{store.place}: expected described images, found none: all {len(names)} failed")
    parts = np.array([labels.splits[number] for number in numbers])
    targets = np.stack([labels.targets[number] for number in numbers])
    vissl = options.protocol == "voc2007-vissl"
    if vissl:
        targets = np.where(targets == 0, -1, targets).astype(np.int8)
    train, test = np.flatnonzero(parts == "train"), np.flatnonzero(parts == "test")
    for part, rows in (("train with", train), ("test", test)):
        if (lacking_class := ~(targets[rows] == 1).any(0)).any():
            raise UsageError(f"class {labels.classes[int(lacking_class.argmax())]!r}: has no image to {part}")
    left_out = Counter("failed" if name in failed else "in no list" for name in set(store.names) - set(names.values()))
    left_out["failed"] += len(names) - len(numbers)
    used = [names[number] for number in numbers]
    return Task(
        used, np.array(labels.classes), targets, [(train, test)], +left_out, method="area" if vissl else "11-point"
    )


def folder_task(store: Store, failed: set[str], known: Labels, options: TransferOptions) -> Task:
    names = labeled_names(store, known, failed)
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
    return Task(names, classes, labels, splits, left_out)


def _split_task(names: list[str], left_out: Counter[str], known: Labels) -> Task:
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
    return Task(used, classes, labels, [(train, test)], left_out, test_part)


def _labels(names: list[str], known: Labels) -> tuple[np.ndarray, np.ndarray]:
    """The class of each name [N], and the classes in rising order."""
    labels = np.array([known.classes[name] for name in names])
    classes = np.unique(labels)
    if len(classes) < 2:
        raise UsageError(f"expected images of at least two classes, found {len(classes)}: {', '.join(classes)}")
    return labels, classes
