"""What is kept of a network: as good as the network itself, or made anew."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import save_file
from timm import create_model

from sppfeat import BackboneError, Recipe
from sppfeat.backbones import backbone as backbone_module
from sppfeat.backbones.description import _models_of, read_description
from sppfeat.backbones.network import Network


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sppfeat" / "networks"


@pytest.mark.parametrize(
    "recipe",
    [TINY, Recipe(), Recipe(layer="conv_head", mean=(0.1, 0.2, 0.3)), replace(TINY, backbone="timm:resnetblur18")],
    ids=["tiny", "default", "another layer", "no geometry"],
)
def test_what_is_read_back_is_what_was_found(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Network(recipe).descriptions[0]
    monkeypatch.setattr(backbone_module, "load_backbone", None)  # it would fail
    assert Network(recipe).descriptions[0] == found
    # A store holds the recipe filled in; and what is done with the maps makes no other network.
    assert Network(found.recipe).descriptions[0] == found
    other = replace(recipe, levels=(2, 1), scales=(96, 128), pooling="avg")
    again = Network(other).descriptions[0]
    assert again.recipe == replace(found.recipe, levels=(2, 1), scales=(96, 128), pooling="avg")
    assert again.weights_sha256 == found.weights_sha256


@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "flipped", "foreign", "folder"])
def test_one_that_does_not_hold_is_made_anew(own_cache: Path, damage: str) -> None:
    found = Network(TINY).descriptions[0]
    for kept in own_cache.glob("*.json"):
        good = kept.read_bytes()
        half = len(good) // 2
        if damage in ("gone", "folder"):
            kept.unlink()
            if damage == "folder":
                kept.mkdir()
        elif damage == "foreign" and os.geteuid() == 0:
            os.chown(kept, 12345, 12345)
        else:
            flipped = good[:half] + bytes([good[half] ^ 1]) + good[half + 1 :]
            kept.write_bytes({"empty": b"", "cut": good[:half], "flipped": flipped}.get(damage, b"foreign"))
    assert read_description(TINY) is None
    assert Network(TINY).descriptions[0] == found
    assert damage == "folder" or read_description(TINY) == found


def test_a_file_of_weights_that_changed_is_another_network(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    recipe = Recipe(backbone="timm:test_resnet", weights=str(path), layer="layer1")
    state = {name: value.contiguous() for name, value in create_model("test_resnet").state_dict().items()}
    save_file(state, path)
    first = Network(recipe).descriptions[0]
    assert read_description(recipe) == first
    name = next(iter(state))
    save_file({**state, name: torch.flip(state[name], [0]).contiguous()}, path)
    assert read_description(recipe) is None
    assert Network(recipe).descriptions[0].weights_sha256 != first.weights_sha256


def test_other_versions_are_other_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    Network(TINY).descriptions  # noqa: B018
    monkeypatch.setattr("sppfeat.backbones.description.network_versions", lambda: {"torch": "0"})
    assert read_description(TINY) is None


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert Network(TINY).descriptions[0] == Network(TINY).descriptions[0]


def test_a_file_that_is_replaced_while_it_is_read_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    recipe = Recipe(backbone="timm:test_resnet", weights=str(path), layer="layer1")
    state = {name: value.contiguous() for name, value in create_model("test_resnet").state_dict().items()}
    other = {name: value + 1 if value.is_floating_point() else value for name, value in state.items()}
    save_file(state, path)
    fold = backbone_module.fold_batch_norms

    def replaced(trunk: torch.fx.GraphModule) -> torch.fx.GraphModule:
        save_file(other, path)
        return fold(trunk)

    monkeypatch.setattr(backbone_module, "fold_batch_norms", replaced)
    first = Network(recipe).descriptions[0]
    monkeypatch.setattr(backbone_module, "fold_batch_norms", fold)
    assert read_description(recipe) is None
    assert Network(recipe).descriptions[0].weights_sha256 != first.weights_sha256


def test_a_copy_with_the_size_and_time_of_the_old_file_is_another_network(tmp_path: Path) -> None:
    path, new = tmp_path / "w.safetensors", tmp_path / "new.safetensors"
    recipe = Recipe(backbone="timm:test_resnet", weights=str(path), layer="layer1")
    state = {name: value.contiguous() for name, value in create_model("test_resnet").state_dict().items()}
    save_file(state, path)
    save_file({name: value + 1 if value.is_floating_point() else value for name, value in state.items()}, new)
    os.utime(path, (1000, 1000))
    os.utime(new, (1000, 1000))
    first = Network(recipe).descriptions[0]
    os.replace(new, path)
    assert read_description(recipe) is None and Network(recipe).descriptions[0].weights_sha256 != first.weights_sha256


def test_weights_that_are_not_those_described_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Network(TINY).descriptions[0]
    described = Network(TINY)
    assert described.descriptions[0] == found
    load = backbone_module.load_backbone

    def changed(recipe: Recipe) -> backbone_module.Backbone:
        built = load(recipe)
        built.descriptions = (replace(built.descriptions[0], weights_sha256="0" * 64),)
        return built

    monkeypatch.setattr(backbone_module, "load_backbone", changed)
    with pytest.raises(BackboneError, match="its weights have changed since they were described"):
        described.backbone  # noqa: B018
    assert Network(TINY).descriptions[0].weights_sha256 == "0" * 64, "the next run is of the new weights"


def test_weights_in_a_path_that_is_not_utf_8(tmp_path: Path) -> None:
    path = os.path.join(tmp_path, os.fsdecode(b"w\xff.pth"))
    torch.save(create_model("test_resnet").state_dict(), path)
    recipe = Recipe(backbone="timm:test_resnet", weights=path, layer="layer1")
    assert Network(recipe).descriptions[0] == Network(recipe).descriptions[0]


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")

    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    assert Network(TINY).descriptions[0] == Network(TINY).descriptions[0]
    assert read_description(TINY) is None


def test_a_pipe_is_no_entry(own_cache: Path) -> None:
    Network(TINY).descriptions  # noqa: B018
    for kept in own_cache.glob("*.json"):
        kept.unlink()
        os.mkfifo(kept)
    assert read_description(TINY) is None


def test_a_name_of_no_kind_is_refused_without_torch() -> None:
    code = (
        "import sys; from sppfeat import Recipe, UsageError\nfrom sppfeat.backbones import Network\n"
        "try: Network(Recipe(backbone='nope')).descriptions\nexcept UsageError as e: print(e, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("unknown backbone 'nope'") and done.stdout.endswith("False\n")


def test_models_are_known_without_their_libraries() -> None:
    import timm
    from torchvision import models

    assert sorted(_models_of("torchvision")) == models.list_models(module=models)
    assert set(_models_of("timm")) == set(timm.list_models())
    assert _models_of("no_such_library") == []
