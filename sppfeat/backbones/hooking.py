"""Cut a network by hooks: what its modules return is caught while its own code runs, and laid out as feature maps.

For networks whose code cannot be traced, and for those whose layers return something else than maps [N, C, h, w]:
channels last, or the tokens of a transformer, which are the cells of a grid after some tokens of the whole image.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from sppfeat.backbones.description import PROBE, Layer
from sppfeat.backbones.layers import NamedLayers, without_values
from sppfeat.errors import BackboneError, one_line

# The tokens of the whole image, under this name behind that of the layer.
CLASS: Final = ":class"
# What follows the features: some classify every token.
_HEADS: Final = frozenset({"head", "aux_head", "classifier", "fc"})
# Sides of the images that fixed networks are made for, where they do not say it.
_USUAL_SIDES: Final = (224, 256, 384, 448, 240, 192, 299)


@dataclass(frozen=True)
class _Layout:
    """How the output of a module holds a feature map.

    kind: `map`, [N, C, h, w]; `last`, [N, h, w, C]; `tokens`, [N, prefix + h * w, C]; `class`, the first of the tokens.
    stride: input pixels per cell.
    """

    kind: str
    stride: int
    prefix: int = 0

    def feature_map(self, output: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """[N, C, h, w] of the output for images of height x width."""
        if self.kind == "map":
            return output
        if self.kind == "last":
            return output.permute(0, 3, 1, 2)
        if self.kind == "class":
            return output[:, :1].permute(0, 2, 1).unsqueeze(-1)
        rows, columns = height // self.stride, width // self.stride
        if output.shape[1] != self.prefix + rows * columns:
            raise RuntimeError(
                f"kernel size: an image of {width} x {height} has {output.shape[1] - self.prefix} tokens, expected "
                f"{rows} x {columns}"
            )
        cells = output[:, self.prefix :].permute(0, 2, 1)
        return cells.reshape(*cells.shape[:2], rows, columns)


class _Caught(Exception):  # noqa: N818: it is no error
    """All outputs have been caught; what follows in the network need not run."""


class HookedTrunk(nn.Module):
    """A network up to some layers: from images [N, 3, H, W] to the list of their feature maps; several threads may call
    it at a time."""

    def __init__(self, network: nn.Module, layouts: Sequence[tuple[str, _Layout]]) -> None:
        super().__init__()
        self.network = network
        self._layouts = list(layouts)
        self._local = threading.local()
        for name in {name for name, _ in self._layouts}:
            network.get_submodule(name).register_forward_hook(self._catching(name))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        caught: dict[str, torch.Tensor] = {}
        self._local.caught = caught
        try:
            self.network(images)
        except _Caught:
            pass
        finally:
            self._local.caught = None
        height, width = images.shape[2:]
        return [layout.feature_map(caught[name], height, width) for name, layout in self._layouts]

    def _catching(self, name: str) -> Callable[..., None]:
        wanted = len({each for each, _ in self._layouts})

        def catch(module: nn.Module, inputs: Any, output: Any) -> None:
            caught = getattr(self._local, "caught", None)
            if caught is not None:
                caught[name] = output
                if len(caught) == wanted:
                    raise _Caught

        return catch


class HookedNetwork(NamedLayers):
    """A network in evaluation mode whose layers are found by running it once. Raises BackboneError if it cannot run.

    fixed: the only side of the square images that it takes; None: any.
    """

    def __init__(self, name: str, network: nn.Module) -> None:
        super().__init__(name)
        self._network = network.eval()
        self.fixed: int | None = None
        self._layouts: dict[str, _Layout] = {}
        self._layers: list[Layer] = []
        self._entered: dict[str, set[str]] = {}
        reason = ""
        for height, width in _probe_sizes(network):
            try:
                outputs, self._entered = _run(network, height, width)
            except Exception as error:  # the network's own code can fail in any way
                reason = reason or one_line(error)
                continue
            self._find(outputs, height, width)
            if self._layers:
                self.fixed = height if height == width else None
                return
            reason = reason or "it has no layer with a feature map"
        raise BackboneError(f"backbone {name}: cannot be cut at a layer ({reason})")

    def layers(self) -> list[Layer]:
        return self._layers

    def default_layer(self) -> str:
        grids = [layer.name for layer in self._layers if not layer.name.endswith(CLASS)]
        if not grids:
            raise BackboneError(f"backbone {self.name}: has no layer with a feature map")
        return next((name for name in reversed(grids) if name.split(".")[0] not in _HEADS), grids[-1])

    @property
    def lays_out(self) -> bool:
        """Whether the last layer is not a map [N, C, h, w], which only hooks can cut."""
        return bool(self._layers) and self._layouts[self.default_layer()].kind != "map"

    def weights_of(self, layers: Sequence[str]) -> dict[str, torch.Tensor]:
        entered = set().union(*(self._entered[layer.removesuffix(CLASS)] for layer in layers))
        return {key: value for key, value in self._network.state_dict().items() if key.rpartition(".")[0] in entered}

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        self._network.load_state_dict(weights, strict=False)

    def cut(self, layers: Sequence[str]) -> HookedTrunk:
        """The network up to some layers, with the weights that it has now."""
        layouts = [(self.layer(name).name.removesuffix(CLASS), self._layouts[name]) for name in layers]
        return HookedTrunk(copy.deepcopy(self._network), layouts)

    def tiles(self, name: str) -> bool:
        """Whether the cells of a layer are patches that cover the image without overlap: those of tokens are."""
        return self._layouts[name].kind == "tokens"

    def check_order(self, layers: Sequence[str]) -> None:
        """Raise BackboneError unless the cells of a layer are in the order of the image: what changes in one place of
        the image changes the cell of this place most."""
        side = self.fixed or PROBE
        laid_out = [name for name in layers if self._layouts[name].kind in ("tokens", "last")]
        if not laid_out:
            return
        strides = [self._layouts[name].stride for name in laid_out]
        if self.fixed is None:
            side = 8 * max(strides) if max(strides) % 32 else max(PROBE, 8 * max(strides))
        images = torch.zeros(2, 3, side, side)
        place = side // 8, side * 5 // 8  # not on the diagonal, and in no corner
        size = max(strides)
        top, left = (at // size * size for at in place)
        images[1, :, top : top + size, left : left + size] = torch.randn(
            3, size, size, generator=torch.Generator().manual_seed(0)
        )
        with torch.inference_mode():
            maps = self.cut(laid_out)(images)
        for name, stride, (before, after) in zip(laid_out, strides, maps, strict=True):
            change = (after - before).norm(dim=0) / before.norm(dim=0).clamp(min=1e-12)
            row, column = divmod(int(change.argmax()), change.shape[1])
            if not (top <= row * stride < top + size and left <= column * stride < left + size):
                raise BackboneError(
                    f"backbone {self.name}: the cells of layer {name} are not in the order of the image: what changed "
                    f"at row {top}, column {left} was found at {row * stride}, {column * stride}"
                )

    def _find(self, outputs: dict[str, torch.Size], height: int, width: int) -> None:
        prefixes = _prefixes(self._network)
        for name, shape in outputs.items():
            layout = _layout(shape, height, width, prefixes)
            if layout is None:
                continue
            channels = shape[1] if layout.kind == "map" else shape[-1]
            self._layouts[name] = layout
            self._layers.append(Layer(name, int(channels), layout.stride, PROBE // layout.stride))
            if layout.prefix:
                self._layouts[name + CLASS] = _Layout("class", layout.stride)
                self._layers.append(Layer(name + CLASS, int(channels), layout.stride, 1))


def _probe_sizes(network: nn.Module) -> Iterator[tuple[int, int]]:
    """Heights and widths to try: oblong ones, which tell rows from columns, then squares that it may be made for."""
    yield PROBE, PROBE + PROBE // 4
    yield 7 * PROBE // 8, 7 * PROBE // 8 + 7 * PROBE // 32  # for patches of 7 and 14 pixels
    patches = {_side(getattr(module, "patch_size", None)) for module in network.modules()} - {None}
    for patch in sorted(each for each in patches if each is not None and PROBE % each):
        yield 16 * patch, 20 * patch
    config = getattr(network, "pretrained_cfg", None) or {}
    sides = [getattr(network, "image_size", None), (config.get("input_size") or (0, 0, 0))[1], *_USUAL_SIDES]
    for side in dict.fromkeys(_side(each) for each in sides):
        if side:
            yield side, side


def _side(value: object) -> int | None:
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return value if isinstance(value, int) and value > 0 else None


def _prefixes(network: nn.Module) -> list[int]:
    """Numbers of tokens before those of the grid, the likeliest first."""
    found = getattr(network, "num_prefix_tokens", None)
    return [found] if isinstance(found, int) else [0, 1, 2]


def _run(network: nn.Module, height: int, width: int) -> tuple[dict[str, torch.Size], dict[str, set[str]]]:
    """The shape that each module returns, in the order in which they return, and the modules entered until then."""
    network = without_values(network)
    outputs: dict[str, torch.Size] = {}
    entered: list[str] = [""]
    until: dict[str, int] = {}

    def enter(name: str) -> Callable[..., None]:
        return lambda module, inputs: entered.append(name)

    def leave(name: str) -> Callable[..., None]:
        def left(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                outputs.pop(name, None)  # of a module that runs several times, the last output counts
                outputs[name] = output.shape
                until[name] = len(entered)

        return left

    for name, module in network.named_modules():
        if name:
            module.register_forward_pre_hook(enter(name))
            module.register_forward_hook(leave(name))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        network(torch.zeros(1, 3, height, width, device="meta"))
    return outputs, {name: set(entered[:count]) for name, count in until.items()}


def _layout(shape: torch.Size, height: int, width: int, prefixes: Sequence[int]) -> _Layout | None:
    """How an output of that shape holds a feature map of more than one cell; None if it does not."""
    if len(shape) == 4:
        for kind, rows, columns in (("map", shape[2], shape[3]), ("last", shape[1], shape[2])):
            if stride := _stride(rows, columns, height, width):
                return _Layout(kind, stride)
    if len(shape) == 3:
        for prefix in prefixes:
            for stride in (16, 14, 32, 8, 4, 28, 64, 7, 2):
                rows, columns = height // stride, width // stride
                if rows > 1 and not height % stride and shape[1] == prefix + rows * columns:
                    return _Layout("tokens", stride, prefix)
    return None


def _stride(rows: int, columns: int, height: int, width: int) -> int | None:
    """Input pixels per cell of a map of rows x columns; None if they cannot be those of the image."""
    if rows < 2 or columns < 2 or (height == width) != (rows == columns):
        return None
    stride, rest = divmod(width - height, columns - rows) if width > height else divmod(width, columns)
    # Layers without padding lose up to a quarter of the cells.
    return stride if stride and not rest and 2 / 3 < rows * stride / height < 5 / 4 else None
