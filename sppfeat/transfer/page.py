"""The page of a transfer evaluation: stores beside each other; of each, accuracy per class, confusions, the most
confident mistakes, and the curve over C."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from sppfeat.report import Origin, common_folder, plot_line, shown_row, write_page
from sppfeat.transfer.evaluation import Transfer

MISTAKES_SHOWN: Final = 24
CONFUSIONS_SHOWN: Final = 12
DIFFERENCES_SHOWN: Final = 30
_CLASSIFIERS: Final = {
    "svm": "one linear SVM per class, against the rest",
    "knn": "the votes of the nearest training images",
    "logistic": "multinomial logistic regression",
}
_NAMED_CLASSES: Final = 30  # up to this many, the confusion matrix has room for their names


def write_transfer_report(path: Path, done: Sequence[Transfer], *, command: str = "") -> None:
    """Write one self-contained page about stores that were evaluated together. command: what made it.

    See `sppfeat.report.check_page`. Raises ReportError.
    """
    first = done[0]
    names = _names([one.store for one in done])
    write_page(
        path,
        "transfer.html",
        {
            "first": first,
            "metric": "mean average precision" if first.metric == "mAP" else "mean per-class accuracy",
            "classifier": _CLASSIFIERS[first.options.classifier],
            "stores": [_about(path, one, name, first) for one, name in zip(done, names, strict=True)],
        },
        origins=[Origin(name, one.recipe, one.weights_sha256) for one, name in zip(done, names, strict=True)],
        command=command,
    )


def _names(stores: Sequence[str]) -> list[str]:
    """The stores' file names, with the folders that tell them apart where these are needed."""
    short = [Path(store).name for store in stores]
    if len(set(short)) == len(set(stores)):
        return short
    folder = common_folder(stores)
    return [store.removeprefix(f"{folder}/") if folder else store for store in stores]


def _about(page: Path, done: Transfer, name: str, first: Transfer) -> dict[str, Any]:
    costs = sorted({float(c) for costs in done.costs for c in costs})
    mistakes = done.mistakes[:MISTAKES_SHOWN]
    classes = sorted(done.per_class.items(), key=lambda item: (math.isnan(item[1]), item[1]))
    return {
        "result": done,
        "name": name,
        "costs": ", ".join(f"{c:g}" for c in costs),
        "levels": ",".join(map(str, done.recipe.levels)),
        "classes": [(label, value) for label, value in classes if not _perfect(value)],
        "perfect": [label for label, value in classes if _perfect(value)],
        "differences": None if done is first else _differences(done, first),
        "curve": plot_line(
            [(math.log10(c), value) for c, value in done.curve],
            ticks=[(math.log10(c), f"{c:g}") for c, _ in done.curve],
            unit=" %",
        )
        if done.curve
        else None,
        "matrix": _matrix(done),
        "confusions": _confusions(done)[:CONFUSIONS_SHOWN],
        "confused": len(_confusions(done)),
        "folder": common_folder(one.name for one in mistakes),
        "mistakes": [
            {
                "image": shown_row(page, done.source_root, one.name, orientation=done.recipe.orientation),
                "label": one.label,
                "predicted": one.predicted,
                "margin": one.margin,
            }
            for one in mistakes
        ],
    }


def _perfect(value: float) -> bool:
    return value > 100 - 1e-6


def _differences(done: Transfer, first: Transfer) -> dict[str, Any]:
    """Classes by how much better or worse they are than with the first store, in percentage points, and the largest."""
    found = [(name, value - first.per_class[name]) for name, value in done.per_class.items()]
    differing = [(name, value) for name, value in found if abs(value) > 1e-6]  # not NaN either
    largest = sorted(differing, key=lambda one: -abs(one[1]))[:DIFFERENCES_SHOWN]
    return {
        "classes": sorted(largest, key=lambda one: one[1]),
        "differing": len(differing),
        "equal": [name for name, value in found if abs(value) <= 1e-6],
        "largest": max((abs(value) for _, value in largest), default=0.0),
    }


def _matrix(done: Transfer) -> dict[str, Any] | None:
    """Cells of the confusion matrix: row, column, share of the row, count, and text."""
    if not done.confusion.size:
        return None
    names = list(done.per_class)
    totals = done.confusion.sum(1)
    cells = [
        {
            "row": int(row),
            "column": int(column),
            "share": float(done.confusion[row, column] / totals[row]),
            "count": int(done.confusion[row, column]),
            "text": f"{names[row]} predicted as {names[column]}: {done.confusion[row, column]} of {totals[row]}"
            if row != column
            else f"{names[row]}: {done.confusion[row, column]} of {totals[row]} correct",
        }
        for row, column in zip(*np.nonzero(done.confusion), strict=True)
    ]
    return {"size": len(names), "cells": cells, "names": names if len(names) <= _NAMED_CLASSES else []}


def _confusions(done: Transfer) -> list[dict[str, Any]]:
    """The pairs that are confused, the most frequent first, by their share of the class."""
    if not done.confusion.size:
        return []
    names = list(done.per_class)
    wrong = done.confusion - np.diag(np.diag(done.confusion))
    shares = wrong / np.maximum(done.confusion.sum(1, keepdims=True), 1)
    order = np.argsort(-shares, axis=None, kind="stable")[: int((wrong > 0).sum())]
    return [
        {
            "label": names[row],
            "predicted": names[column],
            "count": int(wrong[row, column]),
            "share": shares[row, column],
        }
        for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)
    ]
