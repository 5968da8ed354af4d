"""Progress of long-running work, as its caller observes it."""

from __future__ import annotations

from collections.abc import Sequence


class Observer:
    """Progress callbacks of long-running work, called from the caller's thread. By default they do nothing."""

    def stage(self, name: str) -> None:
        """What the next `started` is about, where work has several stages."""

    def started(self, *, todo: int, reused: int, gone: Sequence[str] = (), device: str = "") -> None:
        """The work is planned: `todo` rows or images to process, and `reused` ones to keep.

        gone: names of rows whose file no longer exists. device: where the network will run; empty if none does.
        """

    def planned(self, todo: int) -> None:
        """More work is known than when it started: `todo` rows in all."""

    def row(self, name: str, error: str | None) -> None:
        """One image or window is done, or failed with a reason.

        For an extraction, done means described: its row reaches the disk soon, and before the extraction returns.
        """

    def note(self, text: str) -> None:
        """Something is unusual about an image or a class; there may be one note per image."""

    def say(self, text: str) -> None:
        """How far the work has come, or what it is waiting for."""
