"""Engines: how feature maps are computed. The recipe says what they are; every engine gives the same values.

`torch` runs on every device. `openvino` runs on x86 and ARM processors, faster, where the extra `cpu` is
installed; it computes float32 to 1e-4 of torch's values, and bfloat16 to what bfloat16 itself leaves open.
"""

from __future__ import annotations

import contextlib
import importlib.util
import platform
import threading
import warnings
from typing import Final, Protocol

import torch

from sppfeat.backbones.backbone import Backbone, load_backbone
from sppfeat.engines.cuda_graphs import RecurringPasses, capture_into_one_pool
from sppfeat.engines.devices import resolve_device
from sppfeat.errors import (
    BackboneError,
    DeviceError,
    MissingExtraError,
    SppFeatWarning,
    UsageError,
    one_line,
)
from sppfeat.machine import available_cores
from sppfeat.recipe import Recipe, RunOptions

# Beyond this many forward passes side by side, memory grows faster than speed; further cores join in each pass.
MAX_STREAMS: Final = 16
# On a CPU, one picture a core at a time keeps the layers' maps in its cache: on 2 cores, 1.2 to 1.5 times as many
# pictures a second as batches of 8 spread over both. Batches of 2 or 4 are no faster, and cost 200 MB and more, because
# oneDNN keeps its plans for every shape it has seen. A GPU wants far more at once, and a batch that does not fit into
# its memory is halved, for good.
CPU_BATCH_SIZE: Final = 1
CUDA_BATCH_SIZE: Final = 128
# A group of a rare shape goes to the network incomplete after this many batches' worth of other pictures.
PATIENCE: Final = 16
# While one thread's batch is computed, the next one's is stacked and copied.
CUDA_STREAMS: Final = 2
# The processors that OpenVINO has fast code for, as `platform.machine` names them on Linux, macOS and Windows.
OPENVINO_MACHINES: Final = frozenset({"x86_64", "amd64", "aarch64", "arm64"})
OPENVINO_PRECISIONS: Final = ("float32", "bfloat16")


class Engine(Protocol):
    """A backbone, ready to give feature maps; what a `Recipe` fixes does not depend on which engine it is.

    name: `torch` or `openvino`. device: where it computes, and where its maps are.
    streams: how many threads may well call it side by side. threads: cores that each of these calls uses.
    batch_size: pictures of one shape that it takes best at a time. patience: batches' worth of other pictures that an
    incomplete one may wait for.
    """

    name: str
    device: torch.device
    streams: int
    threads: int
    batch_size: int
    patience: int

    def lane(self) -> contextlib.AbstractContextManager[object]:
        """What a thread works inside of, from pictures to rows, so that the device overlaps it with other threads."""

    def feature_map(self, pictures: torch.Tensor) -> torch.Tensor:
        """Feature map [N, C, h, w], channels last in memory, on `device`, of uint8 RGB pictures [N, H, W, 3].

        The map is the caller's own. Raises RuntimeError, with torch's text, for pictures that the network refuses.
        """

    def release(self) -> None:
        """Give back memory that only saves time. No other thread may be in a pass."""


class TorchEngine:
    """The backbone as torch runs it, on any device. Raises DeviceError where the device cannot hold it."""

    name = "torch"
    patience = PATIENCE

    def __init__(self, backbone: Backbone, device: torch.device) -> None:
        try:
            self._backbone = backbone.to(device)
        except RuntimeError as error:
            raise DeviceError(f"device {device}: cannot hold {backbone.recipe.backbone} ({one_line(error)})") from None
        self.device = device
        self._local = threading.local()
        self._all_passes: list[RecurringPasses] = []
        self.batch_size = CPU_BATCH_SIZE if device.type == "cpu" else CUDA_BATCH_SIZE
        self.streams, self.threads = cpu_streams() if device.type == "cpu" else (CUDA_STREAMS, 1)
        if device.type == "cuda":
            # The weights were copied by this thread's stream, and are read by those of others.
            torch.cuda.synchronize(device)

    def lane(self) -> contextlib.AbstractContextManager[object]:
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._local.stream)

    def feature_map(self, pictures: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cuda":
            return self._backbone.feature_map(pictures)
        # Only from memory that is pinned does the copy run beside another thread's pass.
        pictures = pictures.pin_memory().to(self.device, non_blocking=True)
        if not hasattr(self._local, "stream"):  # outside of a lane, where nothing recurs
            return self._backbone.feature_map(pictures)
        if not hasattr(self._local, "passes"):
            self._local.passes = RecurringPasses(self._backbone.feature_map, capture_into_one_pool)
            self._all_passes.append(self._local.passes)
        output: torch.Tensor = self._local.passes(pictures)
        return output

    def release(self) -> None:
        for passes in self._all_passes:
            passes.release()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def load_engine(recipe: Recipe, options: RunOptions | None = None) -> tuple[Backbone, Engine]:
    """The backbone that a recipe names, and the engine that runs it under these options.

    Under `auto` the engine is OpenVINO on a processor it has fast code for, where it is installed; should it fail on
    this network, torch takes its place with a SppFeatWarning. An engine asked for by name is given or refused.
    Raises BackboneError, DeviceError, UsageError, MissingExtraError.
    """
    options = options or RunOptions()
    device = resolve_device(options.device)
    named = options.engine == "openvino"
    if named:
        _check_openvino(recipe, options.device, device)
    backbone = load_backbone(recipe)
    if named or (options.engine == "auto" and _suits_openvino(recipe, device)):
        from sppfeat.engines.openvino_engine import OpenVinoEngine

        try:
            return backbone, OpenVinoEngine(backbone, *cpu_streams())
        except (BackboneError, MissingExtraError) as error:
            if named:
                raise
            warnings.warn(f"{error}; torch takes its place", SppFeatWarning, stacklevel=2)
    return backbone, TorchEngine(backbone, device)


def _suits_openvino(recipe: Recipe, device: torch.device) -> bool:
    return (
        device.type == "cpu"
        and recipe.precision in OPENVINO_PRECISIONS
        and platform.machine().lower() in OPENVINO_MACHINES
        and importlib.util.find_spec("openvino") is not None
    )


def _check_openvino(recipe: Recipe, asked: str, device: torch.device) -> None:
    if device.type != "cpu":
        raise UsageError(f"engine openvino computes on the processor, found device {asked}: expected --device cpu")
    if recipe.precision not in OPENVINO_PRECISIONS:
        raise UsageError(
            f"engine openvino computes {' and '.join(OPENVINO_PRECISIONS)}, found precision {recipe.precision}"
        )
    from sppfeat.engines.openvino_engine import import_openvino

    import_openvino()


def cpu_streams() -> tuple[int, int]:
    """Forward passes side by side on this processor, and cores for each: one each keeps a map in its core's cache."""
    cores = available_cores()
    streams = min(cores, MAX_STREAMS)
    return streams, max(1, cores // streams)
