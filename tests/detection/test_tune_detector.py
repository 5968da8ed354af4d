"""Detectors whose network is tuned with them: batches, gradients, resumed runs, and the command line."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from scenes import make_voc
from torch.nn import functional as F  # noqa: N812

from sppfeat.backbones import Network
from sppfeat.backbones.backbone import load_trunk, read_weights
from sppfeat.detection import (
    DetectOptions,
    Detector,
    DetectorRunner,
    detection_recipe,
    evaluate_detector,
    open_detector,
)
from sppfeat.detection.annotations import Annotation, read_voc
from sppfeat.detection.detector import save_detector
from sppfeat.detection.tune_detector import TunedDetector, tune_detector
from sppfeat.detection.window_learning import (
    HEAD_COST,
    HEAD_RIDGE,
    TARGET_SPREAD,
    Sample,
    WindowLearner,
    mirrored,
    sample_windows,
)
from sppfeat.errors import SppFeatError
from sppfeat.images import Item
from sppfeat.svm.logistic import LogisticProblem
from sppfeat.training import LearningOptions
from sppfeat.training.heads import start_head
from sppfeat.windows import ProposalOptions, box_targets, overlaps

SMALL = detection_recipe(backbone="timm:test_resnet", weights="random", scales=(96,), levels=(2, 1))
OPTIONS = LearningOptions(epochs=4, learning_rate=1e-3, device="cpu", held_out=0.2)


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_voc(tmp_path_factory.mktemp("voc"))


@pytest.fixture(scope="module")
def windows(voc: Path) -> dict[str, np.ndarray]:
    return {name: np.array(boxes) for name, boxes in json.loads((voc / "windows.json").read_text()).items()}


@pytest.fixture(scope="module")
def tuned(
    voc: Path, windows: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TunedDetector, Path]:
    path = tmp_path_factory.mktemp("tuned") / "det.h5"
    return tune_detector(read_voc(voc, "trainval"), windows, path, SMALL, OPTIONS), path


def test_a_tuned_detector_finds_what_it_learned(
    tuned: tuple[TunedDetector, Path], voc: Path, windows: dict[str, np.ndarray]
) -> None:
    done, path = tuned
    assert done.file == str(path) and done.weights == str(path.with_suffix(".safetensors"))
    assert (done.images, done.held_out, done.classes, done.failed) == (19, 5, ["blue", "red"], {})
    losses = [one.loss for one in done.history[1:]]
    assert losses[0] is not None and losses[-1] is not None and losses[-1] < losses[0]
    detector = open_detector(path)
    assert detector.background is not None and detector.recipe.weights == done.weights
    found = evaluate_detector(detector, read_voc(voc, "test"), windows)
    assert found.eleven_point > 20, "3 before it was tuned"
    # Softmax with the background: no score above 1, and those of one window add up to at most 1.
    rows = np.random.default_rng(0).normal(size=(7, detector.weights.shape[1])).astype(np.float32)
    _, scores = detector.scores(rows)
    logits = np.column_stack(
        [rows @ detector.weights.T + detector.biases, rows @ detector.background[:-1] + detector.background[-1]]
    ).astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(scores, shares[:, :2], rtol=1e-4, atol=1e-6)


def test_the_network_changed_and_is_the_one_that_detects(
    tuned: tuple[TunedDetector, Path], voc: Path, windows: dict[str, np.ndarray]
) -> None:
    done, path = tuned
    before, after = load_trunk(SMALL).weights(), read_weights(str(done.weights))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    detector = open_detector(path)
    with pytest.raises(SppFeatError, match="the detector was trained with other weights"):
        DetectorRunner(replace(detector, recipe=SMALL))
    runner = DetectorRunner(detector)
    (found,) = runner.detect([Item.at(voc / "JPEGImages/024.png", windows["024.png"])], DetectOptions(threshold=0.1))
    assert (found.scores <= 1).all() and (found.scores >= 0.1).all()


def learner_of(voc: Path, windows: dict[str, np.ndarray], options: LearningOptions = OPTIONS) -> WindowLearner:
    annotated = read_voc(voc, "trainval")
    trunk = load_trunk(SMALL)
    names = list(annotated.images)
    return WindowLearner(
        trunk,
        Network(trunk.recipe).descriptions,
        annotated,
        windows,
        ["blue", "red"],
        names[:8],
        names[8:10],
        options,
        torch.device("cpu"),
        lambda *a: None,
        lambda name: None,
    )


def test_scales_change_from_epoch_to_epoch(voc: Path, windows: dict[str, np.ndarray]) -> None:
    """Images are seen at the scale of the epoch; windows stay those of the original."""
    several = learner_of(voc, windows, replace(OPTIONS, scales=(64, 128)))
    one = learner_of(voc, windows)
    for epoch, side in ((1, 64), (2, 128), (3, 64)):
        batches = zip(several.batches(epoch, 0), one.batches(epoch, 0), strict=True)
        for sample, same in ((sample, same) for pair in batches for sample, same in zip(*pair, strict=True)):
            assert min(sample.pixels.shape[:2]) == side and min(same.pixels.shape[:2]) == 96
            assert sample.size == same.size and np.array_equal(sample.windows, same.windows)
            assert np.array_equal(sample.targets, same.targets)


def test_heads_start_at_the_best_ones_of_the_untuned_network(voc: Path, windows: dict[str, np.ndarray]) -> None:
    """Where the gradient of |W|^2 / 2 and the losses of the same windows is 0, and no bias is penalized."""
    learner = learner_of(voc, windows)
    assert learner.start_heads() is None
    annotated = read_voc(voc, "trainval")
    rows, labels, targets = [], [], []
    for at, name in enumerate(list(annotated.images)[:8]):
        one = annotated.images[name]
        of = np.array([["blue", "red"].index(each) for each in one.labels])
        drawn = sample_windows(one, of, windows[name], 2, np.random.default_rng([0, 0, at]))
        found = learner._read(name, 96)
        assert isinstance(found, Sample)
        with torch.no_grad():
            rows.append(learner.descriptors(replace(found, windows=drawn[0])))
        labels.append(drawn[1])
        targets.append(drawn[2])
    points, which = torch.cat(rows), torch.from_numpy(np.concatenate(labels))
    shares = torch.softmax(learner.scores(points), 1).detach()
    residual = shares - F.one_hot(which, 3)
    weights = learner.scores.weight.detach()
    slope = weights + HEAD_COST * residual.T @ points
    loss = F.cross_entropy(learner.scores(points), which, reduction="sum").detach()
    assert slope.square().sum() / 2 <= 2e-3 * (weights.square().sum() / 2 + HEAD_COST * loss)
    for label in range(2):
        mine = which == label
        values = learner.moves(points[mine]).detach().view(-1, 2, 4)[:, label]
        error = values - torch.from_numpy(np.concatenate(targets)[mine] / TARGET_SPREAD)
        part = learner.moves.weight.detach().view(2, 4, -1)[label]
        assert (error.T @ points[mine].double() + HEAD_RIDGE * part).abs().max() < 1e-2
        assert abs(error.sum(0)).max() < 1e-2


def test_the_heads_start_in_bounded_memory(
    voc: Path, windows: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for 16 windows of each of three images, of eight."""
    learner, shapes = learner_of(voc, windows), []
    describe = learner.descriptors

    def watched(sample: Sample) -> torch.Tensor:
        shapes.append(len(sample.windows))
        return describe(sample)

    monkeypatch.setattr(learner, "descriptors", watched)
    monkeypatch.setattr("sppfeat.detection.window_learning._HEAD_BYTES", 4 * learner.scores.in_features * 50)
    assert learner.start_heads() is None
    assert shapes == [16] * 3 and learner.scores.weight.abs().max() > 0


