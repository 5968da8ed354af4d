"""Detectors: trained, stopped, saved, run and evaluated on small images of colored blocks."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import reference
from PIL import Image
from scenes import draw_scene, make_voc, propose_around
from typer.testing import CliRunner, Result

from sppfeat import BackboneError, ModelError, UsageError, read_windows
from sppfeat.detection.annotations import AnnotatedImages, Annotation, read_voc
from sppfeat.detection.average_precision import Objects, coco_figures, voc_average_precision, voc_ranking
from sppfeat.detection.detecting import DEFAULT_PROBABILITY, DetectOptions, DetectorRunner
from sppfeat.detection.detector import detection_recipe, open_detector, save_detector
from sppfeat.detection.evaluation import complete_options, evaluate_detector
from sppfeat.detection.row_cache import Reservoir, RowCache
from sppfeat.detection.train_detector import TrainingOptions, train_detector
from sppfeat.detection.training_rounds import Trainer
from sppfeat.extraction import Describer
from sppfeat.images import Item
from sppfeat.progress import Observer
from sppfeat.svm.solver import SvmProblem
from sppfeat.windows.boxes import fit_ridge
from sppfeat.windows.proposals import open_windows, propose_folder
from sppfeat.windows.selective_search import ProposalOptions

SMALL = detection_recipe(backbone="timm:test_resnet", weights="random", scales=(64, 128), levels=(2, 1))
# A random network's descriptors are weak: they need a larger C than trained ones.
OPTIONS = TrainingOptions(c=0.1, box_ridge=1.0, memory=1 << 24)


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_voc(tmp_path_factory.mktemp("voc"))


@pytest.fixture(scope="module")
def windows(voc: Path) -> dict[str, np.ndarray]:
    return {name: np.array(boxes) for name, boxes in json.loads((voc / "windows.json").read_text()).items()}


@pytest.fixture(scope="module")
def trained(voc: Path, windows: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "det.h5"
    done = train_detector(read_voc(voc, "trainval"), windows, path, SMALL, OPTIONS)
    assert not done.interrupted and done.classes == ["blue", "red"] and not done.failed
    assert done.positives["red"] > 10 and sum(done.hard) > 0
    assert not list(path.parent.glob(".*"))
    return path


def test_a_detector_finds_what_it_learned(trained: Path, voc: Path, windows: dict[str, np.ndarray]) -> None:
    detector = open_detector(trained)
    done = evaluate_detector(detector, read_voc(voc, "test"), windows)
    assert done.eleven_point > 65 and done.area > 65 and done.images == 12 and not done.failed
    bare = replace(detector, box_weights=None, box_biases=None)
    assert evaluate_detector(bare, read_voc(voc, "test"), windows).coco < done.coco
    for one in done.classes:
        assert one.objects and one.recall[-1] <= 1 and (np.diff(one.recall) >= 0).all()


def test_evaluation_keeps_100_detections_of_each_class(trained: Path, voc: Path) -> None:
    """Not 100 over all classes: those with low ranks count, too."""
    bare = replace(open_detector(trained), box_weights=None, box_biases=None)
    apart = np.array([[x, y, x + 11, y + 9] for y in range(0, 120, 10) for x in range(0, 156, 13)], float)
    annotated = read_voc(voc, "test")
    one = annotated.subset([next(name for name, each in annotated.images.items() if each.labels)])
    done = evaluate_detector(bare, one, dict.fromkeys(one.images, apart))
    assert len(apart) == 144 and [each.detections for each in done.classes] == [100, 100]


def test_detections_are_sound(trained: Path, voc: Path, windows: dict[str, np.ndarray]) -> None:
    runner = DetectorRunner(open_detector(trained))
    images = [Item.at(voc / "JPEGImages" / name, boxes) for name, boxes in windows.items()]
    count = 0
    for found in runner.detect(images):
        assert (
            (np.diff(found.scores) <= 0).all() and (found.scores >= DEFAULT_PROBABILITY).all() and found.windows >= 60
        )
        assert (found.boxes >= 0).all() and (found.boxes[:, 2:] <= [159, 119]).all()
        assert (found.boxes[:, 2:] >= found.boxes[:, :2]).all()
        count += len(found.scores)
    assert count
    few = list(runner.detect(images, DetectOptions(threshold=0, max_detections=3)))
    assert all((np.bincount(found.labels, minlength=2) <= 3).all() for found in few)
    assert any(len(found.scores) == 6 for found in few)
    best = runner.detect(images, DetectOptions(threshold=0))
    for some, every in zip(few, best, strict=True):
        for label in range(2):
            assert (some.scores[some.labels == label] == every.scores[every.labels == label][:3]).all()
    (nothing,) = runner.detect([replace(images[0], windows=None)])
    assert not len(nothing.scores) and nothing.error is None and nothing.windows == 0
    (missing,) = runner.detect([Item.at(voc / "no.png", windows["000.png"])])
    assert missing.error == "no such file"


def test_voting_moves_boxes_whatever_the_threshold(trained: Path, voc: Path, windows: dict[str, np.ndarray]) -> None:
    """Each detection is the mean of the boxes that overlap it, by their scores; ranks and scores stay."""
    calibrated = open_detector(trained)
    for model in (calibrated, replace(calibrated, calibration=None)):
        runner = DetectorRunner(model)
        images = [Item.at(voc / "JPEGImages" / name, boxes) for name, boxes in list(windows.items())[:6]]
        lowest = 0.0 if model.probable else -1e9
        every, plain, all_boxes = (
            list(runner.detect(images, DetectOptions(threshold=lowest, max_detections=most, nms=nms, voting=voting)))
            for most, nms, voting in ((100, 0.3, True), (100, 0.3, False), (400, 1.0, False))
        )
        few = list(runner.detect(images))
        moved = 0
        for one, other, voters, some in zip(every, plain, all_boxes, few, strict=True):
            np.testing.assert_array_equal(one.scores, other.scores)
            np.testing.assert_array_equal(one.ranks, other.ranks)
            for label in range(2):
                mine, of = one.labels == label, voters.labels == label
                votes = voters.scores[of] if model.probable else np.maximum(voters.scores[of] + 1, 0)
                expected = reference.voted_boxes(other.boxes[mine], voters.boxes[of], votes, 0.5)
                np.testing.assert_allclose(one.boxes[mine], expected, atol=1e-9)
                moved += int((one.boxes[mine] != other.boxes[mine]).any(1).sum())
                best = some.boxes[some.labels == label]
                np.testing.assert_allclose(best, one.boxes[mine][: len(best)], atol=1e-9)
        assert moved and sum(len(one.scores) for one in few)


def test_probabilities_rank_as_scores_do(trained: Path, voc: Path, windows: dict[str, np.ndarray]) -> None:
    """Average precision by the probabilities is that by the SVM scores, to the last bit, before and after."""
    calibrated, annotated = open_detector(trained), read_voc(voc, "test")
    assert calibrated.calibration is not None
    bare = replace(calibrated, calibration=None)
    # Votes are weighted by probabilities, which the bare detector has not.
    options = [complete_options(one, DetectOptions(voting=False)) for one in (calibrated, bare)]
    done, before = (
        evaluate_detector(one, annotated, windows, chosen)
        for one, chosen in zip((calibrated, bare), options, strict=True)
    )
    least = DEFAULT_PROBABILITY
    found = [
        list(DetectorRunner(one).detect([annotated.item(n, windows[n]) for n in annotated.images], chosen))
        for one, chosen in zip((calibrated, bare), options, strict=True)
    ]
    for label, (one, other) in enumerate(zip(done.classes, before.classes, strict=True)):
        np.testing.assert_equal(
            [one.eleven_point, one.area, *astuple(one.figures)],
            [other.eleven_point, other.area, *astuple(other.figures)],
        )
        images = []
        for image, raw in zip(*found, strict=True):
            objects = annotated.images[list(annotated.images)[image.position]]
            of = np.array([name == one.name for name in objects.labels], bool)
            mine, bare_mine = image.labels == label, raw.labels == label
            np.testing.assert_array_equal(image.boxes[mine], raw.boxes[bare_mine])
            scores = np.stack([raw.scores[bare_mine]] * 2, 1)
            np.testing.assert_array_equal(image.scores[mine], calibrated.probabilities(scores)[:, label])
            images.append(
                Objects(
                    objects.boxes[of],
                    objects.difficult[of],
                    objects.crowd[of],
                    image.boxes[mine],
                    image.scores[mine],
                )
            )
        np.testing.assert_equal(astuple(one.figures), astuple(coco_figures(images)))
        assert one.eleven_point == 100 * voc_average_precision(images)
        # The figures at the threshold are those of the detections that `detect` returns.
        kept = [replace(o, found=o.found[o.scores >= least], scores=o.scores[o.scores >= least]) for o in images]
        targets, _, count = voc_ranking(kept)
        assert one.kept == len(targets) and one.objects == count
        assert one.recall[one.kept - 1] == (targets == 1).sum() / count
    assert done.threshold == DEFAULT_PROBABILITY and before.threshold == -0.5
    assert 0 < done.kept_recall <= 100 and 0 < done.kept_precision <= 100


def test_folds_are_trained_without_their_images(voc: Path, windows: dict[str, np.ndarray], tmp_path: Path) -> None:
    trainer = Trainer(read_voc(voc, "trainval"), windows, Describer(SMALL), OPTIONS, Observer(), tmp_path / "state")
    assert trainer.train(lambda: False)
    detector = trainer.detector(ProposalOptions())
    assert detector.calibration is not None and (detector.calibration[:, 0] > 0).all()
    rows, targets, images = (
        values.copy() for values in (trainer.cache.rows, trainer.cache.targets, trainer.cache.origin[:, 0])
    )
    for fold, found in enumerate(trainer._folds):
        apart = images % 3 != fold
        problem = SvmProblem(rows[apart])
        solution = problem.solve(targets[apart], c=OPTIONS.c * trainer._factor**2, positive_weight=2.0, tolerance=1e-7)
        svm = problem.svm(solution, np.arange(2))
        plain = rows[:, :-1].astype(np.float32)
        # What the folds score is descriptors as pooled; the constant column stands for a part of the bias.
        expected = rows.astype(np.float32) @ svm.weights.T.astype(np.float32) + svm.biases
        np.testing.assert_allclose(plain @ found.weights.T + found.biases, expected, atol=0.05)
        assert not np.allclose(found.weights, detector.weights, atol=1e-3)
        assert found.box_weights is not None and trainer._boxes is not None
        for label in range(2):
            near, moves = trainer._boxes.of(label)
            kept = trainer._boxes.images_of(label) % 3 != fold
            weights, _ = fit_ridge(near[kept], moves[kept], OPTIONS.box_ridge / trainer._factor**2)
            np.testing.assert_array_equal(found.box_weights[label], weights)
    held = trainer._held_out.state()
    assert len(np.unique(held[:, 0])) > 20 and 0 < held[:, 3].sum() <= sum(trainer.positives.values())


def test_a_detector_without_calibration(
    trained: Path, voc: Path, windows: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Files of earlier versions have none, nor `base_k`; so does one of an image alone, whose classes no fold knows."""
    old = tmp_path / "old.h5"
    old.write_bytes(trained.read_bytes())
    with h5py.File(old, "r+") as file:
        del file["calibration"]
        proposals = json.loads(file.attrs["proposals"])
        del proposals["base_k"]
        file.attrs["proposals"] = json.dumps(proposals)
    model = open_detector(old)
    assert model.calibration is None and model.proposals.base_k == 150
    items = [Item.at(voc / "JPEGImages" / name, boxes) for name, boxes in windows.items()]
    default, everything = (
        [found.scores for found in DetectorRunner(model).detect(items, DetectOptions(threshold=threshold))]
        for threshold in (None, -5.0)
    )
    scores = np.concatenate(default)
    assert -0.5 <= scores.min() < 0 and len(scores) < len(np.concatenate(everything))
    shown = call("inspect", old).stdout
    assert "scores: SVM scores, not calibrated" in shown
    assert json.loads(call("inspect", old, "--json").stdout)["calibrated"] is False
    found = call("detect", old, voc / "JPEGImages/001.png", "--windows", voc / "windows.json", "--threshold", "-0.6")
    assert found.exit_code == 0, found.output

    annotated = read_voc(voc, "trainval")
    name = next(name for name, one in annotated.images.items() if len(one.labels) == 2)
    done = train_detector(annotated.subset([name]), windows, tmp_path / "one.h5", SMALL, OPTIONS)
    assert open_detector(tmp_path / "one.h5").calibration is None
    assert any(note.startswith("scores stay SVM scores: ") for note in done.notes)
    counting = Counting()
    done = train_detector(
        annotated, windows, tmp_path / "two.h5", SMALL, replace(OPTIONS, calibration=False), observer=counting
    )
    assert open_detector(tmp_path / "two.h5").calibration is None and not any("SVM scores" in n for n in done.notes)
    assert counting.seen == 24 * (1 + len(done.hard))


