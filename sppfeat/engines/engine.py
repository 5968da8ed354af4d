"""Engines: how feature maps are computed and pooled. Every engine gives the values that the recipe determines.

`torch` runs on every device. `openvino` is faster on x86 and ARM CPUs, and needs the extra `cpu`. It computes float32
within 1e-4 of torch's values, and bfloat16 within 1e-1 (see `openvino_engine.TOLERANCE`); int8 is computed by it
alone, from a calibrated network (see `sppfeat.engines.quantization`). `sift` is for backbone sift-bow alone, which no
other engine runs; it needs the extra `detect`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import platform
import warnings
from collections.abc import Sequence
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np

from sppfeat.backbones import Network, import_cv2
from sppfeat.engines.devices import resolve_device
from sppfeat.errors import BackboneError, MissingExtraError, SppFeatWarning, UsageError
from sppfeat.images import Unresized
from sppfeat.machine import available_cores
from sppfeat.recipe import SIFT_BOW, Recipe, RunOptions

# Beyond this many concurrent forward passes, memory grows faster than speed; more cores then share each pass.
MAX_STREAMS: Final = 16
# The CPUs that OpenVINO has fast code for, as `platform.machine` names them on Linux, macOS and Windows.
OPENVINO_MACHINES: Final = frozenset({"x86_64", "amd64", "aarch64", "arm64"})
OPENVINO_PRECISIONS: Final = ("float32", "bfloat16", "int8")


class ImageRefusedError(RuntimeError):
    """The network cannot take images of this size."""


class Engine(Protocol):
    """A network ready to describe images; values depend on the `Recipe`, not on the engine.

    name: `torch`, `openvino` or `sift`. device: where it computes, such as `cpu` or `cuda:0`.
    streams: best number of threads that call it concurrently. threads: cores that each of these calls uses.
    batch_size: best number of images of one shape per call. patience: how long an incomplete batch may wait, in
    batches' worth of other images.
    """

    name: str
    device: str
    streams: int
    threads: int
    batch_size: int
    patience: int

    def at_work(self) -> contextlib.AbstractContextManager[object]:
        """A context for the thread that starts the others; it restores the process's settings."""

    def lane(self) -> contextlib.AbstractContextManager[object]:
        """A context for each thread, from images to rows, in which the device overlaps it with other threads."""

    def feature_maps(self, images: np.ndarray) -> list[Any]:
        """Each layer's feature maps of uint8 RGB images [N, H, W, 3], in the engine's own form: N maps that the caller
        owns.

        Raises ImageRefusedError for images that the network cannot take, MemoryError when out of memory, and
        RuntimeError for any other failure.
        """

    def pool(self, maps: Any) -> np.ndarray:
        """[N, bins * C] float32 of N feature maps of one layer, by the recipe's pyramid."""

    def pool_windows(self, feature_map: Any, rois: np.ndarray) -> np.ndarray:
        """[K, bins * C] float32 of windows of one feature map, rois [K, 4] int64 in cells, inclusive ends."""

    def release(self) -> None:
        """Free memory that only saves time. No other thread may be in a pass."""


@runtime_checkable
class ResizingEngine(Engine, Protocol):
    """An engine that also takes images as they were decoded.

    It reads them until their rows are pooled, or the pass has failed: whoever calls it keeps them so long.
    """

    def pin(self, memory: np.ndarray) -> None:
        """Prepare memory of which images will be views, uint8 [bytes], for copies to the device.

        Raises DeviceError where the system does not allow it; such memory is copied from as any other.
        """

    def feature_maps_of(self, images: Sequence[Unresized]) -> list[Any]:
        """As `feature_maps`, of images whose shape after resizing is the same."""


