"""Cutting a network at a layer, listing its layers, folding its batch norms."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn

from sppfeat.backbones.description import PROBE
from sppfeat.backbones.tracing import TracedNetwork, fold_batch_norms, fuse_activations
from sppfeat.errors import BackboneError, UsageError


def seeded(build: Any, *args: Any, **kwargs: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: nn.Module = build(*args, **kwargs)
    return network.eval()


@functools.cache
def network_of(name: str) -> nn.Module:
    import timm
    from torchvision import models

    family, _, model = name.partition(":")
    return with_statistics(seeded(timm.create_model if family == "timm" else models.get_model, model))


@functools.cache
def traced_of(name: str) -> TracedNetwork:
    return TracedNetwork(name, network_of(name))


def with_statistics(network: nn.Module) -> nn.Module:
    """Batch norms that change values, as trained ones do; fresh ones only divide by sqrt(1 + eps)."""
    random = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
                (module.weight, 0.7, 1.3),
                (module.bias, -0.2, 0.2),
            ):
                if tensor is not None:
                    tensor.detach().uniform_(low, high, generator=random)
    return network


def random_images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def hooked(network: nn.Module, layer: str, inputs: torch.Tensor) -> torch.Tensor:
    """The output of a module while the whole network runs."""
    seen: list[torch.Tensor] = []
    # Cloned: a later layer may work in place.
    handle = network.get_submodule(layer).register_forward_hook(lambda *call: seen.append(call[2].clone()))
    with torch.inference_mode():
        network(inputs)
    handle.remove()
    return seen[0]


class Small(nn.Module):
    """Two stages and a head; `fuse` can be made to fail once the network is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.stage = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.head = Head()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.stage(self.stem(x)))
        return out


class Head(nn.Conv2d):
    fails = False

    def __init__(self) -> None:
        super().__init__(6, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fails:
            raise AssertionError("a layer behind the cut was run")
        return super().forward(x)


@pytest.fixture
def small() -> nn.Module:
    return with_statistics(seeded(Small))


def test_nothing_behind_the_cut_is_run_or_kept(small: nn.Module) -> None:
    traced = TracedNetwork("small", small)
    trunk, whole = traced.cut(["stage"]), traced.cut(["head"])
    small.head.fails = True  # type: ignore[assignment]
    assert trunk(random_images(2, 3, 17, 23))[0].shape == (2, 6, 5, 6)
    assert {key.split(".")[0] for key in trunk.state_dict()} == {"stem", "stage"}
    assert not any("head" in name for name, _ in trunk.named_modules())
    assert {key.split(".")[0] for key in traced.cut(["stem"]).state_dict()} == {"stem"}
    # So that the test can fail: a trunk that holds the layer does run it.
    with pytest.raises(AssertionError, match="behind the cut"):
        whole(random_images(1, 3, 8, 8))


def test_branches_that_the_layer_does_not_need_are_not_run() -> None:
    class Side(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.side = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.side(x) + self.main(x)

    assert set(TracedNetwork("side", Side()).cut(["main"]).state_dict()) == {"main.weight", "main.bias"}


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("timm:test_resnet", ["maxpool", "layer2.0.bn1", "layer4"]),
        ("timm:test_efficientnet", ["blocks.1", "blocks", "bn2"]),
        ("timm:tf_efficientnet_lite0", ["blocks.2.0", "blocks", "conv_head"]),
        ("torchvision:squeezenet1_1", ["features.3.expand1x1", "features"]),
        ("torchvision:resnet18", ["layer1.0", "layer3.1.conv2", "layer4"]),
    ],
)
def test_a_cut_gives_what_the_whole_network_computes_there(name: str, layers: list[str]) -> None:
    network, traced = network_of(name), traced_of(name)
    inputs = random_images(2, 3, 97, 130)
    for layer in layers:
        with torch.inference_mode():
            (found,) = traced.cut([layer])(inputs)
        # A layer that works in place on the output of another (relu after bn1) is behind the cut, and must not show.
        assert relative_difference(found, hooked(network, layer, inputs)) < 1e-5
        assert found.shape[1] == traced.layer(layer).channels


@pytest.mark.parametrize(
    ("name", "layer"),
    [("torchvision:resnet18", "layer4"), ("timm:tf_efficientnet_lite0", "blocks"), ("timm:test_resnet", "layer4")],
)
def test_folding_keeps_values(name: str, layer: str) -> None:
    trunk = traced_of(name).cut([layer])
    before = copy.deepcopy(trunk.state_dict())
    folded = fold_batch_norms(trunk)
    inputs = random_images(2, 3, 97, 130)
    with torch.inference_mode():
        assert relative_difference(folded(inputs)[0], trunk(inputs)[0]) < 1e-4
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    # The trunk that was given stays as it was.
    assert all(torch.equal(value, before[key]) for key, value in trunk.state_dict().items())


class Shared(nn.Module):
    """One convolution, or one norm, that serves two places."""

    def __init__(self, shared: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 3, padding=1)
        self.conv2 = self.conv1 if shared == "convolution" else nn.Conv2d(3, 3, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(3)
        self.norm2 = self.norm1 if shared == "norm" else nn.BatchNorm2d(3)
        self.end = nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.end(self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())))
        return out


class TwoReaders(nn.Module):
    """The convolution is read before its norm, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.end = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        out: torch.Tensor = self.end(x + self.norm(x))
        return out


class Standardized(nn.Module):
    """timm's StdConv2d normalizes its weights whenever it runs, so what is folded into them would be lost."""

    def __init__(self) -> None:
        super().__init__()
        from timm.layers import StdConv2d

        self.conv, self.norm, self.end = StdConv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.end(self.norm(self.conv(x)))
        return out


