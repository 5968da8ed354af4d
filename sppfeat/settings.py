"""Process-wide settings that hold while any thread needs them, and are then restored."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Final


class WhileAny:
    """A context for many threads: the first thread in enters `setting`, and the last one out leaves it.

    If each thread set and restored it, threads would undo each other's settings.
    """

    def __init__(self, setting: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._setting = setting
        self._lock = threading.Lock()
        self._inside = 0
        self._held = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._held.enter_context(self._setting())
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._held.close()


@contextlib.contextmanager
def _quiet_pillow() -> Iterator[None]:
    # Not `catch_warnings`: it restores the whole list, and so undoes what others set meanwhile.
    filters: list[Any] = warnings.filters  # type: ignore[assignment]
    warnings.filterwarnings("ignore", module=r"PIL\.")
    ours = filters[0]
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            filters.remove(ours)


# Pillow warns about damaged metadata without naming the file; we check what matters to us ourselves.
quiet_pillow: Final = WhileAny(_quiet_pillow)
