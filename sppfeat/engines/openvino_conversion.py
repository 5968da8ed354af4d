"""Conversion of a network from torch to OpenVINO, when the engine `openvino` is first built."""

from __future__ import annotations

import contextlib
import copy
import signal
import threading
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

from sppfeat.backbones.backbone import Backbone
from sppfeat.engines.openvino_engine import failure, import_openvino
from sppfeat.engines.torch_engine import told_apart


class _Served(nn.Module):
    """The module that OpenVINO converts: uint8 images [N, H, W, 3] to each layer's cells [N, h, w, C], with
    normalization."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(backbone.trunk).float()
        for name, module in list(self.trunk.named_modules()):
            if type(module).__name__ == "Conv2dSame":
                self.trunk.set_submodule(name, _MarkedConvolution(module))
        recipe = backbone.descriptions[0].recipe
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (recipe.mean, recipe.std))
        self.register_buffer("scale", (1 / (255 * std)).float().view(1, 3, 1, 1))
        self.register_buffer("shift", (-mean / std).float().view(1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = images.permute(0, 3, 1, 2).float() * self.scale + self.shift
        return tuple(output.permute(0, 2, 3, 1) for output in self.trunk(inputs))


class _MarkedConvolution(nn.Module):
    """A "SAME" convolution whose padding is marked by NaN, so that `_pad_inside` can move it into OpenVINO's."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        layer: Any = self.convolution
        # As many cells as the "SAME" padding of stride 1, so that the map has the right size.
        height, width = (d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
        sides = [width // 2, width - width // 2, height // 2, height - height // 2]
        padded = nn.functional.pad(inputs, sides, value=float("nan"))
        return nn.functional.conv2d(padded, layer.weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups)


def _pad_inside(model: Any) -> None:
    """Make each marked convolution of a converted network pad its own inputs, whatever their size.

    Otherwise padding that depends on the size is a slow layer that copies the map. It also hides that the map and the
    shortcut around it have equal sizes, so sums are not computed inside convolutions: 1.2 to 1.35 times as slow.
    """
    opset13 = import_openvino().opset13

    for layer in model.get_ordered_ops():
        kind = layer.get_type_name()
        pad = layer.input_value(0).get_node() if kind in ("Convolution", "GroupConvolution") else None
        if pad is None or pad.get_type_name() != "Pad":
            continue
        value = pad.input_value(3).get_node() if pad.get_input_size() > 3 else None
        while value is not None and value.get_type_name() == "Convert":
            value = value.input_value(0).get_node()
        if value is None or value.get_type_name() != "Constant" or not np.isnan(value.data).all():
            continue
        options = layer.get_attributes()
        convolution = opset13.convolution if kind == "Convolution" else opset13.group_convolution
        same = convolution(
            pad.input_value(0),
            layer.input_value(1),
            options["strides"],
            [0, 0],
            [0, 0],
            options["dilations"],
            auto_pad="same_upper",
        )
        layer.output(0).replace(same.output(0))
    model.validate_nodes_and_infer_types()


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """Delay Python's signal handlers: converting calls Python from C++, where an exception would abort the process."""
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run only in the main thread
        return
    came: list[tuple[int, FrameType | None]] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.signal(kind, lambda *what: came.append(what)) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
        for number, _ in came[:1]:
            signal.raise_signal(number)


def convert(backbone: Backbone, size: tuple[int, int]) -> Any:
    """A backbone as OpenVINO's model, for any batch, height and width; `size` is that of an example.

    Raises BackboneError if OpenVINO cannot take it.
    """
    openvino = import_openvino()
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    height, width = size
    try:
        with _signals_later(), warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            # Tracing warns about itself and about Python numbers; values are checked later.
            warnings.simplefilter("ignore")
            served = _Served(backbone).eval()
            example = torch.zeros(1, height, width, 3, dtype=torch.uint8)
            traced = torch.jit.trace(served, example, check_trace=False)  # type: ignore[no-untyped-call]
            frontend = openvino.frontend.FrontEndManager().load_by_framework("pytorch")
            decoder = TorchScriptPythonDecoder(traced)  # the front end only borrows it: keep it alive while converting
            model = frontend.convert(frontend.load(decoder))
        _pad_inside(model)
        model.reshape(openvino.PartialShape([-1, -1, -1, 3]))
        return model
    except Exception as error:  # tracing and converting can fail in any way
        raise failure(backbone.descriptions, error) from None


def expected_cells(backbone: Backbone, images: np.ndarray) -> list[np.ndarray]:
    """[N, h, w, C] float32, the cells of each layer that torch gives for images [N, H, W, 3].

    Raises ImageRefusedError for images that the network cannot take.
    """
    with told_apart(), torch.inference_mode():
        maps = backbone.feature_maps(torch.from_numpy(images))
        return [cells.float().permute(0, 2, 3, 1).numpy() for cells in maps]


def say_why(backbone: Backbone, images: np.ndarray) -> None:
    """Raise torch's error for images that OpenVINO failed on, if torch fails on them, too."""
    with told_apart(), torch.inference_mode():
        backbone.feature_maps(torch.from_numpy(images))
