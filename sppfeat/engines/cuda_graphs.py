"""CUDA graphs: passes over recurring shapes are recorded once and launched as a whole.

A network is some hundred small kernels, and launching them one by one takes a CPU longer than a fast GPU takes to
compute a small batch. A graph holds on to its memory: so only a few shapes have one. Each thread has its own graphs,
which share memory, since no two of them run at once.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Final

import torch

from sppfeat.errors import SppFeatWarning, one_line

Pass = Callable[[torch.Tensor], list[torch.Tensor]]
Capture = Callable[[Pass, torch.Tensor], Pass]

# Batches of a shape until it counts as recurring; the most shapes with a graph; the most shapes counted.
_RECURS: Final = 3
MOST_SHAPES: Final = 8
_MOST_COUNTED: Final = 64
# The tolerance of a graph against the pass it recorded: the kernels are the same, but some may sum in another order.
_TOLERANCE: Final = 1e-2
_ONE_CAPTURE: Final = threading.Lock()


class RecurringPasses:
    """A pass that is replaced, shape by shape, by its recording; for one thread.

    new_capture: makes a capture whose passes may share memory. The most recently used shapes have a recorded pass.
    If recording fails or gives different values, every shape runs unrecorded from then on, with a SppFeatWarning; if
    only memory is short, without a warning.
    """

    def __init__(self, run: Pass, new_capture: Callable[[], Capture]) -> None:
        self._run = run
        self._new_capture = new_capture
        self._capture: Capture | None = None
        # Both from the least to the most recently used shape.
        self._seen: dict[torch.Size, int] = {}
        self._recorded: dict[torch.Size, Pass] = {}
        self._records = True

    def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
        shape = images.shape
        recorded = self._recorded.pop(shape, None)
        if recorded is not None:
            self._recorded[shape] = recorded
            return recorded(images)
        output = self._run(images)
        if self._records:
            seen = self._seen.pop(shape, 0) + 1
            if seen >= _RECURS:
                self._record(images, output)
            else:
                self._seen[shape] = seen
                if len(self._seen) > _MOST_COUNTED:
                    del self._seen[next(iter(self._seen))]
        return output

    def release(self) -> None:
        """Drop every graph and its memory; shapes that recur from now on are recorded again."""
        self._recorded.clear()
        self._seen.clear()
        self._capture = None

    def _record(self, images: torch.Tensor, expected: list[torch.Tensor]) -> None:
        while len(self._recorded) >= MOST_SHAPES:
            del self._recorded[next(iter(self._recorded))]
        try:
            self._capture = self._capture or self._new_capture()
            recorded = self._capture(self._run, images)
            for found, wanted in zip(recorded(images), expected, strict=True):
                difference = (found.float() - wanted.float()).norm() / wanted.float().norm().clamp(1e-30)
                if not bool(difference <= _TOLERANCE) and bool(wanted.isfinite().all()):
                    raise RuntimeError(f"values differ from the recorded pass by {float(difference):.1e}")
        except torch.OutOfMemoryError:
            self._records = False
        except RuntimeError as error:
            self._records = False
            self._recorded.clear()
            warnings.warn(
                f"CUDA graphs do not work here ({one_line(error)}); launching kernels one by one",
                SppFeatWarning,
                stacklevel=3,
            )
        else:
            self._recorded[images.shape] = recorded
        if not self._records:
            self._seen.clear()


def capture_into_one_pool() -> Capture:
    """A capture whose graphs share a memory pool; for graphs that run one after another, on a thread's stream.

    The pool is freed with the last of its graphs: use a new capture then.
    """
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Pass, images: torch.Tensor) -> Pass:
        with _ONE_CAPTURE:
            still = images.clone()
            graph = torch.cuda.CUDAGraph()
            # Other threads may copy and allocate meanwhile: only this thread's mistakes are errors.
            with torch.cuda.graph(
                graph, pool=pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
            ):
                outputs = run(still)

        def replay(images: torch.Tensor) -> list[torch.Tensor]:
            still.copy_(images, non_blocking=True)
            graph.replay()
            return [output.clone() for output in outputs]  # the next replay overwrites them

        return replay

    return capture
