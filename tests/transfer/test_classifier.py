"""Classifiers: training on a store, the file, and sorting images with its own recipe."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from sppfeat import (
    ModelError,
    Recipe,
    SppFeatWarning,
    Store,
    StoreError,
    UsageError,
    extract_folder,
    open_store,
    train_linear_svm,
)
from sppfeat.store.writing import StoreWriter
from sppfeat.svm.options import SvmOptions
from sppfeat.transfer.classifier import open_classifier, save_classifier
from sppfeat.transfer.prediction import predict
from sppfeat.transfer.train_classifier import train_classifier

Run = Callable[..., Any]


@pytest.fixture
def colors(tmp_path: Path) -> Path:
    """Images that are roughly red, green or blue, one folder each."""
    generator = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (tmp_path / "colors" / name).mkdir(parents=True)
        for number in range(6):
            pixels = generator.integers(0, 90, (70, 80, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(tmp_path / "colors" / name / f"{number}.png")
    return tmp_path / "colors"


def test_trained_as_the_solver_trains(colors: Path, tmp_path: Path, tiny: Recipe) -> None:
    extract_folder(colors, tmp_path / "f.h5", tiny)
    store = open_store(tmp_path / "f.h5")
    classifier = train_classifier(store, SvmOptions(costs=(1.0,)))
    known = [name.split("/")[0] for name in store.names]
    expected = train_linear_svm(store.descriptors, known, c=1.0)
    assert classifier.classes == ["blue", "green", "red"] and classifier.images == 18
    assert np.allclose(classifier.svm.weights, expected.weights, atol=1e-4)


def test_file_keeps_everything(colors: Path, tmp_path: Path, tiny: Recipe) -> None:
    extract_folder(colors, tmp_path / "f.h5", tiny)
    classifier = train_classifier(open_store(tmp_path / "f.h5"))
    assert [cost for cost, _ in classifier.curve] == sorted(SvmOptions().costs)
    save_classifier(classifier, tmp_path / "m.h5")
    read = open_classifier(tmp_path / "m.h5")
    assert read.recipe == classifier.recipe and read.classes == classifier.classes and read.images == 18
    for name in ("costs", "gaps"):
        assert np.array_equal(getattr(read.svm, name), getattr(classifier.svm, name))
    with h5py.File(tmp_path / "m.h5") as file:
        for name in ("weights", "biases"):
            assert file[name].dtype == np.float32 and getattr(read.svm, name).dtype == np.float64
            assert np.array_equal(getattr(read.svm, name), getattr(classifier.svm, name).astype(np.float32))
    with pytest.raises(ModelError, match=r"m\.h5: already exists; choose another output, or use --overwrite"):
        save_classifier(classifier, tmp_path / "m.h5")
    save_classifier(classifier, tmp_path / "m.h5", overwrite=True)
    with pytest.raises(ModelError, match=r"f\.h5: expected an SVM or a new file, found a store; it is left as it is"):
        save_classifier(classifier, tmp_path / "f.h5", overwrite=True)
    assert not list(tmp_path.glob(".*"))


def test_images_and_their_store_get_the_same_scores(colors: Path, tmp_path: Path, tiny: Recipe) -> None:
    """With levels cut out of the store, and with a store of another recipe, whose images are described again."""
    extract_folder(colors, tmp_path / "f.h5", replace(tiny, levels=(3, 2, 1)))
    extract_folder(colors, tmp_path / "other.h5", replace(tiny, pooling="avg"))
    notes: list[str] = []
    classifier = train_classifier(open_store(tmp_path / "f.h5"), SvmOptions(costs=(1.0,), levels=(2, 1)))
    assert classifier.recipe.levels == (2, 1)
    found = {
        source: {one.name: one.scores for one in predict(classifier, [tmp_path / source], note=notes.append)}
        for source in ("colors", "f.h5", "other.h5")
    }
    assert len(notes) == 1 and "other.h5: was made with another recipe (pooling: model max, store avg)" in notes[0]
    assert found["colors"].keys() == found["f.h5"].keys() == found["other.h5"].keys() and len(found["colors"]) == 18
    for name, scores in found["colors"].items():
        assert scores is not None
        assert scores == pytest.approx(found["f.h5"][name], abs=2e-3)
        assert scores == pytest.approx(found["other.h5"][name], abs=1e-5)
        assert classifier.classes[int(scores.argmax())] == name.split("/")[0]


def test_archives_are_predicted_as_folders_are(colors: Path, tmp_path: Path, tiny: Recipe) -> None:
    """From the archive, and from a store of another recipe, whose images are found in it again."""
    extract_folder(colors, tmp_path / "f.h5", tiny)
    classifier = train_classifier(open_store(tmp_path / "f.h5"), SvmOptions(costs=(1.0,)))
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        tar.add(colors, ".")
    extract_folder(tmp_path / "c.tar", tmp_path / "c.h5", replace(tiny, pooling="avg"))
    expected = {one.name: one.scores for one in predict(classifier, [colors])}
    for source in ("c.tar", "c.h5"):
        found = {one.name.removeprefix("c.tar/"): one.scores for one in predict(classifier, [tmp_path / source])}
        assert found.keys() == expected.keys()
        assert all(found[name] == pytest.approx(expected[name], abs=1e-5) for name in expected)


def test_command_line(colors: Path, tmp_path: Path, tiny: Recipe, run_sppfeat: Run) -> None:
    extract_folder(colors, tmp_path / "f.h5", tiny)
    made = run_sppfeat("train", "svm", tmp_path / "f.h5", "-o", tmp_path / "m.h5", "--c-grid", "vissl", "--json")
    document = json.loads(made.stdout)
    assert made.returncode == 0 and document["classes"] == ["blue", "green", "red"] and len(document["curve"]) == 11
    (tmp_path / "new").mkdir()
    Image.new("RGB", (90, 70), (200, 30, 20)).save(tmp_path / "new" / "a.jpg")
    (tmp_path / "new" / "bad.jpg").write_bytes(b"no image")
    sorted_ = run_sppfeat("predict", tmp_path / "m.h5", tmp_path / "new", "--json", "--top", "2")
    results = {Path(one["image"]).name: one for one in json.loads(sorted_.stdout)["results"]}
    assert sorted_.returncode == 3 and f"failed: {tmp_path}/new/bad.jpg" in sorted_.stderr
    assert results["a.jpg"]["label"] == "red" and len(results["a.jpg"]["top"]) == 2 and "error" in results["bad.jpg"]
    people = run_sppfeat("predict", tmp_path / "m.h5", tmp_path / "new" / "a.jpg")
    assert people.returncode == 0 and people.stdout.startswith(f"{tmp_path}/new/a.jpg: red ")
    assert "SVM of 3 classes (blue, green, red)" in run_sppfeat("inspect", tmp_path / "m.h5").stdout
    refused = run_sppfeat("inspect", tmp_path / "m.h5", "--verify")
    assert refused.returncode == 2 and "--verify is for stores and galleries, found an SVM" in refused.stderr


def test_files_that_are_no_model(colors: Path, tmp_path: Path, tiny: Recipe) -> None:
    extract_folder(colors, tmp_path / "f.h5", tiny)
    save_classifier(train_classifier(open_store(tmp_path / "f.h5"), SvmOptions(costs=(1.0,))), tmp_path / "m.h5")
    whole = (tmp_path / "m.h5").read_bytes()
    (tmp_path / "text.h5").write_text("no model")
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    for name, message in (
        ("gone.h5", "expected an SVM, found no such file"),
        ("colors", "expected an SVM, found a folder"),
        ("text.h5", "cannot be opened"),
        ("cut.h5", "cut short"),
        ("f.h5", "expected an SVM, found a store; `sppfeat train svm` makes one"),
    ):
        with pytest.raises(ModelError, match=f"{name}: .*{message}"):
            open_classifier(tmp_path / name)

    def damaged(change: Callable[[h5py.File], object]) -> Path:
        path = tmp_path / "damaged.h5"
        path.write_bytes(whole)
        with h5py.File(path, "r+") as file:
            change(file)
        return path

    def nan(file: h5py.File) -> None:
        file["weights"][0, 0] = np.nan

    def short(file: h5py.File) -> None:
        del file["biases"]
        file["biases"] = np.zeros(2)

    def one_class(file: h5py.File) -> None:
        for name in ("weights", "biases", "classes", "costs", "gaps"):
            kept = file[name][:1]
            del file[name]
            file[name] = kept

    for change, message in (
        (lambda file: file.attrs.__setitem__("format_version", 99), "format 99 is newer than this sppfeat reads"),
        (lambda file: file.__delitem__("biases"), "KeyError"),
        (lambda file: file.attrs.__setitem__("recipe", "[]"), "expected a JSON object"),
        (nan, "expected finite weights and costs"),
        (short, r"expected one row per class \(3\)"),
        (lambda file: file.attrs.__setitem__("positive_weight", np.inf), "expected finite weights and costs"),
        (one_class, "expected at least two classes, found 1"),
    ):
        with pytest.raises(ModelError, match=message):
            open_classifier(damaged(change))  # type: ignore[arg-type]


def test_what_cannot_be_trained_with(colors: Path, tmp_path: Path, tiny: Recipe) -> None:
    extract_folder(colors / "red", tmp_path / "one.h5", tiny, root=str(colors))
    with pytest.raises(UsageError, match="at least two classes, found 1: red"):
        train_classifier(open_store(tmp_path / "one.h5"))
    extract_folder(colors, tmp_path / "f.h5", tiny)
    with StoreWriter(open_store(tmp_path / "f.h5")) as writer:
        writer.reset([0])
    with pytest.raises(StoreError, match="1 of 18 images are still to be described"):
        train_classifier(open_store(tmp_path / "f.h5"))


def test_training_with_one_c_ends_well(colors: Path, tmp_path: Path, tiny: Recipe, run_sppfeat: Run) -> None:
    extract_folder(colors, tmp_path / "f.h5", tiny)
    made = run_sppfeat("train", "svm", tmp_path / "f.h5", "-o", tmp_path / "m.h5", "--c", "1")
    assert (made.returncode, made.stderr) == (0, "") and "C = 1; solver: gram" in made.stdout
    again = run_sppfeat("train", "svm", tmp_path / "f.h5", "-o", tmp_path / "n.h5", "--c", "1", "--json")
    document = json.loads(again.stdout)
    assert document["C"] == 1 and document["curve"] == [] and document["converged"] is True
    assert document["options"]["costs"] == [1] and document["recipe"]["levels"] == [2, 1]


@pytest.mark.parametrize("output", ["missing/m.h5", "/proc/m.h5", "photo.jpg"])
def test_an_output_that_cannot_be_is_found_before_training(
    output: str, colors: Path, tmp_path: Path, tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sppfeat_cli.app import build

    extract_folder(colors, tmp_path / "f.h5", tiny)
    (tmp_path / "photo.jpg").write_bytes(b"a photograph")
    monkeypatch.setattr("sppfeat.transfer.train_classifier.train_classifier", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(ModelError, match=re.escape(str(tmp_path / output))):
        build()(["train", "svm", str(tmp_path / "f.h5"), "-o", str(tmp_path / output)])
    assert (tmp_path / "photo.jpg").read_bytes() == b"a photograph"


def test_svms_that_do_not_converge_are_told(
    make_store: Callable[..., Store],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As a warning, in the document, in the file, and in `inspect`."""
    from sppfeat_cli.app import build

    monkeypatch.setattr("sppfeat.svm.newton._MAX_NEWTON", 1)
    rows = np.random.default_rng(1).normal(size=(60, 20))
    store = make_store(rows, names=[f"{'abc'[at % 3]}/{at:02}.jpg" for at in range(60)])
    with pytest.warns(SppFeatWarning, match=r"f\.h5: \d of 3 SVMs did not converge"), pytest.raises(SystemExit):
        build()(["train", "svm", str(store.path), "-o", str(tmp_path / "m.h5"), "--c", "10", "--json"])
    document = json.loads(capsys.readouterr().out)
    gaps = {one["class"]: one["gap"] for one in document["not_converged"]}
    assert document["converged"] is False and max(gaps.values()) == document["largest_gap"] > 1e-4
    read = open_classifier(tmp_path / "m.h5")
    assert {one.label: one.gap for one in read.convergence.not_converged} == gaps
    for words, expected in ((["--json"], '"converged": false'), ([], f"{len(gaps)} of 3 SVMs did not converge")):
        with pytest.raises(SystemExit):
            build()(["inspect", str(tmp_path / "m.h5"), *words])
        assert expected in capsys.readouterr().out


