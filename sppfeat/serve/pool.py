"""Work for requests on a few threads, so that a slow image holds up only its own request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class BusyError(Exception):
    """Too many requests wait, or one took too long."""


class Pool:
    """Threads for work that waits its turn. waiting: how much of it may. seconds: that a request waits for a result."""

    def __init__(self, workers: int, waiting: int, seconds: float, name: str) -> None:
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix=name)
        self._most, self._seconds = workers + waiting, seconds
        self._inside = 0

    async def run(self, work: Callable[[], T]) -> T:
        """The result of some work. Raises BusyError, and what the work raises."""
        if self._inside >= self._most:
            raise BusyError("too many requests wait; try again in a moment")
        self._inside += 1
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        # Work that nobody waits for any more still takes its thread.
        future.add_done_callback(self._left)
        try:
            return await asyncio.wait_for(asyncio.shield(future), self._seconds)
        except TimeoutError:
            raise BusyError(f"took more than {self._seconds:g} s") from None

    def close(self) -> None:
        """Begin nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _left(self, future: asyncio.Future[T]) -> None:
        self._inside -= 1
        if not future.cancelled():
            future.exception()  # seen, also where nobody waits
