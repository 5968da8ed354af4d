"""From files to descriptors: decoding, the network and pooling run concurrently."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from sppfeat.backbones import Network
from sppfeat.engines import Engine, ImageRefusedError, choose_engine, load_engine, resolve_device
from sppfeat.errors import BackboneError, ImageError, StoreError, UsageError, one_line, unknown_name
from sppfeat.extraction.stages import Stages
from sppfeat.images import Fingerprint, Item, PreparedImage, ShapeBatcher, prepare_image, read_ahead, scaled_size
from sppfeat.machine import available_cores
from sppfeat.recipe import Recipe, RunOptions
from sppfeat.settings import quiet_pillow
from sppfeat.store import window_text
from sppfeat.windows import map_windows, nearest_scales, outside, part_of_image

# Approximate limit of decoded images that wait for the network; at `native` scale they are large.
AHEAD_BYTES: Final = 1 << 29


class Described(NamedTuple):
    """The outcome for one item: its rows, or why it has none.

    position: index of the item. rows: [R, D], one row, or one per window. image_size: width and height of the upright
    original. row_errors: why single rows could not be described, by their index; their values are meaningless.
    """

    position: int
    rows: np.ndarray | None
    image_size: tuple[int, int]
    fingerprint: Fingerprint
    error: str | None
    row_errors: dict[int, str]

    def row(self, at: int = 0) -> tuple[np.ndarray | None, str | None]:
        """The descriptor [D] of one row, or why there is none."""
        error = self.error or self.row_errors.get(at)
        return (None if error is not None or self.rows is None else self.rows[at]), error


# How windows use the scales of a recipe: each window is pooled at all scales and fused, as a whole image is; or at the
# one scale that brings its area closest to 224 x 224, as SPP-net does for detection.
WINDOW_SCALES: Final = ("all", "nearest")


class _Unreadable(NamedTuple):
    reason: str
    fingerprint: Fingerprint


@dataclass
class _Row:
    """An image in the pipeline, with the results of its scales so far.

    windows: [K, 4], or None if the whole image is described. scale_of: [K] the scale of each window, or None if every
    window is pooled at every scale.
    """

    prepared: PreparedImage
    windows: np.ndarray | None
    scale_of: np.ndarray | None
    parts: list[np.ndarray | None]
    left: int = 0
    error: str | None = None

    def rois_at(self, scale: int) -> np.ndarray | None:
        """[K] which windows are pooled at a scale; None: the whole image."""
        if self.windows is None:
            return None
        return np.ones(len(self.windows), bool) if self.scale_of is None else self.scale_of == scale


_Input = tuple[int, int]  # which image, which scale
_Decoding = tuple[int, Item, "Future[PreparedImage | _Unreadable]"]


class _Gate:
    """Passes run concurrently, or one alone: it waits for running passes to end, and blocks all others."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._changed = threading.Condition()
        self._inside = 0

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


def check_windows(recipe: Recipe) -> None:
    """Raise UsageError for a recipe that windows cannot be described with."""
    if recipe.crop != "none":
        raise UsageError(f"windows need crop 'none', found {recipe.crop!r}")


