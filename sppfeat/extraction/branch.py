"""One backbone of a recipe at work: batches of images to the descriptors of its layers."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from sppfeat.backbones import Description, Network
from sppfeat.engines import (
    Engine,
    ImageRefusedError,
    ResizingEngine,
    StoringEngine,
    choose_engine,
    engine_device,
    engine_of,
    load_engine,
    resizes_images,
    stores_rows,
)
from sppfeat.errors import BackboneError, UsageError, one_line
from sppfeat.extraction.stages import Stages
from sppfeat.extraction.values import finite_rows, normalize, to_stored
from sppfeat.images import Input, Unresized
from sppfeat.recipe import Recipe, RunOptions
from sppfeat.windows import map_windows


class Gate:
    """Passes run concurrently, or one alone: it waits for running passes to end, and blocks all others.

    release: what frees memory that only saves time, of every engine.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._changed = threading.Condition()
        self._inside = 0
        self.release: list[Callable[[], None]] = []

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        with self._turn, self._changed:
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._turn:
            with self._changed:
                self._changed.wait_for(lambda: not self._inside)
            yield


class Windowed(NamedTuple):
    """The windows [k, 4] of one image of `size`, width and height, that are pooled from a pass."""

    windows: np.ndarray
    size: tuple[int, int]


class Branch:
    """A recipe of one backbone, which it completes (layer, mean, ...). The network is loaded on first use.

    network: the recipe's, if it is at hand. gate, times: of all branches. whole: whether a pass gives the whole
    descriptor of an image, in the stored type. dim: values of a pass, normalized layer by layer.
    Raises BackboneError, DeviceError, UsageError, MissingExtraError.
    """

    def __init__(
        self,
        recipe: Recipe,
        options: RunOptions,
        network: Network | None,
        *,
        gate: Gate,
        times: Stages,
        whole: bool,
    ) -> None:
        choose_engine(recipe, options)  # report invalid options before any work
        self._options = options
        self._network = network or Network(recipe)
        self.descriptions = self._network.descriptions
        first = self._network.recipe
        self.recipe = replace(first, layer=",".join(each.layer.name for each in self.descriptions))
        for each in self.descriptions:
            _check_images(each, recipe)
        self.minimum_side = max(each.minimum_side for each in self.descriptions)
        for scale in recipe.scales:
            if isinstance(scale, int) and scale < self.minimum_side:
                raise UsageError(
                    f"scale {scale}: backbone {recipe.backbone} needs at least {self.minimum_side} pixels per side"
                )
        self.dim = recipe.bins * sum(each.channels for each in self.descriptions)
        self.device = engine_device(recipe, options)
        self.geometries = [functools.lru_cache(maxsize=1024)(each.geometry) for each in self.descriptions]
        self._gate, self._times, self._whole = gate, times, whole
        self._most_pixels = 0  # that went through the network in one pass
        self._engine: Engine | None = None
        self._loading = threading.Lock()
        self._lanes = threading.Semaphore(1)
        self.batch_size = 1
        # Batch sizes by shape, where memory is short.
        self.fitting: dict[tuple[int, ...], int] = {}

    def load(self) -> Engine:
        """The engine, loaded on first use. Raises BackboneError, DeviceError."""
        with self._loading:
            if self._engine is None:
                self._engine = load_engine(self._network, self._options)
                # Another backbone may take more threads than this one's device does.
                self._lanes = threading.Semaphore(self._engine.streams)
                self._gate.release.append(self._engine.release)
                self.batch_size = self._options.batch_size or self._engine.batch_size
            return self._engine

    @property
    def engine(self) -> str:
        """The engine that runs the network, or will run it once loaded: `openvino`, `torch` or `sift`."""
        return engine_of(self._network, self._options) if self._engine is None else self._engine.name

    @property
    def resizes(self) -> bool:
        """Whether the engine resizes images, and takes them as they were decoded."""
        return resizes_images(self.engine, self.device)

    @property
    def streams(self) -> int:
        """Threads that run the network; 0 before it is loaded."""
        return self._engine.streams if self._engine is not None else 0

    def forward(self, images: Sequence[Input], windowed: Sequence[Windowed] | None) -> list[np.ndarray | str]:
        """The descriptor [D] of each image of a batch, or those of its windows [k, D]; or why it has none.

        If memory is short, the batch is tried again without other passes, and in halves. Raises BackboneError.
        """
        start = time.perf_counter()
        try:
            self.load()
            with self._lanes, self._gate.shared():
                found = self._pass(images, windowed)
            if isinstance(found, str):
                with self._gate.alone():
                    return self._forward_alone(images, windowed)
            return found
        finally:
            self._times.spend("forward", time.perf_counter() - start)

    def _forward_alone(self, images: Sequence[Input], windowed: Sequence[Windowed] | None) -> list[np.ndarray | str]:
        """The results of one batch or its halves, down to single images; one that does not fit has its reason."""
        for release in self._gate.release:
            release()
        found = self._pass(images, windowed)
        if not isinstance(found, str):
            return found
        shape = images[0].shape
        height, width = shape[:2]
        if len(images) == 1:
            if height * width <= self._most_pixels:
                raise BackboneError(
                    f"device {self.device}: out of memory ({found}): an image of {width} x {height} does not fit, "
                    f"although {self._most_pixels:,} pixels did before; the remaining rows stay pending"
                )
            reason = (
                f"one image of {width} x {height} does not fit into the memory of {self.device} ({found}); "
                "use a smaller scale, or a lower max_pixels"
            )
            return [reason]
        half = len(images) // 2
        self.fitting[shape] = min(half, self.fitting.get(shape, half))  # for later batches, too
        first, second = (None, None) if windowed is None else (windowed[:half], windowed[half:])
        return self._forward_alone(images[:half], first) + self._forward_alone(images[half:], second)

    def _pass(self, images: Sequence[Input], windowed: Sequence[Windowed] | None) -> list[np.ndarray | str] | str:
        """The results of one batch; a message if it ran out of memory. Raises BackboneError."""
        height, width = images[0].shape[:2]
        engine = self.load()
        try:
            with engine.lane():
                found = self._descriptors(engine, images, windowed)
            self._most_pixels = max(self._most_pixels, len(images) * height * width)
            return found
        except MemoryError as error:
            return one_line(error)  # not the error itself, which keeps the memory of the failed pass
        except ImageRefusedError as error:
            return [f"the network rejected an image of {width} x {height}: {one_line(error)}"] * len(images)
        except (RuntimeError, AssertionError) as error:
            # A lost GPU, for example: not these images' fault, so their rows stay pending.
            raise BackboneError(
                f"backbone {self.recipe.backbone}: failed on a batch of {len(images)} images of {width} x {height} "
                f"on {self.device} ({one_line(error)})"
            ) from None

    def _descriptors(
        self, engine: Engine, images: Sequence[Input], windowed: Sequence[Windowed] | None
    ) -> list[np.ndarray | str]:
        decoded = [each for each in images if isinstance(each, Unresized)]
        if decoded:
            assert isinstance(engine, ResizingEngine)  # as `resizes` says
            maps = engine.feature_maps_of(decoded)
        else:
            maps = engine.feature_maps(np.stack([each for each in images if isinstance(each, np.ndarray)]))
        kind = self.recipe.normalize
        if windowed is not None:
            start = time.perf_counter()
            rows: list[np.ndarray | str] = []
            for at, each in enumerate(windowed):
                rois = [self._rois(geometry, images[at], each) for geometry in self.geometries]
                pooled = [engine.pool_windows(of_layer[at], some) for of_layer, some in zip(maps, rois, strict=True)]
                rows.append(_joined([normalize(of_layer, kind) for of_layer in pooled]))
            self._times.spend("pool", time.perf_counter() - start)
            return rows
        # Of several passes, the stored values are known when all are joined.
        if self._whole and stores_rows(engine.name, engine.device):
            assert isinstance(engine, StoringEngine)
            return finite_rows(*engine.pool_stored(maps), self.recipe.dtype)
        described = _joined([normalize(engine.pool(of_layer), kind) for of_layer in maps])
        return to_stored(described, self.recipe.dtype) if self._whole else list(described)

    @staticmethod
    def _rois(geometry: Any, pixels: Input, windowed: Windowed) -> np.ndarray:
        height, width = pixels.shape[:2]
        rows, columns = geometry(height, width)
        return map_windows(windowed.windows, windowed.size, (width, height), columns, rows)


