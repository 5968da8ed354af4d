"""The training loop of an SPP-net detector: positives, first negatives, hard negatives, SVMs, box regression,
calibration.

As in R-CNN's code (Girshick et al., CVPR 2014, which SPP-net's follows): ground truth is positive, windows that
overlap it by less than 0.3 are negative, and of these, those that the current SVMs find hard are added, image by image,
until few new ones appear. All classes share the rows, and are solved together.

Calibration (see `sppfeat.detection.calibration`) needs detections in images that the SVMs do not know. For each of
`FOLDS` folds of the images, the SVMs are solved again without the fold's rows. They are excluded from the rows at hand,
so that nothing is copied, and the solution starts from that of all rows. Box regression is fitted again without them,
too, because one that knows an object moves windows onto it better than onto others. One more pass over the images then
detects in each with the models that do not know it. Two biases are left, both small: hard negatives were chosen by SVMs
that knew all images, and the models of folds, of fewer images, are a little worse than the detector.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

import numpy as np

from sppfeat.detection.annotations import AnnotatedImages, Annotation
from sppfeat.detection.calibration import FLOOR, FOLDS, HeldOut
from sppfeat.detection.detecting import DetectOptions, find_in
from sppfeat.detection.detector import Detector
from sppfeat.detection.row_cache import GROUND_TRUTH, Reservoir, RowCache, read_state, save_state
from sppfeat.detection.training_options import TrainingOptions
from sppfeat.errors import ModelError, UsageError
from sppfeat.extraction import Described, Describer
from sppfeat.images import Item
from sppfeat.progress import Observer
from sppfeat.svm import CONVERGED
from sppfeat.svm.solver import SvmProblem, SvmSolution
from sppfeat.windows import ProposalOptions, box_targets, fit_ridge, overlaps

# R-CNN's code (rcnn_train.m): a negative is hard above the first, and dropped once it is easier than the second.
HARD_SCORE: Final = -1.0001
EASY_SCORE: Final = -1.2
# The constant used instead of 1 with scaled descriptors (bias_mult), so that the bias is hardly regularized.
BIAS_FEATURE: Final = 10.0
# Random negatives, before there is a model to find hard ones: about this many in total, at most these per image.
FIRST_NEGATIVES: Final = 8000
FIRST_PER_IMAGE: Final = 50
# Hard negatives per image and pass: the hardest. More from one image add little.
HARD_PER_IMAGE: Final = 100
# Windows per object for box regression.
BOX_ROWS_PER_OBJECT: Final = 20
# Box rows per class; they are solved in double precision, in four times their memory.
MAX_BOX_ROWS: Final = 8000
# Relative gap of the SVMs at the end of a pass, and during it, where they only find negatives.
_TOLERANCE: Final = 1e-4
_ROUGH_TOLERANCE: Final = 1e-2
# A pass that adds less than this fraction of the rows is the last.
FEW_NEW: Final = 0.02
# A training's state is saved at most this often, and saving never takes more than a tenth of the time.
STATE_SECONDS: Final = 30.0


class Trainer:
    """A training in progress. Step 0 gathers positives, box rows and first negatives; later steps, hard negatives.
    Afterwards, calibration gathers detections by the models of the folds."""

    def __init__(
        self,
        annotated: AnnotatedImages,
        windows: Mapping[str, np.ndarray],
        describer: Describer,
        options: TrainingOptions,
        observer: Observer,
        state_path: Path,
    ) -> None:
        self._annotated, self._windows, self._describer = annotated, windows, describer
        self._options, self._observer, self._state_path = options, observer, state_path
        self.notes: list[str] = []
        self.failed: dict[str, str] = {}
        self.positives = annotated.count_positives()
        self.classes = [name for name in annotated.classes if self.positives[name]]
        for name in annotated.classes:
            if not self.positives[name]:
                self._note(f"class {name!r} has no box that counts and is skipped")
        if not self.classes:
            raise UsageError("expected annotated boxes to learn from, found none that count")
        # Random, because images often come class by class, and the first ones form the first model.
        names = list(annotated.images)
        self._names = [names[at] for at in np.random.default_rng(options.seed).permutation(len(names))]
        bare = [name for name in self._names if name not in windows or not len(windows[name])]
        if len(bare) == len(names):
            raise UsageError(f"expected windows of the images, found none; the first image is {names[0]}")
        for name in sorted(bare):
            self._note(f"{name}: has no windows; only its objects are used")
        dim = describer.nearest_dim
        wanted = sum(self.positives.values())
        capacity = min(options.memory // (2 * (dim + 1)), 1 << 22)
        if wanted > capacity // 2:
            needed = 4 * (dim + 1) * wanted
            raise UsageError(
                f"memory for rows must be at least {needed / 1e6:.1f} MB for {wanted} objects, found "
                f"{options.memory / 1e6:.1f} MB"
            )
        self.cache = RowCache(capacity, dim + 1, len(self.classes))
        per_class = max(16, options.memory // 2 // (2 * dim) // len(self.classes))
        self._boxes = (
            Reservoir(min(per_class, MAX_BOX_ROWS), dim, len(self.classes)) if options.box_regression else None
        )
        self._norms = np.zeros(2)  # count and sum
        self._model = np.zeros((len(self.classes), dim + 1), np.float32)
        self._biases = np.zeros(len(self.classes), np.float32)
        self._fresh = 0  # rows since the SVMs were trained
        self._step = 0
        self.hard: list[int] = []
        self._held_out = HeldOut()
        self._folds: list[Detector] = []  # without the images of each fold
        self._calibrating = False
        self.done = np.zeros(len(self._names), bool)
        self.solve_seconds = 0.0
        self._saved_at, self._save_seconds = time.perf_counter(), 0.0
        self._gaps = np.zeros(0)  # relative gaps of the current SVMs
        self._identity = self._fingerprint()

    def forget(self) -> None:
        """Remove the state on disk."""
        self._state_path.unlink(missing_ok=True)

    def train(self, stop: Callable[[], bool]) -> bool:
        """Run all passes; false if stopped before the end, with the state on disk."""
        self._restore()
        if not self._calibrating:
            if not self._gather(stop):
                return False
            if not self._options.calibration:
                return True
            self._calibrating = True
            self.done[:] = False
        # Not in the state: trained again from the same rows, they are the same.
        self._folds = self._fold_detectors()
        self._observer.stage("calibration, detecting in each image by SVMs that were trained without it")
        if not self._pass(stop, self._take_held_out):
            self._save()
            return False
        return True

    def _gather(self, stop: Callable[[], bool]) -> bool:
        """Gather the rows, and train the SVMs; false if stopped before the end, with the state on disk."""
        while self._step <= self._options.passes:
            if self._step and len(self.hard) < self._step:
                self.hard.append(0)
            self._observer.stage(f"pass {self._step}, hard negatives" if self._step else "objects and first negatives")
            if not self._pass(stop, self._take):
                self._save()
                return False
            if self._step == 0:
                self._drop_classes()
                self._set_bias_feature()
                self._solve(_TOLERANCE)
            else:
                added = self.hard[-1]
                if self._fresh:
                    self._solve(_TOLERANCE)
                self._observer.say(
                    f"pass {self._step}: {added} hard negatives added, easy ones dropped: {self.cache.count} rows "
                    f"left; SVMs solved in {self.solve_seconds:.1f} s so far"
                )
                if added <= FEW_NEW * self.cache.count:
                    break
            self._step += 1
            self.done[:] = False
            self._save_now_and_then()
        for name, gap in zip(self.classes, self._gaps, strict=False):  # none after a restart with nothing left to solve
            if gap > CONVERGED:
                self._note(f"class {name!r}: its SVM did not converge (relative gap {gap:.0e})")
        return True

    def detector(self, proposals: ProposalOptions) -> Detector:
        """The detector, after `train`. Weights are for descriptors as pooled."""
        calibration = self._held_out.calibration(self.classes) if self._options.calibration else None
        if self._options.calibration and calibration is None:
            self._note(
                "scores stay SVM scores: for probabilities, expected detections in images that were held out, correct "
                "ones with higher scores than others"
            )
        detector = self._detector(self._model, self._biases, None)
        return replace(
            detector,
            calibration=calibration,
            proposals=proposals,
            training={
                **asdict(self._options),
                "images": len(self._names),
                "failed": len(self.failed),
                "positives": self.positives,
                "rows": self.cache.count,
                "hard": self.hard,
                "mean_norm_before": float(self._norms[1] / self._norms[0]),
            },
        )

    def _detector(self, model: np.ndarray, biases: np.ndarray, without: int | None) -> Detector:
        """SVMs [K, D+1], with biases [K], as a detector, with box regression fitted without the images of a fold."""
        box_weights = box_biases = None
        if self._boxes is not None:
            start = time.perf_counter()
            box_weights = np.zeros((len(self.classes), 4, model.shape[1] - 1), np.float32)
            box_biases = np.zeros((len(self.classes), 4), np.float32)
            for label in range(len(self.classes)):
                rows, targets = self._boxes.of(label)
                if without is not None:
                    kept = self._boxes.images_of(label) % FOLDS != without
                    rows, targets = rows[kept], targets[kept]
                if len(rows):
                    # The penalty is for scaled descriptors; scaling it instead of the rows saves a copy of them.
                    ridge = self._options.box_ridge / self._factor**2
                    box_weights[label], box_biases[label] = fit_ridge(rows, targets, ridge)
            self.solve_seconds += time.perf_counter() - start
        return Detector(
            recipe=self._describer.recipe,
            weights_sha256=self._describer.weights_sha256,
            classes=self.classes,
            weights=np.ascontiguousarray(model[:, :-1]),
            biases=biases + model[:, -1] * np.float32(BIAS_FEATURE / self._factor),
            box_weights=box_weights,
            box_biases=box_biases,
            proposals=ProposalOptions(),
            training={},
            versions={},
        )

    def _fold_detectors(self) -> list[Detector]:
        """A detector for each fold, trained without its images: every `FOLDS`-th one, in the random order of training.

        A class without a positive elsewhere has a bias of minus infinity, and so detects nothing.
        """
        folds = []
        problem = SvmProblem(self.cache.rows, device=str(self._describer.device))
        for fold in range(FOLDS):
            start = time.perf_counter()
            targets = np.where(self.cache.origin[:, :1] % FOLDS == fold, np.int8(0), self.cache.targets)
            svm = problem.svm(self._solution(problem, targets, _TOLERANCE), np.arange(len(self.classes)))
            self.solve_seconds += time.perf_counter() - start
            folds.append(self._detector(svm.weights.astype(np.float32), svm.biases.astype(np.float32), fold))
        return folds

    @property
    def _factor(self) -> float:
        """The factor that scales descriptors to the mean norm."""
        return self._options.mean_norm / max(float(self._norms[1] / max(self._norms[0], 1)), 1e-12)

    def _pass(self, stop: Callable[[], bool], take: Callable[[int, Annotation, Described], None]) -> bool:
        """Process the images that are not done in this step; false if stopped."""
        todo = [at for at in range(len(self._names)) if not self.done[at] and self._names[at] not in self.failed]
        self._observer.started(todo=len(todo), reused=int(self.done.sum()))
        for done in self._describer.describe(self._items(todo), scales="nearest", stop=stop):
            at = todo[done.position]
            name = self._names[at]
            if done.rows is None:
                self.failed[name] = done.error or ""
            else:
                take(at, self._annotated.images[name], done)
            self.done[at] = True
            self._observer.row(name, done.error)
            self._save_now_and_then()
        return bool(self.done[todo].all())

    def _items(self, todo: list[int]) -> Iterator[Item]:
        for at in todo:
            name = self._names[at]
            boxes = self._annotated.images[name].boxes if self._step == 0 else np.zeros((0, 4))
            yield self._annotated.item(name, np.concatenate([boxes, self._proposed(name)]))

    def _proposed(self, name: str) -> np.ndarray:
        return np.asarray(self._windows[name], np.float64) if name in self._windows else np.zeros((0, 4))

    def _take(self, at: int, annotation: Annotation, done: Described) -> None:
        assert done.rows is not None
        name = self._names[at]
        windows = self._proposed(name)
        good = np.ones(len(done.rows), bool)
        good[list(done.row_errors)] = False
        objects = len(annotation.boxes) if self._step == 0 else 0
        if self._step == 0 and not good.all():
            reason = next(iter(done.row_errors.values()))
            self._note(f"{name}: windows skipped: {int((~good).sum())}; the first {reason}")
        labels = np.array([self.classes.index(x) if x in self.classes else -1 for x in annotation.labels], int)
        overlap = overlaps(windows, annotation.boxes)
        # A window on one object of a crowd is not a negative, however little of the crowd it holds.
        touched = overlaps(windows, annotation.boxes, crowd=annotation.crowd)
        targets = np.zeros((len(windows), len(self.classes)), np.int8)
        for label in range(len(self.classes)):
            touching = touched[:, labels == label].max(1, initial=0)
            targets[touching < self._options.negative_overlap, label] = -1
        targets[~good[objects:]] = 0
        descriptors = done.rows[objects:]
        if self._step == 0:
            generator = np.random.default_rng([self._options.seed, at])
            self._take_objects(at, annotation, labels, done.rows[:objects], good[:objects])
            self._take_first(at, descriptors, targets, generator)
            self._take_boxes(at, annotation, labels, overlap, windows, good, done.rows, generator)
        else:
            self._take_hard(at, descriptors, targets)

    def _take_objects(
        self, at: int, annotation: Annotation, labels: np.ndarray, rows: np.ndarray, good: np.ndarray
    ) -> None:
        chosen = np.flatnonzero(~annotation.difficult & good & (labels >= 0))
        targets = np.zeros((len(chosen), len(self.classes)), np.int8)
        targets[np.arange(len(chosen)), labels[chosen]] = 1
        for row, number in enumerate(chosen):
            # An object of one class is a negative of the others, as a window there would be.
            apart = overlaps(annotation.boxes[number : number + 1], annotation.boxes, crowd=annotation.crowd)[0]
            for label in range(len(self.classes)):
                if apart[labels == label].max(initial=0) < self._options.negative_overlap:
                    targets[row, label] = -1
        self._add(rows[chosen], targets, at, np.full(len(chosen), GROUND_TRUTH))
        norms = np.linalg.norm(rows[chosen], axis=1)
        self._norms += [len(norms), norms.sum()]

    def _take_first(self, at: int, rows: np.ndarray, targets: np.ndarray, generator: np.random.Generator) -> None:
        wanted = int(np.clip(FIRST_NEGATIVES // len(self._names), 2, FIRST_PER_IMAGE))
        room = self.cache.capacity - sum(self.positives.values()) - self.cache.count
        negative = np.flatnonzero((targets == -1).any(1))
        chosen = generator.permutation(negative)[: min(wanted, max(0, room // 2))]
        self._add(rows[chosen], targets[chosen], at, chosen)
        norms = np.linalg.norm(rows[chosen], axis=1)
        self._norms += [len(norms), norms.sum()]

    def _take_boxes(
        self,
        at: int,
        annotation: Annotation,
        labels: np.ndarray,
        overlap: np.ndarray,
        windows: np.ndarray,
        good: np.ndarray,
        descriptors: np.ndarray,
        generator: np.random.Generator,
    ) -> None:
        if self._boxes is None or not len(labels):
            return
        # Objects precede the windows, each its own best window.
        both = np.concatenate([overlaps(annotation.boxes, annotation.boxes), overlap])
        places = np.concatenate([annotation.boxes, windows])
        nearest = both.argmax(1)
        close = good & (both.max(1) >= self._options.box_overlap)
        for number in np.flatnonzero(~annotation.difficult & (labels >= 0)):
            near = generator.permutation(np.flatnonzero(close & (nearest == number)))[:BOX_ROWS_PER_OBJECT]
            targets = box_targets(places[near], np.repeat(annotation.boxes[number : number + 1], len(near), 0))
            self._boxes.offer(int(labels[number]), descriptors[near], targets, at, generator)

    def _take_hard(self, at: int, rows: np.ndarray, targets: np.ndarray) -> None:
        scores = rows @ self._model[:, :-1].T + (self._biases + self._model[:, -1] * (BIAS_FEATURE / self._factor))
        hardness = np.where(targets == -1, scores, -np.inf).max(1, initial=-np.inf)
        hard = self.cache.unknown(at, np.flatnonzero(hardness > HARD_SCORE))
        if not len(hard):
            return
        hard = hard[np.argsort(-hardness[hard], kind="stable")[:HARD_PER_IMAGE]]
        if len(hard) > self.cache.free:
            self._solve(_ROUGH_TOLERANCE)
            self._make_room(len(hard))
            hard = hard[: self.cache.free]
        self._add(rows[hard], targets[hard], at, hard)
        self.hard[-1] += len(hard)
        # Later on, each training costs more and changes less.
        if self._fresh >= max(2000, self.cache.count // 3):
            self._solve(_ROUGH_TOLERANCE)

    def _take_held_out(self, at: int, annotation: Annotation, done: Described) -> None:
        assert done.rows is not None
        windows = self._proposed(self._names[at])
        good = np.setdiff1d(np.arange(len(windows)), list(done.row_errors))
        options = DetectOptions(threshold=FLOOR)
        found = find_in(self._folds[at % FOLDS], done.rows[good], windows[good], done.image_size, options)
        self._held_out.add(at, annotation, self.classes, found.labels, found.scores, found.boxes)

    def _add(self, rows: np.ndarray, targets: np.ndarray, at: int, windows: np.ndarray) -> None:
        constant = 0.0 if self._step == 0 else BIAS_FEATURE / self._factor
        self.cache.add(np.concatenate([rows, np.full((len(rows), 1), constant)], 1), targets, at, windows)
        self._fresh += len(rows)

    def _drop_classes(self) -> None:
        """Drop the classes without rows: their images, or all their windows, may be unusable."""
        kept = [bool((column == 1).any() and (column == -1).any()) for column in self.cache.targets.T]
        for name, (column, keep) in zip(list(self.classes), zip(self.cache.targets.T, kept, strict=True), strict=True):
            if not keep:
                kind = "negative window" if (column == 1).any() else "object on a readable image"
                self._note(f"class {name!r} has no {kind} and is skipped")
        if not any(kept):
            raise UsageError("expected objects and negative windows of a class, found none on readable images")
        self._keep_classes([name for name, keep in zip(self.classes, kept, strict=True) if keep])

    def _keep_classes(self, classes: list[str]) -> None:
        kept = np.array([name in classes for name in self.classes], bool)
        if kept.all():
            return
        self.cache.keep_classes(kept)
        if self._boxes is not None:
            self._boxes.keep_classes(kept)
        self._model, self._biases = self._model[kept], self._biases[kept]
        self.classes = classes

    def _set_bias_feature(self) -> None:
        self.cache.rows[:, -1] = BIAS_FEATURE / self._factor

    def _solve(self, tolerance: float) -> None:
        """Train the SVMs on all rows, starting from the current ones, and drop negatives that have become easy."""
        start = time.perf_counter()
        targets = self.cache.targets
        problem = SvmProblem(self.cache.rows, device=str(self._describer.device))
        solution = self._solution(problem, targets, tolerance)
        self._gaps = solution.gaps
        svm = problem.svm(solution, np.arange(len(self.classes)))
        self._model, self._biases = svm.weights.astype(np.float32), svm.biases.astype(np.float32)
        scores = problem.scores(solution)
        self._fresh = 0
        hardness = np.where(targets == -1, scores, -np.inf).max(1)
        self.cache.keep((targets == 1).any(1) | (hardness >= EASY_SCORE))
        self.solve_seconds += time.perf_counter() - start

    def _solution(self, problem: SvmProblem, targets: np.ndarray, tolerance: float) -> SvmSolution:
        """The SVMs of the cache's rows with targets [N, K], starting from the current ones."""
        return problem.solve(
            targets,
            # Scaling the cost by f squared is the same as scaling the rows by f, and saves a copy of them.
            c=self._options.c * self._factor**2,
            positive_weight=self._options.positive_weight,
            start=(self._model, self._biases),
            tolerance=tolerance,
        )

    def _make_room(self, wanted: int) -> None:
        """Drop the easiest negatives, a quarter of the rows, if dropping easy ones was not enough."""
        if self.cache.free < wanted:
            self.cache.drop_easiest(self._model, self._biases)

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self._observer.note(text)

    def _fingerprint(self) -> str:
        """What must be the same to resume a stopped training."""
        digest = hashlib.sha256()
        recipe, options = self._describer.recipe, asdict(self._options)
        digest.update(recipe.identity(self._describer.weights_sha256).encode())
        digest.update(json.dumps([options, self.classes, self._annotated.root]).encode())
        for name in self._names:
            one = self._annotated.images[name]
            digest.update(f"{name}\n{one.labels}\n".encode("utf-8", "surrogateescape"))
            for values in (one.boxes, one.difficult, self._proposed(name)):
                digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def _save_now_and_then(self) -> None:
        if time.perf_counter() - self._saved_at >= max(STATE_SECONDS, 10 * self._save_seconds):
            self._save()

    def _save(self) -> None:
        start = time.perf_counter()
        arrays = {f"cache_{key}": value for key, value in self.cache.state().items()}
        if self._boxes is not None:
            arrays |= {f"boxes_{key}": value for key, value in self._boxes.state().items()}
        if self._calibrating:
            arrays["held_out"] = self._held_out.state()
        arrays |= {"model": self._model, "biases": self._biases, "norms": self._norms, "done": self.done}
        values = {"step": self._step, "fresh": self._fresh, "classes": self.classes}
        values |= {"hard": self.hard, "failed": self.failed, "notes": self.notes}
        save_state(self._state_path, self._identity, arrays, values)
        self._saved_at = time.perf_counter()
        self._save_seconds = self._saved_at - start

    def _restore(self) -> None:
        found = read_state(self._state_path, self._identity)
        if found is None:
            return
        arrays, values = found
        try:
            self._keep_classes(list(values["classes"]))
            self.notes = list(values["notes"])
            self.cache.restore({key: arrays[f"cache_{key}"] for key in ("rows", "targets", "origin")})
            if self._boxes is not None:
                self._boxes.restore({key: arrays[f"boxes_{key}"] for key in ("offered", "rows", "targets", "images")})
            self._model, self._biases = arrays["model"], arrays["biases"]
            self._norms, self.done = arrays["norms"], arrays["done"].astype(bool)
            self._calibrating = "held_out" in arrays
            if self._calibrating:
                self._held_out.restore(arrays["held_out"])
            self._step, self._fresh = int(values["step"]), int(values["fresh"])
            self.hard, self.failed = list(values["hard"]), dict(values["failed"])
        except (KeyError, ValueError, TypeError) as error:
            raise ModelError(f"{self._state_path}: {error}; --overwrite starts over") from None