class Describer:
    """Describes images by a recipe, which it completes (layer, mean, ...). The network is loaded on first use.

    dim: length of a descriptor. device: where the network runs. weights_sha256: of the network up to the layer.
    workers: decoding threads. network: the recipe's, if it is at hand.
    Raises BackboneError, DeviceError, UsageError, MissingExtraError.
    """

    def __init__(self, recipe: Recipe, options: RunOptions | None = None, *, network: Network | None = None) -> None:
        self._options = options or RunOptions()
        choose_engine(recipe, self._options)  # report invalid options before any work
        self._network = network or Network(recipe)
        description = self._network.description
        self.device = resolve_device(self._options.device)
        self.recipe = description.recipe
        self.minimum_side = description.minimum_side
        for scale in self.recipe.scales:
            if isinstance(scale, int) and scale < self.minimum_side:
                raise UsageError(
                    f"scale {scale}: backbone {recipe.backbone} needs at least {self.minimum_side} pixels per side"
                )
        self.weights_sha256 = description.weights_sha256
        self.dim = description.dim
        self.times = Stages()
        self._geometry = functools.lru_cache(maxsize=1024)(description.geometry)
        self._gate = _Gate()
        self._most_pixels = 0  # that went through the network in one pass
        self.workers = self._options.num_workers or available_cores()
        self._engine: Engine | None = None
        self._loading = threading.Lock()
        self._batch_size = 1
        # Batch sizes by shape, where memory is short.
        self._fitting: dict[tuple[int, ...], int] = {}

    def check_made(self, path: Path, recipe: Recipe, weights_sha256: str) -> None:
        """Raise StoreError, with the fields that differ, unless an output was made with this network and recipe."""
        differences = recipe.differences(self.recipe)
        if weights_sha256 != self.weights_sha256:
            differences.append(f"weights: {weights_sha256[:12]} here, {self.weights_sha256[:12]} there")
        if differences:
            raise StoreError(
                f"{path}: was made with another recipe ({'; '.join(differences)}); "
                "choose another output, or use --overwrite"
            )

    def part_of_image(self, part: np.ndarray, size: tuple[int, int], scale: int | str) -> np.ndarray:
        """[4] what part of an upright image of this size a part of its feature map at a scale shows; both from 0 to 1.

        Raises BackboneError where the geometry of the layer is not known, ImageError for a size that is not described.
        """
        input_size = scaled_size(size, scale, self.recipe, minimum=self.minimum_side)
        rows, columns = self._geometry(input_size[1], input_size[0])
        return part_of_image(part, input_size, columns, rows)

    def load(self) -> Engine:
        """The engine, loaded on first use. Raises BackboneError, DeviceError."""
        with self._loading:
            if self._engine is None:
                self._engine = load_engine(self._network, self._options)
                self._batch_size = self._options.batch_size or self._engine.batch_size
            return self._engine

    @property
    def engine(self) -> str:
        """The engine that runs the network, or will run it once loaded: `openvino` or `torch`."""
        return choose_engine(self.recipe, self._options) if self._engine is None else self._engine.name

    @property
    def streams(self) -> int:
        """Threads that run the network; 0 before it is loaded."""
        return self._engine.streams if self._engine is not None else 0

    def describe(
        self,
        items: Iterable[Item | str | os.PathLike[str]],
        *,
        scales: str = "all",
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[Described]:
        """Describe every item, or the image at every path, roughly in order; one that cannot be described comes with
        its reason.

        Windows are pooled from one forward pass per scale. scales: `all` pools each window at every scale, normalises
        and fuses as for a whole image, so that a window of the whole image has the image's descriptor; `nearest` pools
        each at the one scale that brings its area closest to 224 x 224. A window that reaches outside its image comes
        with a reason. Images with windows run through the network one by one: so readable ones come in order, and only
        the rows of few images are held at a time.
        Once `stop()` is true no new image is started, and those in flight are still yielded. Memory does not depend on
        the number of items. Batches depend only on the order of the images.
        Raises UsageError for windows if the recipe crops.
        """
        if scales not in WINDOW_SCALES:
            raise UsageError(unknown_name("scales", scales, WINDOW_SCALES))
        for index, row in self._run(
            (each if isinstance(each, Item) else Item.at(each) for each in items), scales, stop
        ):
            if isinstance(row, _Unreadable):
                yield Described(index, None, (0, 0), row.fingerprint, row.reason, {})
            else:
                yield self._fused(index, row)

    def _run(
        self, items: Iterable[Item], scales: str, stop: Callable[[], bool]
    ) -> Iterator[tuple[int, _Row | _Unreadable]]:
        decoders = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        try:
            numbered = iter(enumerate(items))
            # The first images are decoded while the network loads.
            begun = deque(self._begin(islice(numbered, 0 if stop() else self._ahead(0)), decoders))
            if not begun:
                return
            engine = self.load()
            forwarders = ThreadPoolExecutor(engine.streams, thread_name_prefix="forward")
            try:
                with engine.at_work():
                    yield from self._pipeline(engine, numbered, begun, scales, decoders, forwarders, stop)
            finally:
                forwarders.shutdown(cancel_futures=True)
        finally:
            read_ahead.forget()
            decoders.shutdown(cancel_futures=True)

    def _ahead(self, passes: int) -> int:
        """How many images may be decoded ahead of the network, which processes `passes` of them at a time."""
        largest = max(self.recipe.max_pixels if isinstance(s, str) else 2 * s * s for s in self.recipe.scales)
        return min(4 * self.workers + passes, max(self.workers, AHEAD_BYTES // (3 * largest * len(self.recipe.scales))))

    def _begin(self, items: Iterable[tuple[int, Item]], decoders: ThreadPoolExecutor) -> Iterator[_Decoding]:
        for index, item in items:
            if item.windows is not None:
                check_windows(self.recipe)
            item.expect()
            yield index, item, decoders.submit(self._prepare, item)

    def _pipeline(
        self,
        engine: Engine,
        items: Iterator[tuple[int, Item]],
        decoding: deque[_Decoding],
        window_scales: str,
        decoders: ThreadPoolExecutor,
        forwarders: ThreadPoolExecutor,
        stop: Callable[[], bool],
    ) -> Iterator[tuple[int, _Row | _Unreadable]]:
        ahead = self._ahead(engine.streams * self._batch_size)
        forwarding: deque[Future[list[tuple[_Input, np.ndarray | str]]]] = deque()
        batcher: ShapeBatcher[_Input] = ShapeBatcher(
            self._batch_size,
            patience=engine.patience * self._batch_size * len(self.recipe.scales),
            most=self._fitting,
        )
        ending = False
        rows: dict[int, _Row] = {}

        def submit(batch: list[tuple[_Input, np.ndarray]]) -> None:
            forwarding.append(forwarders.submit(self._forward, batch, [rows[index] for (index, _), _ in batch]))

        def collect(most: int) -> Iterator[tuple[int, _Row]]:
            while len(forwarding) > most or (forwarding and forwarding[0].done()):
                for (index, scale), part in forwarding.popleft().result():
                    row = rows[index]
                    row.left -= 1
                    if isinstance(part, str):
                        row.error = row.error or part
                    else:
                        row.parts[scale] = part
                    if not row.left:
                        yield index, rows.pop(index)

        while True:
            if not ending:
                decoding.extend(self._begin(islice(items, 0 if stop() else ahead - len(decoding)), decoders))
                ending = len(decoding) < ahead
            if not decoding:
                break
            index, item, future = decoding.popleft()
            prepared = future.result()
            if isinstance(prepared, _Unreadable):
                yield index, prepared
                continue
            row = rows[index] = self._row(prepared, item.windows, window_scales)
            # A scale without windows needs no pass.
            wanted = [s for s in range(len(row.parts)) if (chosen := row.rois_at(s)) is None or chosen.any()]
            row.left = len(wanted)
            if not wanted:
                yield index, rows.pop(index)
            # Batches become smaller towards the end, so that every stream gets work.
            share = -(-(1 + len(decoding)) // (2 * engine.streams)) if ending and engine.device == "cpu" else None
            for scale in wanted:
                if item.windows is not None:
                    submit([((index, scale), prepared.inputs[scale])])
                    continue
                for batch in batcher.add((index, scale), prepared.inputs[scale], share=share):
                    submit(batch)
            prepared.inputs.clear()
            yield from collect(2 * engine.streams)
        for batch in batcher.flush():
            submit(batch)
            yield from collect(2 * engine.streams)
        yield from collect(0)

    def _row(self, prepared: PreparedImage, windows: np.ndarray | None, window_scales: str) -> _Row:
        scale_of = None
        if windows is not None and window_scales == "nearest":
            sizes = [(pixels.shape[1], pixels.shape[0]) for pixels in prepared.inputs]
            scale_of = nearest_scales(windows, prepared.size, sizes)
        return _Row(prepared, windows, scale_of, [None] * len(prepared.inputs))

    def _prepare(self, item: Item) -> PreparedImage | _Unreadable:
        start = time.perf_counter()
        # Taken first: a file that is still being copied is another one by the next run. To ask a bucket takes time.
        early = item.fingerprint() if item.content is None else None
        if item.problem is not None:
            return _Unreadable(item.problem, early or item.fingerprint())
        try:
            with quiet_pillow:
                return prepare_image(item, self.recipe, minimum=self.minimum_side)
        except ImageError as error:
            return _Unreadable(str(error), early or item.fingerprint())
        except MemoryError:
            return _Unreadable("cannot be decoded: out of memory", early or item.fingerprint())
        finally:
            self.times.spend("decode", time.perf_counter() - start)

    def _forward(
        self, batch: list[tuple[_Input, np.ndarray]], rows: list[_Row]
    ) -> list[tuple[_Input, np.ndarray | str]]:
        start = time.perf_counter()
        try:
            return self._attempt(batch, rows)
        finally:
            self.times.spend("forward", time.perf_counter() - start)

    def _attempt(
        self, batch: list[tuple[_Input, np.ndarray]], rows: list[_Row]
    ) -> list[tuple[_Input, np.ndarray | str]]:
        """The results of one batch; if memory is short, it is tried again without other passes."""
        with self._gate.shared():
            found = self._pass(batch, rows)
        if isinstance(found, str):
            with self._gate.alone():
                return self._attempt_alone(batch, rows)
        return found

    def _attempt_alone(
        self, batch: list[tuple[_Input, np.ndarray]], rows: list[_Row]
    ) -> list[tuple[_Input, np.ndarray | str]]:
        """The results of one batch or its halves, down to single images; one that does not fit has its reason."""
        self.load().release()
        found = self._pass(batch, rows)
        if not isinstance(found, str):
            return found
        if len(batch) == 1:
            height, width = batch[0][1].shape[:2]
            if height * width <= self._most_pixels:
                raise BackboneError(
                    f"device {self.device}: out of memory ({found}): an image of {width} x {height} does not fit, "
                    f"although {self._most_pixels:,} pixels did before; the remaining rows stay pending"
                )
            reason = (
                f"one image of {width} x {height} does not fit into the memory of {self.device} ({found}); "
                "use a smaller scale, or a lower max_pixels"
            )
            return [(batch[0][0], reason)]
        half = len(batch) // 2
        shape = batch[0][1].shape
        self._fitting[shape] = min(half, self._fitting.get(shape, half))  # for later batches, too
        return self._attempt_alone(batch[:half], rows[:half]) + self._attempt_alone(batch[half:], rows[half:])

    def _pass(
        self, batch: list[tuple[_Input, np.ndarray]], rows: list[_Row]
    ) -> list[tuple[_Input, np.ndarray | str]] | str:
        """The results of one batch; a message if it ran out of memory. Raises BackboneError."""
        keys = [key for key, _ in batch]
        height, width = batch[0][1].shape[:2]
        engine = self.load()
        try:
            with engine.lane():
                described: list[tuple[_Input, np.ndarray | str]] = list(
                    zip(keys, self._descriptors(engine, batch, rows), strict=True)
                )
            self._most_pixels = max(self._most_pixels, len(batch) * height * width)
            return described
        except MemoryError as error:
            return one_line(error)  # not the error itself, which keeps the memory of the failed pass
        except ImageRefusedError as error:
            reason = f"the network rejected an image of {width} x {height}: {one_line(error)}"
            return [(key, reason) for key in keys]
        except (RuntimeError, AssertionError) as error:
            # A lost GPU, for example: not these images' fault, so their rows stay pending.
            raise BackboneError(
                f"backbone {self.recipe.backbone}: failed on a batch of {len(batch)} images of {width} x {height} "
                f"on {self.device} ({one_line(error)})"
            ) from None

    def _descriptors(
        self, engine: Engine, batch: list[tuple[_Input, np.ndarray]], rows: list[_Row]
    ) -> Sequence[np.ndarray | str]:
        """The descriptor [D] of each image, or those of its windows [k, D]; or why an image has none."""
        maps = engine.feature_maps(np.stack([pixels for _, pixels in batch]))
        if rows[0].windows is not None:
            return [
                self._pool_windows(engine, one, row, key[1], pixels)
                for one, row, (key, pixels) in zip(maps, rows, batch, strict=True)
            ]
        described = normalize(engine.pool(maps), self.recipe.normalize)
        # Of several scales, the stored values are known when all are fused.
        return to_stored(described, self.recipe.dtype) if len(self.recipe.scales) == 1 else list(described)

    def _pool_windows(self, engine: Engine, feature_map: Any, row: _Row, scale: int, pixels: np.ndarray) -> np.ndarray:
        """[k, D] descriptors of the windows that one image has at one scale."""
        start = time.perf_counter()
        assert row.windows is not None
        height, width = pixels.shape[:2]
        rows, columns = self._geometry(height, width)
        rois = map_windows(row.windows[row.rois_at(scale)], row.prepared.size, (width, height), columns, rows)
        descriptors = normalize(engine.pool_windows(feature_map, rois), self.recipe.normalize)
        self.times.spend("pool", time.perf_counter() - start)
        return descriptors

    def _fused(self, index: int, row: _Row) -> Described:
        size, fingerprint = row.prepared.size, row.prepared.fingerprint
        if row.error is not None:
            return Described(index, None, size, fingerprint, row.error, {})
        if row.windows is None:
            return self._fused_whole(index, row)
        dim = self.dim if row.scale_of is None else self.recipe.bins * self._network.description.channels
        parts = [part for part in row.parts if part is not None]
        with np.errstate(over="ignore"):
            if not parts:
                stored = np.zeros((len(row.windows), dim), self.recipe.dtype)
            elif row.scale_of is None or len(parts) == 1:
                stored = fuse(parts, self.recipe.fuse).astype(self.recipe.dtype, copy=False)
            else:
                stored = np.empty((len(row.windows), dim), self.recipe.dtype)
                for scale, part in enumerate(row.parts):
                    if part is not None:
                        stored[row.scale_of == scale] = part
        errors = {
            int(at): f"reaches outside the image of {size[0]} x {size[1]} pixels: {window_text(row.windows[at])}"
            for at in np.flatnonzero(outside(row.windows, size))
        }
        # The sum is not finite if a value is not, and needs no temporary array.
        if not np.isfinite(stored.sum(dtype=np.float32)):
            for at in np.flatnonzero(~np.isfinite(stored).all(1)):
                errors.setdefault(int(at), f"the descriptor is not finite as {self.recipe.dtype}")
        return Described(index, stored, size, fingerprint, None, errors)

    def _fused_whole(self, index: int, row: _Row) -> Described:
        size, fingerprint = row.prepared.size, row.prepared.fingerprint
        parts = [part for part in row.parts if part is not None]
        stored: np.ndarray | str = parts[0]
        if len(parts) > 1:
            stored = to_stored(fuse(parts, self.recipe.fuse)[None], self.recipe.dtype)[0]
        if isinstance(stored, str):
            return Described(index, None, size, fingerprint, stored, {})
        return Described(index, stored[None], size, fingerprint, None, {})


def normalize(descriptors: np.ndarray, kind: str) -> np.ndarray:
    """Normalise rows [N, D]: `l2`, `signed-sqrt-l2` (signed square root, then l2) or `none`. Zeros stay zeros."""
    if kind == "none":
        return descriptors
    if kind == "signed-sqrt-l2":
        descriptors = np.copysign(np.sqrt(np.abs(descriptors)), descriptors)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller that stores rows reports values that are not finite
        lengths = np.sqrt(np.einsum("nd,nd->n", descriptors, descriptors))
        unit: np.ndarray = descriptors / np.maximum(lengths, 1e-12)[:, None]
    return unit


def fuse(parts: list[np.ndarray], kind: str) -> np.ndarray:
    """Fuse the descriptors [.., D] of one image or its windows at each scale, by `mean`, `max` or `concat`."""
    if len(parts) == 1:
        return parts[0]
    if kind == "concat":
        return np.concatenate(parts, axis=-1)
    together: np.ndarray = np.max(parts, axis=0) if kind == "max" else np.mean(parts, axis=0)
    return together


def to_stored(descriptors: np.ndarray, dtype: str) -> list[np.ndarray | str]:
    """Rows [N, D] of float32 in the store's type; for a row that is not finite in it, the reason instead."""
    with np.errstate(over="ignore", invalid="ignore"):
        stored = descriptors.astype(dtype, copy=False)
        # Rounding keeps order: all values are finite if the largest is.
        largest = np.maximum(descriptors.max(1), -descriptors.min(1))
        finite = np.isfinite(largest.astype(dtype))
    rows: list[np.ndarray | str] = list(stored)
    for at in np.flatnonzero(~finite):
        rows[at] = f"the descriptor is not finite as {dtype} (largest value {largest[at]:.3g})"
    return rows
