"""CUDA graphs: passes over shapes that recur are recorded once and launched as a whole.

A network is some hundred small kernels, and launching them one by one takes a GPU server's processor longer than a fast
card takes to compute a small batch. A graph holds its memory for good: so only a few shapes get one, and each thread
has its own.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Final

import torch

from sppfeat.errors import SppFeatWarning, one_line

Pass = Callable[[torch.Tensor], torch.Tensor]

# Batches of one shape until it counts as recurring, and shapes that get a graph.
_RECURS: Final = 3
MOST_SHAPES: Final = 8
# What a graph may differ by from the pass it recorded: it is the same kernels, but some choose how they sum anew.
_TOLERANCE: Final = 1e-2
_ONE_CAPTURE: Final = threading.Lock()


class RecurringPasses:
    """A pass that is replaced, shape by shape, by what `capture` makes of it; for one thread.

    Where recording fails, or gives other values, every shape runs as it is from then on, with a SppFeatWarning; where
    only memory is short, without one.
    """

    def __init__(self, run: Pass, capture: Callable[[Pass, torch.Tensor], Pass]) -> None:
        self._run = run
        self._capture = capture
        self._seen: dict[torch.Size, int] = {}
        self._recorded: dict[torch.Size, Pass] = {}
        self._room = MOST_SHAPES

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        recorded = self._recorded.get(pictures.shape)
        if recorded is not None:
            return recorded(pictures)
        output = self._run(pictures)
        if self._room > len(self._recorded):
            seen = self._seen[pictures.shape] = self._seen.get(pictures.shape, 0) + 1
            if seen >= _RECURS:
                self._record(pictures, output)
        return output

    def release(self) -> None:
        """Drop every graph, and the memory it holds; shapes that recur from now on are recorded anew."""
        self._recorded.clear()
        self._seen.clear()

    def _record(self, pictures: torch.Tensor, expected: torch.Tensor) -> None:
        try:
            recorded = self._capture(self._run, pictures)
            difference = (recorded(pictures).float() - expected.float()).norm() / expected.float().norm().clamp(1e-30)
            if not bool(difference <= _TOLERANCE) and bool(expected.isfinite().all()):
                raise RuntimeError(f"other values than the pass it recorded, by {float(difference):.1e}")
        except torch.OutOfMemoryError:
            self._room = 0
        except RuntimeError as error:
            self._room = 0
            self._recorded.clear()
            warnings.warn(
                f"CUDA graphs do not work here ({one_line(error)}); kernels are launched one by one",
                SppFeatWarning,
                stacklevel=3,
            )
        else:
            self._recorded[pictures.shape] = recorded
        if self._room <= len(self._recorded):
            self._seen.clear()


def capture(run: Pass, pictures: torch.Tensor) -> Pass:
    """Record a pass over pictures of this shape on this thread's stream."""
    with _ONE_CAPTURE:
        still = pictures.clone()
        graph = torch.cuda.CUDAGraph()
        # Another thread may copy and allocate meanwhile: only this one's mistakes are errors.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            output = run(still)

    def replay(pictures: torch.Tensor) -> torch.Tensor:
        still.copy_(pictures, non_blocking=True)
        graph.replay()
        return output.clone()  # the next replay overwrites it

    return replay
