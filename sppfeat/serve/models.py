"""A detector and a classifier for the image that is looked at."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from sppfeat.detection import Detections, DetectOptions, DetectorRunner, open_detector
from sppfeat.errors import ImageError
from sppfeat.images import Item
from sppfeat.recipe import RunOptions
from sppfeat.transfer import Classifier, classifier_describer, open_classifier
from sppfeat.windows import propose

if TYPE_CHECKING:
    from sppfeat.extraction import Describer


@dataclass(frozen=True)
class Class:
    """A class and its score for an image."""

    label: str
    score: float


class Models:
    """What was given beside the gallery; networks are loaded on first use. Raises ModelError."""

    def __init__(
        self,
        detector: str | os.PathLike[str] | None,
        classifier: str | os.PathLike[str] | None,
        run_options: RunOptions | None = None,
    ) -> None:
        self.detector = None if detector is None else open_detector(detector)
        self.classifier: Classifier | None = None if classifier is None else open_classifier(classifier)
        self._options = run_options
        self._runner: DetectorRunner | None = None
        self._describer: Describer | None = None
        # Windows are proposed one image at a time: see `propose`.
        self._lock = threading.Lock()

    def detect(self, item: Item, options: DetectOptions | None = None) -> Detections:
        """Objects in an image. Raises ImageError, ModelError, MissingExtraError."""
        assert self.detector is not None
        with self._lock:
            if self._runner is None:
                self._runner = DetectorRunner(self.detector, self._options)
            proposed = propose(item, self.detector.proposals)
        if proposed.error is not None:
            raise ImageError(proposed.error)
        windows = np.asarray(proposed.windows, np.float64)
        (found,) = self._runner.detect([replace(item, windows=windows)], options)
        if found.error is not None:
            raise ImageError(found.error)
        return found

    def classify(self, item: Item) -> list[Class]:
        """The classes of an image, the best first. Raises ImageError, ModelError."""
        assert self.classifier is not None
        with self._lock:
            if self._describer is None:
                self._describer = classifier_describer(self.classifier, self._options)
        (done,) = self._describer.describe([item])
        descriptor, error = done.row()
        if descriptor is None:
            raise ImageError(error or "cannot be described")
        scores = self.classifier.svm.scores(descriptor[None])[0]
        order = np.argsort(-scores, kind="stable")
        return [Class(self.classifier.classes[at], float(scores[at])) for at in order]
