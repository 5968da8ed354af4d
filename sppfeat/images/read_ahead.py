"""Reading ahead of what is far away: bytes are fetched by many threads, so that latency does not idle the cores."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, Final

# With a latency of 50 ms, 32 requests at a time bring 640 objects a second; servers allow so many connections.
READERS: Final = 32
# Of bytes that wait to be decoded, and of one image: larger ones are fetched when they are opened.
MAX_WAITING_BYTES: Final = 128 << 20
MAX_AHEAD: Final = 4 << 20
MAX_WAITING: Final = 512
# What nobody opened in this time (seconds) is forgotten where room is needed.
PATIENCE: Final = 60.0


class ReadAhead:
    """Results by key, each fetched once and taken once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: dict[Hashable, tuple[float, Future[Any]]] = {}
        self._typical = float(MAX_AHEAD) / 4  # bytes of one image, as they were lately

    def expect(self, key: Hashable, fetch: Callable[[], Any]) -> None:
        """Begin to fetch, unless too much is waiting already."""
        now = time.monotonic()
        with self._lock:
            if len(self._waiting) * MAX_AHEAD > MAX_WAITING_BYTES:
                coming = min(MAX_AHEAD, int(2 * self._typical))
                held = sum(_bytes_of(future, coming) for _, future in self._waiting.values())
                if held > MAX_WAITING_BYTES or len(self._waiting) >= MAX_WAITING:
                    self._waiting = {k: one for k, one in self._waiting.items() if one[0] > now - PATIENCE}
                    return
            if self._pool is None:
                self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="read-ahead")
            if key not in self._waiting:
                self._waiting[key] = now, self._pool.submit(fetch)

    def take(self, key: Hashable) -> Any:
        """What was fetched, once it is there; None if it was not expected. Raises what fetching raised."""
        with self._lock:
            found = self._waiting.pop(key, None)
        if found is None:
            return None
        try:
            result = found[1].result()
        except CancelledError:  # another run of this process forgot everything
            return None
        self._typical += (_bytes_of(found[1], 0) - self._typical) / 16
        return result

    def forget(self) -> None:
        """Drop everything, and do not fetch what has not begun: nobody will take it."""
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        for _, future in waiting.values():
            future.cancel()


def _bytes_of(future: Future[Any], coming: int) -> int:
    """What a result holds; coming: what one that is not there yet will hold, about."""
    if not future.done():
        return coming
    if future.cancelled() or future.exception() is not None:
        return 0
    found = future.result()
    content = found[0] if isinstance(found, tuple) else found
    return len(content) if content is not None else 0


read_ahead: Final = ReadAhead()
