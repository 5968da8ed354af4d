"""The layers of a trunk as the plain steps that `geometry` follows: read from the traced network, once."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import fx, nn

from sppfeat.backbones.geometry import Step
from sppfeat.errors import BackboneError


def layer_steps(trunk: fx.GraphModule) -> list[Step]:
    """The steps from an axis of the input to that of the trunk's output, each after its inputs.

    Both axes follow the same rule, so kernels must be square. Raises BackboneError for a layer of unknown geometry.
    """
    modules = dict(trunk.named_modules())
    steps: list[Step] = []
    # The step that gives each node's axis: 0 is the input, n the n-th step; None: no longer positions in the image.
    known: dict[fx.Node, int | None] = {}
    for node in trunk.graph.nodes:
        places = [place for n in node.all_input_nodes if (place := known.get(n)) is not None]
        if node.op == "placeholder":
            known[node] = 0
            continue
        if node.op not in ("output", "call_module", "call_function", "call_method") or not places:
            known[node] = None
            continue
        distinct = tuple(dict.fromkeys(places))
        if len(distinct) > 1:
            steps.append(Step(name=str(node.target), inputs=distinct))
            distinct = (len(steps),)
        if node.op == "output":
            # What follows reads the last step.
            return steps[: distinct[0]] if distinct[0] else [Step(name="output", inputs=(0,))]
        if node.op == "call_module":
            step = _of_module(str(node.target), modules[str(node.target)], distinct)
        else:
            step = _of_function(node, distinct)
        if isinstance(step, Step):
            steps.append(step)
            known[node] = len(steps)
        else:
            known[node] = distinct[0] if step else None
    raise BackboneError("the geometry of the layer cannot be derived: its output is not a feature map")


def _of_module(name: str, module: nn.Module, inputs: tuple[int, ...]) -> Step | bool:
    """A layer's step; True if it keeps every cell where it is, False if its output is not a map."""
    if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
        kernel, stride = _square(name, module.kernel_size), _square(name, module.stride)
        dilation = _square(name, getattr(module, "dilation", 1))
        same = type(module).__name__ in ("Conv2dSame", "MaxPool2dSame", "AvgPool2dSame")
        padding = None if same else _padding(name, module.padding)
        ceil_mode = bool(getattr(module, "ceil_mode", False))
        return _window(name, inputs, kernel, stride, padding, dilation, ceil_mode)
    if isinstance(module, nn.ZeroPad2d):
        before, after = module.padding[2], module.padding[3]
        if (before, after) != tuple(module.padding[:2]):
            raise BackboneError(f"the geometry of layer {name} is not known: {module.padding} differs between the axes")
        return Step(name=name, inputs=inputs, before=before, after=after)
    if isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten)):
        return False  # a gate or a head: no longer positions in the image
    # A Linear sees single cells where the channels are last (ConvNeXt).
    pointwise = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.PReLU, nn.Linear)
    if isinstance(module, pointwise) or type(module).__name__ in ("LayerScale", "LayerScale2d", "GlobalResponseNorm"):
        return True
    places = hasattr(module, "kernel_size") or hasattr(module, "padding")  # a pooling, a mirroring at the border
    if next(module.parameters(), None) is None and not places:
        return True  # an activation, a dropout; `Description.geometry` detects a layer that pools without saying so
    raise BackboneError(f"the geometry of layer {name} ({type(module).__name__}) is not known")


# Functions of single cells, or that only move channels.
_POINTWISE: Final = frozenset({
    "add", "add_", "iadd", "sub", "mul", "mul_", "imul", "truediv", "relu", "relu_", "relu6", "hardtanh", "hardsigmoid",
    "hardswish", "sigmoid", "silu", "gelu", "tanh", "softmax", "clamp", "norm", "batch_norm", "layer_norm", "dropout",
    "dropout2d", "stochastic_depth", "cat", "chunk", "getitem", "contiguous", "clone", "expand_as", "permute",
    "transpose", "view", "reshape",
})  # fmt: skip


def _of_function(node: fx.Node, inputs: tuple[int, ...]) -> Step | bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if name in _POINTWISE:
        return True
    if node.target in (F.max_pool2d, F.avg_pool2d, torch.max_pool2d) or name == "boolean_dispatch":
        kernel = _square(name, _argument(node, 1, "kernel_size"))
        stride = _square(name, _argument(node, 2, "stride") or kernel)
        padding = _square(name, _argument(node, 3, "padding") or 0)
        averages = name == "avg_pool2d"  # has no dilation, so the next argument comes one place earlier
        dilation = 1 if averages else _square(name, _argument(node, 4, "dilation") or 1)
        ceil_mode = bool(_argument(node, 4 if averages else 5, "ceil_mode"))
        return _window(name, inputs, kernel, stride, padding, dilation, ceil_mode)
    if name in ("adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "flatten", "size", "getattr"):
        return False
    raise BackboneError(f"the geometry of the function {name} is not known")


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _window(
    name: str,
    inputs: tuple[int, ...],
    kernel: int,
    stride: int,
    padding: int | None,
    dilation: int,
    ceil_mode: bool,
) -> Step:
    """padding: on both sides; None: "SAME"."""
    return Step(
        name=name,
        inputs=inputs,
        extent=(kernel - 1) * dilation + 1,
        stride=stride,
        before=padding or 0,
        after=padding or 0,
        same=padding is None,
        ceil_mode=ceil_mode,
    )


def _padding(name: str, value: Any) -> int | None:
    if isinstance(value, str):
        return 0 if value == "valid" else None
    return _square(name, value)


def _square(name: str, value: Any) -> int:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(set(values)) != 1:
        raise BackboneError(f"the geometry of layer {name} is not known: {values} differs between the axes")
    return int(values[0])
