"""Work that takes longer than a request: begun by one, and asked for by others until it is done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from sppfeat.errors import SppFeatError, one_line

T = TypeVar("T")
Work = Callable[[Callable[[float], None]], T]


@dataclass(frozen=True)
class Standing(Generic[T]):
    """How far work is. done: 0 to 1. result: once it is done. failed: why there is none."""

    done: float
    result: T | None = None
    failed: str | None = None


class Jobs(Generic[T]):
    """One job at a time, in a thread of its own; the last results by what was asked for."""

    def __init__(self, name: str, kept: int = 4) -> None:
        self._name, self._kept = name, kept
        self._lock = threading.Lock()
        self._standing: dict[Hashable, Standing[T]] = {}
        self._running: Hashable | None = None

    def ask(self, key: Hashable, work: Work[T]) -> Standing[T]:
        """How far the work for what is asked is, which begins now unless other work is running: then how far that is.

        Why it failed is told once: who asks again begins anew.
        """
        with self._lock:
            if (known := self._standing.get(key)) is not None:
                if known.failed is not None:
                    del self._standing[key]
                return known
            if self._running is not None:
                return self._standing[self._running]
            while len(self._standing) >= self._kept:
                del self._standing[next(iter(self._standing))]
            self._running = key
            begun = self._standing[key] = Standing(0.0)
            threading.Thread(target=self._run, args=(key, work), name=self._name, daemon=True).start()
            return begun

    def _run(self, key: Hashable, work: Work[T]) -> None:
        def tell(part: float) -> None:
            self._standing[key] = Standing(part)

        try:
            ended = Standing(1.0, work(tell))
        except SppFeatError as error:
            ended = Standing(1.0, None, str(error))
        except Exception as error:  # the page shows it; the server goes on
            ended = Standing(1.0, None, f"failed: {one_line(error)}")
        with self._lock:
            self._standing[key] = ended
            self._running = None
