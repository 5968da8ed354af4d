"""SPP-net detection: one feature map per image and scale, every window pooled from it, linear scores, boxes.

Source: He, Zhang, Ren, Sun, "Spatial Pyramid Pooling in Deep Convolutional Networks for Visual Recognition", ECCV 2014
(arXiv:1406.4729), section 4.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np

from sppfeat.detection.detector import Detector
from sppfeat.errors import ModelError, UsageError, near_fraction
from sppfeat.extraction import Describer
from sppfeat.images import ImageList, Item, find_images, no_images
from sppfeat.machine import available_cores
from sppfeat.progress import Observer
from sppfeat.recipe import RunOptions, short_sha
from sppfeat.windows import Proposer, moved_boxes, suppress, voted_boxes

# Without a threshold, detections of calibrated detectors are returned from this probability on, those of others from
# this SVM score on. The sum of F1 on held-out images of an easy and a hard set is highest there, see
# benchmarks/results/detection.md.
DEFAULT_PROBABILITY: Final = 0.25
DEFAULT_SCORE: Final = -0.5
# Detections of one class in one image that go to suppression: more never survive it, and it is quadratic.
MAX_BEFORE_SUPPRESSION: Final = 400
# Boxes vote on detections that they overlap by more than this, as in the paper; 0.6 and 0.7 are worse, see
# benchmarks/results/detection.md.
VOTING_OVERLAP: Final = 0.5


@dataclass(frozen=True, kw_only=True)
class DetectOptions:
    """Which detections are returned.

    threshold: lowest score: a probability from 0 to 1 if the detector is calibrated, else an SVM score, where 0
    separates objects from the far more numerous other windows, so that most objects score below it. None:
    `DEFAULT_PROBABILITY` or `DEFAULT_SCORE`.
    nms: non-maximum suppression, the overlap above which the lower-scored of two detections of a class is dropped.
    max_detections: the most per class and image; the best are kept.
    voting: each detection becomes the mean, by score, of the boxes of its class that overlap it by more than half,
    those that suppression drops and those below the threshold among them (`voted_boxes`).
    """

    threshold: float | None = None
    nms: float = 0.3
    max_detections: int = 100
    voting: bool = True

    def __post_init__(self) -> None:
        if self.threshold is not None and np.isnan(self.threshold):
            raise UsageError("threshold must be a number, found NaN")
        if not 0 <= self.nms <= 1:
            raise UsageError(f"nms must be a number from 0 to 1, found {self.nms!r}")
        if isinstance(self.max_detections, bool) or not 1 <= self.max_detections <= MAX_BEFORE_SUPPRESSION:
            raise UsageError(
                f"max_detections must be a whole number from 1 to {MAX_BEFORE_SUPPRESSION}, "
                f"found {self.max_detections!r}"
            )


def threshold_for(detector: Detector, options: DetectOptions) -> float:
    """The lowest score of a detector's detections. Raises UsageError if it is not a probability, but has to be one."""
    if not detector.probable:
        return DEFAULT_SCORE if options.threshold is None else options.threshold
    threshold = DEFAULT_PROBABILITY if options.threshold is None else options.threshold
    if not 0 <= threshold <= 1:
        raise UsageError(
            "threshold must be a probability from 0 to 1, because the detector's scores are calibrated: the "
            f"probability that a detection is correct; found {threshold:g}{near_fraction(threshold)}"
        )
    return threshold


class Found(NamedTuple):
    """Detections, or candidates, of one image; see `Detections`."""

    labels: np.ndarray
    scores: np.ndarray
    ranks: np.ndarray
    boxes: np.ndarray

    def at(self, chosen: np.ndarray) -> Found:
        return Found(*(values[chosen] for values in self))


class Detections(NamedTuple):
    """The detections in one image, the best first, or why it could not be searched.

    labels: [n] class numbers. scores: [n] float64, the probabilities that the detections are correct, or the SVM scores
    of a detector that is not calibrated. ranks: [n] float64, what orders the detections of a class: as `scores` do, but
    without equal ones where probabilities round to 1. boxes: [n, 4] float64 windows inside the image.
    windows: how many were scored. left_out: how many extend outside the image, or could not be described.
    position: of the image among those given.
    """

    position: int
    labels: np.ndarray
    scores: np.ndarray
    ranks: np.ndarray
    boxes: np.ndarray
    image_size: tuple[int, int]
    windows: int
    left_out: int
    error: str | None


