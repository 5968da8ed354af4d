"""How long the stages of describing take, for summaries and for telling which one holds a run up."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace


@dataclass
class Stages:
    """Seconds of work by stage, summed over the threads that did it; `pool`, of windows, is a part of `forward`.

    workers, streams: the threads or processes that decode, and the threads that run the network.
    """

    decode: float = 0.0
    forward: float = 0.0
    pool: float = 0.0
    write: float = 0.0
    workers: int = 0
    streams: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def spend(self, stage: str, seconds: float) -> None:
        """Count the work of one thread."""
        with self._lock:
            setattr(self, stage, getattr(self, stage) + seconds)

    def add(self, other: Stages) -> None:
        """Count the work, and the threads, of another process."""
        for name, value in other.told().items():
            setattr(self, name, getattr(self, name) + value)

    def follow(self, other: Stages) -> None:
        """Count the work that came next, by the same threads."""
        workers, streams = max(self.workers, other.workers), max(self.streams, other.streams)
        self.add(other)
        self.workers, self.streams = workers, streams

    def copy(self) -> Stages:
        """The figures as they are now."""
        return replace(self, _lock=threading.Lock())

    def told(self) -> dict[str, float]:
        """The figures by name, as `Stages(**told)` takes them back."""
        return {name: getattr(self, name) for name in ("decode", "forward", "pool", "write", "workers", "streams")}
