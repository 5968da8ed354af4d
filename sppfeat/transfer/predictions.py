"""Predictions as a user gets them: the best classes of each image, as a CSV file and as a page."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sppfeat.errors import ReportError, UsageError
from sppfeat.files import appearing, check_new_file
from sppfeat.images import path_to_name
from sppfeat.report import common_folder, shown_row, write_page
from sppfeat.transfer.classifier import Classifier
from sppfeat.transfer.prediction import Prediction

CSV_COLUMNS: Final = ("path", "rank", "label", "score", "error")
# With more thumbnails, a phone could not open the page.
PAGE_IMAGES: Final = 1000
PAGE_PER_CLASS: Final = 48


@dataclass(frozen=True)
class Ranked:
    """The best classes of an image with their scores, the best first, or why there are none; see `Prediction`."""

    path: str
    name: str
    root: str
    top: list[tuple[str, float]]
    error: str | None


def ranked(classifier: Classifier, predictions: Iterable[Prediction], top: int) -> list[Ranked]:
    """The `top` best classes of each image, ordered by path. Raises UsageError."""
    if top < 1:
        raise UsageError(f"top must be at least 1, found {top}")
    found = []
    for one in predictions:
        best = [] if one.scores is None else (-one.scores).argsort(kind="stable")[:top].tolist()
        classes = [(classifier.classes[at], float(one.scores[at])) for at in best if one.scores is not None]
        found.append(Ranked(one.path, one.name, one.root, classes, one.error))
    return sorted(found, key=lambda one: (one.path, one.name))


def check_predictions_csv(path: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The path, if `write_predictions_csv` may write there; call this before the work. Raises ReportError."""
    start = ",".join(CSV_COLUMNS).encode()

    def other(existing: Path) -> str | None:
        with open(existing, "rb") as file:
            return None if file.read(len(start)) == start else "another file"

    return check_new_file(path, overwrite=overwrite, error=ReportError, kind="a CSV file of predictions", other=other)


def write_predictions_csv(path: Path, found: Sequence[Ranked]) -> None:
    r"""Write a CSV file in UTF-8, a line for each of the best classes of each image. Raises ReportError.

    Columns: path, as stores write names (`\\` for a backslash, `\xNN` for a byte that is not UTF-8); rank, from 1;
    label; score; error, alone with the path, for an image that could not be described.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(CSV_COLUMNS)
    for one in found:
        path_text = path_to_name(one.path)
        if one.error is not None:
            table.writerow([path_text, "", "", "", one.error])
        for rank, (label, score) in enumerate(one.top, 1):
            table.writerow([path_text, rank, label, f"{score:.6f}", ""])
    with appearing(path, ReportError) as partial:
        partial.write_text(text.getvalue(), "utf-8", errors="backslashreplace", newline="")


def write_predictions_page(path: Path, found: Sequence[Ranked], *, title: str, command: str = "") -> None:
    """Write one page: the images of each class, those with the highest scores first. command: what made it.

    Raises ReportError.
    """
    by_class: dict[str, list[Ranked]] = {}
    for one in found:
        if one.top:
            by_class.setdefault(one.top[0][0], []).append(one)
    left = PAGE_IMAGES
    classes = []
    for label, images in sorted(by_class.items(), key=lambda entry: (-len(entry[1]), entry[0])):
        images.sort(key=lambda one: (-one.top[0][1], one.path))
        shown = images[: min(left, PAGE_PER_CLASS)]
        left -= len(shown)
        entries = [
            {
                "image": shown_row(path, one.root, one.name),
                "path": one.path,
                "score": one.top[0][1],
                "others": [f"{name} {score:.2f}" for name, score in one.top[1:2]],
            }
            for one in shown
        ]
        classes.append({"label": label, "count": len(images), "images": entries})
    failed = [one for one in found if one.error is not None]
    write_page(
        path,
        "predictions.html",
        {
            "title": title,
            "classes": classes,
            "count": len(found) - len(failed),
            "failed": failed,
            "folder": common_folder(one.path for one in found),
        },
        command=command,
    )