def _check_images(description: Description, recipe: Recipe) -> None:
    """Raise UsageError for a recipe whose images the network does not take, or whose pyramid has one cell alone."""
    name, side = recipe.backbone, description.fixed_side
    if side is not None and (recipe.crop != "center" or recipe.scales != (side,)):
        raise UsageError(
            f"backbone {name} takes images of {side} x {side} pixels only: expected --crop center --scales {side}, "
            f"found crop {recipe.crop!r}, scales {','.join(map(str, recipe.scales))}"
        )
    stride = description.layer.stride
    whole_patches = description.hooked and (description.steps or description.layer.cells == 1)
    if side is None and whole_patches and recipe.crop == "none" and recipe.size_multiple % stride:
        raise UsageError(
            f"backbone {name} takes whole patches of {stride} pixels: expected a size_multiple that {stride} divides, "
            f"found {recipe.size_multiple}; use --size-multiple {stride}"
        )
    if description.layer.cells == 1 and recipe.levels != (1,):
        raise UsageError(
            f"layer {description.layer.name} of backbone {name} is of the whole image: expected --levels 1, found "
            f"{','.join(map(str, recipe.levels))}"
        )


def _joined(layers: list[np.ndarray]) -> np.ndarray:
    return layers[0] if len(layers) == 1 else np.concatenate(layers, axis=-1)
