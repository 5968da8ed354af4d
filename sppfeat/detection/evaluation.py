"""Evaluation of a detector on annotated images."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from sppfeat.detection.annotations import AnnotatedImages
from sppfeat.detection.average_precision import (
    COCO_DETECTIONS,
    CocoFigures,
    Objects,
    Ranking,
    coco_figures,
    coco_means,
    rank_detections,
)
from sppfeat.detection.detecting import DetectOptions, DetectorRunner, detected, threshold_for, window_notes
from sppfeat.detection.detector import Detector
from sppfeat.detection.mistakes import Mistakes, find_mistakes
from sppfeat.errors import UsageError
from sppfeat.extraction import Describer
from sppfeat.progress import Observer
from sppfeat.recipe import RunOptions
from sppfeat.svm import ranked_average_precision


def complete_options(detector: Detector, options: DetectOptions | None = None) -> DetectOptions:
    """All that survives suppression, up to 100 per class and image (COCO's number), so that no curve ends early.

    options: what else they say is kept.
    """
    least = 0.0 if detector.probable else -1e9
    return replace(options or DetectOptions(), threshold=least, max_detections=COCO_DETECTIONS)


@dataclass(frozen=True)
class ClassResult:
    """One class, in percent; NaN if it has no object.

    eleven_point, area: VOC's average precision. coco: COCO's, the mean over overlaps 0.5 .. 0.95; figures: all of
    COCO's, as fractions of 1.
    recall, precision: [R] along the ranking, as fractions of 1. kept: how many of these detections `detect` returns
    with its default threshold.
    """

    name: str
    objects: int
    detections: int
    eleven_point: float
    area: float
    coco: float
    figures: CocoFigures
    recall: np.ndarray
    precision: np.ndarray
    kept: int


@dataclass(frozen=True)
class DetectionEvaluation:
    """What a detector finds in annotated images. Means are over the classes that have objects, in percent.

    threshold: the lowest score that `detect` returns by default; a probability if the detector is calibrated.
    mistakes: of the detections from it on. failed: skipped images by name, and why. notes: what else was skipped or
    suspicious. stages: seconds per stage.
    """

    classes: list[ClassResult]
    overlap: float
    threshold: float
    images: int
    windows: int
    mistakes: Mistakes
    failed: dict[str, str]
    notes: list[str]
    seconds: float
    stages: dict[str, float]

    @property
    def eleven_point(self) -> float:
        """mAP as defined by VOC 2007."""
        return _mean([one.eleven_point for one in self.classes])

    @property
    def area(self) -> float:
        """mAP as defined by VOC 2010 and later."""
        return _mean([one.area for one in self.classes])

    @property
    def figures(self) -> CocoFigures:
        """COCO's twelve figures, means over the classes that have them, as fractions of 1."""
        return coco_means([one.figures for one in self.classes])

    @property
    def coco(self) -> float:
        """mAP as defined by COCO."""
        return _mean([one.coco for one in self.classes])

    @property
    def kept_precision(self) -> float:
        """Percentage of the detections from `threshold` on that are correct, of all classes; NaN without detections."""
        kept = sum(one.kept for one in self.classes)
        return 100 * self._kept_correct / kept if kept else float("nan")

    @property
    def kept_recall(self) -> float:
        """Percentage of the objects that these detections find, of all classes; NaN without objects."""
        objects = sum(one.objects for one in self.classes)
        return 100 * self._kept_correct / objects if objects else float("nan")

    @property
    def _kept_correct(self) -> float:
        return sum(float(one.precision[one.kept - 1]) * one.kept for one in self.classes if one.kept)


def evaluate_detector(
    detector: Detector,
    annotated: AnnotatedImages,
    windows: Mapping[str, np.ndarray] | None = None,
    options: DetectOptions | None = None,
    run: RunOptions | None = None,
    *,
    overlap: float = 0.5,
    describer: Describer | None = None,
    observer: Observer | None = None,
) -> DetectionEvaluation:
    """Detect objects in annotated images and compare, per class. windows: as in `detected`; None: proposed on the fly.
    options: None: `complete_options`.

    An image that cannot be read counts as one where nothing was found, and is reported. Annotated classes that the
    detector does not know are skipped, with a note. overlap: from which a detection is correct, for VOC's figures.
    describer: an existing one for the detector's recipe.
    """
    began = time.perf_counter()
    options = options or complete_options(detector)
    if not 0 < overlap <= 1:
        raise UsageError(f"iou must be above 0 and at most 1, found {overlap!r}")
    notes = list(annotated.notes)
    boxes = {name: sum(one.labels.count(name) for one in annotated.images.values()) for name in annotated.classes}
    for name, number in boxes.items():
        if name not in detector.classes and number:
            notes.append(f"unknown class {name!r}, which the detector was not trained for: {number} boxes skipped")
    if not any(boxes.get(name) for name in detector.classes):
        raise UsageError(f"expected boxes of the detector's classes ({', '.join(detector.classes)}), found none")
    names = list(annotated.images)
    runner = DetectorRunner(detector, run, describer=describer)
    threshold = threshold_for(detector, DetectOptions())
    observer = observer or Observer()
    for note in notes:
        observer.note(note)
    observer.started(todo=len(names), reused=0)
    failed: dict[str, str] = {}
    objects: list[list[Objects]] = [[] for _ in detector.classes]
    kept = [0] * len(detector.classes)
    count = 0
    items = [annotated.item(name) for name in names]
    order: list[int] = []
    for done in detected(runner, items, windows, options):
        name = names[done.position]
        one = annotated.images[name]
        if done.error is not None:
            failed[name] = done.error
        else:
            for note in window_notes(name, done):
                notes.append(note)
                observer.note(note)
        count += done.windows
        order.append(done.position)
        for label, known in enumerate(detector.classes):
            of = np.array([each == known for each in one.labels], bool)
            mine = done.labels == label
            kept[label] += int((done.scores[mine] >= threshold).sum())
            areas = None if one.areas is None else one.areas[of]
            objects[label].append(
                Objects(
                    one.boxes[of],
                    one.difficult[of],
                    one.crowd[of],
                    done.boxes[mine],
                    done.ranks[mine],
                    areas,
                    done.scores[mine],
                )
            )
        observer.row(name, done.error)
    # In the listed order of the images, not the order they came in: of equal scores the first counts first.
    turns = np.argsort(order)
    objects = [[of_class[turn] for turn in turns] for of_class in objects]
    rankings = [rank_detections(of_class, overlap) for of_class in objects]
    return DetectionEvaluation(
        classes=[
            _class_result(known, objects[label], rankings[label], kept[label])
            for label, known in enumerate(detector.classes)
        ],
        overlap=overlap,
        threshold=threshold,
        images=len(names),
        windows=count,
        mistakes=find_mistakes(annotated, detector.classes, objects, rankings, kept, overlap),
        failed={**annotated.problems, **failed},
        notes=notes,
        seconds=time.perf_counter() - began,
        stages=runner.seconds,
    )


def _class_result(name: str, images: list[Objects], ranking: Ranking, kept: int) -> ClassResult:
    targets, objects = ranking.targets, ranking.objects
    hits = targets[targets != 0] > 0
    found = np.cumsum(hits)
    figures = coco_figures(images)
    return ClassResult(
        name=name,
        objects=objects,
        detections=len(targets),
        eleven_point=100 * ranked_average_precision(targets, relevant=objects, method="11-point"),
        area=100 * ranked_average_precision(targets, relevant=objects, method="area"),
        coco=100 * figures.ap,
        figures=figures,
        recall=found / max(objects, 1),
        precision=found / np.arange(1, len(hits) + 1),
        kept=int((targets[:kept] != 0).sum()),
    )


def _mean(values: list[float]) -> float:
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else float("nan")
