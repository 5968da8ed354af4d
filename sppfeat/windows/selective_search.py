"""Selective search: windows of an image that may hold objects, in worker processes.

Source: Uijlings, van de Sande, Gevers, Smeulders, "Selective Search for Object Recognition", IJCV 2013, as implemented
in OpenCV's contrib modules. As in R-CNN's code, images are first shrunk to 500 pixels, and windows narrower than 20 of
these are dropped.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import numpy as np
from PIL import Image

from sppfeat.errors import ImageError, UsageError, WindowsError, one_line, require_extra, unknown_name
from sppfeat.images import Fingerprint, Item, fingerprint_of, read_image

METHODS: Final = ("selective-search", "selective-search-quality")
# R-CNN's code (selective_search_boxes.m): images 500 wide, boxes at least 20 wide.
SEARCH_SIDE: Final = 500
MIN_SIDE: Final = 20
MAX_WINDOWS: Final = 100_000
# OpenCV's default, with which windows were proposed before `base_k` was an option.
_FORMER_BASE_K: Final = 150


@dataclass(frozen=True, kw_only=True)
class ProposalOptions:
    """How windows are proposed.

    method: `selective-search` (OpenCV's fast mode) or `selective-search-quality` (more windows, several times slower).
    max_windows: maximum per image; the best ranks stay. seed: of the ranks, which are partly random.
    base_k: the scale k of the finest segmentation that windows grow from (Felzenszwalb and Huttenlocher, "Efficient
    Graph-Based Image Segmentation", IJCV 2004); with a smaller one its segments, and so some windows, are smaller.
    OpenCV's default is 150; benchmarks/results/detection.md has the objects found with both.
    """

    method: str = "selective-search"
    max_windows: int = 2000
    seed: int = 0
    base_k: int = 50

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Self:
        """Options as saved in a file, of an earlier version, too."""
        return cls(**{"base_k": _FORMER_BASE_K, **document})

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(unknown_name("method", self.method, METHODS))
        for name, value, low, high in (
            ("max_windows", self.max_windows, 1, MAX_WINDOWS),
            ("seed", self.seed, 0, 1 << 31),
            ("base_k", self.base_k, 1, 10_000),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise UsageError(f"{name} must be a whole number from {low} to {high}, found {value!r}")


class Proposed(NamedTuple):
    """One image's windows [K, 4] int32, or why it has none; the seconds that it took, in a worker process."""

    windows: np.ndarray
    image_size: tuple[int, int]
    fingerprint: Fingerprint
    error: str | None
    seconds: float = 0.0


def propose(source: Item | str, options: ProposalOptions | None = None) -> Proposed:
    """Propose windows for one image, in this process; an image that cannot be read comes with its reason.

    Threads of one process must not search at once: OpenCV ranks by the C library's random numbers.
    Raises MissingExtraError without OpenCV's contrib modules.
    """
    options = options or ProposalOptions()
    fingerprint = fingerprint_of(source) if isinstance(source, str) else source.fingerprint()
    try:
        pixels, size = read_image(source)
        small = pixels
        if max(size) > SEARCH_SIDE:
            ratio = SEARCH_SIDE / max(size)
            target = (max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio)))
            small = pixels.resize(target, Image.Resampling.BILINEAR, reducing_gap=2.0)
        boxes = _selective_search(np.asarray(small)[:, :, ::-1], options)
    except ImageError as error:
        return Proposed(np.zeros((0, 4), np.int32), (0, 0), fingerprint, str(error))
    return Proposed(_scaled(boxes, small.size, size)[: options.max_windows], size, fingerprint, None)


def _selective_search(pixels: np.ndarray, options: ProposalOptions) -> np.ndarray:
    """Windows [K, 4] of BGR pixels [H, W, 3], the best ranks first."""
    cv2 = require_extra("cv2", "detect", "selective search")
    if not hasattr(cv2, "ximgproc"):
        require_extra("cv2.ximgproc", "detect", "selective search (in OpenCV's contrib modules)")
    if min(pixels.shape[:2]) < MIN_SIDE:
        return np.zeros((0, 4), np.int64)
    try:
        cv2.setNumThreads(1)
        # OpenCV draws the ranks with `rand`, whose state earlier images have changed.
        ctypes.CDLL(None).srand(options.seed + 1)  # glibc takes 0 for 1
        search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
        search.setBaseImage(np.ascontiguousarray(pixels))
        if options.method == "selective-search":
            search.switchToSelectiveSearchFast(options.base_k)
        else:
            search.switchToSelectiveSearchQuality(options.base_k)
        x, y, width, height = np.asarray(search.process(), np.int64).reshape(-1, 4).T
    except cv2.error as error:
        raise ImageError(f"selective search failed: {one_line(error)}") from None
    kept = (width >= MIN_SIDE) & (height >= MIN_SIDE)
    return np.stack([x, y, x + width - 1, y + height - 1], 1)[kept]


def _scaled(boxes: np.ndarray, small: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Windows of the shrunk image on the original, without duplicates."""
    if small != size:
        ratio = np.array([size[0] / small[0], size[1] / small[1]] * 2)
        edges = (boxes + [0, 0, 1, 1]) * ratio - [0, 0, 1, 1]
        boxes = np.clip(np.rint(edges), 0, [size[0] - 1, size[1] - 1] * 2)
    _, first = np.unique(boxes, axis=0, return_index=True)
    result: np.ndarray = boxes[np.sort(first)].astype(np.int32)
    return result


class Proposer:
    """Worker processes that propose windows. Use as a context manager.

    A script that uses it needs the usual `if __name__ == "__main__":`, since the processes import it again.
    """

    def __init__(self, options: ProposalOptions | None = None, *, workers: int) -> None:
        require_extra("cv2", "detect", "selective search")
        self._options = options or ProposalOptions()
        self._workers = workers
        self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin_worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def stream(
        self, items: Iterable[Item], *, stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[Item, Proposed]]:
        """Every image with its windows, in order; once `stop()` is true no new image is started.

        Raises WindowsError if a worker process dies (out of memory, for example).
        """
        waiting: deque[tuple[Item, Future[Proposed]]] = deque()
        items = iter(items)
        while True:
            item = waiting[0][0] if waiting else None
            try:
                while len(waiting) < 4 * self._workers and not stop():
                    item = next(items, None)
                    if item is None:
                        break
                    waiting.append((item, self._pool.submit(_propose_item, item, self._options)))
                if not waiting:
                    return
                item, future = waiting.popleft()
                proposed = future.result()
            except BrokenProcessPool:
                raise WindowsError(
                    f"{item.path if item else ''}: a worker process died on this image or one of the "
                    f"{4 * self._workers} around it; out of memory?"
                ) from None
            yield item, proposed


def _propose_item(item: Item, options: ProposalOptions) -> Proposed:
    if item.problem is not None:
        return Proposed(np.zeros((0, 4), np.int32), (0, 0), item.fingerprint(), item.problem)
    start = time.perf_counter()
    return propose(item, options)._replace(seconds=time.perf_counter() - start)


def _begin_worker() -> None:
    # Ctrl-C and `timeout` signal every process of a group; the parent decides what to finish.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    # Otherwise workers of a killed parent would wait for work forever.
    threading.Thread(target=end_with_parent, daemon=True).start()
