"""Networks cut by hooks: transformers' tokens as a grid, maps with channels last, code that cannot be traced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sppfeat.backbones import Network
from sppfeat.backbones.backbone import list_layers, load_backbone, load_trunk
from sppfeat.backbones.hooking import HookedNetwork
from sppfeat.engines import load_engine
from sppfeat.errors import BackboneError, SppFeatError, UsageError
from sppfeat.extraction import Describer
from sppfeat.recipe import Recipe, RunOptions

# One small network of each of more than 40 families: the layer, and the side of its only images, if it is fixed.
FAMILIES = {
    "torchvision:alexnet": None,
    "torchvision:densenet121": None,
    "torchvision:efficientnet_b0": None,
    "torchvision:googlenet": None,
    "torchvision:maxvit_t": 224,
    "torchvision:mnasnet0_5": None,
    "torchvision:mobilenet_v3_small": None,
    "torchvision:regnet_y_400mf": None,
    "torchvision:resnet18": None,
    "torchvision:shufflenet_v2_x0_5": None,
    "torchvision:squeezenet1_1": None,
    "torchvision:swin_t": None,
    "timm:cait_xxs24_224": 224,
    "timm:coat_tiny": 224,
    "timm:convit_tiny": 224,
    "timm:test_convnext": None,
    "timm:cpubone_nano": None,
    "timm:cs3darknet_focus_s": None,
    "timm:deit_tiny_patch16_224": None,
    "timm:dla46x_c": None,
    "timm:dpn48b": None,
    "timm:edgenext_xx_small": None,
    "timm:efficientformerv2_s0": 224,
    "timm:efficientvit_m0": None,
    "timm:efficientvit_b0": None,
    "timm:fasternet_t0": None,
    "timm:fastvit_t8": None,
    "timm:gcvit_xxtiny": 224,
    "timm:ghostnet_050": None,
    "timm:gmlp_ti16_224": 224,
    "timm:halonet_h1": 256,
    "timm:hardcorenas_b": None,
    "timm:hgnetv2_b0": None,
    "timm:hiera_tiny_224": 224,
    "timm:iformer_t": None,
    "timm:inception_next_atto": None,
    "timm:lcnetv2_small": None,
    "timm:mobilenetv3_small_050": None,
    "timm:mobilevit_xxs": None,
    "timm:mvitv2_tiny": 224,
    "timm:pit_ti_224": 224,
    "timm:poolformerv2_s12": None,
    "timm:pvt_v2_b0": None,
    "timm:repghostnet_050": None,
    "timm:repvit_m1": None,
    "timm:rexnet_100": None,
    "timm:starnet_s050": None,
    "timm:swin_tiny_patch4_window7_224": None,
    "timm:swinv2_cr_tiny_224": None,
    "timm:test_byobnet": None,
    "timm:test_mambaout": None,
    "timm:test_nfnet": None,
    "timm:test_vit": None,
    "timm:tiny_vit_5m_224": None,
    "timm:twins_svt_small": None,
    "timm:visformer_tiny": 224,
    "timm:vit_tiny_patch16_dinov3_qkvb": None,
    "timm:xcit_nano_12_p8_224": None,
}


def random_images(count: int, height: int, width: int) -> torch.Tensor:
    found = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)
    return torch.from_numpy(found)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_of_every_family_gives_maps_of_the_image(name: str) -> None:
    """Of its default layer, in the size that its stride says, the same for each image of a batch."""
    side = FAMILIES[name]
    loaded = load_backbone(Recipe(backbone=name, weights="random"))
    (description,) = loaded.descriptions
    assert description.fixed_side == side
    stride = description.layer.stride
    for height, width in [(side, side)] if side else [(128, 192), (256, 160)]:
        assert height is not None and width is not None
        images = random_images(2, height, width)
        with torch.inference_mode():
            (both,) = loaded.feature_maps(images)
            (second,) = loaded.feature_maps(images[1:])
        assert both.shape[:2] == (2, description.channels)
        for cells, pixels in zip(both.shape[2:], (height, width), strict=True):
            assert abs(cells - pixels / stride) <= 1.5 and cells > 1
        assert bool(both.isfinite().all()) and bool((both[0] != both[1]).any())
        torch.testing.assert_close(both[1:], second, rtol=1e-3, atol=1e-4)


class Tokens(nn.Module):
    """Means of patches of 8 pixels as tokens, after one of the whole image; `order` permutes those of the grid."""

    def __init__(self, order: bool = False) -> None:
        super().__init__()
        self.order = order
        self.norm = nn.Identity()
        self.num_prefix_tokens = 1

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not images.shape[-1] % 8 == 0:
            raise RuntimeError("sides must be multiples of 8")
        cells = nn.functional.avg_pool2d(images, 8).flatten(2).permute(0, 2, 1)
        if self.order:
            cells = cells.flip(1)
        whole = images.mean((2, 3))[:, None]
        result: torch.Tensor = self.norm(torch.cat([whole, cells], 1)).sum()
        return result


def test_tokens_are_the_cells_of_a_grid_and_the_first_is_of_the_whole_image() -> None:
    network = HookedNetwork("tokens", Tokens())
    assert [(one.name, one.channels, one.stride, one.cells) for one in network.layers()] == [
        ("norm", 3, 8, 32),
        ("norm:class", 3, 8, 1),
    ]
    assert network.default_layer() == "norm" and network.fixed is None and network.lays_out
    images = torch.rand(2, 3, 40, 64)
    cells, whole = network.cut(["norm", "norm:class"])(images)
    torch.testing.assert_close(cells, nn.functional.avg_pool2d(images, 8))
    torch.testing.assert_close(whole, images.mean((2, 3), keepdim=True))
    network.check(["norm"])


def test_cells_in_another_order_are_refused() -> None:
    network = HookedNetwork("flipped", Tokens(order=True))
    with pytest.raises(BackboneError, match="backbone flipped: the cells of layer norm are not in the order"):
        network.check(["norm"])
    with pytest.raises(BackboneError, match="layer blocks.3 are not in the order of the image"):
        load_backbone(Recipe(backbone="timm:hiera_tiny_224", weights="random", layer="blocks.3"))


def test_a_transformers_grid_is_what_timm_says() -> None:
    """Against timm's own layout, at a size that its positions are interpolated to."""
    import timm

    loaded = load_backbone(Recipe(backbone="timm:test_vit", weights="random", layer="blocks.1,norm"))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = timm.create_model("test_vit", dynamic_img_size=True).eval()
    images = random_images(2, 96, 160)
    with torch.inference_mode():
        blocks, norm = loaded.feature_maps(images)
        recipe = loaded.descriptions[0].recipe
        assert recipe.mean is not None and recipe.std is not None
        mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (recipe.mean, recipe.std))
        inputs = (images.permute(0, 3, 1, 2) / 255 - mean) / std
        before = network.forward_intermediates(inputs, indices=[1], norm=False, intermediates_only=True)  # type: ignore[operator]
        after = network.forward_intermediates(inputs, indices=[-1], norm=True, intermediates_only=True)  # type: ignore[operator]
    torch.testing.assert_close(blocks, before[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm, after[0], rtol=1e-4, atol=1e-5)


def test_hooked_layers_of_a_traceable_network_are_the_traced_ones() -> None:
    name = "timm:test_resnet"
    loaded = load_backbone(Recipe(backbone=name, weights="random", layer="layer2,layer4"))
    from sppfeat.backbones.backbone import build_network

    trunk = HookedNetwork(name, build_network(name)).cut(["layer2", "layer4"])
    images = random_images(2, 96, 128)
    recipe = loaded.descriptions[0].recipe
    assert recipe.mean is not None and recipe.std is not None
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (recipe.mean, recipe.std))
    with torch.inference_mode():
        expected = loaded.feature_maps(images)
        found = trunk((images.permute(0, 3, 1, 2) / 255 - mean) / std)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_weights_of_what_comes_after_the_layer_are_not_needed(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from sppfeat.backbones.backbone import build_network

    name = "timm:test_vit"
    weights = build_network(name).state_dict()
    used = {key: value for key, value in weights.items() if not key.startswith(("head", "norm", "fc_norm"))}
    path = tmp_path / "vit.safetensors"
    save_file(used, path)
    loaded = load_backbone(Recipe(backbone=name, weights=str(path), layer="blocks.5"))
    original = load_backbone(Recipe(backbone=name, weights="random", layer="blocks.5"))
    assert loaded.descriptions[0].weights_sha256 == original.descriptions[0].weights_sha256
    with pytest.raises(BackboneError, match=r"not the weights of this network: 2 \(norm.weight, norm.bias\) missing"):
        load_backbone(Recipe(backbone=name, weights=str(path), layer="norm"))


def test_what_a_network_gives_is_told() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = nn.Conv2d(3, 4, 16, stride=16)
            self.layer = nn.Linear(4, 5)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tokens = self.patch_embed(images).mean((2, 3))
            if float(images.shape[2]) < 0:
                return tokens
            result: torch.Tensor = self.layer(tokens)
            return result

    network = HookedNetwork("pair", Pair())
    with pytest.raises(BackboneError, match="backbone pair: has no layer with a feature map but patch_embed$"):
        network.default_layer()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"backbone": "torchvision:vit_b_32"},
            r"takes images of 224 x 224 pixels only: expected --crop center",
        ),
        ({"size_multiple": 8}, "takes whole patches of 16 pixels: expected a size_multiple that 16 divides, found 8"),
        (
            {"layer": "norm:class"},
            "layer norm:class of backbone timm:test_vit is of the whole image: expected",
        ),
        ({"layer": "norm:classes"}, "unknown layer 'norm:classes'"),
        ({"layer": "head"}, "unknown layer 'head'"),
    ],
)
def test_recipes_that_do_not_suit_a_transformer_say_so(changes: dict[str, object], message: str) -> None:
    recipe = Recipe(**{"backbone": "timm:test_vit", "weights": "random", **changes})  # type: ignore[arg-type]
    with pytest.raises(SppFeatError, match=message):
        Describer(recipe, RunOptions(device="cpu"))


