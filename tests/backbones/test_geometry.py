"""Stride, offset and receptive field against a probe of the pixels that really reach a cell."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import fx, nn

from sppfeat.backbones.backbone import Backbone, load_backbone
from sppfeat.backbones.description import Description
from sppfeat.backbones.geometry import Geometry, follow
from sppfeat.backbones.layer_steps import layer_steps
from sppfeat.errors import BackboneError
from sppfeat.recipe import Recipe

WINDOWS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
# Mean and standard deviation over channels or places: not what a receptive field counts.
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def derive_geometry(trunk: fx.GraphModule, length: int) -> Geometry:
    """Geometry of a trunk's output along an axis of `length` input pixels."""
    return follow(layer_steps(trunk), length)


class Probe(fx.Interpreter):
    """Runs a trunk whose signals can neither cancel nor die, so that gradients show what reaches what.

    Every weight is a positive constant (one channel is enough for that), norms are left out, maxima become means.
    Gates that see the whole image are cut off from the gradient.
    """

    def __init__(self, trunk: fx.GraphModule) -> None:
        super().__init__(trunk)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.submodules[str(target)]
        if isinstance(module, nn.Conv2d):
            # A copy of the module itself, so that its own padding is what is probed.
            single = object.__new__(type(module))
            single.__dict__ = {**module.__dict__, "_parameters": {}}
            single.groups = 1
            single.weight = nn.Parameter(torch.full((1, 1, *module.kernel_size), 1.0).double(), requires_grad=False)
            single.weight /= single.weight.sum()
            single.bias = None
            return single(args[0].mean(1, keepdim=True))
        if isinstance(module, nn.MaxPool2d):
            assert module.dilation == 1 and type(module) is nn.MaxPool2d
            return F.avg_pool2d(args[0], module.kernel_size, module.stride, module.padding, module.ceil_mode)
        if isinstance(module, nn.Linear):
            return args[0].mean(-1, keepdim=True)
        if isinstance(module, nn.AdaptiveAvgPool2d):
            return super().call_module(target, args, kwargs).detach()
        return args[0] if isinstance(module, NORMS) else super().call_module(target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_method(target, args, kwargs)
        return result.detach() if target == "mean" else result

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return torch.ones_like(super().get_attr(target, args, kwargs), dtype=torch.float64)

    @functools.cached_property
    def submodules(self) -> dict[str, nn.Module]:
        return dict(self.module.named_modules())


Pixels = tuple[list[int], list[int]]


def _listed(output: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    """A backbone's trunk gives a list of maps, one that is traced here a map."""
    return [output] if isinstance(output, torch.Tensor) else output


def reached_by(
    trunk: fx.GraphModule, height: int, width: int, rows: list[int]
) -> tuple[list[int], Pixels, list[Pixels]]:
    """Size of the map; the pixel rows and columns that reach it; those that reach each of `rows`, middle column."""
    # Small values: sums along residual branches must stay below 6, where ReLU6 ends.
    image = torch.full((1, 3, height, width), 1e-9, dtype=torch.float64, requires_grad=True)
    (output,) = _listed(Probe(trunk).run(image))
    assert output.dim() == 4

    def pixels(cells: torch.Tensor) -> tuple[list[int], list[int]]:
        (gradient,) = torch.autograd.grad(cells.sum(), image, retain_graph=True)
        seen = gradient[0, 0] > 0
        return seen.any(1).nonzero().squeeze(1).tolist(), seen.any(0).nonzero().squeeze(1).tolist()

    return list(output.shape[2:]), pixels(output), [pixels(output[..., r, output.shape[3] // 2]) for r in rows]


def interval(axis: Geometry, cell: int, length: int) -> list[int]:
    """The pixels that a cell depends on by its geometry."""
    middle, reach = axis.offset + axis.stride * cell, (axis.receptive_field - 1) / 2
    assert float(middle - reach).is_integer() and float(middle + reach).is_integer()
    return list(range(max(0, int(middle - reach)), min(length, int(middle + reach) + 1)))


@functools.cache
def backbone(name: str, layer: str | None = None) -> Backbone:
    return load_backbone(Recipe(backbone=name, layer=layer, weights="random"))


# Layers early enough that most of their cells see only a part of images of these sizes.
NETWORKS = [
    ("efficientnet_lite0", "blocks"),
    ("efficientnet_lite1", "blocks.3"),
    ("efficientnet_lite2", "blocks.2"),
    ("torchvision:squeezenet1_1", None),
    ("torchvision:resnet18", None),
    ("torchvision:vgg11", None),
    ("torchvision:mobilenet_v2", None),
    ("torchvision:alexnet", None),
    ("torchvision:densenet121", "features.denseblock2"),
    ("torchvision:googlenet", None),
    ("torchvision:regnet_y_400mf", None),
    ("torchvision:convnext_tiny", "features.3"),
    ("timm:test_efficientnet", None),
    ("timm:test_resnet", None),
    ("timm:resnet18", None),
    ("timm:test_convnext", "stages.1"),
]


@pytest.mark.parametrize(("name", "layer"), NETWORKS)
def test_a_cell_depends_on_exactly_the_pixels_that_its_geometry_names(name: str, layer: str | None) -> None:
    loaded = backbone(name, layer)
    told_apart = False
    # Odd lengths and lengths that strides do not divide: "SAME" padding depends on them.
    for height, width in ((224, 225), (231, 320), (1001, 97)):
        rows, columns = loaded.descriptions[0].geometry(height, width)
        cells = [0, rows.size // 2, rows.size - 1]
        size, (used_rows, used_columns), reached = reached_by(loaded.trunk, height, width, cells)
        assert [rows.size, columns.size] == size
        # The last pixels reach no cell at all where a stride leaves less than a window.
        assert used_rows == list(range(len(used_rows))) and len(used_rows) > height - rows.stride
        for cell, (seen_rows, seen_columns) in zip(cells, reached, strict=True):
            expected = interval(rows, cell, height)
            assert seen_rows == [pixel for pixel in expected if pixel in used_rows]
            assert seen_columns == [p for p in interval(columns, columns.size // 2, width) if p in used_columns]
            told_apart |= expected[0] > 0 and expected[-1] < height - 1
    assert told_apart, "every cell sees the whole image: the test says nothing about the offset"


@pytest.mark.parametrize("name", ["efficientnet_lite0", "torchvision:squeezenet1_1", "timm:test_resnet"])
def test_size_is_that_of_the_real_map(name: str) -> None:
    loaded = backbone(name, "blocks" if name == "efficientnet_lite0" else None)
    for height, width in ((64, 97), (131, 75)):
        with torch.inference_mode():
            shape = loaded.feature_maps(torch.zeros(1, height, width, 3, dtype=torch.uint8))[0].shape
        assert list(shape[2:]) == [axis.size for axis in loaded.descriptions[0].geometry(height, width)]


def test_a_known_network() -> None:
    """ResNet-18 by hand: strides 2 five times, paddings floor(k/2), so cell i is centered on pixel 32 i."""
    assert backbone("torchvision:resnet18").descriptions[0].geometry(224, 225) == (
        Geometry(size=7, stride=32, offset=0.0, receptive_field=435),
        Geometry(size=8, stride=32, offset=0.0, receptive_field=435),
    )


def test_same_padding_moves_with_the_size() -> None:
    """224 pixels leave the odd pixel of padding at the end; 225 pad evenly."""
    even, odd = backbone("efficientnet_lite0", "blocks").descriptions[0].geometry(224, 225)
    assert (even.stride, odd.stride) == (32, 32) and even.offset != odd.offset


# Single layers and short chains, on a one-pixel impulse at every place.


def chain(*layers: nn.Module) -> fx.GraphModule:
    return fx.symbolic_trace(nn.Sequential(*layers))


def support(trunk: Callable[[torch.Tensor], torch.Tensor], length: int, *, along_width: bool = False) -> np.ndarray:
    """[pixels, cells]: whether an impulse on that row of pixels reaches that row of cells, for a square image."""
    impulses = torch.eye(length)[:, None, :, None].expand(-1, 1, -1, length)
    maps = trunk(impulses.transpose(2, 3) if along_width else impulses)
    return (maps > 0).any(1).any(1 if along_width else 2).numpy()


def assert_support(axis: Geometry, reached: np.ndarray) -> None:
    assert axis.size == reached.shape[1]
    for cell in range(axis.size):
        seen = np.flatnonzero(reached[:, cell])
        middle, reach = axis.offset + axis.stride * cell, (axis.receptive_field - 1) / 2
        # Dilated layers have gaps; the ends are what counts, where they lie in the image.
        if len(seen):
            assert middle - reach <= seen[0] and seen[-1] <= middle + reach
        for end in (middle - reach, middle + reach):
            assert float(end).is_integer()
            # Over the border, a layer's own padding can stand where the geometry goes on counting pixels.
            if middle - reach >= 0 and middle + reach < len(reached):
                assert reached[int(end), cell]


def window(kind: str, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> nn.Module:
    if kind == "max":
        return nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil_mode)
    if kind == "avg":
        return nn.AvgPool2d(kernel, stride, padding, ceil_mode=ceil_mode)
    layer = nn.Conv2d(1, 1, kernel, stride, padding, dilation, bias=False)
    nn.init.ones_(layer.weight)
    return layer


@st.composite
def windows(draw: st.DrawFn) -> nn.Module:
    kind, kernel = draw(st.sampled_from(["conv", "max", "avg"])), draw(st.integers(1, 6))
    dilation = 1 if kind == "avg" else draw(st.integers(1, 3))
    # Pooling refuses to pad by more than half the kernel.
    padding = draw(st.integers(0, 7 if kind == "conv" else kernel // 2))
    return window(kind, kernel, draw(st.integers(1, 4)), padding, dilation, draw(st.booleans()))


@settings(max_examples=70, deadline=None)
@given(st.lists(windows(), min_size=1, max_size=3), st.integers(1, 24))
def test_windows_agree_with_a_probe(layers: list[nn.Module], length: int) -> None:
    trunk = chain(*layers)
    with torch.no_grad():
        try:
            reached = support(trunk, length)
        except RuntimeError:  # torch finds it too short
            with pytest.raises(BackboneError, match="cells are too few for layer"):
                derive_geometry(trunk, length)
            return
    # A later window of a chain may fall between what dilation or a wide stride left: no single interval then.
    assume(len(layers) == 1 or all(_gapless(layer) for layer in layers))
    assert_support(derive_geometry(trunk, length), reached)


def _gapless(layer: Any) -> bool:
    pair = [v if isinstance(v, int) else v[0] for v in (layer.kernel_size, layer.stride, getattr(layer, "dilation", 1))]
    return pair[0] >= pair[1] and pair[2] == 1


# torch says that it copies the input to pad an even kernel; that costs time, not values.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 2), st.integers(1, 20))
def test_same_padding_agrees_with_a_probe(kernel: int, stride: int, dilation: int, length: int) -> None:
    from timm.layers.conv2d_same import Conv2dSame
    from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame

    layers: list[nn.Module] = [Conv2dSame(1, 1, kernel, stride, dilation=dilation, bias=False)]
    if stride == 1:
        layers.append(nn.Conv2d(1, 1, kernel, padding="same", dilation=dilation, bias=False))
    if dilation == 1 and kernel >= stride:
        layers += [MaxPool2dSame(kernel, stride), AvgPool2dSame(kernel, stride)]
    for layer in layers:
        for weight in layer.parameters():
            nn.init.ones_(weight)
        # Traced as a leaf: what `same` pads is computed in Python.
        trunk = fx.GraphModule(nn.Sequential(layer), _leaf_graph())
        with torch.no_grad():
            assert_support(derive_geometry(trunk, length), support(trunk, length))


def _leaf_graph() -> fx.Graph:
    graph = fx.Graph()
    graph.output(graph.call_module("0", (graph.placeholder("x"),)))
    return graph


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.max_pool2d(x, 3, 2),
        lambda x: F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=True),
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.max_pool2d(x, 3, 2, 1, 2, True),
        lambda x: torch.max_pool2d(x, 3, 2, 0, 1, True),
        lambda x: F.avg_pool2d(x, 3, 2),
        lambda x: F.avg_pool2d(x, 3, stride=2, padding=1),
        lambda x: F.avg_pool2d(x, kernel_size=2, ceil_mode=True),
        lambda x: F.avg_pool2d(x, 2, 2, 0, True),
        lambda x: F.relu(x) + x,
        lambda x: torch.cat([F.max_pool2d(x, 5, 2, 2), F.max_pool2d(x, 3, 2, 1)], 1).mul(2),
    ],
)
@pytest.mark.parametrize("length", [14, 15, 16, 17])
def test_functions_agree_with_a_probe(function: Callable[[torch.Tensor], torch.Tensor], length: int) -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    trunk = fx.symbolic_trace(Net())
    assert_support(derive_geometry(trunk, length), support(trunk, length))


def test_branches_that_meet_see_the_union() -> None:
    """One branch reaches further to the left, the other to the right."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Sequential(nn.ZeroPad2d((3, 0, 3, 0)), nn.MaxPool2d(4, 2))
            self.right = nn.MaxPool2d(4, 2, ceil_mode=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.left(x) + self.right(x)

    trunk = fx.symbolic_trace(Net())
    axis = derive_geometry(trunk, 11)
    assert (axis.stride, axis.receptive_field, axis.offset) == (2, 7, 0.0)


# An unknown geometry is an error, never a number.


@pytest.mark.parametrize("name", ["timm:resnetblur18", "timm:hrnet_w18_small"])
def test_unknown_networks(name: str) -> None:
    with pytest.raises(BackboneError, match="geometry"):
        backbone(name).descriptions[0].geometry(224, 224)


class Blur(nn.Module):
    """Pools without saying so: nothing but its output tells."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, ::2, ::2]


def test_a_layer_that_pools_without_saying_so() -> None:
    from sppfeat.backbones.tracing import TracedNetwork

    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Blur(), nn.Conv2d(4, 4, 3, padding=1))
    traced = TracedNetwork("blurred", network)
    recipe = Recipe(backbone="blurred", mean=(0, 0, 0), std=(1, 1, 1))
    described = Description(recipe, traced.layer("2"), "", 1, tuple(layer_steps(traced.cut("2"))))
    with pytest.raises(BackboneError, match="expected 256 cells on 256 pixels by its layers, found 128"):
        described.geometry(64, 64)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([nn.Conv2d(1, 1, (3, 5))], r"layer 0 is not known: \(3, 5\) differs"),
        ([nn.MaxPool2d(2, (2, 1))], r"layer 0 is not known: \(2, 1\) differs"),
        ([nn.AvgPool2d(3, 1, (0, 1))], r"layer 0 is not known: \(0, 1\) differs"),
        ([nn.ConvTranspose2d(1, 1, 2, 2)], r"layer 0 \(ConvTranspose2d\) is not known"),
        ([nn.LPPool2d(2, 2)], r"layer 0 \(LPPool2d\) is not known"),
        ([nn.ReLU(), nn.ZeroPad2d((1, 1, 0, 0))], r"layer 1 is not known"),
        # This one keeps the size after the stride: only the offset would be wrong.
        ([nn.ReflectionPad2d(1), nn.Conv2d(1, 1, 3, 4)], r"layer 0 \(ReflectionPad2d\) is not known"),
        ([nn.CircularPad2d(1), nn.Conv2d(1, 1, 3, 4)], r"layer 0 \(CircularPad2d\) is not known"),
        ([nn.AdaptiveAvgPool2d(4)], "its output is not a feature map"),
        ([nn.Conv2d(1, 1, 5), nn.Conv2d(1, 1, 7)], "4 cells are too few for layer 1, which needs 7"),
    ],
    ids=lambda value: type(value[0]).__name__ if isinstance(value, list) else "",
)
def test_unknown_layers(layers: list[nn.Module], reason: str) -> None:
    with pytest.raises(BackboneError, match=reason):
        derive_geometry(chain(*layers), 8)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: F.interpolate(x, scale_factor=2), "function interpolate is not known"),
        (lambda x: torch.roll(x, 1, 2), "function roll is not known"),
        (lambda x: F.pad(x, (1, 1, 1, 1)), "function pad is not known"),
        (lambda x: x + F.max_pool2d(x, 2), "branches of different strides are merged"),
        (lambda x: x.mean((2, 3)), "its output is not a feature map"),
    ],
)
def test_unknown_functions(function: Callable[[torch.Tensor], torch.Tensor], reason: str) -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    with pytest.raises(BackboneError, match=reason):
        derive_geometry(fx.symbolic_trace(Net()), 16)


def test_padding_layers_of_their_own() -> None:
    trunk = chain(nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2))
    for length in (9, 10):
        assert_support(derive_geometry(trunk, length), support(trunk, length))
        assert_support(derive_geometry(trunk, length), support(trunk, length, along_width=True))


def test_a_gate_does_not_count() -> None:
    """Squeeze-and-excitation sees the whole image; the map keeps its place in it."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(1, 1, 3, 2, 1), nn.AdaptiveAvgPool2d(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return x * torch.sigmoid(self.pool(x)) * x.mean((2, 3), keepdim=True)

    assert derive_geometry(fx.symbolic_trace(Gated()), 9) == Geometry(5, 2, 0.0, 3)
    assert math.isclose(derive_geometry(fx.symbolic_trace(Gated()), 10).offset, 0.0)