def test_windows_of_another_recipe_are_described_anew(colors: Path, tmp_path: Path, tiny: Recipe) -> None:
    """In the order of the rows; each as a store of the classifier's own recipe has it."""
    from sppfeat.transfer.prediction import Prediction

    extract_folder(colors, tmp_path / "f.h5", tiny)
    classifier = train_classifier(open_store(tmp_path / "f.h5"), SvmOptions(costs=(1.0,)))
    boxes = {
        f"{name}/{n}.png": np.array([[0, 0, 30, 40], [5, 9, 60, 60.5]]) for name in ("red", "blue") for n in (4, 2)
    }
    extract_folder(colors, tmp_path / "same.h5", tiny, windows=boxes)
    extract_folder(colors, tmp_path / "other.h5", replace(tiny, pooling="avg"), windows=boxes)

    def predicted(store: str) -> list[Prediction]:
        return list(predict(classifier, [tmp_path / store]))

    (colors / "blue" / "2.png").write_bytes(b"gone")
    same, other = predicted("same.h5"), predicted("other.h5")
    assert [one.name for one in other] == [one.name for one in same] == open_store(tmp_path / "other.h5").names
    assert len(other) == 8
    for one, expected in zip(other, same, strict=True):
        if one.name.startswith("blue/2.png"):
            assert one.scores is None and "not an image" in str(one.error)
        else:
            assert one.scores == pytest.approx(expected.scores, abs=2e-3), one.error


