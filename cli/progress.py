"""Progress on standard error: a bar on a terminal, and a bounded number of failures and notes."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from types import FrameType
from typing import Any, Final, Self

from sppfeat.progress import Observer
from sppfeat_cli.output import counted, printable

SECOND_SIGNAL_SECONDS: Final = 0.5
# Lines of one kind: a disk that is not mounted makes a million failures, which would bury everything else.
LISTED: Final = 10


class Progress(Observer):
    """A line for each of the first failures and notes, the number of the others, and a bar on a terminal.

    Work is counted in items (`started`, `row`) or, without any, in parts of 1 (`part`).
    all_listed_by: the command or option that lists all failures and notes.
    Once work that can finish early is under way, the first SIGINT or SIGTERM only sets `stop`, and images in flight are
    finished; a second one ends the process at once.
    """

    def __init__(
        self,
        *,
        quiet: bool,
        verb: str = "to search",
        unit: str = "image",
        can_finish_early: bool = True,
        all_listed_by: str = "--json",
    ) -> None:
        self.stop = threading.Event()
        self._can_finish_early = can_finish_early
        self._quiet = quiet
        self._verb = verb
        self._unit = unit
        self._all_listed_by = all_listed_by
        self._stage = ""
        self._counts: Counter[str] = Counter()
        self._bar: Any = None
        self._signalled = 0.0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.close()
        for kind, count in self._counts.items():
            if count > LISTED:
                self.say(f"... and {count - LISTED:,} more {kind}; {self._all_listed_by} lists them all")

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.stop.is_set():
            # `timeout` and some schedulers signal a process and its group, and so twice.
            if time.monotonic() - self._signalled > SECOND_SIGNAL_SECONDS:
                os._exit(130)
            return
        self.stop.set()
        self._signalled = time.monotonic()
        # Not `print`: the signal may have come within another one, and no stream can be written to twice at a time.
        with contextlib.suppress(OSError):
            os.write(2, b"sppfeat: finishing images in flight; interrupt again to stop at once\n")

    def stage(self, name: str) -> None:
        """What the next work is about, instead of the verb."""
        self._stage = name

    def started(self, *, todo: int, reused: int, gone: Sequence[str] = (), device: str = "") -> None:
        """The work is known. gone: what was described before and no longer exists."""
        if self._can_finish_early and not self._handlers:
            self._handlers = {n: signal.signal(n, self._interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
        if self._quiet:
            return
        self.close()
        where = f" on {device}" if device else ""
        kept = f", {reused} already done" if reused else ""
        work = f"{counted(todo, self._unit)}"
        work = f"{self._stage}: {work}" if self._stage else f"{work} {self._verb}"
        print(f"{work}{where}{kept}", file=sys.stderr)
        for name in gone[:LISTED]:
            self.say(f"gone: {name} (its row is kept)")
        if len(gone) > LISTED:
            self.say(f"... and {len(gone) - LISTED:,} more gone")
        self._bar = new_bar(todo, self._unit)

    def planned(self, todo: int) -> None:
        """More work is known: `todo` items in all."""
        if self._bar is not None:
            self._bar.total = todo
            self._bar.refresh()

    def row(self, name: str, error: str | None) -> None:
        """One image is done, or failed for a reason."""
        if self._quiet:
            return
        if error is not None:
            self._list("failed", f"failed: {name}: {error}")
        if self._bar is not None:
            if failed := self._counts["failed"]:
                self._bar.set_postfix(failed=failed, refresh=False)
            self._bar.update()

    def part(self, done: float) -> None:
        """A part of the work is done, from 0 to 1."""
        if self._quiet:
            return
        if self._bar is None:
            self._bar = new_bar(100, "%", leave=False)
        self._bar.update(100 * done - self._bar.n)

    def note(self, text: str) -> None:
        """Something suspicious in the input; after the first notes, further ones are only counted."""
        self._list("notes", text)

    def _list(self, kind: str, text: str) -> None:
        self._counts[kind] += 1
        if self._counts[kind] <= LISTED:
            self.say(text)
        elif self._counts[kind] == LISTED + 1:
            self.say(f"... more {kind}, counted at the end")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(printable(text), file=sys.stderr)
        else:
            print(printable(text), file=sys.stderr)


def new_bar(total: int, unit: str, *, leave: bool = True) -> Any:
    """A bar on standard error, shown only if that is a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, disable=None, file=sys.stderr, smoothing=0.1, leave=leave)