def test_a_class_that_no_row_is_of_is_not_ruled_out() -> None:
    """A fit gives it a bias that falls without an end."""
    generator = np.random.default_rng(0)
    rows, labels = generator.normal(size=(40, 5)).astype(np.float32), np.repeat([0, 2], 20)
    problem, head = LogisticProblem(rows, np.arange(40)), torch.nn.Linear(5, 3)
    weights, biases = problem.weights(problem.solve(labels, 3, c=1.0))
    assert biases[1] < biases[[0, 2]].min() - 5
    start_head(head, weights, biases, labels)
    found = head.bias.detach().numpy()
    np.testing.assert_allclose(found, [biases[0], biases[[0, 2]].min(), biases[2]], rtol=1e-6)
    np.testing.assert_allclose(head.weight.detach().numpy(), weights, rtol=1e-6)


def test_the_loss_is_that_of_the_windows_one_by_one(voc: Path, windows: dict[str, np.ndarray]) -> None:
    learner = learner_of(voc, windows)
    torch.manual_seed(0)
    for linear in (learner.scores, learner.moves):
        torch.nn.init.normal_(linear.weight, std=0.01)
    batch = next(learner.batches(1, 0))
    assert len(batch) == 2
    loss, count = learner.backward(batch)
    found = {name: p.grad.clone() for name, p in learner.module.named_parameters() if p.grad is not None}
    learner.module.zero_grad()
    total = torch.zeros(())
    for sample in batch:
        for at in range(len(sample.labels)):
            row = learner.descriptors(replace(sample, windows=sample.windows[at : at + 1]))
            label = int(sample.labels[at])
            total = total + F.cross_entropy(learner.scores(row), torch.tensor([label]))
            if label < 2:
                move = learner.moves(row).view(2, 4)[label]
                wanted = torch.tensor(sample.targets[at] / np.array(TARGET_SPREAD)).float()
                total = total + F.smooth_l1_loss(move, wanted, reduction="sum")
    (total / count).backward()  # type: ignore[no-untyped-call]
    assert count == sum(len(sample.labels) for sample in batch) and loss == pytest.approx(
        float(total.detach()), rel=1e-4
    )
    for name, parameter in learner.module.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=2e-3, atol=1e-5)


