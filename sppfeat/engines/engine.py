"""Engines: how feature maps are computed and pooled. The recipe says what they are; every engine gives the same values.

`torch` runs on every device. `openvino` runs on x86 and ARM processors, faster, where the extra `cpu` is
installed; it computes float32 to 1e-4 of torch's values, and bfloat16 to what bfloat16 itself leaves open.
"""

from __future__ import annotations

import contextlib
import importlib.util
import platform
import warnings
from typing import Any, Final, Protocol

import numpy as np

from sppfeat.backbones import Network
from sppfeat.engines.devices import resolve_device
from sppfeat.errors import BackboneError, MissingExtraError, SppFeatWarning, UsageError
from sppfeat.machine import available_cores
from sppfeat.recipe import Recipe, RunOptions

# Beyond this many forward passes side by side, memory grows faster than speed; further cores join in each pass.
MAX_STREAMS: Final = 16
# The processors that OpenVINO has fast code for, as `platform.machine` names them on Linux, macOS and Windows.
OPENVINO_MACHINES: Final = frozenset({"x86_64", "amd64", "aarch64", "arm64"})
OPENVINO_PRECISIONS: Final = ("float32", "bfloat16")


class ImageRefusedError(RuntimeError):
    """The network cannot take images of this size."""


class Engine(Protocol):
    """A network ready to describe images; what a `Recipe` fixes does not depend on which engine it is.

    name: `torch` or `openvino`. device: where it computes, such as `cpu` or `cuda:0`.
    streams: how many threads may well call it side by side. threads: cores that each of these calls uses.
    batch_size: images of one shape that it takes best at a time. patience: batches' worth of other images that an
    incomplete one may wait for.
    """

    name: str
    device: str
    streams: int
    threads: int
    batch_size: int
    patience: int

    def at_work(self) -> contextlib.AbstractContextManager[object]:
        """What the thread that starts others works inside of; leaves the process's settings as they were."""

    def lane(self) -> contextlib.AbstractContextManager[object]:
        """What a thread works inside of, from images to rows, so that the device overlaps it with other threads."""

    def feature_maps(self, images: np.ndarray) -> Any:
        """Feature maps of uint8 RGB images [N, H, W, 3], in the engine's own form: N maps that the caller owns.

        Raises ImageRefusedError for images that the network cannot take, MemoryError where memory is short, and
        RuntimeError for whatever else fails.
        """

    def pool(self, maps: Any) -> np.ndarray:
        """[N, bins * C] float32 of N feature maps, by the recipe's pyramid."""

    def pool_windows(self, feature_map: Any, rois: np.ndarray) -> np.ndarray:
        """[K, bins * C] float32 of windows of one feature map, rois [K, 4] int64 in cells, inclusive ends."""

    def release(self) -> None:
        """Give back memory that only saves time. No other thread may be in a pass."""


def choose_engine(recipe: Recipe, options: RunOptions) -> str:
    """The name of the engine that these options ask for, or that `auto` takes.

    `auto` takes OpenVINO on a processor it has fast code for, where it is installed. Raises DeviceError, UsageError,
    and MissingExtraError for what cannot be; loads no network.
    """
    device = resolve_device(options.device)
    if options.engine == "openvino":
        _check_openvino(recipe, options.device, device)
        return "openvino"
    suits = (
        options.engine == "auto"
        and device == "cpu"
        and recipe.precision in OPENVINO_PRECISIONS
        and platform.machine().lower() in OPENVINO_MACHINES
        and importlib.util.find_spec("openvino") is not None
    )
    return "openvino" if suits else "torch"


def load_engine(network: Network, options: RunOptions | None = None) -> Engine:
    """The engine that runs a network under these options; see `choose_engine`.

    Where the network has to be converted first, its `note` is told before.
    Should the engine that `auto` took fail on this network, torch takes its place with a SppFeatWarning. An engine
    asked for by name is given or refused. Raises BackboneError, DeviceError, UsageError, MissingExtraError.
    """
    options = options or RunOptions()
    if choose_engine(network.description.recipe, options) == "openvino":
        from sppfeat.engines.openvino_engine import OpenVinoEngine

        try:
            return OpenVinoEngine(network, *cpu_streams())
        except (BackboneError, MissingExtraError) as error:
            if options.engine == "openvino":
                raise
            warnings.warn(f"{error}; falling back to PyTorch", SppFeatWarning, stacklevel=2)
    from sppfeat.engines.torch_engine import TorchEngine

    return TorchEngine(network.backbone, resolve_device(options.device))


def _check_openvino(recipe: Recipe, asked: str, device: str) -> None:
    if device != "cpu":
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
