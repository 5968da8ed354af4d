"""The passes of a step, one on each core: small passes that share all cores wait for each other most of the time."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

import torch
from torch import nn

from sppfeat.machine import available_cores

P = TypeVar("P")
R = TypeVar("R")
# Passes that wait or are done ahead of the one whose result is taken, for each core: their gradients are kept.
_AHEAD: Final = 2


class Passes:
    """Runs passes side by side on a processor, one after the other on a GPU; results come in order."""

    def __init__(self, device: torch.device) -> None:
        self._cores = available_cores() if device.type == "cpu" else 1

    def run(self, passes: Iterable[P], each: Callable[[P], R]) -> Iterator[R]:
        """What `each` returns for each pass."""
        if self._cores == 1:
            yield from map(each, passes)
            return
        with _threads(self._cores) as threads:
            waiting: deque[Future[R]] = deque()
            for one in passes:
                waiting.append(threads.submit(each, one))
                if len(waiting) >= _AHEAD * self._cores:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def backward(
        self,
        passes: Iterable[P],
        loss_of: Callable[[P], torch.Tensor],
        parameters: Sequence[nn.Parameter],
        share: float,
    ) -> float:
        """Add the gradients of all losses, times `share`, to the parameters; returns the sum of the losses.

        The gradients are added in the order of the passes: the result does not depend on which is done first.
        """

        def gradients(one: P) -> tuple[float, tuple[torch.Tensor | None, ...]]:
            with torch.enable_grad():
                loss = loss_of(one)
                found = torch.autograd.grad(loss * share, parameters, allow_unused=True)
            return float(loss.detach()), found

        total = 0.0
        for loss, found in self.run(passes, gradients):
            total += loss
            for parameter, gradient in zip(parameters, found, strict=True):
                if gradient is None:
                    continue
                if parameter.grad is None:
                    parameter.grad = gradient
                else:
                    parameter.grad += gradient
        return total


@contextlib.contextmanager
def _threads(cores: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that compute on one core each; torch's setting is put back for what comes later."""
    before = torch.get_num_threads()
    threads = ThreadPoolExecutor(cores, thread_name_prefix="train", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
