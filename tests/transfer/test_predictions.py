"""Predictions as they are given out: in order, by the paths that the user gave, as a CSV file and as a page."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
from conftest import TINY
from PIL import Image
from safetensors.torch import save_file

from sppfeat import BackboneError, ModelError, ReportError, extract_folder, open_store
from sppfeat.images import as_given
from sppfeat.svm import SvmOptions
from sppfeat.transfer import (
    Classifier,
    check_predictions_csv,
    open_classifier,
    predict,
    ranked,
    save_classifier,
    write_predictions_csv,
    write_predictions_page,
)
from sppfeat.transfer.train_classifier import train_classifier

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images that are roughly red or blue, of several shapes, so that batches mix their order."""
    generator = np.random.default_rng(0)
    for channel, name in ((0, "red"), (2, "blue")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(7):
            pixels = generator.integers(0, 90, (64 + 32 * (number % 3), 80, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def model(images: Path, tmp_path: Path) -> Path:
    extract_folder(images, tmp_path / "f.h5", TINY)
    save_classifier(train_classifier(open_store(tmp_path / "f.h5"), SvmOptions(costs=(1.0,))), tmp_path / "m.h5")
    return tmp_path / "m.h5"


def test_paths_are_those_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "a").mkdir(parents=True)
    (tmp_path / "here" / "a" / "x.png").touch()
    monkeypatch.chdir(tmp_path / "here")
    path = str(tmp_path / "here" / "a" / "x.png")
    given = {
        "a": "a/x.png",
        "a/": "a/x.png",
        "./a": "./a/x.png",
        "../here": "../here/a/x.png",
        str(tmp_path): path,
        "./a/x.png": "./a/x.png",
        "list.txt": "a/x.png",
    }
    assert {source: as_given(path, [source]) for source in given} == given
    assert as_given(path, [str(tmp_path), "a"]) == "a/x.png"  # the nearest
    assert as_given("/elsewhere/x.png", ["list.txt"]) == "/elsewhere/x.png"
    assert as_given("s3://bucket/x.png", ["s3://bucket/"]) == "s3://bucket/x.png"


def test_the_command(images: Path, model: Path, tmp_path: Path, run_sppfeat: Run) -> None:
    (images / "bad.png").write_bytes(b"no image")
    page, table = tmp_path / "p.html", tmp_path / "p.csv"
    done = run_sppfeat("predict", model, "images", "--top", "1", "--html", page, "--csv", table, cwd=tmp_path)
    assert done.returncode == 3 and "failed: images/bad.png: not an image" in done.stderr
    lines = [line.partition(": ") for line in done.stdout.splitlines()]
    paths = [path for path, _, _ in lines]
    assert paths == sorted(paths) == [f"images/{name}/{n}.png" for name in ("blue", "red") for n in range(7)]
    assert all(label.startswith(path.split("/")[1]) for path, _, label in lines)

    rows = list(csv.DictReader(table.read_text("utf-8").splitlines()))
    assert [row["path"] for row in rows] == ["images/bad.png", *paths]
    assert rows[0]["error"].startswith("not an image") and rows[0]["label"] == "" and rows[1]["rank"] == "1"
    assert [f"{row['label']} {float(row['score']):.2f}" for row in rows[1:]] == [shown for _, _, shown in lines]
    text = page.read_text()
    assert text.count("data:image/jpeg") == 14 and text.count('class="card class"') == 2
    assert "images/bad.png: not an image" in text

    again = run_sppfeat("predict", model, "images", "--csv", table, cwd=tmp_path)
    assert again.returncode == 1 and "already exists; choose another output, or use --overwrite" in again.stderr
    none = run_sppfeat("predict", model, "images", "--top", "0", cwd=tmp_path)
    assert none.stderr == "sppfeat: --top must be at least 1, found 0\n" and none.returncode == 2
    quiet = run_sppfeat("predict", model, "red", "--root", tmp_path, "--quiet", cwd=images)
    assert (quiet.returncode, quiet.stderr) == (0, "") and quiet.stdout.startswith("images/red/0.png: red ")
    store = run_sppfeat("predict", model, tmp_path / "f.h5")
    assert store.returncode == 0 and store.stdout.startswith("blue/0.png: blue ")


def test_weights_that_moved(images: Path, tmp_path: Path) -> None:
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "w.safetensors")
    extract_folder(images, tmp_path / "f.h5", replace(TINY, weights=str(tmp_path / "w.safetensors")))
    classifier = train_classifier(open_store(tmp_path / "f.h5"), SvmOptions(costs=(1.0,)))
    shutil.move(tmp_path / "w.safetensors", tmp_path / "moved.safetensors")
    with pytest.raises(BackboneError, match="found no such file"):
        list(predict(classifier, [images]))
    found = list(predict(classifier, [images], weights=str(tmp_path / "moved.safetensors")))
    assert len(found) == 14 and all(one.scores is not None for one in found)
    with pytest.raises(ModelError, match="expected the weights that the classifier was trained with"):
        list(predict(classifier, [images], weights="random"))


def test_files_are_written_only_where_they_may_be(images: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("name,price\n")
    with pytest.raises(ReportError, match="expected a CSV file of predictions or a new file, found another file"):
        check_predictions_csv(tmp_path / "notes.csv", overwrite=True)
    classifier: Classifier = open_classifier(model)
    name = os.fsdecode(b"\xff <b>.png")
    shutil.copy(images / "red" / "0.png", images / name)
    found = ranked(classifier, predict(classifier, [images / name]), 2)
    write_predictions_csv(check_predictions_csv(tmp_path / "p.csv", overwrite=False), found)
    (first, _) = csv.DictReader((tmp_path / "p.csv").read_text("utf-8").splitlines())
    assert first["path"] == f"{images}/\\xff <b>.png" and first["label"] == "red"
    write_predictions_page(tmp_path / "p.html", found, title="Classes <of> it")
    text = (tmp_path / "p.html").read_text("utf-8")
    assert "&lt;b&gt;.png" in text and "<b>.png" not in text and "Classes &lt;of&gt; it" in text
