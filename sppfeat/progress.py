"""How long work is followed by who asked for it."""

from __future__ import annotations

from collections.abc import Sequence


class Observer:
    """Progress callback of long work; called from the thread that asked for the work. Does nothing by itself."""

    def started(self, *, todo: int, reused: int, gone: Sequence[str] = (), device: str = "") -> None:
        """The work is known: rows or images to do, and how many are kept as they are.

        gone: names of rows whose file is no longer there. device: where the network will run; empty where none does.
        """

    def row(self, name: str, error: str | None) -> None:
        """One image, or one window, is done, or failed for a reason."""

    def note(self, text: str) -> None:
        """Something is odd about an image or a class; there may be one for every image."""

    def say(self, text: str) -> None:
        """How far the work is, or what it waits for."""
