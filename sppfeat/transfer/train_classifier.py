"""Training a classifier on the images of a store that have a label."""

from __future__ import annotations

import warnings

import numpy as np

from sppfeat.errors import SppFeatWarning, UsageError
from sppfeat.store import DescriptorView, Store, require_complete
from sppfeat.svm import SvmOptions
from sppfeat.svm.cost_selection import choose_cost
from sppfeat.svm.solver import SvmProblem, class_targets
from sppfeat.transfer.classifier import Classifier
from sppfeat.transfer.labels import Labels, labels_from_folders
from sppfeat.transfer.splits import labeled_names


def train_classifier(store: Store, options: SvmOptions | None = None, *, labels: Labels | None = None) -> Classifier:
    """Train on every image of a store that has a label; labels: None: from the names (`labels_from_folders`).

    Raises StoreError for a store with pending rows, UsageError for unusable labels. Warns, as
    SppFeatWarning, about SVMs that do not converge and classes whose images all failed.
    """
    options = options or SvmOptions()
    require_complete(store)
    labels = labels or labels_from_folders(store.names)
    names = labeled_names(store, labels, set(store.errors()))
    known = np.array([labels.classes[name] for name in names])
    classes = np.unique(known)
    if len(classes) < 2:
        raise UsageError(f"expected images of at least two classes, found {len(classes)}: {', '.join(classes)}")
    place = {name: row for row, name in enumerate(store.names)}
    view = DescriptorView(store, np.array([place[name] for name in names]), options.levels, options.only)
    problem = SvmProblem(view, device=options.device, names=names)
    choice = choose_cost(problem, known, np.arange(len(names)), options)
    targets, _ = class_targets(known, classes)
    solution = problem.solve(targets, c=choice.costs, positive_weight=options.positive_weight, start=choice.start)
    classifier = Classifier(
        svm=problem.svm(solution, classes),
        recipe=view.recipe,
        weights_sha256=view.weights_sha256,
        images=len(names),
        positive_weight=options.positive_weight,
        curve=[(cost, 100 * value) for cost, value in choice.curve],
        choice_gap=choice.gap,
    )
    for text in classifier.convergence.warnings():
        warnings.warn(f"{store.place}: {text}", SppFeatWarning, stacklevel=2)
    return classifier
