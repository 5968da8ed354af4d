"""Linear classifiers of all classes at once, SVMs and logistic regression, the choice of C, and metrics."""

from __future__ import annotations

from sppfeat.svm.convergence import Convergence
from sppfeat.svm.metrics import (
    AP_METHODS,
    accuracy_per_class,
    average_precisions,
    mean_over_classes,
    precision_at,
    ranked_average_precision,
    recall_at,
)
from sppfeat.svm.model import CONVERGED, LinearSvm
from sppfeat.svm.options import COST_GRIDS, SvmOptions
from sppfeat.svm.statistics import corrected_t_test, interval, mcnemar, paired_bootstrap

__all__ = [
    "AP_METHODS",
    "CONVERGED",
    "COST_GRIDS",
    "Convergence",
    "LinearSvm",
    "SvmOptions",
    "accuracy_per_class",
    "average_precisions",
    "corrected_t_test",
    "interval",
    "mcnemar",
    "mean_over_classes",
    "paired_bootstrap",
    "precision_at",
    "ranked_average_precision",
    "recall_at",
]
