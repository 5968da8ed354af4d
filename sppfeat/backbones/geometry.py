"""Where the cells of a feature map lie in the picture, derived from the layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from sppfeat.errors import BackboneError


@dataclass(frozen=True)
class Geometry:
    """One axis of a feature map, in input pixels.

    Cell i has its centre on pixel `offset + stride * i`, and depends on the pixels up to (receptive_field - 1) / 2 away
    from it. `size` is the number of cells. Gates that see the whole picture (squeeze-and-excitation) do not count.
    """

    size: int
    stride: int
    offset: float
    receptive_field: int


def derive_geometry(trunk: fx.GraphModule, length: int) -> Geometry:
    """Geometry of a trunk's output along an axis of `length` input pixels.

    It depends on the length, because "SAME" padding does. Both axes follow the same rule, so kernels must be as wide
    as they are high. Raises BackboneError for a layer of unknown geometry or an axis too short for the layers.
    """
    modules = dict(trunk.named_modules())
    known: dict[fx.Node, Geometry | None] = {}
    for node in trunk.graph.nodes:
        inputs = [known[n] for n in node.all_input_nodes if known.get(n) is not None]
        axis = _join([g for g in inputs if g is not None])
        if node.op == "placeholder":
            known[node] = Geometry(length, 1, 0.0, 1)
        elif node.op == "output":
            if axis is None:
                break
            return axis
        elif node.op == "call_module" and axis is not None:
            known[node] = _through_module(str(node.target), modules[str(node.target)], axis)
        elif node.op in ("call_function", "call_method") and axis is not None:
            known[node] = _through_function(node, axis)
        else:
            known[node] = None
    raise BackboneError("the geometry of the layer cannot be derived: its output is not a feature map")


def _join(branches: list[Geometry]) -> Geometry | None:
    """Where branches meet (a sum, a concatenation), a cell sees the union of what each branch sees."""
    if not branches:
        return None
    if len({branch.stride for branch in branches}) > 1:
        raise BackboneError("the geometry of the layer cannot be derived: branches of different stride meet")
    first = min(branch.offset - (branch.receptive_field - 1) / 2 for branch in branches)
    last = max(branch.offset + (branch.receptive_field - 1) / 2 for branch in branches)
    widest = max(branches, key=lambda branch: branch.receptive_field)
    return Geometry(min(b.size for b in branches), widest.stride, (first + last) / 2, round(last - first) + 1)


def _through_module(name: str, module: nn.Module, axis: Geometry) -> Geometry | None:
    if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
        kernel, stride = _square(name, module.kernel_size), _square(name, module.stride)
        dilation = _square(name, getattr(module, "dilation", 1))
        same = type(module).__name__ in ("Conv2dSame", "MaxPool2dSame", "AvgPool2dSame")
        padding: int | str = "same" if same else _padding(name, module.padding)
        return _through_window(name, axis, kernel, stride, padding, dilation, bool(getattr(module, "ceil_mode", False)))
    if isinstance(module, nn.ZeroPad2d):
        before, after = module.padding[2], module.padding[3]
        if (before, after) != tuple(module.padding[:2]):
            raise BackboneError(f"the geometry of layer {name} is not known: {module.padding} differs between the axes")
        return Geometry(
            axis.size + before + after, axis.stride, axis.offset - before * axis.stride, axis.receptive_field
        )
    if isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten)):
        return None  # a gate or a head: no longer a place in the picture
    # A Linear sees single cells where the channels are last (ConvNeXt).
    pointwise = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.PReLU, nn.Linear)
    if isinstance(module, pointwise) or type(module).__name__ in ("LayerScale", "LayerScale2d", "GlobalResponseNorm"):
        return axis
    places = hasattr(module, "kernel_size") or hasattr(module, "padding")  # a pooling, a mirroring at the border
    if next(module.parameters(), None) is None and not places:
        return axis  # an activation, a dropout; what pools without saying so is found out by `Backbone.geometry`
    raise BackboneError(f"the geometry of layer {name} ({type(module).__name__}) is not known")


# Functions of single cells, or that only move channels about.
_POINTWISE = frozenset(
    [
        "add",
        "add_",
        "iadd",
        "sub",
        "mul",
        "mul_",
        "imul",
        "truediv",
        "relu",
        "relu_",
        "relu6",
        "hardtanh",
        "hardsigmoid",
    ]
    + [
        "hardswish",
        "sigmoid",
        "silu",
        "gelu",
        "tanh",
        "softmax",
        "clamp",
        "norm",
        "batch_norm",
        "layer_norm",
        "dropout",
    ]
    + ["dropout2d", "stochastic_depth", "cat", "chunk", "getitem", "contiguous", "clone", "expand_as"]
    + ["permute", "transpose", "view", "reshape"]
)


def _through_function(node: fx.Node, axis: Geometry) -> Geometry | None:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if name in _POINTWISE:
        return axis
    if node.target in (F.max_pool2d, F.avg_pool2d, torch.max_pool2d) or name == "boolean_dispatch":
        kernel = _square(name, _argument(node, 1, "kernel_size"))
        stride = _square(name, _argument(node, 2, "stride") or kernel)
        padding = _square(name, _argument(node, 3, "padding") or 0)
        averages = name == "avg_pool2d"  # has no dilation, so what follows it stands one place earlier
        dilation = 1 if averages else _square(name, _argument(node, 4, "dilation") or 1)
        ceil_mode = bool(_argument(node, 4 if averages else 5, "ceil_mode"))
        return _through_window(name, axis, kernel, stride, padding, dilation, ceil_mode)
    if name in ("adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "flatten", "size", "getattr"):
        return None
    raise BackboneError(f"the geometry of the function {name} is not known")


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _through_window(
    name: str, axis: Geometry, kernel: int, stride: int, padding: int | str, dilation: int, ceil_mode: bool
) -> Geometry:
    extent = (kernel - 1) * dilation + 1
    if padding == "same":
        # As TensorFlow pads: ceil(size / stride) cells, the odd pixel of padding at the end.
        size = math.ceil(axis.size / stride)
        before = max((size - 1) * stride + extent - axis.size, 0) // 2
    else:
        before = int(padding)
        free = axis.size + 2 * before - extent
        size = (math.ceil(free / stride) if ceil_mode else free // stride) + 1
        if ceil_mode and (size - 1) * stride >= axis.size + before:
            size -= 1
    if size < 1 or axis.size < 1:
        raise BackboneError(f"{axis.size} cells are too few for layer {name}, which needs {extent}")
    return Geometry(
        size=size,
        stride=axis.stride * stride,
        offset=axis.offset + ((extent - 1) / 2 - before) * axis.stride,
        receptive_field=axis.receptive_field + (extent - 1) * axis.stride,
    )


def _padding(name: str, value: Any) -> int | str:
    if isinstance(value, str):
        return 0 if value == "valid" else "same"
    return _square(name, value)


def _square(name: str, value: Any) -> int:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(set(values)) != 1:
        raise BackboneError(f"the geometry of layer {name} is not known: {values} differs between the axes")
    return int(values[0])
