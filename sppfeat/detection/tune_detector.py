"""Training of detectors whose network is tuned with them, as Fast R-CNN's; `window_learning` says what is learned."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sppfeat._version import __version__
from sppfeat.backbones import Network
from sppfeat.backbones.backbone import load_trunk, weights_sha256
from sppfeat.detection.annotations import AnnotatedImages
from sppfeat.detection.detector import detection_recipe, save_detector
from sppfeat.detection.train_detector import windows_beside
from sppfeat.detection.window_learning import WindowLearner
from sppfeat.engines import resolve_device
from sppfeat.errors import ModelError, UsageError
from sppfeat.files import DETECTOR, cache_key, check_new_file
from sppfeat.progress import Observer
from sppfeat.recipe import Recipe
from sppfeat.store import lock_store
from sppfeat.training import Epoch, LearningOptions
from sppfeat.training.learning import learn
from sppfeat.training.weights import check_weights_file, save_tensors
from sppfeat.windows import ProposalOptions, WindowFile

# Images whose windows tell how long descriptors are.
_MEASURED = 8


@dataclass(frozen=True)
class TunedDetector:
    """What a run of `tune_detector` did.

    file, weights: the detector and the tuned weights, which are written at the end; None until then, the weights also
    if the network is the untuned one. recipe: of the untuned network. images, held_out: how many were learned from, and
    how many the epoch was chosen by. history: by epoch, whose `held_out` is mAP. The rest: see
    `sppfeat.detection.train_detector.Training` and `sppfeat.training.learning.Learned`.
    """

    file: str | None
    weights: str | None
    recipe: Recipe
    options: LearningOptions
    images: int
    held_out: int
    classes: list[str]
    positives: dict[str, int]
    failed: dict[str, str]
    notes: list[str]
    history: list[Epoch]
    best: int
    diverged: str | None
    seconds: float
    device: str


def _crc(windows: np.ndarray | None) -> int:
    return 0 if windows is None else zlib.crc32(np.ascontiguousarray(windows, np.float64).data)


def tune_detector(
    annotated: AnnotatedImages,
    windows: Mapping[str, np.ndarray] | None,
    output: str | os.PathLike[str],
    recipe: Recipe | None = None,
    options: LearningOptions | None = None,
    *,
    proposals: ProposalOptions | None = None,
    overwrite: bool = False,
    observer: Observer | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> TunedDetector:
    """Train a detector and tune its network on annotated images with windows [K, 4] by image name.

    Writes `output`, and the weights beside it, unless the untuned network is the best: `det.safetensors` for `det.h5`.
    With 0 epochs, a softmax and box regression are fitted to the network as it is. windows, proposals: see
    `train_detector`. Resumes from `det.h5.checkpoint`. Raises ModelError, UsageError, BackboneError.
    """
    began = time.perf_counter()
    options, observer = options or LearningOptions(), observer or Observer()
    recipe = recipe or detection_recipe()
    path = Path(os.path.realpath(output)) if os.path.islink(output) else Path(output)
    checkpoint, weights_path = path.with_name(f"{path.name}.checkpoint"), path.with_suffix(".safetensors")
    # A stopped run already has permission to replace its outputs.
    replaces = overwrite or checkpoint.exists()
    check_new_file(path, overwrite=replaces, error=ModelError, kind=DETECTOR)
    check_weights_file(weights_path, overwrite=replaces)
    if os.path.exists(weights_path) and os.path.exists(recipe.weights) and weights_path.samefile(recipe.weights):
        raise UsageError(
            f"{weights_path}: the tuned weights would replace those they start from; choose another output"
        )
    if len(recipe.branches()) > 1 or recipe.normalize != "none" or recipe.pooling == "gem":
        raise UsageError(
            "a tuned detector needs one backbone, normalize 'none' and pooling max or avg, found "
            f"{recipe.backbone}, {recipe.normalize!r}, {recipe.pooling!r}"
        )
    positives = annotated.count_positives()
    classes = [name for name in annotated.classes if positives.get(name)]
    if not classes:
        raise UsageError(f"expected objects in {len(annotated.images)} images, found none that count")
    device = torch.device(resolve_device(options.device))
    notes = list(annotated.notes)

    def note(text: str) -> None:
        notes.append(text)
        observer.note(text)

    for name in annotated.classes:
        if name not in classes:
            note(f"class {name!r} has no box that counts and is skipped")
    failed = dict(annotated.problems)

    def fail(name: str, reason: str) -> None:
        if name not in failed:
            failed[name] = reason
            observer.note(f"{name}: {reason}; left out")

    with lock_store(path):
        if overwrite:
            checkpoint.unlink(missing_ok=True)
        trunk = load_trunk(recipe)
        trunk.parameters_from(options.from_layer)  # before anything takes long
        if windows is None:
            windows = windows_beside(path, annotated, proposals, observer, stop)
        if isinstance(windows, WindowFile):
            proposals = proposals or windows.options
        names = list(annotated.images)
        if windows is not None and not any(len(windows.get(name, ())) for name in names):
            raise UsageError(f"expected windows of the images, found none; the first image is {names[0]}")
        order = np.random.default_rng([options.seed, 0]).permutation(len(names))
        count = round(options.held_out * len(names)) if len(names) > 1 and options.epochs else 0
        held = sorted(names[at] for at in order[:count])
        rest = sorted(names[at] for at in order[count:])
        learned_from = annotated.subset(rest).count_positives()
        positives = {name: learned_from[name] for name in positives}
        learner = WindowLearner(
            trunk,
            Network(trunk.recipe).descriptions,
            annotated,
            windows or {},
            classes,
            rest,
            held,
            options,
            device,
            fail,
            lambda name: observer.row(name, None),  # a failed image is noted once, not in every epoch
        )
        done = TunedDetector(
            file=None,
            weights=None,
            recipe=trunk.recipe,
            options=options,
            images=len(rest),
            held_out=len(held),
            classes=classes,
            positives=positives,
            failed=failed,
            notes=notes,
            history=[],
            best=0,
            diverged=None,
            seconds=0.0,
            device=str(device),
        )
        if windows is None:
            return replace(done, seconds=time.perf_counter() - began)
        learner.set_factor(rest[:_MEASURED])
        key = cache_key(
            {
                "weights": weights_sha256(trunk.weights()),
                "recipe": json.loads(replace(trunk.recipe, weights="pretrained").to_json()),
                "options": asdict(replace(options, checkpoint_minutes=1.0, device="auto")),
                "images": [[name, _crc(windows.get(name)), *annotated.item(name).fingerprint()] for name in names],
                "boxes": [_crc(one.boxes) for one in annotated.images.values()],
                "labels": [one.labels for one in annotated.images.values()],
                "classes": classes,
                "versions": {"sppfeat": __version__, "torch": torch.__version__},
            }
        )
        if not checkpoint.exists():
            observer.say(
                f"describing windows of {len(rest)} images with the untuned network, for the heads to start from"
            )
            if told := learner.start_heads():
                note(told)
        observer.started(todo=options.epochs * len(rest), reused=0, device=str(device))
        learned = learn(
            learner, options, checkpoint, key, measure="mAP on held-out images", observer=observer, stop=stop
        )
        done = replace(
            done,
            history=learned.history,
            best=learned.best,
            diverged=learned.diverged,
            seconds=time.perf_counter() - began,
        )
        if not learned.finished:
            return done
        final = trunk.recipe
        if learned.best:
            save_tensors(weights_path, trunk.weights(), {"sppfeat": __version__, "recipe": final.to_json()})
            final = replace(final, weights=os.path.abspath(weights_path))
            done = replace(done, weights=str(weights_path))
        training = {
            "images": len(rest),
            "held_out": len(held),
            "positives": positives,
            "best": learned.best,
            "options": asdict(options),
        }
        detector = replace(
            learner.detector(final, "+".join(each.weights_sha256 for each in Network(final).descriptions)),
            proposals=proposals or ProposalOptions(),
            training=training,
        )
        save_detector(detector, path)
        checkpoint.unlink(missing_ok=True)
    return replace(done, file=str(path), seconds=time.perf_counter() - began)
