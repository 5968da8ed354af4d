"""From files to descriptors: decoding, the network and pooling at work side by side."""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, NamedTuple

import numpy as np
import torch

from sppfeat.engines.engine import load_engine
from sppfeat.engines.settings import exact_convolutions, quiet_pillow
from sppfeat.errors import BackboneError, ImageError, UsageError, one_line, unknown_name
from sppfeat.images.reading import Fingerprint, fingerprint_of
from sppfeat.images.resizing import PreparedImage, ShapeBatcher, prepare_image
from sppfeat.machine import available_cores
from sppfeat.pyramid.pooling import pool_pyramid, pool_rois
from sppfeat.recipe import Recipe, RunOptions
from sppfeat.windows.windows import map_windows, nearest_scales, outside, window_text

# Decoded pictures that wait for the network take at most about this much; at `native` scale they are large.
AHEAD_BYTES: Final = 1 << 29


class Described(NamedTuple):
    """One picture's outcome: its descriptor, or why there is none. `position` counts the paths given."""

    position: int
    descriptor: np.ndarray | None
    image_size: tuple[int, int]
    fingerprint: Fingerprint
    error: str | None


class DescribedWindows(NamedTuple):
    """The outcome for one picture's K windows: [K, D] descriptors, or why the picture has none.

    window_errors: why single windows could not be described, by their number; their rows are of no use.
    """

    position: int
    descriptors: np.ndarray | None
    image_size: tuple[int, int]
    fingerprint: Fingerprint
    error: str | None
    window_errors: dict[int, str]


# How the scales of a recipe serve windows: every window is pooled at all of them and fused, as a whole picture is; or
# each at the one scale that brings its area closest to 224 x 224, as SPP-net detects.
WINDOW_SCALES: Final = ("all", "nearest")


@dataclass
class StageTimes:
    """Seconds of work by stage, summed over the threads that did it. `pool`, of windows, is a part of `forward`."""

    decode: float = 0.0
    forward: float = 0.0
    pool: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, stage: str, seconds: float) -> None:
        with self._lock:
            setattr(self, stage, getattr(self, stage) + seconds)


class _Unreadable(NamedTuple):
    reason: str
    fingerprint: Fingerprint


@dataclass
class _Row:
    """A picture on its way: what its scales have given so far.

    windows: [K, 4], or None where the whole picture is described. scale_of: [K] the scale of each window, or None where
    every scale serves all.
    """

    prepared: PreparedImage
    windows: np.ndarray | None
    scale_of: np.ndarray | None
    parts: list[np.ndarray | None]
    left: int = 0
    error: str | None = None

    def rois_at(self, scale: int) -> np.ndarray | None:
        """[K] which windows are pooled at a scale; None: the whole picture is."""
        if self.windows is None:
            return None
        return np.ones(len(self.windows), bool) if self.scale_of is None else self.scale_of == scale


# How torch says that a picture is too small for a convolution or a pooling.
_SIZE_REFUSED: Final = re.compile("[Kk]ernel size|Calculated padded input size|[Oo]utput size is too small")

# How torch's and OpenVINO's allocators on the processor say that there is no more.
_OUT_OF_MEMORY: Final = re.compile(
    "out of memory|can't allocate memory|not enough memory|bad_?\\s?alloc", re.IGNORECASE
)

_Input = tuple[int, int]  # which picture, which scale
_Task = tuple[str, np.ndarray | None]  # a picture's path, its windows


class _Gate:
    """Passes go side by side, or one alone: it waits for those that are under way, and holds back all others."""

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


