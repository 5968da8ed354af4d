"""Work that is done ahead, in order, while the network computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

from sppfeat.machine import available_cores

T = TypeVar("T")
R = TypeVar("R")
# Batches that are prepared while one is learned from.
_AHEAD: Final = 2


def ahead(batches: Iterable[Sequence[T]], prepare: Callable[[T], R]) -> Iterator[list[R]]:
    """What `prepare` returns for each member of each batch, in order, from threads."""
    waiting: deque[list[Future[R]]] = deque()
    threads = ThreadPoolExecutor(available_cores(), thread_name_prefix="decode")
    try:
        for batch in batches:
            waiting.append([threads.submit(prepare, each) for each in batch])
            if len(waiting) > _AHEAD:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        threads.shutdown(cancel_futures=True)
