"""Settings of the whole process that work needs: in force while any thread is at it, and then as they were before."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Final

import torch


class WhileAny:
    """A context for many threads: `setting` is entered by the first that comes in, and left by the last that goes out.

    Each thread by itself would restore what another had set.
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
def _exact() -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    # Once a program sets `fp32_precision`, which torch 2.9 brought, torch refuses to read or write the older setting.
    if hasattr(cudnn, "conv"):
        changes: dict[Any, tuple[str, object]] = dict.fromkeys((cudnn.conv, cudnn.rnn), ("fp32_precision", "ieee"))
    else:
        changes = {cudnn: ("allow_tf32", False)}
    before = {place: getattr(place, name) for place, (name, _) in changes.items()}
    try:
        for place, (name, value) in changes.items():
            setattr(place, name, value)
        yield
    finally:
        for place, (name, _) in changes.items():
            setattr(place, name, before[place])


@contextlib.contextmanager
def _quiet_pillow() -> Iterator[None]:
    # Not `catch_warnings`, which puts back the whole list as it was, and so undoes what others set meanwhile.
    filters: list[Any] = warnings.filters  # type: ignore[assignment]
    warnings.filterwarnings("ignore", module=r"PIL\.")
    ours = filters[0]
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            filters.remove(ours)


# cuDNN would round float32 to 10 bits (TF32): a GPU must give the values that a CPU gives.
exact_convolutions: Final = WhileAny(_exact)
# Pillow warns about damaged metadata without naming the file; what matters to us is checked for itself.
quiet_pillow: Final = WhileAny(_quiet_pillow)
