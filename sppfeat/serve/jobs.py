"""Work that takes longer than a request: begun by one, and asked for by others until it is done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from sppfeat.errors import SppFeatError, one_line

T = TypeVar("T")
Work = Callable[[Callable[[float], None]], T]


class _Ended(Exception):
    """Nobody waits for the work any more."""


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
        self._thread: threading.Thread | None = None
        self._closed = False

    def ask(self, key: Hashable, work: Work[T], *, again: bool = False) -> Standing[T]:
        """How far the work for what is asked is, which begins now unless other work is running: then how far that is.

        Why it failed is told once: who asks again begins anew. again: begin anew even if there is a result.
        """
        with self._lock:
            known = self._standing.get(key)
            if known is not None and not (again and known.result is not None):
                if known.failed is not None:
                    del self._standing[key]
                return known
            if self._running is not None:
                return self._standing[self._running]
            while len(self._standing) >= self._kept:
                del self._standing[next(iter(self._standing))]
            self._running = key
            begun = self._standing[key] = Standing(0.0)
            self._thread = threading.Thread(target=self._run, args=(key, work), name=self._name, daemon=True)
            self._thread.start()
            return begun

    def look(self) -> Standing[T] | None:
        """How far the work is that is running, or why the last failed, which is told once; None if there is neither."""
        with self._lock:
            if self._running is not None:
                return self._standing[self._running]
            failed = next((key for key, one in self._standing.items() if one.failed is not None), None)
            return None if failed is None else self._standing.pop(failed)

    def end(self) -> None:
        """Let running work end the next time that it tells how far it is."""
        self._closed = True

    def join(self, seconds: float) -> None:
        """Wait so long for running work."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self, key: Hashable, work: Work[T]) -> None:
        def tell(part: float) -> None:
            if self._closed:
                raise _Ended
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