@runtime_checkable
class StoringEngine(Engine, Protocol):
    """An engine that also makes the rows as they are stored."""

    def pool_stored(self, maps: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """The rows [N, D] of N images in the store's type, of their maps of all layers, each layer normalized.

        With the largest absolute value of each before it was rounded, float32 [N], not finite if a value is not.
        """


def stores_rows(engine: str, device: str) -> bool:
    """Whether an engine of this name makes rows as they are stored on this device: torch on a GPU, whose copies to the
    processor take time."""
    return engine == "torch" and device != "cpu"


def resizes_images(engine: str, device: str) -> bool:
    """Whether an engine of this name resizes images on this device: torch on an NVIDIA GPU, with Triton."""
    return engine == "torch" and device.startswith("cuda") and importlib.util.find_spec("triton") is not None


def choose_engine(recipe: Recipe, options: RunOptions) -> str:
    """The name of the engine that these options select.

    `auto` selects OpenVINO if it is installed and has fast code for this CPU. Raises DeviceError, UsageError and
    MissingExtraError for invalid choices; loads no network.
    """
    device = engine_device(recipe, options)
    if recipe.backbone == SIFT_BOW:
        if options.engine != "auto":
            raise UsageError(f"engine {options.engine}: expected auto for backbone {SIFT_BOW}, which is no network")
        if importlib.util.find_spec("cv2") is None:
            import_cv2()  # says how to install it; importing it takes long for a run with nothing to do
        return "sift"
    if recipe.precision == "int8" and options.engine == "torch":
        raise UsageError("precision int8 is computed by OpenVINO: expected --engine auto or openvino, found torch")
    if options.engine == "openvino" or recipe.precision == "int8":
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


def engine_of(network: Network, options: RunOptions) -> str:
    """The name of the engine that these options select for a network; see `choose_engine`.

    Raises BackboneError if the one that is asked for by name does not run it.
    """
    chosen = choose_engine(network.recipe, options)
    if chosen != "openvino" or not any(each.hooked for each in network.descriptions):
        return chosen
    if options.engine == "openvino" or network.recipe.precision == "int8":
        raise BackboneError(
            f"engine openvino: backbone {network.recipe.backbone} is cut by hooks, which only PyTorch runs: "
            + ("use --precision float32" if network.recipe.precision == "int8" else "use --engine torch or auto")
        )
    return "torch"


def engine_device(recipe: Recipe, options: RunOptions) -> str:
    """The device that a recipe of one backbone is computed on: `cpu` or `cuda:N`; see `resolve_device`.

    Bags of SIFT words are computed on the processor, without looking for a GPU. Raises DeviceError, UsageError.
    """
    if recipe.backbone != SIFT_BOW:
        return resolve_device(options.device)
    if options.device not in ("auto", "cpu"):
        raise UsageError(f"backbone {SIFT_BOW} runs on the CPU: expected --device cpu or auto, found {options.device}")
    return "cpu"


def load_engine(network: Network, options: RunOptions | None = None) -> Engine:
    """The engine that runs a network under these options; see `choose_engine`.

    If OpenVINO, selected by `auto`, fails on this network, falls back to torch with a SppFeatWarning. An engine that
    is asked for by name never falls back. Raises BackboneError, DeviceError, UsageError, MissingExtraError.
    """
    options = options or RunOptions()
    chosen = engine_of(network, options)
    if chosen == "sift":
        from sppfeat.engines.sift_engine import SiftEngine

        return SiftEngine(network, *cpu_streams())
    if chosen == "openvino":
        from sppfeat.engines.openvino_engine import OpenVinoEngine

        try:
            return OpenVinoEngine(network, *cpu_streams())
        except (BackboneError, MissingExtraError) as error:
            if options.engine == "openvino" or network.recipe.precision == "int8":
                raise
            warnings.warn(f"{error}; falling back to PyTorch", SppFeatWarning, stacklevel=2)
    from sppfeat.engines.torch_engine import TorchEngine

    return TorchEngine(network.backbone, resolve_device(options.device))


def _check_openvino(recipe: Recipe, asked: str, device: str) -> None:
    if device != "cpu":
        what = "precision int8" if recipe.precision == "int8" else "engine openvino"
        raise UsageError(f"{what} runs on the CPU: expected --device cpu, found {asked}")
    if recipe.precision not in OPENVINO_PRECISIONS:
        raise UsageError(
            f"engine openvino: expected precision {', '.join(OPENVINO_PRECISIONS[:-1])} or {OPENVINO_PRECISIONS[-1]}, "
            f"found {recipe.precision}"
        )
    from sppfeat.engines.openvino_engine import import_openvino

    import_openvino()


def cpu_streams() -> tuple[int, int]:
    """Concurrent forward passes on this CPU, and cores for each: one core per pass keeps a map in its cache."""
    cores = available_cores()
    streams = min(cores, MAX_STREAMS)
    return streams, max(1, cores // streams)
