"""The engine of backbone sift-bow: its values, windows, choice, and company of networks."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from conftest import TINY
from PIL import Image
from textures import make_textures, random_vocabulary, save_random, texture

from sppfeat import Describer, MissingExtraError, Recipe, RunOptions, UsageError, extract_folder, open_store
from sppfeat.backbones import Network, dense_sift, grid_size
from sppfeat.engines import Engine, choose_engine, load_engine
from sppfeat.images import Item, read_image
from sppfeat.store import DescriptorView

cv2 = pytest.importorskip("cv2")

WORDS = 6


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Of a vocabulary of few words, all of which occur."""
    path = save_random(tmp_path / "v.h5", WORDS)
    return Recipe(
        backbone="sift-bow",
        weights=str(path),
        pooling="avg",
        normalize="none",
        levels=(3, 2, 1),
        scales=("native",),
        dtype="float32",
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_textures(tmp_path / "images", 4)


def load(recipe: Recipe) -> Engine:
    return load_engine(Network(recipe))


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return texture("checks", height, width, seed)


def words_of(image: np.ndarray) -> np.ndarray:
    """[h, w] the nearest words of patches, one by one."""
    centers = random_vocabulary(WORDS).centers.astype(np.float64)
    distances = ((dense_sift(image)[:, None].astype(np.float64) - centers[None]) ** 2).sum(2)
    return distances.argmin(1).reshape(grid_size(*image.shape[:2]))


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("levels", [(3, 2, 1), (1,), (4, 5)])
def test_rows_are_the_pyramid_of_one_hot_words(recipe: Recipe, pooling: str, levels: tuple[int, ...]) -> None:
    engine = load(replace(recipe, pooling=pooling, levels=levels))
    images = np.stack([pixels(70, 93, seed) for seed in range(3)])
    (maps,) = engine.feature_maps(images)
    np.testing.assert_array_equal(maps, [words_of(image) for image in images])
    expected = [reference.pool_words(one, WORDS, levels, pooling) for one in maps]
    np.testing.assert_allclose(engine.pool(maps), expected, rtol=1e-6, atol=1e-9)
    rois = np.array([[0, 0, maps.shape[2] - 1, maps.shape[1] - 1], [1, 2, 4, 3], [5, 5, 5, 5]])
    found = engine.pool_windows(maps[1], rois)
    np.testing.assert_allclose(found, reference_windows(maps[1], rois, levels, pooling), rtol=1e-6, atol=1e-9)


def reference_windows(one: np.ndarray, rois: np.ndarray, levels: tuple[int, ...], pooling: str) -> list[np.ndarray]:
    parts = [one[y1 : y2 + 1, x1 : x2 + 1] for x1, y1, x2, y2 in rois]
    return [reference.pool_words(part, WORDS, levels, pooling) for part in parts]


def test_threads_give_what_one_gives(recipe: Recipe) -> None:
    engine = load(recipe)
    images = [pixels(64, 80, seed)[None] for seed in range(8)]
    expected = [engine.feature_maps(one)[0] for one in images]
    found: dict[int, np.ndarray] = {}

    def run(at: int) -> None:
        with engine.lane():
            found[at] = engine.feature_maps(images[at])[0]

    threads = [threading.Thread(target=run, args=(at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at, one in enumerate(expected):
        np.testing.assert_array_equal(found[at], one)


def test_opencv_runs_without_threads_of_its_own_and_has_them_back(recipe: Recipe) -> None:
    engine, before = load(recipe), cv2.getNumThreads()
    cv2.setNumThreads(3)
    try:
        with engine.at_work(), engine.lane():
            assert cv2.getNumThreads() == 1
        assert cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)


def test_it_is_chosen_for_bags_of_words_alone(recipe: Recipe) -> None:
    engine = load(recipe)
    assert (engine.name, engine.device) == ("sift", "cpu")
    for device in ("auto", "cpu"):
        assert choose_engine(recipe, RunOptions(device=device)) == "sift"
    for options, message in (
        (RunOptions(engine="torch"), "engine torch: expected auto for backbone sift-bow"),
        (RunOptions(engine="openvino"), "engine openvino: expected auto for backbone sift-bow"),
        (RunOptions(device="cuda"), "backbone sift-bow runs on the CPU: expected --device cpu or auto, found cuda"),
        (RunOptions(device="cuda:1"), "found cuda:1"),
    ):
        with pytest.raises(UsageError, match=message):
            choose_engine(recipe, options)
        with pytest.raises(UsageError, match=message):
            Describer(recipe, options)


@pytest.mark.parametrize("device", ["cuda:0", "cuda:0,1"])
def test_gpus_are_refused_before_images_are_listed(recipe: Recipe, device: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="backbone sift-bow runs on the CPU: .*found cuda:0"):
        extract_folder(tmp_path / "none", tmp_path / "f.h5", recipe, RunOptions(device=device))


def test_no_gpu_is_looked_for(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(*arguments: Any) -> None:
        raise AssertionError("a GPU was looked for")

    monkeypatch.setattr("sppfeat.engines.engine.resolve_device", look)
    assert Describer(recipe).device == "cpu"


def test_a_network_beside_it_has_the_device(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sppfeat.engines.engine.resolve_device", lambda name: "cuda:0")
    both = replace(recipe, backbone=f"sift-bow+{TINY.backbone}", weights=f"{recipe.weights}+random", scales=(64,))
    assert Describer(both).device == "cuda:0"


def test_a_missing_opencv_is_told(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    message = "backbone sift-bow needs cv2, which is not installed: pip install 'sppfeat\\[detect\\]'"
    with pytest.raises(MissingExtraError, match=message):
        choose_engine(recipe, RunOptions())


def test_a_row_does_not_depend_on_its_batch_and_windows_are_parts_of_it(recipe: Recipe, folder: Path) -> None:
    paths = sorted(folder.rglob("*.png"))
    describer = Describer(recipe)
    rows = {each.position: each.rows for each in describer.describe(paths)}
    images = [read_image(str(path)).pixels for path in paths]
    for at, image in enumerate(images):
        expected = reference.pool_words(words_of(np.asarray(image)), WORDS, (3, 2, 1), "avg")
        np.testing.assert_allclose(rows[at][0], expected, rtol=1e-6)
    width, height = images[0].size
    # The second shows the patches whose middles, 7.5 + 8 i, lie within: 2 to 4 across, 1 to 3 down.
    windows = np.array([[0, 0, width - 1, height - 1], [20, 12, 42, 34]], np.float64)
    (found,) = describer.describe([replace(Item.at(paths[0]), windows=windows)])
    assert found.rows is not None and not found.row_errors
    np.testing.assert_allclose(found.rows[0], rows[0][0], rtol=1e-6)
    part = words_of(np.asarray(images[0]))[1:4, 2:5]
    np.testing.assert_allclose(found.rows[1], reference.pool_words(part, WORDS, (3, 2, 1), "avg"), rtol=1e-6)


def test_images_below_one_patch_fail_alone(recipe: Recipe, tmp_path: Path) -> None:
    for side in (15, 16):
        Image.fromarray(pixels(side, 40)).save(tmp_path / f"{side}.png")
    small, large = Describer(recipe).describe([tmp_path / "15.png", tmp_path / "16.png"])
    assert small.error is not None and "the backbone needs at least 16 per side" in small.error
    assert large.error is None


@pytest.mark.parametrize("normalize", ["none", "l2", "signed-sqrt-l2"])
@pytest.mark.parametrize("levels", [(2, 1), (3,), (1,), (3, 1), (3, 2), (1, 3)])
def test_levels_cut_out_of_a_store_are_those_of_their_own_recipe(
    recipe: Recipe, folder: Path, tmp_path: Path, normalize: str, levels: tuple[int, ...]
) -> None:
    recipe = replace(recipe, normalize=normalize)
    for name, each in (("all.h5", recipe), ("some.h5", replace(recipe, levels=levels))):
        extract_folder(folder, tmp_path / name, each)
    view = DescriptorView(open_store(tmp_path / "all.h5"), levels=levels)
    own = open_store(tmp_path / "some.h5")
    assert view.recipe == own.recipe and view.recipe.identity(view.weights_sha256) == own.recipe_hash
    np.testing.assert_allclose(view[:], own.descriptors[:], rtol=1e-5, atol=1e-7)


def test_words_and_a_network_are_parts_of_one_row(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    own = replace(recipe, scales=(64,), normalize="signed-sqrt-l2")
    network = replace(own, backbone=TINY.backbone, weights="random")
    both = replace(own, backbone=f"{network.backbone}+sift-bow@96", weights=f"random+{recipe.weights}")
    for name, each in (("both", both), ("words", replace(own, scales=(96,))), ("network", network)):
        extract_folder(folder, tmp_path / f"{name}.h5", each)
    store, words, alone = (open_store(tmp_path / f"{name}.h5") for name in ("both", "words", "network"))
    first, second = store.recipe.parts(store.dim)
    assert (second.backbone, second.layer, second.channels) == ("sift-bow", "words", WORDS)
    np.testing.assert_allclose(
        store.descriptors[:, first.start : first.end], alone.descriptors[:], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(store.descriptors[:, second.start : second.end], words.descriptors[:], rtol=1e-6)
    assert store.weights_sha256 == f"{alone.weights_sha256}+{words.weights_sha256}"
    view = DescriptorView(store, only=("sift-bow",))
    np.testing.assert_array_equal(view[:], store.descriptors[:, second.start : second.end])
    # Another network of the same recipe takes only its own levels' weights along.
    reduced = DescriptorView(store, levels=(3, 1))
    extract_folder(folder, tmp_path / "reduced.h5", replace(both, levels=(3, 1)))
    np.testing.assert_allclose(reduced[:], open_store(tmp_path / "reduced.h5").descriptors[:], rtol=1e-4, atol=1e-6)


def test_another_vocabulary_makes_another_store(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    extract_folder(folder, tmp_path / "f.h5", recipe)
    moved = save_random(tmp_path / "moved.h5", WORDS)
    assert extract_folder(folder, tmp_path / "f.h5", replace(recipe, weights=str(moved))).reused == 12
    save_random(moved, WORDS, seed=1)
    with pytest.raises(Exception, match="was made with another recipe \\(weights: "):
        extract_folder(folder, tmp_path / "f.h5", replace(recipe, weights=str(moved)))
