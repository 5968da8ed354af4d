"""Work for requests on a few threads, so that a slow image holds up only its own request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

# How often it is looked whether a client is still there.
_LOOK_SECONDS: Final = 0.25

T = TypeVar("T")


class BusyError(Exception):
    """Too many requests wait, or one took too long."""


class Pool:
    """Threads for work that waits its turn. waiting: how much of it may. seconds: that a request waits for a result."""

    def __init__(self, workers: int, waiting: int, seconds: float, name: str) -> None:
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix=name)
        self._most, self._seconds = workers + waiting, seconds
        self._inside = 0

    async def run(self, work: Callable[[], T], gone: Callable[[], Awaitable[bool]] | None = None) -> T:
        """The result of some work, which is not begun once nobody waits for it. Raises BusyError, and what it raises.

        gone: whether the client hung up.
        """
        if self._inside >= self._most:
            raise BusyError("too many requests wait; try again in a moment")
        self._inside += 1
        job = self._threads.submit(work)
        future = asyncio.wrap_future(job)
        # Work that was begun takes its thread to the end, whoever waits.
        future.add_done_callback(self._left)
        deadline = time.monotonic() + self._seconds
        while True:
            left = deadline - time.monotonic()
            await asyncio.wait({future}, timeout=max(0.0, left if gone is None else min(left, _LOOK_SECONDS)))
            if future.done():
                return future.result()
            if left <= 0 or gone is not None and await gone():
                begun = not job.cancel()
                raise BusyError(f"took more than {self._seconds:g} s" if begun else "too many requests were before it")

    def close(self) -> None:
        """Begin nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _left(self, future: asyncio.Future[T]) -> None:
        self._inside -= 1
        if not future.cancelled():
            future.exception()  # seen, also where nobody waits