def test_class_tokens_stand_beside_the_grid(tmp_path: Path) -> None:
    recipe = Recipe(backbone="timm:test_vit", weights="random", layer="norm,norm:class", levels=(1,), scales=(64,))
    describer = Describer(recipe, RunOptions(device="cpu"))
    assert describer.recipe.channels == (64, 64) and describer.dim == 128 and describer.engine == "torch"


def test_hooked_networks_run_on_torch_alone() -> None:
    network = Network(Recipe(backbone="timm:test_vit", weights="random"))
    assert load_engine(network, RunOptions(device="cpu")).name == "torch"
    with pytest.raises(BackboneError, match="engine openvino: backbone timm:test_vit is cut by hooks, which only"):
        load_engine(network, RunOptions(device="cpu", engine="openvino"))


def test_layers_of_a_transformer_are_listed() -> None:
    names = [layer.name for layer in list_layers("timm:test_vit")]
    assert "blocks.0" in names and "blocks.0:class" in names and names[-2:] == ["norm", "norm:class"]
    with pytest.raises(UsageError, match="unknown timm backbone"):
        list_layers("timm:nope")


@pytest.mark.parametrize(
    "name",
    ["torchvision:vit_b_32", "timm:eva02_tiny_patch14_224", "timm:swinv2_cr_tiny_224", "timm:maxvit_pico_rw_256"],
)
def test_weights_that_code_reads_without_a_call_are_loaded_and_count(name: str, tmp_path: Path) -> None:
    """Such as `F.linear(x, self.qkv.weight)`, or the output of torch's own attention."""
    from safetensors.torch import save_file

    from sppfeat.backbones.backbone import build_network

    network = build_network(name).eval()
    generator = torch.Generator().manual_seed(1)
    weights = {
        key: value + 0.02 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for key, value in network.state_dict().items()
    }
    network.load_state_dict(weights)
    path = tmp_path / "w.safetensors"
    save_file({key: value.clone() for key, value in weights.items()}, path)
    loaded = load_trunk(Recipe(backbone=name, weights=str(path)))
    layer, cuttable = loaded.layers[0], loaded.cuttable
    side = (cuttable.fixed if isinstance(cuttable, HookedNetwork) else None) or 224
    images = torch.rand(1, 3, side, side, generator=generator)
    caught: list[torch.Tensor] = []
    network.get_submodule(layer).register_forward_hook(lambda module, inputs, output: caught.append(output))
    with torch.inference_mode():
        network(images)
        (found,) = loaded.module(images)
    flat = caught[0] if caught[0].shape == found.shape else caught[0].flatten()
    if flat.dim() == 1:  # tokens or channels last: the same numbers in another order
        cells = found.permute(0, 2, 3, 1).flatten()
        flat, found = flat[len(flat) - len(cells) :], cells
    torch.testing.assert_close(found, flat, rtol=1e-4, atol=1e-5)
    kept = loaded.weights()
    unused = {key for key in weights if key not in kept}
    assert not any(key.startswith(("blocks", "encoder", "layers", "stages")) and "head" not in key for key in unused)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("torchvision:resnet18", "bn1,layer1"),
        ("torchvision:vgg11", "features.3,features.8"),
        ("timm:test_vit", "blocks.0,norm"),
    ],
)
def test_layers_asked_together_are_those_asked_alone(name: str, layers: str) -> None:
    """Though what comes after the first may write into its output."""
    images = random_images(1, 96, 128)
    with torch.inference_mode():
        together = load_backbone(Recipe(backbone=name, weights="random", layer=layers))
        maps = together.feature_maps(images)
        for layer, found, description in zip(layers.split(","), maps, together.descriptions, strict=True):
            alone = load_backbone(Recipe(backbone=name, weights="random", layer=layer))
            (expected,) = alone.feature_maps(images)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert alone.descriptions == (description,)