def test_windows_that_reach_outside_are_skipped(trained: Path, voc: Path, windows: dict[str, np.ndarray]) -> None:
    runner = DetectorRunner(open_detector(trained))
    path = str(voc / "JPEGImages" / "000.png")
    (inside,) = runner.detect([Item.at(path, windows["000.png"])])
    (both,) = runner.detect([Item.at(path, np.concatenate([[[0, 0, 900, 9]], windows["000.png"]]))])
    assert both.windows == inside.windows and (both.left_out, inside.left_out) == (1, 0)
    np.testing.assert_array_equal(both.boxes, inside.boxes)


class Counting(Observer):
    """Counts the processed images."""

    seen = 0

    def row(self, name: str, error: str | None) -> None:
        self.seen += 1


def same(a: Path, b: Path) -> bool:
    with h5py.File(a) as one, h5py.File(b) as other:
        return all(np.array_equal(one[key][...], other[key][...]) for key in one)


@pytest.mark.parametrize("stop_after", [5, 24, 40, -20])  # the last during calibration
def test_a_stopped_training_ends_in_the_same_detector(
    trained: Path, voc: Path, windows: dict[str, np.ndarray], tmp_path: Path, stop_after: int
) -> None:
    counting, path, annotated = Counting(), tmp_path / "det.h5", read_voc(voc, "trainval")
    # Step 0, passes for hard negatives, calibration.
    whole = 24 * (1 + len(open_detector(trained).training["hard"]) + 1)
    stop_after %= whole
    done = train_detector(
        annotated, windows, path, SMALL, OPTIONS, observer=counting, stop=lambda: counting.seen >= stop_after
    )
    assert done.interrupted and not path.exists() and (tmp_path / ".det.h5.training").exists() and done.file is None
    with pytest.raises(ModelError, match="a training with other images, windows, recipe or options was stopped here"):
        train_detector(annotated, windows, path, SMALL, replace(OPTIONS, c=7.0))
    before = counting.seen
    done = train_detector(annotated, windows, path, SMALL, OPTIONS, observer=counting)
    assert not done.interrupted and same(path, trained) and done.file == str(path)
    assert counting.seen == whole and before >= stop_after
    assert not (tmp_path / ".det.h5.training").exists()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[AnnotatedImages, dict[str, np.ndarray]]:
    """60 scenes of three shapes, with windows."""
    root, generator = tmp_path_factory.mktemp("mixed"), np.random.default_rng(1)
    images, windows = {}, {}
    for number in range(60):
        width, height = ((160, 120), (224, 120), (160, 160))[number % 3]
        pixels, objects = draw_scene(generator)
        canvas = generator.integers(100, 150, (height, width, 3)).astype(np.uint8)
        canvas[:120, :160] = pixels
        name = f"{number:02}.png"
        Image.fromarray(canvas).save(root / name)
        boxes = np.array([box for _, *box in objects], float).reshape(-1, 4) - 1
        none = np.zeros(len(boxes), bool)
        images[name] = Annotation(boxes, [label for label, *_ in objects], none, none, (width, height))
        windows[name] = propose_around(objects, generator)
    return AnnotatedImages(str(root), images, ["blue", "red"]), windows