def test_names_that_leave_the_root_are_not_followed(
    colors: Path, make_store: Callable[..., Store], tmp_path: Path, tiny: Recipe
) -> None:
    extract_folder(colors, tmp_path / "f.h5", tiny)
    classifier = train_classifier(open_store(tmp_path / "f.h5"), SvmOptions(costs=(1.0,)))
    names = [
        "../colors/red/1.png",
        str(colors / "red/1.png"),
        "red/1.png#9,9,nan,3",
        "red/1.png",
        "red/1.png#0,0,9,9",
    ]
    store = make_store(np.eye(5), "evil.h5", names=names, recipe=replace(tiny, pooling="avg"), root=str(colors))
    found = list(predict(classifier, [store.path]))
    assert [one.name for one in found] == names
    assert [one.error for one in found] == [
        "the name leads out of the image folder, and is not followed",
        "the name is absolute, and is not followed",
        "no such file",
        None,
        None,
    ]
    assert [one.scores is None for one in found] == [True, True, True, False, False]


def test_windows_and_a_recipe_that_crops(colors: Path, tmp_path: Path, tiny: Recipe) -> None:
    extract_folder(colors, tmp_path / "f.h5", replace(tiny, crop="center"))
    classifier = train_classifier(open_store(tmp_path / "f.h5"), SvmOptions(costs=(1.0,)))
    extract_folder(colors, tmp_path / "w.h5", tiny, windows={"red/1.png": np.array([[0, 0, 30, 40]])})
    with pytest.raises(UsageError, match=r"w\.h5: expected images, found windows: the classifier.s recipe crops"):
        list(predict(classifier, [tmp_path / "w.h5"]))


def test_other_weights_are_refused(colors: Path, tmp_path: Path, tiny: Recipe) -> None:
    """A model recognizes the network it was trained for, even if another has the same name."""
    extract_folder(colors, tmp_path / "f.h5", tiny)
    classifier = replace(
        train_classifier(open_store(tmp_path / "f.h5"), SvmOptions(costs=(1.0,))), weights_sha256="1" * 64
    )
    with pytest.raises(ModelError, match="expected the weights that the classifier was trained with"):
        list(predict(classifier, [colors]))
    notes: list[str] = []
    with pytest.raises(ModelError):
        list(predict(classifier, [tmp_path / "f.h5"], note=notes.append))
    assert "was made with other weights" in notes[0]
