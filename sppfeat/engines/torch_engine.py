"""The engine `torch`: the network as PyTorch runs it, on any device."""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch

from sppfeat.backbones.backbone import Backbone
from sppfeat.engines.cuda_graphs import Pass, RecurringPasses, capture_into_one_pool
from sppfeat.engines.engine import ImageRefusedError, cpu_streams
from sppfeat.engines.torch_rows import copied_out, stored_rows
from sppfeat.engines.torch_settings import exact_convolutions
from sppfeat.errors import DeviceError, SppFeatWarning, one_line
from sppfeat.images import Unresized
from sppfeat.pyramid.pooling import pool_pyramid, pool_rois

# On a CPU, one image per core at a time keeps the layers' maps in its cache: on 2 cores, 1.2 to 1.5 times as many
# images per second as batches of 8 spread over both. Batches of 2 or 4 are no faster, and cost 200 MB or more, because
# oneDNN keeps its plans for every shape it has seen. A GPU needs far larger batches; one that does not fit into its
# memory is halved.
CPU_BATCH_SIZE: Final = 1
CUDA_BATCH_SIZE: Final = 128
# An incomplete batch of a rare shape runs after this many batches' worth of other images.
PATIENCE: Final = 16
# While one thread's batch is computed, the next one's is stacked and copied.
CUDA_STREAMS: Final = 2
# cudaHostRegisterPortable
_FOR_ALL_DEVICES: Final = 1

# torch's messages for an image that is too small for a convolution or a pooling, and timm's and torchvision's for one
# that patches do not cover.
_SIZE_REFUSED: Final = re.compile(
    "[Kk]ernel size|Calculated padded input size|[Oo]utput size is too small|divisible by patch size|"
    "(height|width) .* (doesn't match|should be divisible)|Wrong image (height|width)"
)
# Messages of torch's CPU allocator, and of oneDNN, when out of memory.
_OUT_OF_MEMORY: Final = re.compile(
    "out of memory|can't allocate memory|not enough memory|bad_?\\s?alloc", re.IGNORECASE
)


