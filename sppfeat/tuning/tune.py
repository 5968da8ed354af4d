"""Tuning a network on the classes of images."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import nn

from sppfeat._version import __version__
from sppfeat.backbones.backbone import load_trunk, weights_sha256
from sppfeat.engines import resolve_device
from sppfeat.errors import UsageError
from sppfeat.extraction import Describer
from sppfeat.files import cache_key
from sppfeat.images import find_images
from sppfeat.progress import Observer
from sppfeat.recipe import Recipe, RunOptions
from sppfeat.store import lock_store
from sppfeat.svm import SvmOptions
from sppfeat.svm.logistic import LogisticProblem, choose_regularization
from sppfeat.training.heads import start_head
from sppfeat.training.learning import learn
from sppfeat.training.weights import check_weights_file, save_tensors
from sppfeat.transfer import Labels, labels_from_folders
from sppfeat.tuning.classes import ClassLearner, Examples
from sppfeat.tuning.options import TuningOptions
from sppfeat.tuning.result import Tuned

Source = str | os.PathLike[str]
# Costs of the logistic regression that the head starts from: on unit descriptors the best one lies among them.
_COSTS: Final = (1.0, 10.0, 100.0)
# Descriptors that the head starts from; of more images, a random sample is described.
_HEAD_BYTES: Final = 2 << 30
# Classes without this many images have none to spare for holding out.
_LEAST_TO_HOLD_OUT: Final = 3


def tune(
    sources: Source | Sequence[Source],
    output: Source,
    recipe: Recipe | None = None,
    options: TuningOptions | None = None,
    *,
    labels: Labels | None = None,
    overwrite: bool = False,
    observer: Observer | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Tuned:
    """Tune the network of a recipe on the classes of images; writes its weights to `output`, a .safetensors file.

    labels: None: the folder that holds an image is its class. Images of parts named test or val are left out. An
    interrupted run resumes from OUTPUT.checkpoint, which is deleted at the end. The recipe's scales are not used.
    Raises UsageError, BackboneError, ModelError, DeviceError. An image that cannot be read is noted and left out.
    """
    recipe, options, observer = recipe or Recipe(), options or TuningOptions(), observer or Observer()
    _check_recipe(recipe)
    path = Path(output)
    checkpoint = path.with_name(f"{path.name}.checkpoint")
    if path.suffix != ".safetensors":
        raise UsageError(f"{path}: expected a name that ends with .safetensors")
    # A stopped run already has permission to replace its output.
    path = check_weights_file(path, overwrite=overwrite or checkpoint.exists())
    several = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    with lock_store(path):
        if overwrite:
            checkpoint.unlink(missing_ok=True)
        return _tune(several, path, checkpoint, recipe, options, labels, observer, stop)


def _tune(
    sources: list[Source],
    path: Path,
    checkpoint: Path,
    recipe: Recipe,
    options: TuningOptions,
    labels: Labels | None,
    observer: Observer,
    stop: Callable[[], bool],
) -> Tuned:
    began = time.perf_counter()
    classes, train, held = _examples(sources, labels, options, observer)
    device = torch.device(resolve_device(options.device))
    trunk = load_trunk(recipe)
    trunk.parameters_from(options.from_layer)  # before anything takes long
    failed: dict[str, str] = {}

    def fail(name: str, reason: str) -> None:
        if name not in failed:
            failed[name] = reason
            observer.note(f"{name}: {reason}; left out")

    key = cache_key(
        {
            "weights": weights_sha256(trunk.weights()),
            "recipe": json.loads(replace(trunk.recipe, weights="pretrained").to_json()),
            "options": asdict(replace(options, checkpoint_minutes=1.0, device="auto")),
            "images": [
                [item.name, int(label), *item.fingerprint()]
                for part in (train, held)
                for item, label in zip(part.items, part.labels, strict=True)
            ],
            "versions": {"sppfeat": __version__, "torch": torch.__version__},
        }
    )
    head = nn.Linear(recipe.bins * sum(trunk.cuttable.layer(name).channels for name in trunk.layers), len(classes))
    # A failed image is noted once, not in every epoch.
    learner = ClassLearner(trunk, head, train, held, options, device, fail, lambda name: observer.row(name, None))
    if not checkpoint.exists():
        _start_head(head, trunk.recipe, train, len(classes), options, fail, observer)
    observer.started(todo=options.epochs * len(train), reused=0, device=str(device))
    learned = learn(learner, options, checkpoint, key, observer=observer, stop=stop)
    done = Tuned(
        file=None,
        recipe=trunk.recipe,
        options=options,
        classes=classes,
        images=len(train),
        held_out=len(held),
        failed=failed,
        history=learned.history,
        best=learned.best,
        diverged=learned.diverged,
        weights_sha256=None,
        seconds=time.perf_counter() - began,
        peak_bytes=_peak_bytes(),
    )
    if not learned.finished:
        return done
    weights = {name: value.cpu() for name, value in trunk.weights().items()}
    about = {
        "sppfeat": __version__,
        "recipe": trunk.recipe.to_json(),
        "options": json.dumps(asdict(options)),
        "classes": json.dumps(classes),
        "best": str(learned.best),
        "history": json.dumps([[one.number, one.loss, one.held_out] for one in learned.history]),
    }
    save_tensors(path, weights, about)
    checkpoint.unlink(missing_ok=True)
    return replace(done, file=str(path), weights_sha256=weights_sha256(weights))


def _check_recipe(recipe: Recipe) -> None:
    if len(recipe.branches()) > 1:
        raise UsageError(f"backbone: expected one network to tune, found {recipe.backbone}")
    if recipe.crop != "none":
        raise UsageError(f"crop: expected none for tuning, which sees whole images, found {recipe.crop!r}")


def _examples(
    sources: list[Source], labels: Labels | None, options: TuningOptions, observer: Observer
) -> tuple[list[str], Examples, Examples]:
    """The classes, the images to train on and those held out: a share of each class, drawn by the seed."""
    found = find_images(sources)
    names = [item.name for item in found.items]
    known = labels or labels_from_folders(names)
    items = [
        item for item in found.items if item.name in known.classes and known.splits.get(item.name, "train") == "train"
    ]
    if not items:
        example = next(iter(known.classes), None)
        told = f" (an image is named {names[0]!r}, a label is for {example!r})" if names and example else ""
        raise UsageError(f"expected images with a class, found none among {len(names)}{told}")
    if left := len(names) - len(items):
        observer.note(f"{left} of {len(names)} images have no class, or are of a part for testing: left out")
    classes = sorted({known.classes[item.name] for item in items})
    if len(classes) < 2:
        raise UsageError(f"expected images of at least two classes, found {len(classes)}: {classes[0]}")
    labels_of = np.array([classes.index(known.classes[item.name]) for item in items])
    random = np.random.default_rng([options.seed, 0])
    held: list[int] = []
    few = []
    for label, name in enumerate(classes):
        mine = random.permutation(np.flatnonzero(labels_of == label))
        if len(mine) < _LEAST_TO_HOLD_OUT:
            few.append(name)
        elif options.held_out:
            held += mine[: max(1, round(options.held_out * len(mine)))].tolist()
    if few and options.held_out:
        shown = ", ".join(few[:5]) + ", ..." * (len(few) > 5)
        observer.note(f"{len(few)} classes of fewer than {_LEAST_TO_HOLD_OUT} images are not held out: {shown}")
    is_held = np.zeros(len(items), bool)
    is_held[held] = True

    def some(which: np.ndarray) -> Examples:
        return Examples([items[at] for at in np.flatnonzero(which)], labels_of[which])

    return classes, some(~is_held), some(is_held)


def _start_head(
    head: nn.Linear,
    recipe: Recipe,
    train: Examples,
    classes: int,
    options: TuningOptions,
    fail: Callable[[str, str], None],
    observer: Observer,
) -> None:
    """Logistic regression on the descriptors of the untuned network: a head drawn at random would first spoil the
    network that it learns on (Kumar et al., ICLR 2022)."""
    describer = Describer(
        replace(recipe, scales=(options.test_scale,), dtype="float32", channels=None),
        RunOptions(device=options.device),
    )
    most = max(2 * classes, _HEAD_BYTES // (4 * head.in_features))
    some = np.sort(np.random.default_rng([options.seed, 1]).permutation(len(train))[:most])
    counted = f"{len(some)} images" if len(some) == len(train) else f"{len(some)} of {len(train)} images"
    observer.say(f"describing {counted} with the untuned network, for the head to start from")
    rows = np.zeros((len(some), head.in_features), np.float32)
    readable = np.zeros(len(some), bool)
    for done in describer.describe(train.items[at] for at in some):
        row, error = done.row()
        if row is None:
            fail(train.items[some[done.position]].name, error or "")
        else:
            rows[done.position], readable[done.position] = row, True
    which = np.flatnonzero(readable)
    if not len(which):
        raise UsageError(f"expected images that can be read, found none of {len(some)}")
    problem, labels = LogisticProblem(rows, which), train.labels[some[which]]
    enough = np.bincount(labels, minlength=classes).max() > 1
    costs = _COSTS if enough else (_COSTS[1],)
    choice = choose_regularization(problem, labels, classes, SvmOptions(costs=costs, seed=options.seed))
    weights, biases = problem.weights(problem.solve(labels, classes, c=choice.cost, start=choice.start))
    start_head(head, weights, biases, labels)


def _peak_bytes() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used
