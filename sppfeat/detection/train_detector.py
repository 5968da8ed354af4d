"""Training of SPP-net detectors, from annotated images to the detector's file; `training_rounds` does the work."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sppfeat.detection.annotations import AnnotatedImages
from sppfeat.detection.detector import detection_recipe, save_detector
from sppfeat.detection.training_options import TrainingOptions
from sppfeat.detection.training_rounds import Trainer
from sppfeat.errors import ModelError, UsageError
from sppfeat.extraction import Describer
from sppfeat.files import DETECTOR, check_new_file
from sppfeat.progress import Observer
from sppfeat.recipe import Recipe, RunOptions
from sppfeat.store import lock_store
from sppfeat.windows import ProposalOptions, WindowFile, open_windows, propose_folder

__all__ = ["Training", "TrainingOptions", "train_detector"]


@dataclass(frozen=True)
class Training:
    """What a run of `train_detector` did.

    file: the detector; None after an interruption, if there is none yet. positives: by class. rows: of the last
    training. hard: negatives that each pass added. failed: unusable images by name. notes: what else was
    skipped or suspicious. pending: remaining images of the current pass, after an interruption.
    """

    file: str | None
    images: int
    classes: list[str]
    positives: dict[str, int]
    rows: int
    hard: list[int]
    failed: dict[str, str]
    notes: list[str]
    pending: int
    seconds: float
    device: str
    stages: dict[str, float]

    @property
    def interrupted(self) -> bool:
        return self.pending > 0


def train_detector(
    annotated: AnnotatedImages,
    windows: Mapping[str, np.ndarray] | None,
    output: str | os.PathLike[str],
    recipe: Recipe | None = None,
    options: TrainingOptions | None = None,
    run: RunOptions | None = None,
    *,
    proposals: ProposalOptions | None = None,
    describer: Describer | None = None,
    overwrite: bool = False,
    observer: Observer | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Training:
    """Train a detector on annotated images with windows [K, 4] by image name, into the file `output`.

    windows: None: they are proposed first, and kept beside the output, `det.windows.h5` for `det.h5`.
    After `stop` or a kill, the same call resumes from the file `.OUTPUT.training` beside the output: at the same
    image after a stop, at most half a minute earlier after a kill; it ends in the same detector. Classes without a
    positive are skipped, with a note; so are windows outside their image. Memory is bounded by the options.
    proposals: how the windows were, or are to be, found; kept for detecting. None: as in the windows file.
    describer: an existing one; then its recipe is used.
    Raises ModelError, UsageError, and what `Describer` raises.
    """
    began = time.perf_counter()
    options, observer = options or TrainingOptions(), observer or Observer()
    path = Path(os.path.realpath(output)) if os.path.islink(output) else Path(output)
    state = path.with_name(f".{path.name}.training")
    # A stopped training already has permission to replace its output.
    check_new_file(path, overwrite=overwrite or os.path.exists(state), error=ModelError, kind=DETECTOR)
    with lock_store(path):
        describer = describer or Describer(recipe or detection_recipe(), run)
        if describer.recipe.dtype != "float32" or describer.recipe.fuse == "concat":
            raise UsageError("a detector needs dtype 'float32', and a fuse other than 'concat'")
        if windows is None:
            windows = windows_beside(path, annotated, proposals, observer, stop)
            if windows is None:
                return _stopped_before(annotated, describer, time.perf_counter() - began)
        if isinstance(windows, WindowFile):
            proposals = proposals or windows.options
        trainer = Trainer(annotated, windows, describer, options, observer, state)
        if overwrite:
            trainer.forget()
        finished = trainer.train(stop)
        if finished:
            detector = trainer.detector(proposals or ProposalOptions())
            save_detector(detector, path)
            trainer.forget()
    return Training(
        file=str(path) if finished else None,
        images=len(annotated.images),
        classes=trainer.classes,
        positives=trainer.positives,
        rows=trainer.cache.count,
        hard=trainer.hard,
        failed={**annotated.problems, **trainer.failed},
        notes=[*annotated.notes, *trainer.notes],
        pending=0 if finished else max(1, int((~trainer.done).sum())),
        seconds=time.perf_counter() - began,
        device=str(describer.device),
        stages={
            **{k: getattr(describer.times, k) for k in ("decode", "forward", "pool")},
            "solve": trainer.solve_seconds,
        },
    )


def windows_beside(
    output: Path,
    annotated: AnnotatedImages,
    options: ProposalOptions | None,
    observer: Observer,
    stop: Callable[[], bool],
) -> WindowFile | None:
    """Windows of annotated images, proposed into a file beside the output or read from there; None when stopped."""
    path = output.with_suffix(".windows.h5")
    sources = [annotated.item(name).path for name in annotated.images]
    observer.say(f"windows are proposed first, and kept in {path}")
    observer.stage("windows")
    done = propose_folder(sources, path, options, root=annotated.root, observer=observer, stop=stop)
    observer.stage("")
    return None if done.pending else open_windows(path)


def _stopped_before(annotated: AnnotatedImages, describer: Describer, seconds: float) -> Training:
    return Training(
        file=None,
        images=len(annotated.images),
        classes=annotated.classes,
        positives=annotated.count_positives(),
        rows=0,
        hard=[],
        failed=annotated.problems,
        notes=annotated.notes,
        pending=len(annotated.images),
        seconds=seconds,
        device=str(describer.device),
        stages={},
    )