class DetectorRunner:
    """A detector with its network loaded. Raises ModelError if the network is not the one it was trained with.

    describer: an existing one for the detector's recipe.
    seconds: of work per stage (windows, if they are proposed, decode, forward, pool, score, suppress), summed over
    threads and processes; pool is part of forward. proposing_seconds: those of the windows.
    """

    def __init__(
        self, detector: Detector, options: RunOptions | None = None, *, describer: Describer | None = None
    ) -> None:
        self.detector = detector
        self._describer = describer or Describer(detector.recipe, options)
        self.device = self._describer.device
        if self._describer.weights_sha256 != detector.weights_sha256:
            raise ModelError(
                f"the detector was trained with other weights of {detector.recipe.backbone}: expected sha256 "
                f"{short_sha(detector.weights_sha256)}, found {short_sha(self._describer.weights_sha256)}"
            )
        dim = self._describer.nearest_dim
        if detector.weights.shape[1] != dim:
            raise ModelError(f"the detector expects descriptors of {detector.weights.shape[1]} values, found {dim}")
        self._score_seconds = self._suppress_seconds = self.proposing_seconds = 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of work per stage."""
        times = self._describer.times
        proposing = {"windows": self.proposing_seconds} if self.proposing_seconds else {}
        return proposing | {
            "decode": times.decode,
            "forward": times.forward,
            "pool": times.pool,
            "score": self._score_seconds,
            "suppress": self._suppress_seconds,
        }

    def detect(
        self,
        items: Iterable[Item],
        options: DetectOptions | None = None,
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[Detections]:
        """Detect objects in the windows of every item, roughly in order.

        Windows that extend outside their image are skipped. An image that cannot be read comes with the reason.
        Raises UsageError, see `threshold_for`.
        """
        options = options or DetectOptions()
        threshold_for(self.detector, options)
        windows_of: dict[int, np.ndarray] = {}

        def remembered() -> Iterator[Item]:
            for position, item in enumerate(items):
                windows_of[position] = np.zeros((0, 4)) if item.windows is None else item.windows
                yield replace(item, windows=windows_of[position])

        for done in self._describer.describe(remembered(), scales="nearest", stop=stop):
            windows = windows_of.pop(done.position)
            if done.rows is None:
                nothing = Found(np.zeros(0, np.int64), np.zeros(0), np.zeros(0), np.zeros((0, 4)))
                yield Detections(done.position, *nothing, done.image_size, 0, 0, done.error)
                continue
            good = np.setdiff1d(np.arange(len(windows)), list(done.row_errors))
            found = self._found(done.rows[good], windows[good], done.image_size, options)
            yield Detections(done.position, *found, done.image_size, len(good), len(windows) - len(good), None)

    def _found(
        self, descriptors: np.ndarray, windows: np.ndarray, size: tuple[int, int], options: DetectOptions
    ) -> Found:
        start = time.perf_counter()
        candidates = _candidates(self.detector, descriptors, windows, size, options)
        middle = time.perf_counter()
        found = _detections(self.detector, candidates, options)
        self._score_seconds += middle - start
        self._suppress_seconds += time.perf_counter() - middle
        return found


def find_in(
    detector: Detector, descriptors: np.ndarray, windows: np.ndarray, size: tuple[int, int], options: DetectOptions
) -> Found:
    """What is detected in windows [K, 4] with descriptors [K, D], the best first. size: width, height of the image."""
    return _detections(detector, _candidates(detector, descriptors, windows, size, options), options)


def _candidates(
    detector: Detector, descriptors: np.ndarray, windows: np.ndarray, size: tuple[int, int], options: DetectOptions
) -> Found:
    """The windows [K, 4] with descriptors [K, D] that go to suppression, the best of each class first: those that reach
    the threshold and, of a class with such a one, those that vote."""
    threshold = threshold_for(detector, options)
    raw, scores = detector.scores(descriptors)
    labels, chosen, boxes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros((0, 4))]
    for label in range(len(detector.classes)):
        reaching = np.flatnonzero(scores[:, label] >= threshold)
        if not len(reaching):
            continue
        wanted = np.flatnonzero(detector.votes(raw[:, label], scores[:, label]) > 0) if options.voting else reaching
        wanted = np.union1d(wanted, reaching)
        # Probabilities of very high scores are equal, and are then ranked by the scores: suppression keeps this order.
        best = wanted[np.argsort(-raw[wanted, label], kind="stable")[:MAX_BEFORE_SUPPRESSION]]
        labels.append(np.full(len(best), label))
        chosen.append(best)
        if detector.box_weights is None or detector.box_biases is None:
            boxes.append(windows[best])
        else:
            moves = descriptors[best] @ detector.box_weights[label].T + detector.box_biases[label]
            boxes.append(moved_boxes(windows[best], moves, size))
    rows, of = np.concatenate(chosen), np.concatenate(labels)
    return Found(of, scores[rows, of], raw[rows, of], np.concatenate(boxes))


def _detections(detector: Detector, candidates: Found, options: DetectOptions) -> Found:
    """What suppression and the threshold leave of the candidates, the best first, moved by their votes."""
    reaching = candidates.at(np.flatnonzero(candidates.scores >= threshold_for(detector, options)))
    found = reaching.at(suppress(reaching.boxes, reaching.scores, reaching.labels, options.nms))
    # Each class keeps its best detections, whatever the others score.
    found = found.at(np.flatnonzero(_ranks(found.labels) < options.max_detections))
    if options.voting:
        votes = detector.votes(candidates.ranks, candidates.scores)
        for label in np.unique(found.labels):
            mine, voters = found.labels == label, candidates.labels == label
            found.boxes[mine] = voted_boxes(found.boxes[mine], candidates.boxes[voters], votes[voters], VOTING_OVERLAP)
    return found


def _ranks(labels: np.ndarray) -> np.ndarray:
    """[N] how many earlier ones have the same label."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - np.searchsorted(ordered, ordered)
    return ranks