def test_descriptors_are_those_that_detect(voc: Path, windows: dict[str, np.ndarray]) -> None:
    from sppfeat.extraction import Describer

    learner = learner_of(voc, windows)
    name = "003.png"
    sample = learner._read(name, 96)
    assert isinstance(sample, Sample)
    with torch.no_grad():
        rows = learner.descriptors(replace(sample, windows=windows[name])).numpy()
    (done,) = Describer(SMALL).describe([Item.at(voc / "JPEGImages" / name, windows[name])], scales="nearest")
    assert done.rows is not None
    np.testing.assert_allclose(rows, done.rows, rtol=1e-3, atol=1e-3)


def test_mirrored_windows_hold_the_same_pixels(voc: Path, windows: dict[str, np.ndarray]) -> None:
    sample = learner_of(voc, windows)._read("001.png", 128)
    assert isinstance(sample, Sample)
    places = np.array([[0.0, 10, 79, 50], [30, 0, 159, 119]])
    boxes = places + [2, -3, -1, 5]
    sample = replace(sample, windows=places, labels=np.zeros(2, int), targets=box_targets(places, boxes))
    other = mirrored(sample)
    np.testing.assert_array_equal(other.pixels[:, ::-1], sample.pixels)
    np.testing.assert_array_equal(other.windows, [[80, 10, 159, 50], [0, 0, 129, 119]])
    flipped = boxes.copy()
    flipped[:, [0, 2]] = 159 - boxes[:, [2, 0]]
    np.testing.assert_allclose(other.targets, box_targets(other.windows, flipped))
    np.testing.assert_array_equal(mirrored(other).windows, sample.windows)