@pytest.mark.parametrize(
    ("build", "norms_left"),
    [
        (lambda: Shared("convolution"), 2),
        (lambda: Shared("norm"), 1),
        (TwoReaders, 1),
        (Standardized, 1),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 1)), 0),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), 1),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), 2),
    ],
    ids=[
        "shared convolution",
        "shared norm",
        "two readers",
        "StdConv2d",
        "no affine",
        "no statistics",
        "norm elsewhere",
    ],
)
def test_what_cannot_be_folded_is_left(build: Any, norms_left: int) -> None:
    network = with_statistics(seeded(build))
    traced = TracedNetwork("odd", network)
    trunk = traced.cut([traced.layers()[-1].name])
    folded = fold_batch_norms(trunk)
    inputs = random_images(2, 3, 12, 15)
    with torch.inference_mode():
        assert relative_difference(folded(inputs)[0], trunk(inputs)[0]) < 1e-5
    left = [m for m in folded.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(left) == norms_left and not any(norm.training for norm in left)


def test_folding_keeps_the_activation_inside_a_norm() -> None:
    from timm.layers import BatchNormAct2d

    trunk = TracedNetwork("act", with_statistics(seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4)))))
    folded = fold_batch_norms(trunk.cut(["1"]))
    with torch.inference_mode():
        found = folded(random_images(1, 3, 9, 9))[0]
        assert relative_difference(found, trunk.cut(["1"])(random_images(1, 3, 9, 9))[0]) < 1e-5
    assert found.min() == 0


# Layers.


@pytest.mark.parametrize(
    ("name", "layer", "channels", "stride", "default"),
    [
        ("resnet50", "layer4", 2048, 32, "layer4"),
        ("squeezenet1_1", "features", 512, 16, "features"),
        ("resnet18", "layer2.0.conv1", 128, 8, "layer4"),
    ],
)
def test_layers_are_listed_with_channels_and_stride(
    name: str, layer: str, channels: int, stride: int, default: str
) -> None:
    traced = traced_of(f"torchvision:{name}")
    found = traced.layer(layer)
    assert (found.name, found.channels, found.stride) == (layer, channels, stride)
    assert traced.default_layer() == default


def test_layers_are_in_the_order_of_the_computation(small: nn.Module) -> None:
    layers = TracedNetwork("small", small).layers()
    names = ["stem.0", "stem.1", "stem", "stem.2", "stage.0", "stage.1", "stage", "stage.2", "head"]
    assert [layer.name for layer in layers] == names
    assert [layer.stride for layer in layers] == [2] * 4 + [4] * 5
    assert [layer.cells for layer in layers] == [128] * 4 + [64] * 5


def test_unknown_layer_names_the_nearest(small: nn.Module) -> None:
    with pytest.raises(UsageError, match="backbone small: unknown layer 'stages': did you mean stage"):
        TracedNetwork("small", small).cut(["stages"])


def test_pooled_vectors_are_not_layers() -> None:
    names = {layer.name for layer in traced_of("torchvision:resnet18").layers()}
    assert not names & {"avgpool", "fc"} and "maxpool" in names


def test_channels_last_maps_are_not_taken_for_rows() -> None:
    """Inside a swin, maps are [N, H, W, C]; only where they are permuted back can they be pooled."""
    traced = traced_of("torchvision:swin_t")
    maps = {layer.name: layer for layer in traced.layers()}
    assert traced.default_layer() == "permute"
    assert (maps["permute"].channels, maps["permute"].stride) == (768, 32)
    for layer in maps.values():
        # 256 rows over the stride, and nothing else.
        assert layer.cells * layer.stride == PROBE
    assert not any(name.startswith("features.1.") for name in maps)


def test_code_that_cannot_be_traced() -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) if x.sum() > 0 else x

    with pytest.raises(BackboneError, match="backbone odd: cannot be cut at a layer") as caught:
        TracedNetwork("odd", Untraceable())
    assert "\n" not in str(caught.value)


def test_network_without_maps() -> None:
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    with pytest.raises(BackboneError, match="has no layer with a feature map"):
        TracedNetwork("flat", network).default_layer()


@pytest.mark.parametrize(
    "name",
    [
        "timm:tf_efficientnet_lite0",
        "torchvision:resnet18",
        "torchvision:squeezenet1_1",
        "torchvision:vgg11",
        "timm:test_resnet",
    ],
)
def test_fusing_activations_keeps_values_and_weights(name: str) -> None:
    """ReLU6 in place, one ReLU module called many times, and none at all behind some convolutions."""
    trunk = fold_batch_norms(traced_of(name).cut([traced_of(name).default_layer()]))
    trunk.to(memory_format=torch.channels_last)
    fused = fuse_activations(trunk)
    if fused is trunk:
        pytest.skip("this build of torch has no oneDNN")
    relus = [sum(isinstance(m, nn.ReLU | nn.Hardtanh) for m in t.modules()) for t in (trunk, fused)]
    assert relus[1] < relus[0]
    assert {t.data_ptr() for t in fused.parameters()} <= {t.data_ptr() for t in trunk.parameters()}
    for size in ((1, 3, 96, 96), (2, 3, 97, 131)):
        inputs = random_images(*size).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            assert relative_difference(fused(inputs)[0], trunk(inputs)[0]) < 1e-5
