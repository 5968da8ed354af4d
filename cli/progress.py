"""What commands that go through many images show on standard error."""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any, Final, Self

from sppfeat_cli.output import counted, printable

SECOND_SIGNAL_SECONDS: Final = 0.5


class Progress:
    """A line a failure, and a bar where standard error is a terminal.

    Once work is under way that can finish early, the first SIGINT or SIGTERM only sets `stop`, and images in flight are
    finished; a second one ends the process at once.
    """

    def __init__(
        self, *, quiet: bool, verb: str = "to search", unit: str = "image", can_finish_early: bool = True
    ) -> None:
        self.stop = threading.Event()
        self._can_finish_early = can_finish_early
        self._quiet = quiet
        self._verb = verb
        self._unit = unit
        self._failed = 0
        self._bar: Any = None
        self._signalled = 0.0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.close()

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
        print("sppfeat: finishing the images in flight; once more to stop at once", file=sys.stderr)

    def started(self, *, todo: int, reused: int, gone: Sequence[str] = (), device: str = "") -> None:
        """The work is known. gone: what was described before, and is not there any more."""
        if self._can_finish_early and not self._handlers:
            self._handlers = {n: signal.signal(n, self._interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
        if self._quiet:
            return
        from tqdm import tqdm

        self.close()
        where = f" on {device}" if device else ""
        kept = f", {reused} done before" if reused else ""
        print(f"{counted(todo, self._unit)} {self._verb}{where}{kept}", file=sys.stderr)
        for name in gone:
            print(f"gone: {printable(name)} (its row is kept)", file=sys.stderr)
        self._bar = tqdm(total=todo, unit=self._unit, disable=None, file=sys.stderr, smoothing=0.1)

    def row(self, name: str, error: str | None) -> None:
        """One image is done, or failed for a reason."""
        if self._quiet:
            return
        if error is not None:
            self.note(f"failed: {name}: {error}")
            self._failed += 1
        if self._bar is not None:
            if self._failed:
                self._bar.set_postfix(failed=self._failed, refresh=False)
            self._bar.update()

    def note(self, text: str) -> None:
        """A line beside the bar."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(printable(text), file=sys.stderr)
        else:
            print(printable(text), file=sys.stderr)