def test_images_of_several_shapes_are_taken_in_order(
    mixed: tuple[AnnotatedImages, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    """So a training that is stopped during a pass, and again, ends in the same detector."""
    annotated, windows = mixed
    whole = train_detector(annotated, windows, tmp_path / "whole.h5", SMALL, OPTIONS)
    assert sum(whole.hard) > 0
    pending = []
    for stop_after in (3, 10, 30):
        counting = Counting()
        done = train_detector(
            annotated,
            windows,
            tmp_path / "det.h5",
            SMALL,
            OPTIONS,
            observer=counting,
            stop=lambda: counting.seen >= stop_after,  # noqa: B023
        )
        pending.append(done.pending)
    assert sum(0 < left < 60 for left in pending) >= 2
    done = train_detector(annotated, windows, tmp_path / "det.h5", SMALL, OPTIONS)
    assert (done.hard, done.rows) == (whole.hard, whole.rows) and same(tmp_path / "det.h5", tmp_path / "whole.h5")


def test_a_stopped_overwrite_of_a_detector_resumes(
    trained: Path, mixed: tuple[AnnotatedImages, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    path = tmp_path / "det.h5"
    path.write_bytes(trained.read_bytes())
    counting = Counting()
    stopped = train_detector(
        *mixed, path, SMALL, OPTIONS, overwrite=True, observer=counting, stop=lambda: counting.seen >= 5
    )
    assert stopped.interrupted and stopped.file is None and same(path, trained)
    assert not train_detector(*mixed, path, SMALL, OPTIONS).interrupted and not same(path, trained)


def test_windows_on_a_crowd_are_no_negatives(
    mixed: tuple[AnnotatedImages, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    annotated, windows = mixed
    few = annotated.subset(list(annotated.images)[:6])
    done = train_detector(few, windows, tmp_path / "a.h5", SMALL, OPTIONS)
    for name, one in few.images.items():
        everywhere = np.array([[0, 0, one.size[0] - 1, one.size[1] - 1]], float)
        yes = np.append(np.zeros(len(one.boxes), bool), True)
        few.images[name] = Annotation(np.concatenate([one.boxes, everywhere]), [*one.labels, "red"], yes, yes, one.size)
    crowded = train_detector(few, windows, tmp_path / "b.h5", SMALL, OPTIONS)
    # No window is a negative of the class whose crowd is everywhere; objects and windows of other classes still are.
    assert crowded.classes == ["blue"] and done.classes == ["blue", "red"]
    assert "class 'red' has no negative window and is skipped" in crowded.notes


def test_the_cache_is_bounded(voc: Path, windows: dict[str, np.ndarray], tmp_path: Path) -> None:
    annotated = read_voc(voc, "trainval")
    few = replace(OPTIONS, memory=1 << 20)
    recipe = replace(SMALL, levels=(6, 3, 2, 1))  # 50 bins of 96 channels: 109 rows fit
    done = train_detector(annotated, windows, tmp_path / "det.h5", recipe, few)
    assert done.rows <= (1 << 20) // (2 * (50 * 96 + 1))
    assert evaluate_detector(open_detector(tmp_path / "det.h5"), read_voc(voc, "test"), windows).eleven_point > 50
    with pytest.raises(UsageError, match=r"memory for rows must be at least"):
        train_detector(annotated, windows, tmp_path / "x.h5", replace(recipe, levels=(16,)), few)


def test_an_svm_that_does_not_converge_is_noted(
    voc: Path, windows: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sppfeat.svm.newton._MAX_NEWTON", 1)
    done = train_detector(read_voc(voc, "trainval"), windows, tmp_path / "det.h5", SMALL, OPTIONS)
    assert "class 'red': its SVM did not converge (relative gap 1e+00)" in done.notes


def test_row_cache() -> None:
    cache = RowCache(6, 3, 2)
    cache.add(np.arange(9).reshape(3, 3), np.array([[1, -1], [-1, 0], [0, -1]]), 4, np.array([-1, 2, 5]))
    assert cache.free == 3 and cache.unknown(4, np.array([2, 3, 5])).tolist() == [3]
    assert cache.unknown(5, np.array([2])).tolist() == [2]
    cache.keep(np.array([True, False, True]))
    assert cache.rows.tolist() == [[0, 1, 2], [6, 7, 8]] and cache.origin.tolist() == [[4, -1], [4, 5]]
    assert cache.unknown(4, np.array([2, 5])).tolist() == [2]
    other = RowCache(6, 3, 2)
    other.restore(cache.state())
    assert other.rows.tolist() == cache.rows.tolist() and other.unknown(4, np.array([5])).tolist() == []
    with pytest.raises(ValueError, match="of another kind"):
        RowCache(6, 4, 2).restore(cache.state())


def test_a_reservoir_samples_evenly() -> None:
    """Of 100 offered rows, 10 stay, each with the same probability."""
    kept = np.zeros(100)
    for seed in range(400):
        reservoir = Reservoir(10, 1, 1)
        rows = np.arange(100)[:, None]
        generator = np.random.default_rng(seed)
        for image in range(4):  # 25 rows each
            part = rows[25 * image : 25 * (image + 1)]
            reservoir.offer(0, part, np.repeat(part, 4, 1), image, generator)
        held, targets = reservoir.of(0)
        assert np.array_equal(reservoir.images_of(0), held[:, 0] // 25)
        assert len(set(held[:, 0].tolist())) == 10 and np.array_equal(held[:, 0], targets[:, 0])
        kept[held[:, 0].astype(int)] += 1
    assert kept.min() > 40 / 3 and kept.max() < 40 * 2


def test_classes_without_objects_and_images_without_windows(
    voc: Path, windows: dict[str, np.ndarray], tmp_path: Path
) -> None:
    annotated = read_voc(voc, "trainval")
    annotated.classes = ["blue", "green", "red"]
    some = {name: boxes for name, boxes in windows.items() if name not in ("000.png", "003.png")}
    some["001.png"] = np.concatenate([some["001.png"], [[0, 0, 500, 9]]])
    done = train_detector(annotated, some, tmp_path / "det.h5", SMALL, OPTIONS)
    assert done.classes == ["blue", "red"] and open_detector(tmp_path / "det.h5").classes == ["blue", "red"]
    assert "class 'green' has no box that counts and is skipped" in done.notes
    assert "000.png: has no windows; only its objects are used" in done.notes
    assert any(note.startswith("001.png: windows skipped: 1; the first reaches outside") for note in done.notes)
    with pytest.raises(ModelError, match="already exists"):  # before hours of searching for windows
        train_detector(annotated, None, tmp_path / "det.h5", SMALL, OPTIONS)
    with pytest.raises(UsageError, match="expected windows of the images, found none"):
        train_detector(annotated, {}, tmp_path / "x.h5", SMALL, OPTIONS)
    with pytest.raises(UsageError, match="expected annotated boxes to learn from, found none"):
        train_detector(replace_boxes(annotated), windows, tmp_path / "x.h5", SMALL, OPTIONS)


def replace_boxes(annotated: AnnotatedImages) -> AnnotatedImages:
    """The same images, all objects difficult."""
    images = {n: replace(one, difficult=np.ones(len(one.boxes), bool)) for n, one in annotated.images.items()}
    return replace(annotated, images=images)


def test_an_image_that_breaks_later_is_skipped(
    voc: Path, windows: dict[str, np.ndarray], tmp_path: Path, trained: Path
) -> None:
    annotated = read_voc(voc, "trainval")
    content = (voc / "JPEGImages/005.png").read_bytes()
    try:
        (voc / "JPEGImages/005.png").write_bytes(content[: len(content) // 2])
        done = train_detector(annotated, windows, tmp_path / "det.h5", SMALL, OPTIONS)
    finally:
        (voc / "JPEGImages/005.png").write_bytes(content)
    assert done.failed.keys() == {"005.png"} and not same(tmp_path / "det.h5", trained)


def test_a_class_whose_images_cannot_be_read_is_skipped(
    voc: Path, windows: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Also by a training that is stopped afterwards and resumed."""
    annotated = read_voc(voc, "trainval")
    one = annotated.images["005.png"]
    annotated.images["005.png"] = replace(one, labels=["green"] * len(one.labels))
    annotated.classes = ["blue", "green", "red"]
    content = (voc / "JPEGImages/005.png").read_bytes()
    counting, path = Counting(), tmp_path / "det.h5"
    try:
        (voc / "JPEGImages/005.png").write_bytes(content[: len(content) // 2])
        for most in (30, 1000):
            done = train_detector(
                annotated,
                windows,
                path,
                SMALL,
                OPTIONS,
                observer=counting,
                stop=lambda: counting.seen >= most,  # noqa: B023
            )
            assert done.interrupted == (most == 30) and done.classes == ["blue", "red"] and one.labels
            assert done.notes[-1] == "class 'green' has no object on a readable image and is skipped"
    finally:
        (voc / "JPEGImages/005.png").write_bytes(content)
    assert open_detector(path).classes == ["blue", "red"]


def test_options(tmp_path: Path, voc: Path, windows: dict[str, np.ndarray]) -> None:
    for change in ({"c": 0.0}, {"positive_weight": -1.0}, {"negative_overlap": 0.0}, {"passes": 0}, {"seed": -1}):
        with pytest.raises(UsageError, match=next(iter(change))):
            TrainingOptions(**change)  # type: ignore[arg-type]
    for change in ({"threshold": float("nan")}, {"nms": 1.5}, {"max_detections": 0}, {"max_detections": 401}):
        with pytest.raises(UsageError, match=next(iter(change))):
            DetectOptions(**change)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a detector needs dtype 'float32'"):
        train_detector(read_voc(voc, "trainval"), windows, tmp_path / "d.h5", replace(SMALL, dtype="float16"), OPTIONS)


def test_detectors_that_cannot_be_trusted(trained: Path, tmp_path: Path) -> None:
    model = open_detector(trained)
    save_detector(replace(model, weights_sha256="0" * 64), tmp_path / "w.h5")
    with pytest.raises(ModelError, match="was trained with other weights of timm:test_resnet: expected sha256 0000"):
        DetectorRunner(open_detector(tmp_path / "w.h5"))
    with pytest.raises(ModelError, match="the detector expects descriptors of 480 values, found 4800"):
        DetectorRunner(replace(model, recipe=replace(model.recipe, levels=(6, 3, 2, 1))))
    wrong = np.array([[1.0, 0.0], [-1.0, 0.0]])
    for key, values in (
        ("weights", np.zeros((2, 9))),
        ("biases", np.full(2, np.nan)),
        ("weights", None),
        ("calibration", np.zeros((3, 2))),
        ("calibration", wrong),
    ):
        save_detector(model, tmp_path / "x.h5")
        with h5py.File(tmp_path / "x.h5", "r+") as file:
            del file[key]
            if values is not None:
                file[key] = values
        with pytest.raises(ModelError, match=r"x\.h5: damaged: expected a detector, found: .*" + key):
            open_detector(tmp_path / "x.h5")
    save_detector(model, tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5", "r+") as file:
        file.attrs["recipe"] = replace(model.recipe, scales=(64,)).to_json()
    with pytest.raises(ModelError, match="its recipe_hash does not match its recipe"):
        open_detector(tmp_path / "x.h5")


def call(*arguments: str | Path) -> Result:
    """The command line in this process, which saves seconds of imports; exit codes of errors need `run_sppfeat`."""
    from sppfeat_cli.app import build

    return CliRunner().invoke(build(), [str(each) for each in arguments])


def test_command_line(voc: Path, tmp_path: Path, run_sppfeat: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    det, windows = tmp_path / "det.h5", voc / "windows.json"
    options = ["--backbone", "timm:test_resnet", "--weights", "random", "--scales", "64,128", "--levels", "2,1"]
    done = run_sppfeat("train", "detector", voc, "-o", det, "--windows", windows, "--c", "0.1", *options)
    # An image without objects is named, and used for training.
    assert done.returncode == 3 and "detector of 2 classes" in done.stdout
    assert re.search(r"\d+\.png: \d+\.xml has no valid object", done.stderr)
    again = call("train", "detector", voc, "-o", det, "--windows", windows)
    assert isinstance(again.exception, ModelError) and "already exists" in str(again.exception)
    assert "detector of 2 classes (blue, red)" in call("inspect", det).stdout
    shown = json.loads(call("inspect", det, "--json").stdout)
    assert shown["format"] == "detector" and shown["training"]["positives"]["red"] > 10 and shown["calibrated"]
    assert "scores: calibrated, the probability that a detection is correct" in call("inspect", det).stdout

    drawn, page = tmp_path / "drawn", tmp_path / "hits.html"
    found = run_sppfeat(
        "detect", det, voc / "JPEGImages", "--windows", windows, "--json", "--draw", drawn, "--html", page
    )
    assert found.returncode == 0, found.stderr
    results = json.loads(found.stdout)["results"]
    assert [one["image"] for one in results] == [f"{n:03}.png" for n in range(36)]
    hit = next(one for one in results if one["detections"])
    assert hit["detections"][0].keys() == {"label", "score", "box"} and len(hit["detections"][0]["box"]) == 4
    scores = [each["score"] for one in results for each in one["detections"]]
    assert all(DEFAULT_PROBABILITY <= score <= 1 for score in scores)
    assert f"probability at least {DEFAULT_PROBABILITY:g}" in page.read_text()
    data = [det, voc / "JPEGImages", "--windows", windows]
    surer = json.loads(call("detect", *data, "--json", "--threshold", "0.6").stdout)["results"]
    assert [each["score"] for one in surer for each in one["detections"]] == [s for s in scores if s >= 0.6]
    wrong = run_sppfeat("detect", *data, "--threshold", "-0.6")
    assert wrong.returncode == 2 and wrong.stderr == (
        "sppfeat: --threshold must be a probability from 0 to 1, because the detector's scores are calibrated: the "
        "probability that a detection is correct; found -0.6\n"
    )
    percent = call("detect", *data, "--threshold", "60")
    assert str(percent.exception).endswith("correct; found 60; did you mean 0.6?")
    below = call("detect", det, voc / "JPEGImages", "--root", voc, "--windows", windows)
    assert isinstance(below.exception, UsageError) and "such as 'JPEGImages/000.png'" in str(below.exception)
    named = {f"JPEGImages/{name}": boxes.tolist() for name, boxes in read_windows(windows).items()}
    (tmp_path / "below.json").write_text(json.dumps(named))
    rooted = call("detect", det, voc / "JPEGImages", "--root", voc, "--windows", tmp_path / "below.json", "--json")
    assert [f"JPEGImages/{one['image']}" for one in results] == [
        one["image"] for one in json.loads(rooted.stdout)["results"]
    ]
    other = call("detect", *data, "--weights", "pretrained")
    assert isinstance(other.exception, (BackboneError, ModelError))
    assert len(list(drawn.glob("*.jpg"))) == 36
    assert page.read_text().count("<figure") == sum(bool(one["detections"]) for one in results)
    lines = call("detect", det, voc / "JPEGImages", "--windows", windows).stdout.splitlines()
    assert len(lines) == sum(len(one["detections"]) for one in results) and lines[0].count("\t") == 3

    report = tmp_path / "report.html"
    found = run_sppfeat("evaluate", "detection", det, voc, "--windows", windows, "--json", "--report", report)
    document = json.loads(found.stdout)
    assert {"mAP", "per_class", "iou", "images"} <= document.keys() and document["mAP"] > 60
    assert len(document["coco"]) == 12 and document["coco"]["ap"] == document["mAP_coco"] < document["coco"]["ap50"]
    assert "COCO's figures" in report.read_text()
    assert report.read_text().count("<polyline") == 2
    assert document["options"]["max_detections"] == 100 and document["options"]["windows"] == str(windows)
    assert document["options"]["split"] == "test" and document["seed"] == document["proposals"]["seed"] == 0
    assert document["recipe"]["scales"] == [64, 128] and len(document["weights_sha256"]) == 64
    assert document["threshold"] == DEFAULT_PROBABILITY and document["precision"] > 40 and document["recall"] > 40
    table = call("evaluate", "detection", det, voc, "--windows", windows).stdout
    assert f"\nat the default threshold of detect, {DEFAULT_PROBABILITY:g}: precision " in table
    assert table.splitlines()[0].split() == ["class", "11-point", "area", "COCO", "objects"]
    assert "\nCOCO AP: all " in table and ", large " in table.splitlines()[-1]


def test_command_line_finds_windows_itself(
    voc: Path, trained: Path, tmp_path: Path, run_sppfeat: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes((voc / "JPEGImages/001.png").read_bytes())
    (tmp_path / "in/broken.png").write_bytes(b"\x89PNG")
    Image.new("RGB", (200, 12)).save(tmp_path / "in/flat.png")
    found = run_sppfeat("detect", trained, tmp_path / "in", "--json")
    assert found.returncode == 3, found.stderr
    document = json.loads(found.stdout)
    assert document["failed"].keys() == {"broken.png"} and document["notes"] == ["flat.png: has no windows"]
    assert [one["image"] for one in document["results"]] == ["a.png", "flat.png"]
    assert document["results"][0]["detections"]
    wrong = run_sppfeat("detect", trained, tmp_path / "in", "--windows", voc / "windows.json")
    assert wrong.returncode == 2 and "the windows match none of the 3 images" in wrong.stderr
    assert isinstance(call("detect", voc / "windows.json", tmp_path / "in").exception, ModelError)
    assert isinstance(call("train", "detector", "-o", tmp_path / "x.h5").exception, UsageError)


def test_command_line_on_coco_without_windows(
    voc: Path, tmp_path: Path, run_sppfeat: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Windows are proposed first and kept; a class that is not selected is named; the proposal options are kept.

    Class names are numbers that are other categories' ids.
    """
    annotated = read_voc(voc, "trainval").subset([f"{n:03}.png" for n in range(8)])
    document: dict[str, list[object]] = {"categories": [{"id": 2, "name": "1"}, {"id": 1, "name": "2"}]}
    document |= {"images": [], "annotations": []}
    for number, (name, one) in enumerate(annotated.images.items()):
        document["images"].append({"id": number, "file_name": name, "width": 160, "height": 120})
        for label, (x1, y1, x2, y2) in zip(one.labels, one.boxes.tolist(), strict=True):
            category = 2 if label == "red" else 1
            box = [x1, y1, x2 - x1 + 1, y2 - y1 + 1]
            document["annotations"].append({"image_id": number, "category_id": category, "bbox": box})
    document["annotations"].append({"image_id": 0, "category_id": 2, "bbox": [1, 1, 60, 60]})
    document["annotations"].append({"image_id": 0, "category_id": 2, "bbox": ["nan", "nan", 9, 9]})
    (tmp_path / "coco.json").write_text(json.dumps(document))
    det = tmp_path / "det.h5"
    data = ["--images", voc / "JPEGImages", "--annotations", tmp_path / "coco.json"]
    options = ["--backbone", "timm:test_resnet", "--weights", "random", "--scales", "64", "--levels", "1", "--c", "0.1"]
    done = run_sppfeat("train", "detector", *data, "-o", det, "--classes", "1", *options)
    assert done.returncode == 3, done.stderr
    assert "class '2' is not selected" in done.stderr and "annotation 8" not in done.stderr
    assert "000.png: annotation " in done.stderr and "nan" in done.stderr
    assert "detector of 1 class," in done.stdout and (tmp_path / "det.windows.h5").exists()
    # What each count of images is of; the windows are not trained on.
    for stage in ("windows", "objects and first negatives", "pass 1, hard negatives"):
        assert f"\n{stage}: 8 images\n" in done.stderr
    assert "to train on" not in done.stderr
    found = run_sppfeat("evaluate", "detection", det, *data, "--json")
    assert found.returncode == 3 and json.loads(found.stdout)["per_class"].keys() == {"1"}, found.stderr
    table = run_sppfeat("evaluate", "detection", det, *data).stdout.splitlines()
    reds, blues = (sum(one.labels.count(c) for one in annotated.images.values()) for c in ("red", "blue"))
    assert reds + 1 != blues and table[1].split()[0] == "1" and table[1].split()[-1] == str(reds + 1), table
    twice = call("train", "detector", *data, "-o", tmp_path / "x.h5", "--classes", "1,1", *options)
    assert isinstance(twice.exception, UsageError) and "expected unique class names" in str(twice.exception)

    propose_folder(voc / "JPEGImages", tmp_path / "few.h5", ProposalOptions(max_windows=9), workers=1)
    path = tmp_path / "nine.h5"
    train_detector(annotated, open_windows(tmp_path / "few.h5"), path, replace(SMALL, scales=(64,)), OPTIONS)
    assert open_detector(path).proposals.max_windows == 9
