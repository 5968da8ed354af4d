"""Recipes of several layers and backbones: one descriptor of parts, each as its own recipe would make it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sppfeat.errors import SppFeatError, StoreError, UsageError
from sppfeat.extraction import Describer, extract_folder
from sppfeat.images import Item
from sppfeat.recipe import Recipe, RunOptions
from sppfeat.store import DescriptorView, Store, open_store, verify_store

MakeImages = Callable[..., Path]

RESNET, VIT = "timm:test_resnet", "timm:test_efficientnet"
SEVERAL = Recipe(
    backbone=f"{RESNET}@64,96+{VIT}",
    weights="random",
    layer="layer2,layer4+blocks.2",
    scales=(80,),
    levels=(3, 1),
    dtype="float32",
    size_multiple=16,
)
OPTIONS = [RunOptions(device="cpu", engine="torch"), RunOptions(device="cpu")]


def described(folder: Path, path: Path, recipe: Recipe, options: RunOptions | None = None) -> Store:
    extract_folder(folder, path, recipe, options)
    return open_store(path)


def alone(recipe: Recipe, backbone: str, layer: str, scales: tuple[int, ...]) -> Recipe:
    return replace(recipe, backbone=backbone, layer=layer, scales=scales)


@pytest.mark.parametrize("options", OPTIONS, ids=["torch", "auto"])
@pytest.mark.parametrize("fuse", ["mean", "max", "concat"])
def test_parts_are_the_descriptors_of_their_own_recipes(
    make_images: MakeImages, tmp_path: Path, options: RunOptions, fuse: str
) -> None:
    folder = make_images(7)
    recipe = replace(SEVERAL, fuse=fuse)
    store = described(folder, tmp_path / "all.h5", recipe, options)
    scales = [(64,), (96,)] if fuse == "concat" else [(64, 96)]
    singles = [(RESNET, layer, scale) for scale in scales for layer in ("layer2", "layer4")]
    singles.append((VIT, "blocks.2", (80,)))
    parts = store.recipe.parts(store.dim)
    assert len(parts) == len(singles)
    hashes = []
    for number, (part, single) in enumerate(zip(parts, singles, strict=True)):
        one = described(folder, tmp_path / f"{number}.h5", alone(recipe, *single), options)
        assert (part.backbone, part.layer, part.channels) == (*single[:2], one.dim // recipe.bins)
        assert part.scale == (single[2][0] if fuse == "concat" else None)
        found = np.array(store.descriptors[:, part.start : part.end])
        np.testing.assert_allclose(found, np.array(one.descriptors), rtol=1e-4, atol=1e-6)
        if one.weights_sha256 not in hashes:
            hashes.append(one.weights_sha256)
    assert store.weights_sha256 == "+".join(hashes)
    assert store.recipe.layer == SEVERAL.layer and store.recipe.channels == tuple(part.channels for part in parts)


def test_windows_are_pooled_from_every_layer_of_every_backbone(make_images: MakeImages, tmp_path: Path) -> None:
    paths = sorted(make_images(3).iterdir())
    windows = np.array([[0, 0, 30, 20], [5, 8, 40, 44], [0, 0, 5, 5]], np.int32)
    items = [replace(Item.at(path), windows=windows) for path in paths]
    describer = Describer(SEVERAL, OPTIONS[0])
    for scales in ("all", "nearest"):
        rows = [each.rows for each in describer.describe(items, scales=scales)]
        start = 0
        for backbone, layer, own in (
            (RESNET, "layer2", (64, 96)),
            (RESNET, "layer4", (64, 96)),
            (VIT, "blocks.2", (80,)),
        ):
            single = Describer(alone(SEVERAL, backbone, layer, own), OPTIONS[0])
            end = start + single.dim
            for found, done in zip(rows, single.describe(items, scales=scales), strict=True):
                assert found is not None and done.rows is not None
                np.testing.assert_allclose(found[:, start:end], done.rows, rtol=1e-4, atol=1e-6)
            start = end
        assert start == describer.dim == describer.nearest_dim
    concatenated = Describer(replace(SEVERAL, fuse="concat"), OPTIONS[0])
    assert concatenated.nearest_dim == describer.dim < concatenated.dim
    (done,) = concatenated.describe([replace(items[0], windows=windows[:0])], scales="nearest")
    assert done.rows is not None and done.rows.shape == (0, concatenated.nearest_dim)


def test_a_store_of_parts_is_resumed_and_checked(make_images: MakeImages, tmp_path: Path) -> None:
    folder = make_images(5)
    path = tmp_path / "all.h5"
    described(folder, path, SEVERAL)
    again = extract_folder(folder, path, SEVERAL)
    assert (again.described, again.reused) == (0, 5)
    assert extract_folder(folder, path, open_store(path).recipe).reused == 5, "the recipe as the store holds it"
    assert verify_store(open_store(path)) == []
    with pytest.raises(StoreError, match="layer: store layer2,layer4.blocks.2, asked layer4.blocks.2; weights"):
        extract_folder(folder, path, replace(SEVERAL, layer="layer4+blocks.2"))
    with pytest.raises(UsageError, match=r"channels: expected \(\d+, \d+, \d+\), found \(1, 2, 3\)"):
        Describer(replace(SEVERAL, channels=(1, 2, 3)))


@pytest.mark.parametrize(
    ("only", "backbone", "layer", "scales"),
    [
        (("layer4",), RESNET, "layer4", (64, 96)),
        ((RESNET,), RESNET, "layer2,layer4", (64, 96)),
        ((VIT,), VIT, "blocks.2", (80,)),
        (("layer2", VIT), f"{RESNET}@64,96+{VIT}", "layer2+blocks.2", (80,)),
    ],
)
@pytest.mark.parametrize("levels", [None, (1,)])
def test_a_slice_is_what_its_own_recipe_makes(
    make_images: MakeImages,
    tmp_path: Path,
    only: tuple[str, ...],
    backbone: str,
    layer: str,
    scales: tuple[int, ...],
    levels: tuple[int, ...] | None,
) -> None:
    folder = make_images(4)
    recipe = replace(SEVERAL, fuse="concat")
    store = described(folder, tmp_path / "all.h5", recipe)
    view = DescriptorView(store, np.array([2, 0]), levels, only)
    wanted = replace(recipe, backbone=backbone, layer=layer, scales=scales, levels=levels or recipe.levels)
    expected = described(folder, tmp_path / "one.h5", wanted)
    np.testing.assert_allclose(view[:], np.array(expected.descriptors)[[2, 0]], rtol=1e-4, atol=1e-6)
    assert view.shape == (2, expected.dim) and view.weights_sha256 == expected.weights_sha256
    # One backbone's own input is filled in once it is loaded.
    fields = {text.split(":")[0] for text in view.recipe.differences(expected.recipe, ("one", "other"))}
    assert fields <= {"mean", "std", "interpolation"} and view.recipe.channels == expected.recipe.channels


def test_parts_that_are_not_there_are_named(make_images: MakeImages, tmp_path: Path) -> None:
    store = described(make_images(2), tmp_path / "all.h5", SEVERAL)
    with pytest.raises(UsageError, match="unknown part 'layer3'.*layer2"):
        DescriptorView(store, only=("layer3",))
    with pytest.raises(UsageError, match="its 2 scales were fused by mean over all levels"):
        DescriptorView(store, levels=(1,))


def test_backbones_that_resize_in_different_ways_are_told(
    make_images: MakeImages, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each gets the interpolation that it was trained with."""
    recipe = Recipe(
        backbone="torchvision:squeezenet1_1+efficientnet_lite0", weights="random", scales=(64,), levels=(1,)
    )
    with caplog.at_level(logging.INFO):
        store = described(make_images(2), tmp_path / "f.h5", recipe, OPTIONS[0])
    assert "squeezenet1_1 by bilinear, efficientnet_lite0 by bicubic" in caplog.text
    first = described(
        make_images(2), tmp_path / "g.h5", replace(recipe, backbone="torchvision:squeezenet1_1"), OPTIONS[0]
    )
    part = store.recipe.parts(store.dim)[0]
    np.testing.assert_allclose(store.descriptors[:, : part.end], first.descriptors[:], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": "layer2,layer9+blocks.2"}, "backbone timm:test_resnet: unknown layer 'layer9'"),
        ({"backbone": f"{RESNET}+efficientnet_lite9", "layer": None}, "unknown backbone 'efficientnet_lite9'"),
        ({"layer": "layer2+blocks.4", "scales": (16,)}, "scale 16: backbone timm:test_efficientnet needs at least"),
    ],
)
def test_each_backbone_is_checked(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SppFeatError, match=message):
        Describer(replace(SEVERAL, **changes))  # type: ignore[arg-type]


def test_a_classifier_of_a_part_takes_the_rows_of_a_store(
    make_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was trained on need not be described again."""
    from sppfeat.svm import SvmOptions
    from sppfeat.transfer import Labels, predict
    from sppfeat.transfer.train_classifier import train_classifier

    folder = make_images(6)
    store = described(folder, tmp_path / "all.h5", replace(SEVERAL, fuse="concat"))
    labels = Labels({name: "ab"[at % 2] for at, name in enumerate(store.names)}, {})
    monkeypatch.setattr("sppfeat.transfer.prediction.Describer", None)
    for only in (("layer4",), (VIT,), ("layer2", VIT), None):
        options = SvmOptions(costs=(1.0,), only=only, levels=(1,))
        classifier = train_classifier(store, options, labels=labels)
        notes: list[str] = []
        found = list(predict(classifier, [tmp_path / "all.h5"], note=notes.append))
        assert len(found) == 6 and notes == []