class TorchEngine:
    """The network as torch runs it; see `Engine`. Raises DeviceError if the device cannot hold it."""

    name = "torch"
    patience = PATIENCE

    def __init__(self, backbone: Backbone, device: str) -> None:
        self._place = torch.device(device)
        try:
            self._backbone = backbone.to(self._place)
        except RuntimeError as error:
            name = backbone.descriptions[0].recipe.backbone
            raise DeviceError(f"device {device}: cannot hold {name} ({one_line(error)})") from None
        self.device = device
        self._recipe = backbone.descriptions[0].recipe
        self._local = threading.local()
        self._all_passes: list[RecurringPasses] = []
        self._resizing_failed = False
        self.batch_size = CPU_BATCH_SIZE if device == "cpu" else CUDA_BATCH_SIZE
        self.streams, self.threads = cpu_streams() if device == "cpu" else (CUDA_STREAMS, 1)
        if self._place.type == "cuda":
            # This thread's stream copied the weights, and other threads' streams read them.
            torch.cuda.synchronize(self._place)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        before = torch.get_num_threads()
        try:
            yield
        finally:
            torch.set_num_threads(before)  # threads that start later inherit what a lane sets

    @contextlib.contextmanager
    def lane(self) -> Iterator[None]:
        if not getattr(self._local, "ready", False):
            torch.set_num_threads(self.threads)
            self._local.ready = True
        with exact_convolutions, torch.inference_mode():
            if self._place.type != "cuda":
                yield
                return
            if not hasattr(self._local, "stream"):
                self._local.stream = torch.cuda.Stream(self._place)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._local.stream):
                yield

    def feature_maps(self, images: np.ndarray) -> list[torch.Tensor]:
        """[N, C, h, w] of each layer, on the device; see `Engine.feature_maps`."""
        with told_apart():
            pixels = torch.from_numpy(images)
            if self._place.type != "cuda":
                return self._backbone.feature_maps(pixels)
            # Only a copy from pinned memory runs beside another thread's pass.
            pixels = pixels.pin_memory().to(self._place, non_blocking=True)
            return self._recurring("of_pixels", self._backbone.feature_maps)(pixels)

    def feature_maps_of(self, images: Sequence[Unresized]) -> list[torch.Tensor]:
        """As `feature_maps`, of images that the GPU resizes; see `card_resize`."""
        with told_apart():
            inputs = self._resized(images)
            if inputs is not None:
                return self._recurring("of_inputs", self._backbone.maps_of)(inputs)
        return self.feature_maps(np.stack([each.resized() for each in images]))

    def _recurring(self, name: str, run: Pass) -> Pass:
        if not hasattr(self._local, "stream"):  # outside of a lane, where nothing recurs
            return run
        if not hasattr(self._local, name):
            passes = RecurringPasses(run, capture_into_one_pool)
            setattr(self._local, name, passes)
            self._all_passes.append(passes)
        found: Pass = getattr(self._local, name)
        return found

    def _resized(self, images: Sequence[Unresized]) -> torch.Tensor | None:
        """The network's inputs [N, 3, H, W]; None, with a warning the first time, if the kernel does not work."""
        if self._resizing_failed:
            return None
        if not hasattr(self._local, "byte_values"):
            self._local.byte_values = self._backbone.byte_values()
        table: torch.Tensor = self._local.byte_values
        height, width, _ = images[0].shape
        inputs = torch.empty(
            (len(images), 3, height, width), dtype=table.dtype, device=self._place, memory_format=torch.channels_last
        )
        pixels = self._uploaded([each.pixels for each in images])
        try:
            from sppfeat.engines.card_resize import resize_into

            for into, each, of_each in zip(inputs, images, pixels, strict=True):
                resize_into(into, of_each, each.size, each.interpolation, table, each.corner)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler that is missing, or too old for the GPU, can fail in any way
            self._resizing_failed = True
            warnings.warn(
                f"the Triton kernel that resizes does not work here ({one_line(error)}); falling back to the CPU",
                SppFeatWarning,
                stacklevel=2,
            )
            return None
        return inputs

    def pin(self, memory: np.ndarray) -> None:
        address = memory.ctypes.data
        if self._place.type != "cuda" or _is_pinned(memory):
            return
        cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._place):
            result = cuda.cudaHostRegister(address, memory.nbytes, _FOR_ALL_DEVICES)
        if result != cuda.cudaError.success:
            raise DeviceError(
                f"device {self.device}: {memory.nbytes:,} bytes of memory cannot be pinned "
                f"({cuda.cudaGetErrorString(result)})"
            )
        # Before the memory is unmapped. At the end of the process the driver sees to it.
        weakref.finalize(memory, cuda.cudaHostUnregister, address).atexit = False

    def _uploaded(self, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Images of any shapes, on the device: from pinned memory as they are, the others by one copy.

        The copies are done when this stream's rows are pooled.
        """
        found = [torch.from_numpy(each) if _is_pinned(each) else None for each in images]
        others = [each for each, pinned in zip(images, found, strict=True) if pinned is None]
        copied = iter(self._uploaded_together(others) if others else ())
        return [next(copied) if pinned is None else pinned.to(self._place, non_blocking=True) for pinned in found]

    def _uploaded_together(self, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        # With a copy for each that must be pinned first, a CPU takes longer than the GPU.
        ends = np.cumsum([each.size for each in images]).tolist()
        held = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=self._place.type == "cuda")
        np.concatenate([each.reshape(-1) for each in images], out=held.numpy())
        held = held.to(self._place, non_blocking=True)
        return [held[end - each.size : end].view(each.shape) for each, end in zip(images, ends, strict=True)]

    def pool(self, maps: torch.Tensor) -> np.ndarray:
        recipe = self._recipe
        with told_apart():
            rows = pool_pyramid(maps, recipe.levels, pooling=recipe.pooling, gem_p=recipe.gem_p)
            return _to_numpy(rows)

    def pool_stored(self, maps: Sequence[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """See `StoringEngine.pool_stored`."""
        recipe = self._recipe
        with told_apart():
            layers = [
                pool_pyramid(of_layer, recipe.levels, pooling=recipe.pooling, gem_p=recipe.gem_p) for of_layer in maps
            ]
            rows, largest = copied_out(stored_rows(layers, recipe.normalize, recipe.dtype))
            return rows.numpy(), largest.numpy()

    def pool_windows(self, feature_map: torch.Tensor, rois: np.ndarray) -> np.ndarray:
        recipe = self._recipe
        with told_apart():
            rows = pool_rois(
                feature_map, torch.from_numpy(rois), recipe.levels, pooling=recipe.pooling, gem_p=recipe.gem_p
            )
            return _to_numpy(rows)

    def release(self) -> None:
        for passes in self._all_passes:
            passes.release()
        if self._place.type == "cuda":
            torch.cuda.empty_cache()


def _is_pinned(pixels: np.ndarray) -> bool:
    # torch warns of arrays that are not writable; those are Pillow's.
    return pixels.flags.writeable and torch.from_numpy(pixels).is_pinned()


def _to_numpy(rows: torch.Tensor) -> np.ndarray:
    found: np.ndarray = rows.detach().float().cpu().numpy()
    return found


@contextlib.contextmanager
def told_apart() -> Iterator[None]:
    """Turn torch's errors into those of `Engine`, MemoryError and ImageRefusedError; others pass unchanged."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(one_line(error)) from None
    except (RuntimeError, AssertionError) as error:
        if _OUT_OF_MEMORY.search(str(error)):
            raise MemoryError(one_line(error)) from None
        if _SIZE_REFUSED.search(str(error)):
            raise ImageRefusedError(one_line(error)) from None
        raise
