"""Work that takes longer than a request: begun by one, and asked for by others until it is done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from sppfeat.errors import SppFeatError, one_line

T = TypeVar("T")


class Job(Generic[T]):
    """Work in a thread of its own. done: 0 to 1. result: once it is done. failed: why there is none."""

    def __init__(self, work: Callable[[Callable[[float], None]], T], name: str) -> None:
        self.done = 0.0
        self.result: T | None = None
        self.failed: str | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether there is neither a result nor a reason yet."""
        return self.result is None and self.failed is None

    def _run(self) -> None:
        try:
            self.result = self._work(self._tell)
        except SppFeatError as error:
            self.failed = str(error)
        except Exception as error:  # the page shows it; the server goes on
            self.failed = f"failed: {one_line(error)}"

    def _tell(self, part: float) -> None:
        self.done = part


class Jobs(Generic[T]):
    """One job at a time; the last ones by what was asked for."""

    def __init__(self, name: str, kept: int = 4) -> None:
        self._name, self._kept = name, kept
        self._lock = threading.Lock()
        self._jobs: dict[Hashable, Job[T]] = {}

    def known(self, key: Hashable) -> Job[T] | None:
        """The job for what is asked, if it was begun."""
        with self._lock:
            return self._jobs.get(key)

    def begun(self, key: Hashable, work: Callable[[Callable[[float], None]], T]) -> Job[T]:
        """The job for what is asked, begun now unless another one is running: then that one."""
        with self._lock:
            if (known := self._jobs.get(key)) is not None and known.failed is None:
                return known
            if (running := next((job for job in self._jobs.values() if job.running), None)) is not None:
                return running
            while len(self._jobs) >= self._kept:
                del self._jobs[next(iter(self._jobs))]
            self._jobs.pop(key, None)
            job = self._jobs[key] = Job(work, self._name)
            return job
