"""Cut a network by hooks: what its modules return is caught while its own code runs, and laid out as feature maps.

For networks whose code cannot be traced, and for those whose layers return something else than maps [N, C, h, w]:
channels last, or the tokens of a transformer, which are the cells of a grid after some tokens of the whole image.
"""

from __future__ import annotations

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
# What comes before the features, and what follows them: some heads classify every token.
_NO_FEATURES: Final = frozenset({"patch_embed", "head", "aux_head", "classifier", "fc"})
# Where an image is changed to see which cells change: by chance, more than half are in place once in 70 networks.
_PLACES: Final = 9
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
    it at a time. `close` takes its hooks off the network."""

    def __init__(self, network: nn.Module, layouts: Sequence[tuple[str, _Layout]]) -> None:
        super().__init__()
        self.network = network
        self._layouts = list(layouts)
        self._local = threading.local()
        self._hooks = [
            network.get_submodule(name).register_forward_hook(self._catching(name))
            for name in {name for name, _ in self._layouts}
        ]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

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
                # What comes after a layer may write into its output.
                caught[name] = output.clone() if wanted > 1 else output
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
        # When each module that is called begins, and when each output is there, both counted in calls.
        self._entered: dict[str, int] = {}
        self._until: dict[str, int] = {}
        reason = ""
        for height, width in _probe_sizes(network):
            try:
                outputs, self._entered, self._until = _run(network, height, width)
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
        features = [name for name in grids if name.split(".")[0] not in _NO_FEATURES]
        if not features:
            others = f" but {', '.join(grids[:3])}" if grids else ""
            raise BackboneError(f"backbone {self.name}: has no layer with a feature map{others}")
        return features[-1]

    @property
    def lays_out(self) -> bool:
        """Whether the last layer is not a map [N, C, h, w], which only hooks can cut."""
        try:
            return self._layouts[self.default_layer()].kind != "map"
        except BackboneError:
            return False

    def weights_of(self, layers: Sequence[str]) -> dict[str, torch.Tensor]:
        owners = set(self.modules_of(layers))
        return {key: value for key, value in self._network.state_dict().items() if key.rpartition(".")[0] in owners}

    def modules_of(self, layers: Sequence[str]) -> list[str]:
        end = max(self._until[layer.removesuffix(CLASS)] for layer in layers)
        begins: dict[str, int] = {}
        for name, _ in self._network.named_modules():
            # Weights may be read by the code of a parent, without a call of the module that holds them.
            caller = name
            while caller not in self._entered:
                caller = caller.rpartition(".")[0]
            begins[name] = self._entered[caller]
        return sorted((name for name, begin in begins.items() if begin < end), key=begins.__getitem__)

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        self._network.load_state_dict(weights, strict=False)

    def cut(self, layers: Sequence[str]) -> HookedTrunk:
        """The network up to some layers, with the weights that it has now."""
        layouts = [(self.layer(name).name.removesuffix(CLASS), self._layouts[name]) for name in layers]
        return HookedTrunk(self._network, layouts)

    def tiles(self, name: str) -> bool:
        """Whether the cells of a layer are patches that cover the image without overlap: those of tokens are."""
        layout = self._layouts[name]
        return layout.kind == "tokens" or (layout.kind == "last" and layout.stride in _patches(self._network))

    def check(self, layers: Sequence[str]) -> None:
        """Run the network once: shapes alone do not tell all.

        Sets `fixed` if it takes squares of one side only. Raises BackboneError if it cannot run, or if the cells of a
        layer are not in the order of the image: what changes in one place must change the cell of this place most.
        """
        strides = [self._layouts[name].stride for name in layers]
        largest = max(strides)
        tries = [(8 * largest, 10 * largest)] if self.fixed is None else [(self.fixed, self.fixed)]
        tries += [size for size in _probe_sizes(self._network) if size[0] == size[1]]
        reason = ""
        for height, width in tries:
            images, places = _changed(height, width, largest)
            trunk = self.cut(layers)
            try:
                with torch.inference_mode():
                    maps = trunk(images)
            except Exception as error:  # the network's own code can fail in any way
                reason = reason or one_line(error)
                continue
            finally:
                trunk.close()
            self.fixed = height if height == width else None
            for name, stride, cells in zip(layers, strides, maps, strict=True):
                changes = (cells[1:] - cells[:1]).norm(dim=1)
                if self._layouts[name].kind in ("tokens", "last") and not _in_place(changes, places, stride, largest):
                    raise BackboneError(
                        f"backbone {self.name}: the cells of layer {name} are not in the order of the image: "
                        "what changes in one place changes the cells of others"
                    )
            return
        raise BackboneError(f"backbone {self.name}: cannot be cut at layer {layers[0]} ({reason})")

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


def _changed(height: int, width: int, size: int) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """[1 + P, 3, height, width] of one image, and the same with a square changed in each of P places, top and left."""
    random = torch.Generator().manual_seed(0)
    rows, columns = height // size, width // size
    # Spread over the image, and never symmetric.
    cells = [((3 * at + 1) % rows, (5 * at + 2) % columns) for at in range(_PLACES)]
    places = [(row * size, column * size) for row, column in cells]
    images = torch.randn(1, 3, height, width, generator=random).repeat(1 + _PLACES, 1, 1, 1)
    for image, (top, left) in zip(images[1:], places, strict=True):
        image[:, top : top + size, left : left + size] = 3 * torch.randn(3, size, size, generator=random)
    return images, places


def _in_place(changes: torch.Tensor, places: list[tuple[int, int]], stride: int, size: int) -> bool:
    """Whether most of the changes [P, h, w] are largest in their places, or next to them: patches may overlap."""
    near = 0
    for change, place in zip(changes, places, strict=True):
        found = [stride * int(at) for at in divmod(int(change.argmax()), change.shape[1])]
        near += all(start - stride <= at < start + size + stride for start, at in zip(place, found, strict=True))
    return 2 * near > len(places)


def _probe_sizes(network: nn.Module) -> Iterator[tuple[int, int]]:
    """Heights and widths to try: oblong ones, which tell rows from columns, then squares that it may be made for."""
    yield PROBE, PROBE + PROBE // 4
    yield 7 * PROBE // 8, 7 * PROBE // 8 + 7 * PROBE // 32  # for patches of 7 and 14 pixels
    for patch in sorted(each for each in _patches(network) if PROBE % each):
        yield 16 * patch, 20 * patch
    config = getattr(network, "pretrained_cfg", None) or {}
    sides = [getattr(network, "image_size", None), (config.get("input_size") or (0, 0, 0))[1], *_USUAL_SIDES]
    for side in dict.fromkeys(_side(each) for each in sides):
        if side:
            yield side, side


def _patches(network: nn.Module) -> set[int]:
    """The sides of the patches that a transformer cuts images into."""
    return {side for module in network.modules() if (side := _side(getattr(module, "patch_size", None)))}


def _side(value: object) -> int | None:
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return value if isinstance(value, int) and value > 0 else None


def _prefixes(network: nn.Module) -> list[int]:
    """Numbers of tokens before those of the grid, the likeliest first."""
    found = getattr(network, "num_prefix_tokens", None)
    return [found] if isinstance(found, int) else [0, 1, 2]


def _run(network: nn.Module, height: int, width: int) -> tuple[dict[str, torch.Size], dict[str, int], dict[str, int]]:
    """The shape that each module returns, in the order in which they return, and the numbers of calls when each module
    begins and when its output is there. Modules that are called several times have no output of their own."""
    network = without_values(network)
    outputs: dict[str, torch.Size] = {}
    entered: dict[str, int] = {"": 0}
    until: dict[str, int] = {}
    calls = 1
    again: set[str] = set()

    def enter(name: str) -> Callable[..., None]:
        def entering(module: nn.Module, inputs: Any) -> None:
            nonlocal calls
            if name in entered:
                again.add(name)
            entered.setdefault(name, calls)
            calls += 1

        return entering

    def leave(name: str) -> Callable[..., None]:
        def left(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                outputs[name] = output.shape
                until[name] = calls

        return left

    for name, module in network.named_modules():
        if name:
            module.register_forward_pre_hook(enter(name))
            module.register_forward_hook(leave(name))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        network(torch.zeros(1, 3, height, width, device="meta"))
    return {name: shape for name, shape in outputs.items() if name not in again}, entered, until


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