def annotation(boxes: list[list[float]], difficult: list[bool] | None = None) -> Annotation:
    count = len(boxes)
    none = np.zeros(count, bool)
    hard = none if difficult is None else np.array(difficult)
    return Annotation(np.array(boxes, float).reshape(-1, 4), ["a"] * count, hard, none, (200, 200))


def test_windows_are_drawn_as_published() -> None:
    random = np.random.default_rng(0)
    corner = random.uniform(0, 140, (3000, 2))
    proposed = np.concatenate([corner, corner + random.uniform(20, 59, (3000, 2))], 1)
    truth = annotation([[20, 20, 79, 79], [100, 100, 159, 159], [20, 120, 79, 179]], [False, False, True])
    labels = np.array([0, 1, 1])
    places, found, targets = sample_windows(truth, labels, proposed, 2, np.random.default_rng(1))
    assert len(places) == 64 and (found < 2).sum() == 16
    touched = overlaps(places, truth.boxes)
    objects = found < 2
    assert (touched[objects].max(1) >= 0.5).all() and (touched[objects].argmax(1) < 2).all(), (
        "none of the difficult one"
    )
    np.testing.assert_array_equal(found[objects], labels[touched[objects].argmax(1)])
    background = touched[~objects].max(1)
    assert (background >= 0.1).all() and (background < 0.5).all()
    np.testing.assert_allclose(targets[objects], box_targets(places[objects], truth.boxes[touched[objects].argmax(1)]))
    again = sample_windows(truth, labels, proposed, 2, np.random.default_rng(1))
    assert all(np.array_equal(a, b) for a, b in zip(again, (places, found, targets), strict=True))


def test_images_without_objects_or_windows_are_sampled() -> None:
    far = np.array([[0.0, 0, 9, 9]] * 3)
    _, found, _ = sample_windows(annotation([]), np.zeros(0, int), far, 2, np.random.default_rng(0))
    assert found.tolist() == [2, 2, 2]
    truth = annotation([[100, 100, 150, 150]])
    places, found, _ = sample_windows(truth, np.array([0]), np.zeros((0, 4)), 2, np.random.default_rng(0))
    assert found.tolist() == [0] and places.tolist() == [[100, 100, 150, 150]], "an object is a window of its own"
    _, found, _ = sample_windows(truth, np.array([0]), far, 2, np.random.default_rng(0))
    assert sorted(found.tolist()) == [0, 2, 2, 2], "without windows that touch an object, any are background"
    _, found, _ = sample_windows(annotation([]), np.zeros(0, int), np.zeros((0, 4)), 2, np.random.default_rng(0))
    assert len(found) == 0