def test_what_is_known_of_a_layer_does_not_depend_on_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`permute` can be traced, and `features.5` cannot: together they are cut by hooks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe = Recipe(backbone="torchvision:swin_t", weights="random")
    together = Network(Recipe(backbone=recipe.backbone, weights="random", layer="features.5,permute"))
    _, second = together.descriptions
    alone = Network(Recipe(backbone=recipe.backbone, weights="random", layer="permute"))
    assert alone.descriptions == (second,) and alone.backbone.descriptions == (second,)
    assert load_engine(together, RunOptions(device="cpu")).name == "torch"
    assert Network(Recipe(backbone=recipe.backbone, weights="random", layer="features.5,permute")).backbone


def test_modules_that_run_twice_are_no_layers() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 3, 2, stride=2)
            self.act = nn.ReLU()
            self.last = nn.Identity()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.last(self.act(self.stem(self.act(self.stem(images)))))
            return result

    assert [layer.name for layer in HookedNetwork("twice", Twice()).layers()] == ["last"]


def test_images_that_patches_do_not_cover_fail_alone(tmp_path: Path) -> None:
    from PIL import Image

    for number, size in enumerate([(64, 48), (70, 50), (96, 64)]):
        Image.new("RGB", size, (number * 50, 9, 90)).save(tmp_path / f"{number}.png")
    recipe = Recipe(backbone="timm:test_vit", weights="random", scales=("native",), levels=(1,))
    rows = list(Describer(recipe, RunOptions(device="cpu")).describe(sorted(tmp_path.iterdir())))
    errors = {each.position: each.error for each in rows}
    assert errors[0] is None and errors[2] is None
    assert errors[1] is not None and "rejected an image of 70 x 50" in errors[1] and "patch size" in errors[1]
