"""Vocabularies: words, files good and damaged, and backbone sift-bow as data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from textures import random_vocabulary, save_random

from sppfeat import BackboneError, ModelError, Recipe, UsageError
from sppfeat.backbones import Network, Vocabulary, open_vocabulary, save_vocabulary, vocabulary
from sppfeat.files import VOCABULARY, format_of


@pytest.mark.parametrize("block", [1 << 18, 14])
def test_words_are_the_nearest_centers(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_BLOCK_VALUES", block)
    known = random_vocabulary(7)
    descriptors = np.random.default_rng(1).integers(0, 120, (50, 128)).astype(np.float32)
    expected = [
        min(range(7), key=lambda word: float(((one - known.centers[word].astype(float)) ** 2).sum()))
        for one in descriptors
    ]
    found = known.words_of(descriptors)
    assert found.dtype == np.int32 and found.tolist() == expected
    assert known.words_of(known.centers).tolist() == list(range(7))
    assert known.words_of(descriptors[:0]).shape == (0,)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    known = replace(random_vocabulary(5, 3), images=4, descriptors=9)
    save_vocabulary(known, tmp_path / "v.h5")
    assert format_of(tmp_path / "v.h5") == VOCABULARY
    found = open_vocabulary(tmp_path / "v.h5")
    np.testing.assert_array_equal(found.centers, known.centers)
    for name in ("seed", "images", "descriptors", "objective", "versions", "words", "sha256"):
        assert getattr(found, name) == getattr(known, name)
    with pytest.raises(ModelError, match="already exists"):
        save_vocabulary(known, tmp_path / "v.h5")
    (tmp_path / "photo.h5").write_bytes(b"not ours")
    with pytest.raises(ModelError, match="photo.h5"):
        save_vocabulary(known, tmp_path / "photo.h5", overwrite=True)
    assert (tmp_path / "photo.h5").read_bytes() == b"not ours"


def test_the_sha256_is_that_of_the_centers() -> None:
    known = random_vocabulary(5)
    assert replace(known, seed=9, images=7, versions={}).sha256 == known.sha256
    centers = known.centers.copy()
    centers[2, 3] += 1
    assert replace(known, centers=centers).sha256 != known.sha256
    assert replace(known, centers=known.centers[:4]).sha256 != known.sha256


def damaged(path: Path, **changes: Any) -> Path:
    """A vocabulary with other attributes, or other centers."""
    save_random(path)
    with h5py.File(path, "r+") as file:
        for name, value in changes.items():
            if name == "centers":
                del file["centers"]
                file["centers"] = value
            elif value is None:
                del file.attrs[name]
            else:
                file.attrs[name] = value
    return path


def with_one(value: float) -> np.ndarray:
    centers = random_vocabulary(4).centers.copy()
    centers[1, 1] = value
    return centers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"centers": np.zeros((4, 127), np.float32)}, r"1 to 65536 words x 128 values, found float32 \[4, 127\]"),
        ({"centers": np.zeros((0, 128), np.float32)}, r"found float32 \[0, 128\]"),
        ({"centers": np.zeros(128, np.float32)}, r"found float32 \[128\]"),
        ({"centers": np.zeros((4, 128), np.float64)}, r"found float64 \[4, 128\]"),
        ({"centers": with_one(np.nan)}, "values from 0 to 256, found others"),
        ({"centers": with_one(np.inf)}, "values from 0 to 256, found others"),
        ({"centers": with_one(-1)}, "values from 0 to 256, found others"),
        ({"objective": np.nan}, "expected a finite objective, found nan"),
        ({"objective": "much"}, "damaged: expected a vocabulary"),
        ({"seed": None}, "damaged: expected a vocabulary"),
        ({"versions": "[1]"}, "expected a JSON document 'versions'"),
        ({"format": "sppfeat-svm"}, "expected a vocabulary, found an SVM; `sppfeat train vocabulary` makes one"),
        ({"format_version": 2}, "its format 2 is newer than this sppfeat reads"),
    ],
)
def test_damage_is_told(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = damaged(tmp_path / "v.h5", **changes)
    with pytest.raises(ModelError, match=message) as error:
        open_vocabulary(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    with pytest.raises(BackboneError, match=message):
        _ = Network(Recipe(backbone="sift-bow", weights=str(path), pooling="avg")).descriptions


def test_what_is_no_vocabulary_is_told(tmp_path: Path) -> None:
    whole = save_random(tmp_path / "v.h5").read_bytes()
    (tmp_path / "short.h5").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.h5").write_text("words")
    for name, message in (
        ("none.h5", "expected a vocabulary, found no such file"),
        ("short.h5", "expected a vocabulary, found a file that cannot be opened"),
        ("text.h5", "not an HDF5 file"),
        (".", "expected a vocabulary, found a folder"),
    ):
        with pytest.raises(ModelError, match=message):
            open_vocabulary(tmp_path / name)


def network(path: Path, **fields: Any) -> Network:
    return Network(Recipe(**{"backbone": "sift-bow", "weights": str(path), "pooling": "avg"} | fields))


def test_a_vocabulary_describes_itself_as_a_network_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random(tmp_path / "v.h5", 6)
    monkeypatch.chdir(tmp_path)
    (found,) = network(Path("v.h5")).descriptions
    assert (found.layer.name, found.channels, found.layer.stride, found.minimum_side) == ("words", 6, 8, 16)
    assert found.weights_sha256 == open_vocabulary("v.h5").sha256
    # The store that is made from it is used elsewhere.
    assert found.recipe.weights == str(tmp_path / "v.h5") and found.recipe.layer == "words"
    assert network(tmp_path / "v.h5", layer="words").descriptions == (found,)
    rows, columns = found.geometry(100, 16)
    assert (rows.size, rows.stride, rows.offset, rows.receptive_field) == (11, 8, 7.5, 16)
    assert (columns.size, columns.stride, columns.offset) == (1, 8, 7.5)


def test_only_the_layer_of_words_exists(tmp_path: Path) -> None:
    save_random(tmp_path / "v.h5")
    for layer in ("blocks", "words,blocks"):
        with pytest.raises(UsageError, match="backbone sift-bow: unknown layer 'blocks': expected one of words"):
            _ = network(tmp_path / "v.h5", layer=layer).descriptions


def test_it_is_no_network_and_a_network_is_none(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="backbone sift-bow: is no network"):
        _ = network(save_random(tmp_path / "v.h5")).backbone
    with pytest.raises(BackboneError, match="efficientnet_lite0: has no vocabulary"):
        _ = Network(Recipe()).vocabulary


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": "pretrained"}, "backbone sift-bow: expected a vocabulary, with --vocabulary FILE .*'pretrained'"),
        ({"weights": "random"}, "found weights 'random'"),
        ({"pooling": "gem"}, "pooling: expected avg or max for backbone sift-bow, found 'gem'"),
        ({"precision": "bfloat16"}, "precision: expected float32 for backbone sift-bow, found 'bfloat16'"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean: expected none for backbone sift-bow, found 0.5,0.5,0.5"),
        ({"std": (0.5, 0.5, 0.5)}, "std: expected none for backbone sift-bow"),
    ],
)
@pytest.mark.parametrize("backbone", ["sift-bow", "sift-bow@128", "efficientnet_lite0+sift-bow"])
def test_recipes_that_it_has_no_values_for(backbone: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe(**{"backbone": backbone, "weights": "v.h5"} | fields)


def test_equal_vocabularies_are_not_compared_value_by_value() -> None:
    known = random_vocabulary(2)
    assert known != random_vocabulary(2) and isinstance(known, Vocabulary)
