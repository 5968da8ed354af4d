"""From files to descriptors: decoding, the network and pooling run concurrently."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np

from sppfeat.backbones import Network
from sppfeat.engines import Engine, ResizingEngine
from sppfeat.errors import StoreError, UsageError, unknown_name
from sppfeat.extraction.branch import Branch, Gate, Windowed
from sppfeat.extraction.decoders import Decoders
from sppfeat.extraction.stages import Stages
from sppfeat.extraction.values import as_stored, fuse, to_stored
from sppfeat.images import (
    MOST_UNRESIZED,
    Decoded,
    DecodedImage,
    Decoder,
    Fingerprint,
    Input,
    Item,
    PreparedImage,
    ShapeBatcher,
    Unreadable,
    read_ahead,
    scaled_size,
)
from sppfeat.machine import available_cores
from sppfeat.recipe import Recipe, RunOptions
from sppfeat.store import window_text
from sppfeat.windows import nearest_scales, outside, part_of_image

T = TypeVar("T")
_log = logging.getLogger(__name__)

# Approximate limit of decoded images that wait for the network; at `native` scale they are large.
AHEAD_BYTES: Final = 1 << 29
# Images with windows in a batch, on a GPU, and how many such batches an incomplete one waits for: of each image that
# waits, the rows are held, some 30 MB for 2,000 windows.
WINDOWS_BATCH: Final = 8
WINDOWS_PATIENCE: Final = 2


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


@dataclass
class _Row:
    """An image in the pipeline, with the results of its passes so far.

    windows: [K, 4], or None if the whole image is described. nearest: for each pass, [K] whether a window is pooled
    from it; None if every window is pooled from every pass.
    """

    prepared: PreparedImage | DecodedImage
    windows: np.ndarray | None
    nearest: list[np.ndarray] | None
    results: list[np.ndarray | None]
    left: int = 0
    error: str | None = None

    def windowed(self, at: int) -> Windowed | None:
        """The windows that are pooled from a pass; None: the whole image."""
        if self.windows is None:
            return None
        return Windowed(self.windows if self.nearest is None else self.windows[self.nearest[at]], self.prepared.size)


class _Pass(NamedTuple):
    """A backbone at a scale."""

    branch: Branch
    scale: int | str


_Key = tuple[int, int]  # which image, which pass
_Results = list[tuple[_Key, "np.ndarray | str"]]
_Decoding = tuple[int, Item, "Future[Decoded]"]


class _Threads:
    """The threads that run networks, which stay from one use to the next: what an engine keeps for each of its threads
    takes longer to make than an image, CUDA's recorded passes above all."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._making = threading.Lock()

    def pool(self, count: int) -> ThreadPoolExecutor:
        """As many threads as the first caller asks for."""
        with self._making:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(count, thread_name_prefix="forward")
            return self._pool

    def end(self) -> None:
        """End all threads that are at rest, and the others when they are."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _give_up(futures: Iterable[Future[Any]]) -> None:
    """Cancel what has not begun, and wait for the rest."""
    wait([future for future in futures if not future.cancel()])


def check_windows(recipe: Recipe) -> None:
    """Raise UsageError for a recipe that windows cannot be described with."""
    if recipe.crop != "none":
        raise UsageError(f"windows need crop 'none', found {recipe.crop!r}")


class Describer:
    """Describes images by a recipe, which it completes (layer, mean, ...). Networks are loaded on first use.

    dim: length of a descriptor; nearest_dim: of a window at its nearest scale. device: where networks run.
    weights_sha256: of the network up to the layer, or of each part, joined by `+`. workers: decoding threads, or
    processes. network: the recipe's, if it is of one backbone and at hand.
    Raises BackboneError, DeviceError, UsageError, MissingExtraError.
    """

    def __init__(self, recipe: Recipe, options: RunOptions | None = None, *, network: Network | None = None) -> None:
        options = options or RunOptions()
        self.times = Stages()
        branches, gate = recipe.branches(), Gate()
        whole = len(branches) == 1 and len(branches[0].scales) == 1
        self._branches = [Branch(each, options, network, gate=gate, times=self.times, whole=whole) for each in branches]
        self._recipes = [branch.recipe for branch in self._branches]
        self._passes = [_Pass(branch, scale) for branch in self._branches for scale in branch.recipe.scales]
        # A backbone that runs on the processor alone does not keep the others from a GPU.
        self.device = next((b.device for b in self._branches if b.device != "cpu"), "cpu")
        self.minimum_side = max(branch.minimum_side for branch in self._branches)
        self.weights_sha256 = "+".join(each.weights_sha256 for b in self._branches for each in b.descriptions)
        channels = tuple(
            each.channels
            for branch in self._branches
            for _ in (branch.recipe.scales if recipe.fuse == "concat" else [None])
            for each in branch.descriptions
        )
        self.recipe = self._completed(recipe, channels)
        self.dim = recipe.bins * sum(channels)
        self.nearest_dim = sum(branch.dim for branch in self._branches)
        self.workers = options.num_workers or available_cores()
        unresized = all(branch.resizes for branch in self._branches)
        most = self.recipe.max_pixels
        pixels = sum(most if isinstance(scale, str) else min(most, 2 * scale * scale) for _, scale in self._passes)
        self._most_bytes = 3 * max(pixels, MOST_UNRESIZED if unresized else 0)  # of what an ordinary image becomes
        decoder = Decoder(tuple(self._recipes), self.minimum_side, unresized)
        self._decoders = Decoders(decoder, self.workers, self._most_bytes, self.times)
        self._threads = _Threads()
        weakref.finalize(self, self._decoders.end)
        weakref.finalize(self, self._threads.end)

    def _completed(self, recipe: Recipe, channels: tuple[int, ...]) -> Recipe:
        recipes = self._recipes
        completed = recipes[0]
        if len(recipes) > 1:
            # Their means, deviations and interpolations are their own.
            layer, weights = "+".join(each.layer or "" for each in recipes), [each.weights for each in recipes]
            completed = replace(
                recipe, layer=layer, weights=weights[0] if len(set(weights)) == 1 else "+".join(weights)
            )
            differ = {each.interpolation for each in recipes}
            if len(differ) > 1:
                each = ", ".join(f"{one.backbone} by {one.interpolation}" for one in recipes)
                _log.info("the backbones were trained with different resizing, and each gets its own: %s", each)
        several = len(recipes) > 1 or len(recipes[0].layers) > 1
        if several and recipe.channels not in (None, channels):
            raise UsageError(f"channels: expected {channels}, found {recipe.channels}")
        return replace(completed, channels=channels if several else None)

    def check_made(self, path: Path, recipe: Recipe, weights_sha256: str) -> None:
        """Raise StoreError, with the fields that differ, unless an output was made with this network and recipe."""
        both = weights_sha256, self.weights_sha256
        if differences := recipe.differences(self.recipe, ("store", "asked"), weights=both):
            raise StoreError(
                f"{path}: was made with another recipe ({'; '.join(differences)}); "
                "choose another output, or use --overwrite"
            )

    def part_of_image(self, part: np.ndarray, size: tuple[int, int], scale: int | str) -> np.ndarray:
        """[4] what part of an upright image of this size a part of its feature map at a scale shows; both from 0 to 1.

        Raises BackboneError where the geometry of the layer is not known, ImageError for a size that is not described.
        """
        input_size = scaled_size(size, scale, self.recipe, minimum=self.minimum_side)
        rows, columns = self._branches[0].geometries[0](input_size[1], input_size[0])
        return part_of_image(part, input_size, columns, rows)

    def load(self) -> list[Engine]:
        """The engine of each backbone, loaded on first use. Raises BackboneError, DeviceError."""
        return [branch.load() for branch in self._branches]

    @property
    def engine(self) -> str:
        """The engines that run the networks, or will: `openvino`, `torch`, `sift`, or several joined by `+`."""
        return "+".join(dict.fromkeys(branch.engine for branch in self._branches))

    @property
    def streams(self) -> int:
        """Threads that run networks; 0 before they are loaded."""
        return max(branch.streams for branch in self._branches)

    def describe(
        self,
        items: Iterable[Item | str | os.PathLike[str]],
        *,
        scales: str = "all",
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[Described]:
        """Describe every item, or the image at every path, roughly in order; one that cannot be described comes with
        its reason.

        Windows are pooled from one forward pass per scale. scales: `all` pools each window at every scale, normalizes
        and fuses as for a whole image, so that a window of the whole image has the image's descriptor; `nearest` pools
        each at the one scale that brings its area closest to 224 x 224. A window that reaches outside its image comes
        with a reason. Readable images with windows come in order, and the rows of few of them are held at a time: on a
        processor they run through the network one by one, on a GPU in small batches.
        Once `stop()` is true no new image is started, and those in flight are still yielded. Memory does not depend on
        the number of items. Batches depend only on the order of the images.
        Raises UsageError for windows if the recipe crops.
        """
        if scales not in WINDOW_SCALES:
            raise UsageError(unknown_name("scales", scales, WINDOW_SCALES))
        for index, row in self._run(
            (each if isinstance(each, Item) else Item.at(each) for each in items), scales, stop
        ):
            if isinstance(row, Unreadable):
                yield Described(index, None, (0, 0), row.fingerprint, row.reason, {})
            else:
                yield self._fused(index, row)

    def _run(
        self, items: Iterable[Item], scales: str, stop: Callable[[], bool]
    ) -> Iterator[tuple[int, _Row | Unreadable]]:
        begun: deque[_Decoding] = deque()
        try:
            numbered = iter(enumerate(items))
            # The first images are decoded while the network loads.
            begun.extend(self._begin(islice(numbered, 0 if stop() else self._ahead(0))))
            if not begun:
                return
            with contextlib.ExitStack() as stack:
                engines = self.load()
                for engine in engines:
                    stack.enter_context(engine.at_work())
                if self.device != "cpu":  # which takes more images than threads decode; a processor does not
                    self._decoders.allow_processes([e.pin for e in engines if isinstance(e, ResizingEngine)])
                forwarders = self._threads.pool(self.streams)
                forwarding: deque[Future[_Results]] = deque()
                stack.callback(_give_up, forwarding)
                yield from self._pipeline(numbered, begun, scales, forwarders, forwarding, stop)
        finally:
            read_ahead.forget()
            _give_up(future for _, _, future in begun)

    def _ahead(self, passes: int) -> int:
        """How many images may be decoded ahead of the network, which processes `passes` of them at a time."""
        return min(4 * self.workers + passes, max(self.workers, AHEAD_BYTES // self._most_bytes))

    def _begin(self, items: Iterable[tuple[int, Item]]) -> Iterator[_Decoding]:
        for index, item in items:
            if item.windows is not None:
                check_windows(self.recipe)
            item.expect()
            yield index, item, self._decoders.submit(item)

    def _pipeline(
        self,
        items: Iterator[tuple[int, Item]],
        decoding: deque[_Decoding],
        window_scales: str,
        forwarders: ThreadPoolExecutor,
        forwarding: deque[Future[_Results]],
        stop: Callable[[], bool],
    ) -> Iterator[tuple[int, _Row | Unreadable]]:
        streams = self.streams
        ahead = self._ahead(streams * max(branch.batch_size for branch in self._branches))
        whole = {branch: self._batcher(branch) for branch in self._branches}
        with_windows = {branch: self._windows_batcher(branch) for branch in self._branches}
        ending = False
        rows: dict[int, _Row] = {}
        in_order: deque[int] = deque()  # images with windows

        def submit(batch: list[tuple[_Key, Input]]) -> None:
            windowed = [rows[index].windowed(at) for (index, at), _ in batch]
            forwarding.append(forwarders.submit(self._forward, batch, [each for each in windowed if each is not None]))

        def finished(index: int) -> Iterator[tuple[int, _Row]]:
            if rows[index].windows is None:
                yield index, rows.pop(index)
            while in_order and not rows[in_order[0]].left:
                yield (first := in_order.popleft()), rows.pop(first)

        def collect(most: int) -> Iterator[tuple[int, _Row]]:
            while len(forwarding) > most or (forwarding and forwarding[0].done()):
                for (index, at), result in forwarding.popleft().result():
                    row = rows[index]
                    row.left -= 1
                    if isinstance(result, str):
                        row.error = row.error or result
                    else:
                        row.results[at] = result
                    if not row.left:
                        yield from finished(index)

        while True:
            if not ending:
                decoding.extend(self._begin(islice(items, 0 if stop() else ahead - len(decoding))))
                ending = len(decoding) < ahead
            if not decoding:
                break
            index, item, future = decoding.popleft()
            prepared = future.result()
            if isinstance(prepared, Unreadable):
                yield index, prepared
                continue
            row = rows[index] = self._row(prepared, item.windows, window_scales)
            # A scale without windows needs no pass.
            windowed = [row.windowed(at) for at in range(len(self._passes))]
            wanted = [at for at, chosen in enumerate(windowed) if chosen is None or len(chosen.windows)]
            row.left = len(wanted)
            if item.windows is not None:
                in_order.append(index)
            if not wanted:
                yield from finished(index)
            # Batches become smaller towards the end, so that every stream gets work.
            share = -(-(1 + len(decoding)) // (2 * streams)) if ending and self.device == "cpu" else None
            batchers = whole if item.windows is None else with_windows
            for at in wanted:
                for batch in batchers[self._passes[at].branch].add((index, at), prepared.inputs[at], share=share):
                    submit(batch)
            prepared.inputs.clear()
            yield from collect(2 * streams)
        for batcher in (*whole.values(), *with_windows.values()):
            for batch in batcher.flush():
                submit(batch)
                yield from collect(2 * streams)
        yield from collect(0)

    @staticmethod
    def _batcher(branch: Branch) -> ShapeBatcher[_Key]:
        patience = branch.load().patience * branch.batch_size * len(branch.recipe.scales)
        return ShapeBatcher(branch.batch_size, patience=patience, most=branch.fitting)

    @staticmethod
    def _windows_batcher(branch: Branch) -> ShapeBatcher[_Key]:
        size = 1 if branch.device == "cpu" else min(branch.batch_size, WINDOWS_BATCH)
        patience = WINDOWS_PATIENCE * size * len(branch.recipe.scales)
        return ShapeBatcher(size, patience=patience, most=branch.fitting)

    def _row(self, prepared: PreparedImage | DecodedImage, windows: np.ndarray | None, window_scales: str) -> _Row:
        nearest: list[np.ndarray] | None = None
        if windows is not None and window_scales == "nearest":
            nearest, sizes = [], [(pixels.shape[1], pixels.shape[0]) for pixels in prepared.inputs]
            for branch in self._branches:
                count = len(branch.recipe.scales)
                scale_of = nearest_scales(windows, prepared.size, sizes[len(nearest) : len(nearest) + count])
                nearest += [scale_of == scale for scale in range(count)]
        return _Row(prepared, windows, nearest, [None] * len(prepared.inputs))

    def _forward(self, batch: list[tuple[_Key, Input]], windowed: list[Windowed]) -> _Results:
        keys, images = zip(*batch, strict=True)
        return list(zip(keys, self._passes[keys[0][1]].branch.forward(images, windowed or None), strict=True))

    def _fused(self, index: int, row: _Row) -> Described:
        size, fingerprint = row.prepared.size, row.prepared.fingerprint
        if row.error is not None:
            return Described(index, None, size, fingerprint, row.error, {})
        if row.windows is None:
            return self._fused_whole(index, row)
        stored = as_stored(self._of_windows(row), self.recipe.dtype)
        errors = {
            int(at): f"reaches outside the image of {size[0]} x {size[1]} pixels, whose last one is "
            f"{size[0] - 1},{size[1] - 1}: {window_text(row.windows[at])}"
            for at in np.flatnonzero(outside(row.windows, size))
        }
        # The sum is not finite if a value is not, and needs no temporary array.
        if not np.isfinite(stored.sum(dtype=np.float32)):
            for at in np.flatnonzero(~np.isfinite(stored).all(1)):
                errors.setdefault(int(at), f"the descriptor is not finite as {self.recipe.dtype}")
        return Described(index, stored, size, fingerprint, None, errors)

    def _of_windows(self, row: _Row) -> np.ndarray:
        """[K, D] float32 of the windows of an image."""
        assert row.windows is not None
        if not len(row.windows):
            return np.zeros((0, self.dim if row.nearest is None else self.nearest_dim), np.float32)
        chosen_by = [None] * len(self._branches) if row.nearest is None else self._by_branch(row.nearest)
        parts = []
        for results, chosen in zip(self._by_branch(row.results), chosen_by, strict=True):
            found = [each for each in results if each is not None]
            if chosen is None:
                parts.append(fuse(found, self.recipe.fuse))
            elif len(found) == 1:
                parts.append(found[0])
            else:
                part = np.empty((len(row.windows), found[0].shape[1]), np.float32)
                for which, each in zip(chosen, results, strict=True):
                    if each is not None:
                        part[which] = each
                parts.append(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts, 1)

    def _fused_whole(self, index: int, row: _Row) -> Described:
        size, fingerprint = row.prepared.size, row.prepared.fingerprint
        results = [each for each in row.results if each is not None]
        stored: np.ndarray | str = results[0]
        if len(results) > 1:
            fused = [fuse(of_branch, self.recipe.fuse) for of_branch in self._by_branch(results)]
            stored = to_stored(np.concatenate(fused)[None], self.recipe.dtype)[0]
        if isinstance(stored, str):
            return Described(index, None, size, fingerprint, stored, {})
        return Described(index, stored[None], size, fingerprint, None, {})

    def _by_branch(self, of_passes: Sequence[T]) -> Iterator[Sequence[T]]:
        """What there is for each pass, branch by branch."""
        at = 0
        for recipe in self._recipes:
            yield of_passes[at : at + len(recipe.scales)]
            at += len(recipe.scales)
