"""Bags of visual words from the command line: from images to a vocabulary, a store, classes and a gallery."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from textures import make_textures, save_random

pytest.importorskip("cv2")
pytest.importorskip("faiss")

RUN = """
import sys
from sppfeat_cli import main
try:
    main()
finally:
    names = ("torch", "torchvision", "timm", "openvino")
    print(*[name for name in names if name in sys.modules], file=open("loaded.txt", "w"))
"""
BACKBONE = "--backbone sift-bow --vocabulary v.h5"
PYRAMID = ["--levels", "4,2,1", "--pooling", "avg", "--normalize", "signed-sqrt-l2", "--scales", "native"]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    make_textures(tmp_path / "images", 8)

    def start(*words: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            [sys.executable, "-c", RUN, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
        )

    return start


def document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_way_of_spatial_pyramid_matching(run: Run, tmp_path: Path) -> None:
    loaded = tmp_path / "loaded.txt"
    learned = document(run("train", "vocabulary", "images/train", "-o", "v.h5", "--words", "12", "--json"))
    assert (learned["words"], learned["images"], learned["failed"]) == (12, 12, {})
    assert learned["options"] == {"words": 12, "images": 1000, "descriptors": 200, "seed": 0}
    assert loaded.read_text().split() == []
    about = document(run("inspect", "v.h5", "--json"))
    for key in ("words", "images", "descriptors", "objective", "weights_sha256", "versions"):
        assert about[key] == learned[key]
    assert (about["format"], about["seed"], about["dim"]) == ("vocabulary", 0, 128)
    extract = [
        "extract",
        "images",
        "-o",
        "spm.h5",
        "--backbone",
        "sift-bow",
        "--vocabulary",
        "v.h5",
        *PYRAMID,
        "--json",
    ]
    done = document(run(*extract))
    assert (done["described"], done["dim"], done["engine"], done["device"]) == (24, 21 * 12, "sift", "cpu")
    assert loaded.read_text().split() == []
    assert document(run(*extract))["reused"] == 24
    store = document(run("inspect", "spm.h5", "--json"))
    assert store["weights_sha256"] == learned["weights_sha256"]
    assert store["recipe"]["weights"] == str(tmp_path / "v.h5") and store["recipe"]["layer"] == "words"
    for levels in ("4,2,1", "1"):
        words = ["evaluate", "transfer", "spm.h5", "--protocol", "split", "--levels", levels, "--c", "1", "--json"]
        assert document(run(*words))["value"] == 100
    # Classes and neighbors of images are found with the recipe of the store.
    document(run("train", "svm", "spm.h5", "-o", "svm.h5", "--c", "1", "--json"))
    image = "images/test/down/00.png"
    assert '"down"' in run("predict", "svm.h5", image, "--json").stdout
    document(run("index", "spm.h5", "-o", "gallery", "--json"))
    found = document(run("search", "gallery", image, "--json"))["results"][0]["neighbors"][0]
    assert found["name"] == "test/down/00.png" and found["score"] > 0.99


def test_windows_are_described(run: Run, tmp_path: Path) -> None:
    save_random(tmp_path / "v.h5")
    (tmp_path / "w.csv").write_text("name,x1,y1,x2,y2\ntest/down/00.png,2,2,50,40\ntest/down/00.png,0,0,9,9\n")
    words = ["--backbone", "sift-bow", "--vocabulary", "v.h5", "--windows", "w.csv"]
    assert document(run("extract", "images", "-o", "w.h5", *words, "--json"))["described"] == 2


def test_what_was_learned_is_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "images" / "broken.png").write_bytes(b"not an image")
    words = ["train", "vocabulary", "images", "-o", "v.h5", "--words", "4", "--max-images", "100"]
    done = run(*words)
    assert done.returncode == 3
    assert done.stdout.startswith("v.h5: 4 words from ") and "of 24 images, 1 failed; mean squared" in done.stdout
    assert done.stdout.count("\n") == 1
    assert "failed: broken.png: not an image" in done.stderr
    again = run(*words)
    assert again.returncode == 1 and "v.h5: already exists" in again.stderr
    quiet = run(*words, "--overwrite", "--quiet", "--max-images", "6")
    assert quiet.stdout == quiet.stderr == ""
    text = run("inspect", "v.h5").stdout
    assert "v.h5: vocabulary of 4 words, 128 values each" in text and "opencv" in text
    listed = run("models").stdout
    assert "sift-bow: bags of visual words" in listed


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("--backbone sift-bow", 2, "backbone sift-bow: expected a vocabulary, with --vocabulary FILE"),
        ("--vocabulary v.h5", 2, "--vocabulary: expected backbone sift-bow with it, found efficientnet_lite0"),
        (
            "--backbone sift-bow --vocabulary v.h5 --weights w.pth",
            2,
            "expected no weights of backbone sift-bow beside it",
        ),
        ("--backbone timm:test_resnet+sift-bow --weights a+b --vocabulary v.h5", 2, "beside it, found a+b"),
        ("--backbone sift-bow --vocabulary none.h5", 1, "none.h5: expected a vocabulary, found no such file"),
        ("--backbone sift-bow --vocabulary images", 1, "expected a vocabulary, found a folder"),
        (
            "--backbone sift-bow --vocabulary v.h5 --pooling gem",
            2,
            "pooling: expected avg or max for backbone sift-bow",
        ),
        (
            "--backbone sift-bow --vocabulary v.h5 --engine torch",
            2,
            "engine torch: expected auto for backbone sift-bow",
        ),
        (f"{BACKBONE} --device cuda", 2, "backbone sift-bow runs on the CPU"),
    ],
)
def test_wrong_usage_is_one_line(words: str, code: int, message: str, run: Run, tmp_path: Path) -> None:
    save_random(tmp_path / "v.h5")
    done = run("extract", "images", "-o", "f.h5", *words.split())
    assert done.returncode == code and done.stdout == ""
    assert done.stderr.count("\n") == 1 and message in done.stderr
    assert not (tmp_path / "f.h5").exists()


def test_several_backbones_share_the_option(run: Run, tmp_path: Path) -> None:
    save_random(tmp_path / "v.h5", 5)
    words = ["--backbone", "timm:test_resnet+sift-bow@32,64", "--weights", "random", "--vocabulary", "v.h5"]
    done = document(run("extract", "images", "-o", "f.h5", *words, "--scales", "64", "--levels", "2,1", "--json"))
    assert done["engine"].endswith("+sift")
    about = document(run("inspect", "f.h5", "--json"))
    assert about["recipe"]["weights"] == f"random+{tmp_path / 'v.h5'}"
    assert [part["backbone"] for part in about["parts"]] == ["timm:test_resnet", "sift-bow"]


def test_a_backbone_of_words_has_no_layers_to_list(run: Run) -> None:
    done = run("models", "sift-bow")
    assert done.returncode == 2 and "its only layer, words, has a channel per word" in done.stderr