class Describer:
    """Describes pictures by a recipe. The network is loaded once; `recipe` is then complete (layer, mean, ...).

    dim: length of a descriptor. device, engine: where and how the network runs. weights_sha256: of the network up to
    the layer. workers, streams: threads that decode, and that run the network.
    Raises BackboneError, DeviceError, UsageError, MissingExtraError.
    """

    def __init__(self, recipe: Recipe, options: RunOptions | None = None) -> None:
        options = options or RunOptions()
        self._backbone, self._engine = load_engine(recipe, options)
        self.device, self.engine = self._engine.device, self._engine.name
        self.recipe = self._backbone.recipe
        smallest = self._backbone.minimum_side
        for scale in self.recipe.scales:
            if isinstance(scale, int) and scale < smallest:
                raise UsageError(f"scale {scale}: backbone {recipe.backbone} needs at least {smallest} pixels a side")
        self.weights_sha256 = self._backbone.weights_sha256
        self.dim = self.recipe.dimensions(self._backbone.channels)
        self.times = StageTimes()
        self._geometry = functools.lru_cache(maxsize=1024)(self._backbone.geometry)
        self._gate = _Gate()
        self._most_pixels = 0  # that went through the network in one pass
        self.workers = options.num_workers or available_cores()
        self.streams = self._engine.streams
        self._batch_size = options.batch_size or self._engine.batch_size

    def describe(self, paths: Iterable[str], *, stop: Callable[[], bool] = lambda: False) -> Iterator[Described]:
        """Describe every path, about in order; a picture that cannot be described comes with its reason.

        Once `stop()` is true no further picture is begun, and those begun are still given. Memory does not depend on
        how many paths there are. How pictures are batched depends on their order alone.
        """
        for index, row in self._run(((path, None) for path in paths), "all", stop, together=True):
            if isinstance(row, _Unreadable):
                yield Described(index, None, (0, 0), row.fingerprint, row.reason)
            else:
                yield self._fused(index, row)

    def describe_windows(
        self,
        pictures: Iterable[tuple[str, np.ndarray]],
        *,
        scales: str = "all",
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[DescribedWindows]:
        """Describe windows [K, 4] of every picture, given as path and windows, from one forward pass for each scale.

        Windows are pixels x1, y1, x2, y2 of the upright original, inclusive; K may be 0. scales: `all` pools each
        window at every scale, normalises and fuses as `describe` does, so that a window of the whole picture has the
        picture's descriptor; `nearest` pools each at the one scale that brings its area closest to 224 x 224.
        A window that reaches outside its picture comes with a reason. Otherwise as `describe`, but pictures go through
        the network one by one: so those that can be read come in order, and rows of few pictures are held at a time.
        Raises UsageError for a recipe that crops.
        """
        if scales not in WINDOW_SCALES:
            raise UsageError(unknown_name("scales", scales, WINDOW_SCALES))
        if self.recipe.crop != "none":
            raise UsageError(f"windows need crop 'none', found {self.recipe.crop!r}")
        for index, row in self._run(pictures, scales, stop, together=False):
            if isinstance(row, _Unreadable):
                yield DescribedWindows(index, None, (0, 0), row.fingerprint, row.reason, {})
            else:
                yield self._fused_windows(index, row)

    def _run(
        self, tasks: Iterable[_Task], scales: str, stop: Callable[[], bool], *, together: bool
    ) -> Iterator[tuple[int, _Row | _Unreadable]]:
        """together: whether pictures of one shape wait for each other."""
        threads_before = torch.get_num_threads()
        decoders = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        forwarders = ThreadPoolExecutor(
            self.streams,
            thread_name_prefix="forward",
            initializer=torch.set_num_threads,
            initargs=(self._engine.threads,),
        )
        try:
            yield from self._pipeline(iter(enumerate(tasks)), scales, decoders, forwarders, stop, together)
        finally:
            decoders.shutdown(cancel_futures=True)
            forwarders.shutdown(cancel_futures=True)
            torch.set_num_threads(threads_before)

    def _pipeline(
        self,
        tasks: Iterator[tuple[int, _Task]],
        window_scales: str,
        decoders: ThreadPoolExecutor,
        forwarders: ThreadPoolExecutor,
        stop: Callable[[], bool],
        together: bool,
    ) -> Iterator[tuple[int, _Row | _Unreadable]]:
        largest = max(self.recipe.max_pixels if isinstance(s, str) else 2 * s * s for s in self.recipe.scales)
        ahead = 4 * self.workers + self.streams * self._batch_size
        ahead = min(ahead, max(self.workers, AHEAD_BYTES // (3 * largest * len(self.recipe.scales))))
        decoding: deque[tuple[int, np.ndarray | None, Future[PreparedImage | _Unreadable]]] = deque()
        forwarding: deque[Future[list[tuple[_Input, np.ndarray | str]]]] = deque()
        batcher: ShapeBatcher[_Input] = ShapeBatcher(
            self._batch_size if together else 1,
            patience=self._engine.patience * self._batch_size * len(self.recipe.scales),
        )
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
            if not stop():
                for index, (path, windows) in islice(tasks, ahead - len(decoding)):
                    decoding.append((index, windows, decoders.submit(self._prepare, path)))
            if not decoding:
                break
            index, windows, future = decoding.popleft()
            prepared = future.result()
            if isinstance(prepared, _Unreadable):
                yield index, prepared
                continue
            row = rows[index] = self._row(prepared, windows, window_scales)
            # A scale that no window takes needs no pass.
            wanted = [s for s in range(len(row.parts)) if (chosen := row.rois_at(s)) is None or chosen.any()]
            row.left = len(wanted)
            if not wanted:
                yield index, rows.pop(index)
            batcher.limit(self._batch_size)
            for scale in wanted:
                for batch in batcher.add((index, scale), prepared.inputs[scale]):
                    submit(batch)
            prepared.inputs.clear()
            yield from collect(2 * self.streams)
        for batch in batcher.flush():
            submit(batch)
            yield from collect(2 * self.streams)
        yield from collect(0)

    def _row(self, prepared: PreparedImage, windows: np.ndarray | None, window_scales: str) -> _Row:
        scale_of = None
        if windows is not None and window_scales == "nearest":
            sizes = [(pixels.shape[1], pixels.shape[0]) for pixels in prepared.inputs]
            scale_of = nearest_scales(windows, prepared.size, sizes)
        return _Row(prepared, windows, scale_of, [None] * len(prepared.inputs))

    def _prepare(self, path: str) -> PreparedImage | _Unreadable:
        start = time.perf_counter()
        try:
            with quiet_pillow:
                return prepare_image(path, self.recipe, minimum=self._backbone.minimum_side)
        except ImageError as error:
            return _Unreadable(str(error), fingerprint_of(path))
        except MemoryError:
            return _Unreadable("cannot be decoded: it does not fit into memory", fingerprint_of(path))
        finally:
            self.times.add("decode", time.perf_counter() - start)

    def _forward(
        self, batch: list[tuple[_Input, np.ndarray]], rows: list[_Row]
    ) -> list[tuple[_Input, np.ndarray | str]]:
        start = time.perf_counter()
        try:
            return self._attempt(batch, rows)
        finally:
            self.times.add("forward", time.perf_counter() - start)

    def _attempt(
        self, batch: list[tuple[_Input, np.ndarray]], rows: list[_Row]
    ) -> list[tuple[_Input, np.ndarray | str]]:
        """What one batch gives; where memory is short, it is tried again with no other pass beside it."""
        with self._gate.shared():
            found = self._pass(batch, rows)
        if isinstance(found, str):
            with self._gate.alone():
                return self._attempt_alone(batch, rows)
        return found

    def _attempt_alone(
        self, batch: list[tuple[_Input, np.ndarray]], rows: list[_Row]
    ) -> list[tuple[_Input, np.ndarray | str]]:
        """What one batch gives, or its halves, down to single images; one that does not fit comes with its reason."""
        self._engine.release()
        found = self._pass(batch, rows)
        if not isinstance(found, str):
            return found
        if len(batch) == 1:
            height, width = batch[0][1].shape[:2]
            if height * width <= self._most_pixels:
                raise BackboneError(
                    f"device {self.device}: its memory is short ({found}): an image of {width} x {height} does not fit "
                    f"where {self._most_pixels:,} pixels did; the rows that are left stay pending"
                )
            reason = (
                f"one image of {width} x {height} does not fit into the memory of {self.device} ({found}); "
                "a smaller scale, or max_pixels, takes less"
            )
            return [(batch[0][0], reason)]
        half = len(batch) // 2
        self._batch_size = min(self._batch_size, half)  # of the batches to come, too
        return self._attempt_alone(batch[:half], rows[:half]) + self._attempt_alone(batch[half:], rows[half:])

    def _pass(
        self, batch: list[tuple[_Input, np.ndarray]], rows: list[_Row]
    ) -> list[tuple[_Input, np.ndarray | str]] | str:
        """What one batch gives; a text where the memory does not suffice. Raises BackboneError."""
        keys = [key for key, _ in batch]
        height, width = batch[0][1].shape[:2]
        try:
            with exact_convolutions, torch.inference_mode(), self._engine.lane():
                described: list[tuple[_Input, np.ndarray | str]] = list(
                    zip(keys, self._descriptors(batch, rows), strict=True)
                )
            self._most_pixels = max(self._most_pixels, len(batch) * height * width)
            return described
        except (RuntimeError, AssertionError, MemoryError) as error:
            if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _OUT_OF_MEMORY.search(str(error)):
                return one_line(error)  # not the error itself, which holds on to the memory of the failed pass
            if _SIZE_REFUSED.search(str(error)):
                reason = f"the network refused an image of {width} x {height}: {one_line(error)}"
                return [(key, reason) for key in keys]
            # A lost GPU, say: no fault of these images, whose rows stay pending.
            raise BackboneError(
                f"backbone {self.recipe.backbone}: failed on a batch of {len(batch)} images of {width} x {height} "
                f"on {self.device} ({one_line(error)})"
            ) from None

    def _descriptors(self, batch: list[tuple[_Input, np.ndarray]], rows: list[_Row]) -> list[np.ndarray]:
        """Of each picture [D], or of its windows [k, D]."""
        feature_map = self._engine.feature_map(torch.from_numpy(np.stack([pixels for _, pixels in batch])))
        if rows[0].windows is not None:
            return [
                self._pool_windows(one, row, key[1], pixels)
                for one, row, (key, pixels) in zip(feature_map, rows, batch, strict=True)
            ]
        pooled = pool_pyramid(feature_map, self.recipe.levels, pooling=self.recipe.pooling, gem_p=self.recipe.gem_p)
        return list(normalize(pooled.float(), self.recipe.normalize).cpu().numpy())

    def _pool_windows(self, feature_map: torch.Tensor, row: _Row, scale: int, pixels: np.ndarray) -> np.ndarray:
        """[k, D] descriptors of the windows that one picture has at one scale."""
        start = time.perf_counter()
        assert row.windows is not None
        height, width = pixels.shape[:2]
        rows, columns = self._geometry(height, width)
        rois = map_windows(row.windows[row.rois_at(scale)], row.prepared.size, (width, height), columns, rows)
        pooled = pool_rois(
            feature_map,
            torch.from_numpy(rois),
            self.recipe.levels,
            pooling=self.recipe.pooling,
            gem_p=self.recipe.gem_p,
        )
        descriptors: np.ndarray = normalize(pooled.float(), self.recipe.normalize).cpu().numpy()
        self.times.add("pool", time.perf_counter() - start)
        return descriptors

    def _fused_windows(self, index: int, row: _Row) -> DescribedWindows:
        size, fingerprint = row.prepared.size, row.prepared.fingerprint
        if row.error is not None:
            return DescribedWindows(index, None, size, fingerprint, row.error, {})
        assert row.windows is not None
        dim = self.dim if row.scale_of is None else self.recipe.bins * self._backbone.channels
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
            int(at): f"reaches outside the picture of {size[0]} x {size[1]} pixels: {window_text(row.windows[at])}"
            for at in np.flatnonzero(outside(row.windows, size))
        }
        # A sum is not finite where a value is not, and needs no array of answers.
        if not np.isfinite(stored.sum(dtype=np.float32)):
            for at in np.flatnonzero(~np.isfinite(stored).all(1)):
                errors.setdefault(int(at), f"the descriptor is not finite as {self.recipe.dtype}")
        return DescribedWindows(index, stored, size, fingerprint, None, errors)

    def _fused(self, index: int, row: _Row) -> Described:
        size, fingerprint = row.prepared.size, row.prepared.fingerprint
        if row.error is not None:
            return Described(index, None, size, fingerprint, row.error)
        descriptor = fuse([part for part in row.parts if part is not None], self.recipe.fuse)
        with np.errstate(over="ignore"):
            stored = descriptor.astype(self.recipe.dtype)
        if not np.isfinite(stored).all():
            largest = float(np.abs(descriptor).max())
            reason = f"the descriptor is not finite as {self.recipe.dtype} (largest value {largest:.3g})"
            return Described(index, None, size, fingerprint, reason)
        return Described(index, stored, size, fingerprint, None)


def normalize(descriptors: torch.Tensor, kind: str) -> torch.Tensor:
    """Normalise rows [N, D]: `l2`, `signed-sqrt-l2` (signed square root, then l2) or `none`. Zeros stay zeros."""
    if kind == "none":
        return descriptors
    if kind == "signed-sqrt-l2":
        descriptors = descriptors.sign() * descriptors.abs().sqrt()
    return torch.nn.functional.normalize(descriptors, dim=1)


def fuse(parts: list[np.ndarray], kind: str) -> np.ndarray:
    """Descriptors [.., D] of one picture or its windows at each scale as one: `mean` or `max`, or `concat`."""
    if len(parts) == 1:
        return parts[0]
    if kind == "concat":
        return np.concatenate(parts, axis=-1)
    together: np.ndarray = np.max(parts, axis=0) if kind == "max" else np.mean(parts, axis=0)
    return together