def detected(
    runner: DetectorRunner,
    items: Sequence[Item],
    windows: Mapping[str, np.ndarray] | None,
    options: DetectOptions | None = None,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Detections]:
    """Detect objects in images. windows: [K, 4] by name; an image that is not listed has none.

    None: windows are proposed on the fly, like those that the detector was trained with, by one process per core; see
    `Proposer` for what that requires of a script.
    """
    if windows is not None:
        none = np.zeros((0, 4))
        given = (replace(item, windows=np.asarray(windows.get(item.name, none), np.float64)) for item in items)
        yield from runner.detect(given, options, stop=stop)
        return
    with Proposer(runner.detector.proposals, workers=available_cores()) as proposer:
        reasons: dict[int, str] = {}

        def proposed() -> Iterator[Item]:
            for position, (item, one) in enumerate(proposer.stream(items, stop=stop)):
                runner.proposing_seconds += one.seconds
                if one.error is not None:
                    reasons[position] = one.error
                yield replace(item, windows=np.asarray(one.windows, np.float64))

        for done in runner.detect(proposed(), options):
            yield done._replace(error=done.error or reasons.pop(done.position, None))


@dataclass(frozen=True)
class Detecting:
    """What a run of `detect_images` did.

    images: listed. searched: in this run. bare: those of them without windows. failed: those that could not be
    searched, by name, and why. notes: images without windows, or with some outside the image. stages: seconds of work
    per stage, summed over threads and processes.
    """

    images: int
    searched: int
    bare: int
    found: int
    failed: dict[str, str]
    notes: list[str]
    seconds: float
    device: str
    stages: dict[str, float]


class DetectionObserver(Observer):
    """Receives the results of `detect_images` as they come."""

    def listed(self, images: ImageList) -> None:
        """The images are known, and nothing is done yet; raise here if their results cannot be taken."""

    def found(self, item: Item, found: Detections) -> None:
        """The detections in an image; called before its `row`."""


def detect_images(
    detector: Detector,
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    windows: Mapping[str, np.ndarray] | None = None,
    options: DetectOptions | None = None,
    run: RunOptions | None = None,
    *,
    weights: str | None = None,
    root: str | None = None,
    observer: DetectionObserver | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Detecting:
    """Detect objects in the images of folders, files or lists (see `find_images`); the observer gets the results.

    Write a class of your own after `DetectionObserver`, whose `found` is called with the detections in each image.

    windows: as in `detected`, by names. root: what names are relative to; None: the folder that holds all images.
    weights: where the network's weights are now, if they moved. Raises UsageError, ModelError, and what
    `Describer` raises. An image that cannot be read is reported, not raised.
    """
    began = time.perf_counter()
    observer = observer or DetectionObserver()
    threshold_for(detector, options or DetectOptions())
    several = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    images = find_images(several, root=root)
    if not images.items:
        raise UsageError(no_images(several))
    if windows is not None and not set(windows) & set(images.names):
        raise UsageError(
            f"the windows match none of the {len(images.items)} images below {images.root}: expected names such as "
            f"{images.names[0]!r}, found {next(iter(windows), '')!r}"
        )
    observer.listed(images)
    recipe = detector.recipe if weights is None else replace(detector.recipe, weights=weights)
    runner = DetectorRunner(detector, describer=Describer(recipe, run))
    failed: dict[str, str] = {}
    notes: list[str] = []
    count = searched = bare = 0
    observer.started(todo=len(images.items), reused=0)
    for done in detected(runner, images.items, windows, options, stop=stop):
        item = images.items[done.position]
        if done.error is not None:
            failed[item.name] = done.error
        else:
            searched += 1
            bare += not done.windows
            count += len(done.scores)
            notes += window_notes(item.name, done)
            observer.found(item, done)
        observer.row(item.name, done.error)
    return Detecting(
        images=len(images.items),
        searched=searched,
        bare=bare,
        found=count,
        failed=failed,
        notes=sorted(notes),
        seconds=time.perf_counter() - began,
        device=str(runner.device),
        stages=runner.seconds,
    )


def window_notes(name: str, done: Detections) -> list[str]:
    """What is suspicious about the windows of a searched image."""
    notes = []
    if done.left_out:
        notes.append(f"{name}: windows that reach outside the image are skipped: {done.left_out}")
    if not done.windows:
        notes.append(f"{name}: has no windows")
    return notes
