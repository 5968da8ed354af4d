"""The page of a transfer evaluation: accuracy per class, confusions, the most confident mistakes, the curve over C."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from sppfeat.report import plot_line, thumbnail, write_page
from sppfeat.transfer.evaluation import Transfer

MISTAKES_SHOWN: Final = 24
CONFUSIONS_SHOWN: Final = 12
_CLASSIFIERS: Final = {
    "svm": "one linear SVM per class, against the rest",
    "knn": "the votes of the nearest training images",
    "logistic": "multinomial logistic regression",
}
_NAMED_CLASSES: Final = 30  # up to this many, the confusion matrix has room for their names


def write_transfer_report(path: Path, done: Sequence[Transfer]) -> None:
    """Write one self-contained page about stores that were evaluated together. See `sppfeat.report.pages.check_page`.

    Raises ReportError.
    """
    first = done[0]
    write_page(
        path,
        "transfer.html",
        {
            "first": first,
            "metric": "mean average precision" if first.metric == "mAP" else "mean per-class accuracy",
            "classifier": _CLASSIFIERS[first.options.classifier],
            "stores": [_about(one) for one in done],
        },
    )


def _about(done: Transfer) -> dict[str, Any]:
    costs = sorted({float(c) for costs in done.costs for c in costs})
    return {
        "result": done,
        "name": Path(done.store).name,
        "costs": ", ".join(f"{c:g}" for c in costs),
        "levels": ",".join(map(str, done.recipe.levels)),
        "classes": sorted(done.per_class.items(), key=lambda item: (math.isnan(item[1]), item[1])),
        "curve": plot_line(
            [(math.log10(c), value) for c, value in done.curve],
            ticks=[(math.log10(c), f"{c:g}") for c, _ in done.curve],
            unit=" %",
        )
        if done.curve
        else None,
        "matrix": _matrix(done),
        "confusions": _confusions(done),
        "mistakes": [
            {
                "image": thumbnail(done.source_root, one.name),
                "name": one.name,
                "label": one.label,
                "predicted": one.predicted,
                "margin": one.margin,
            }
            for one in done.mistakes[:MISTAKES_SHOWN]
        ],
    }


def _matrix(done: Transfer) -> dict[str, Any] | None:
    """Cells of the confusion matrix: row, column, share of the row, and text."""
    if not done.confusion.size:
        return None
    names = list(done.per_class)
    totals = done.confusion.sum(1)
    cells = [
        {
            "row": int(row),
            "column": int(column),
            "share": float(done.confusion[row, column] / totals[row]),
            "text": f"{names[row]} predicted as {names[column]}: {done.confusion[row, column]} of {totals[row]}"
            if row != column
            else f"{names[row]}: {done.confusion[row, column]} of {totals[row]} correct",
        }
        for row, column in zip(*np.nonzero(done.confusion), strict=True)
    ]
    return {"size": len(names), "cells": cells, "names": names if len(names) <= _NAMED_CLASSES else []}


def _confusions(done: Transfer) -> list[dict[str, Any]]:
    """The pairs that are confused most often, by their share of the class."""
    if not done.confusion.size:
        return []
    names = list(done.per_class)
    wrong = done.confusion - np.diag(np.diag(done.confusion))
    shares = wrong / np.maximum(done.confusion.sum(1, keepdims=True), 1)
    order = np.argsort(-shares, axis=None, kind="stable")[:CONFUSIONS_SHOWN]
    return [
        {
            "label": names[row],
            "predicted": names[column],
            "count": int(wrong[row, column]),
            "share": shares[row, column],
        }
        for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[row, column]
    ]
