"""The page of an evaluation of a detector: figures, curves, mistakes, and a table of the classes."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from sppfeat.detection.detector import Detector
from sppfeat.detection.evaluation import ClassResult, DetectionEvaluation
from sppfeat.detection.mistakes import MissedObject, WrongDetection
from sppfeat.report import FOUND_COLOR, TRUE_COLOR, Mark, Origin, Shown, common_folder, shown_item, write_page
from sppfeat.store import Box

NOTES_SHOWN: Final = 50
# How much of the surroundings of a box is shown on each side, of its width and height.
_AROUND: Final = 0.5


def write_evaluation(
    output: Path, done: DetectionEvaluation, detector: Detector, *, title: str, note: str, command: str = ""
) -> None:
    """Write one self-contained page. command: what made it.

    See `sppfeat.report.check_page`. Raises ReportError.
    """
    classes: list[ClassResult] = sorted(
        done.classes, key=lambda one: (np.isnan(one.eleven_point), -one.eleven_point, one.name)
    )
    mistakes = done.mistakes
    items = [one.item for one in mistakes.wrong] + [one.item for one in mistakes.missed]
    write_page(
        output,
        "detection_evaluation.html",
        {
            "title": title,
            "note": note,
            "done": done,
            "classes": [(one, _curve(one)) for one in classes if not _perfect(one)],
            "perfect": [(one, _curve(one)) for one in classes if _perfect(one)],
            "kind": "probability" if detector.probable else "score",
            "wrong": [{"about": one, "image": _shown_wrong(output, one)} for one in mistakes.wrong],
            "missed": [{"about": one, "image": _shown_missed(output, one)} for one in mistakes.missed],
            "found_color": FOUND_COLOR,
            "true_color": TRUE_COLOR,
            "root": items[0].root if items else "",
            "folder": common_folder(item.name for item in items),
            "notes": done.notes[:NOTES_SHOWN],
            "failed": dict(list(done.failed.items())[:NOTES_SHOWN]),
        },
        origins=[Origin("the detector", detector.recipe, detector.weights_sha256)],
        command=command,
    )


def _perfect(one: ClassResult) -> bool:
    return one.eleven_point > 100 - 1e-6


def _shown_wrong(page: Path, one: WrongDetection) -> Shown:
    marks = [] if one.other_box is None else [Mark(_box(one.other_box), TRUE_COLOR)]
    boxes = [one.box] if one.other_box is None else [one.box, one.other_box]
    return shown_item(page, one.item, one.item.name, box=_around(boxes), marks=[*marks, Mark(_box(one.box))])


def _shown_missed(page: Path, one: MissedObject) -> Shown:
    marks = [] if one.near is None else [Mark(_box(one.near))]
    return shown_item(
        page, one.item, one.item.name, box=_around([one.box]), marks=[*marks, Mark(_box(one.box), TRUE_COLOR)]
    )


def _box(box: np.ndarray) -> Box:
    x1, y1, x2, y2 = box.tolist()
    return x1, y1, x2, y2


def _around(boxes: list[np.ndarray]) -> Box:
    """The smallest box that holds all of these, with what surrounds it."""
    low, high = np.min(boxes, 0)[:2], np.max(boxes, 0)[2:]
    margin = _AROUND * (high - low + 1)
    return _box(np.concatenate([np.maximum(low - margin, 0), high + margin]))


def _curve(one: ClassResult) -> str:
    """Points of a precision-recall polyline in a square of 100 x 100, starting in the upper left."""
    recall, precision = one.recall, one.precision
    if not len(recall):
        return ""
    # Where precision only falls between two hits, its end is enough: curves of many detections stay small.
    turns = np.flatnonzero(np.diff(recall, prepend=-1, append=2)[:-1] + np.diff(recall, prepend=-1, append=2)[1:] > 0)
    turns = turns[:: max(1, len(turns) // 400)]
    points = zip(100 * recall[turns], 100 - 100 * precision[turns], strict=True)
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