@pytest.mark.parametrize("stop_after", [3, 11])
def test_a_stopped_run_ends_in_the_same_detector(
    tuned: tuple[TunedDetector, Path], voc: Path, windows: dict[str, np.ndarray], tmp_path: Path, stop_after: int
) -> None:
    path, annotated, calls = tmp_path / "det.h5", read_voc(voc, "trainval"), 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls > stop_after

    assert tune_detector(annotated, windows, path, SMALL, OPTIONS, stop=stop).file is None and not path.exists()
    with pytest.raises(SppFeatError, match="det.h5.checkpoint: a checkpoint of a run with other images or options"):
        tune_detector(annotated, windows, path, SMALL, replace(OPTIONS, learning_rate=1e-4))
    tune_detector(annotated, windows, path, SMALL, OPTIONS)
    with h5py.File(path) as one, h5py.File(tuned[1]) as other:
        assert set(one) == set(other) and all(np.array_equal(one[key][...], other[key][...]) for key in one)
    ours, theirs = (read_weights(str(each.with_suffix(".safetensors"))) for each in (path, tuned[1]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["det.h5", "det.safetensors"]


def test_bad_input(voc: Path, windows: dict[str, np.ndarray], tmp_path: Path) -> None:
    annotated, path = read_voc(voc, "trainval"), tmp_path / "det.h5"
    empty = replace(annotated, images={n: annotation([]) for n in annotated.images})
    cases: list[tuple[Any, Any, Any, Any, str]] = [
        (empty, windows, SMALL, OPTIONS, "expected objects in 24 images, found none that count"),
        (annotated, {"x": windows["000.png"]}, SMALL, OPTIONS, "expected windows of the images, found none"),
        (annotated, windows, SMALL, replace(OPTIONS, from_layer="layer7"), "unknown layer 'layer7'"),
        (annotated, windows, replace(SMALL, normalize="l2"), OPTIONS, "a tuned detector needs one backbone, normalize"),
        (annotated, windows, replace(SMALL, weights="no.pth"), OPTIONS, "no.pth: expected a weights file"),
    ]
    for images, boxes, recipe, options, message in cases:
        with pytest.raises(SppFeatError, match=message):
            tune_detector(images, boxes, path, recipe, options)
    assert not path.exists()


def test_detectors_are_read_back_with_their_background(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    detector = Detector(
        recipe=SMALL,
        weights_sha256="0" * 64,
        classes=["a", "b"],
        weights=random.normal(size=(2, 5)).astype(np.float32),
        biases=np.zeros(2, np.float32),
        background=random.normal(size=6).astype(np.float32),
        box_weights=None,
        box_biases=None,
        proposals=ProposalOptions(),
        training={},
        versions={},
    )
    save_detector(detector, tmp_path / "d.h5")
    found = open_detector(tmp_path / "d.h5").background
    assert found is not None and np.array_equal(found, detector.background)  # type: ignore[arg-type]
    with h5py.File(tmp_path / "d.h5", "r+") as file:
        del file["background"]
        file["background"] = np.zeros(5, np.float32)
    with pytest.raises(SppFeatError, match=r"background: expected finite numbers \[6\], found \[5\]"):
        open_detector(tmp_path / "d.h5")
    huge = replace(detector, weights=1e4 * detector.weights)
    assert np.isfinite(huge.scores(random.normal(size=(9, 5)).astype(np.float32))[1]).all()


def test_command_line(voc: Path, tmp_path: Path, run_sppfeat: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    output = tmp_path / "det.h5"
    tiny = ("--backbone", SMALL.backbone, "--weights", "random", "--scales", "96", "--levels", "2,1", "--device", "cpu")
    run = ("train", "detector", str(voc), "-o", str(output), "--windows", str(voc / "windows.json"), *tiny)
    page, published = tmp_path / "curves.html", ("--optimizer", "sgd", "--schedule", "steps", "--weight-decay", "5e-4")
    scales = ("--train-scales", "96,64", "--held-out", "0.2")
    learning = ("--epochs", "2", *scales, "--learning-rate", "1e-2", "--from", "layer3", *published)
    done = run_sppfeat(*run, "--tune", *learning, "--report", str(page))
    assert done.returncode == 3 and "006.png: 006.xml has no valid object" in done.stderr, done.stderr
    shown = page.read_text()
    assert "tuned from layer3 on at scales 96, 64, one per epoch, by sgd, learning rate 0.01, schedule steps" in shown
    assert "of 2 classes in 19 images" in shown and shown.count("<svg") == 2
    assert "tuned detector of 2 classes" in done.stdout and "det.safetensors: its network" in done.stdout
    assert "epoch 2 of 2: loss " in done.stderr and "% mAP on held-out images" in done.stderr
    found = run_sppfeat("evaluate", "detection", str(output), str(voc), "--split", "test", "--windows",
                        str(voc / "windows.json"), "--json")  # fmt: skip
    assert found.returncode == 3, "one image has no object"
    assert json.loads(found.stdout)["mAP"] >= 0
    shown = run_sppfeat("inspect", str(output))
    assert shown.returncode == 0 and "its network was tuned with it" in shown.stdout
    assert "scores: probabilities, shares of a softmax" in shown.stdout
    wrong = run_sppfeat(*run, "--tune", "--c", "0.1")
    assert wrong.returncode == 2 and "--c is for SVMs: expected no --tune" in wrong.stderr
    wrong = run_sppfeat(*run, "--tune", "--no-calibration")
    assert wrong.returncode == 2 and "--calibration is for SVMs: expected no --tune" in wrong.stderr
    for one in (("--from", "layer3"), ("--train-scales", "96"), ("--report", "curves.html"), ("--schedule", "steps")):
        wrong = run_sppfeat(*run, *one)
        assert wrong.returncode == 2 and f"{one[0]}: expected --tune with it" in wrong.stderr


def test_weights_beside_the_detector_are_not_replaced_unasked(
    voc: Path, windows: dict[str, np.ndarray], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    annotated, weights = read_voc(voc, "trainval"), tmp_path / "det.safetensors"
    save_file(load_trunk(SMALL).network.state_dict(), weights)
    with pytest.raises(SppFeatError, match="det.safetensors: already exists; choose another output, or use"):
        tune_detector(annotated, windows, tmp_path / "det.h5", SMALL, OPTIONS)
    started = replace(SMALL, weights=str(weights))
    with pytest.raises(SppFeatError, match="the tuned weights would replace those they start from"):
        tune_detector(annotated, windows, tmp_path / "det.h5", started, OPTIONS, overwrite=True)
    weights.write_bytes(b"something else")
    with pytest.raises(SppFeatError, match="expected a file of weights or a new file, found another file"):
        tune_detector(annotated, windows, tmp_path / "det.h5", SMALL, OPTIONS, overwrite=True)
    assert weights.read_bytes() == b"something else"


def test_a_run_with_other_windows_is_not_resumed(voc: Path, windows: dict[str, np.ndarray], tmp_path: Path) -> None:
    annotated, path = read_voc(voc, "trainval"), tmp_path / "det.h5"
    stopped = iter([False, False, False] + [True] * 100)
    assert tune_detector(annotated, windows, path, SMALL, OPTIONS, stop=lambda: next(stopped)).file is None
    moved = {name: boxes + 1 for name, boxes in windows.items()}
    with pytest.raises(SppFeatError, match="a checkpoint of a run with other images or options"):
        tune_detector(annotated, moved, path, SMALL, OPTIONS)


def test_a_softmax_on_the_network_as_it_is(
    voc: Path,
    windows: dict[str, np.ndarray],
    tmp_path: Path,
    run_sppfeat: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    path, frozen = tmp_path / "det.h5", replace(SMALL, levels=(3, 2, 1))
    annotated = read_voc(voc, "trainval")
    annotated.notes.append("000.png: box 1: empty; skipped")
    done = tune_detector(annotated, windows, path, frozen, replace(OPTIONS, epochs=0))
    assert done.notes == annotated.notes, "so that the exit code is 3"
    assert (done.file, done.weights, done.best, done.images, done.held_out) == (str(path), None, 0, 24, 0)
    assert sorted(each.name for each in tmp_path.iterdir() if not each.name.startswith(".")) == ["det.h5"]
    detector = open_detector(path)
    assert detector.background is not None and detector.recipe.weights == "random"
    found = evaluate_detector(detector, read_voc(voc, "test"), windows)
    assert found.eleven_point > 10, "3 without a fit"
    shown = run_sppfeat("inspect", str(path))
    assert shown.returncode == 0 and "fitted to the network as it is" in shown.stdout
    wrong = run_sppfeat("tune", str(voc), "-o", str(tmp_path / "t.safetensors"), "--epochs", "0")
    assert wrong.returncode == 2 and "epochs must be at least 1, found 0: without any" in wrong.stderr
