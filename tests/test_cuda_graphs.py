"""Which shapes are recorded, with a recorder that only pretends; and the real one where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import TINY

from sppfeat import RunOptions, SppFeatWarning
from sppfeat.cuda_graphs import _RECURS, MOST_SHAPES, Pass, RecurringPasses
from sppfeat.engine import load_engine


def double(pictures: torch.Tensor) -> torch.Tensor:
    return pictures * 2.0


class Recorder:
    """Stands in for `capture`; its passes add `off` to each value."""

    def __init__(self, off: float = 0.0, error: Exception | None = None) -> None:
        self.shapes: list[torch.Size] = []
        self.replays = 0
        self._off, self._error = off, error

    def __call__(self, run: Pass, pictures: torch.Tensor) -> Pass:
        self.shapes.append(pictures.shape)
        if self._error is not None:
            raise self._error

        def replay(pictures: torch.Tensor) -> torch.Tensor:
            self.replays += 1
            return run(pictures) + self._off

        return replay


def go(passes: Callable[[torch.Tensor], torch.Tensor], side: int, times: int) -> None:
    for number in range(times):
        pictures = torch.full((2, side), float(number + 1))
        assert torch.equal(passes(pictures), 2 * pictures)


def test_only_shapes_that_recur_are_recorded_and_only_so_many() -> None:
    recorder = Recorder()
    passes = RecurringPasses(double, recorder)
    go(passes, 1, _RECURS - 1)
    assert not recorder.shapes
    go(passes, 1, 4)
    assert recorder.shapes == [torch.Size((2, 1))] and recorder.replays == 1 + 3
    for side in range(2, MOST_SHAPES + 10):
        go(passes, side, _RECURS + 1)
    assert len(recorder.shapes) == MOST_SHAPES == len(set(recorder.shapes))
    replays = recorder.replays
    go(passes, 1, 1)
    assert recorder.replays == replays + 1  # those recorded first are still used


@pytest.mark.parametrize(
    ("recorder", "reason"),
    [
        (Recorder(off=1.0), "other values"),
        (Recorder(error=RuntimeError("operation not permitted\nx")), "not permitted"),
    ],
)
def test_graphs_that_do_not_work_are_given_up_with_one_warning(recorder: Recorder, reason: str) -> None:
    passes = RecurringPasses(double, recorder)
    with pytest.warns(SppFeatWarning, match=f"CUDA graphs do not work here .*{reason}.*one by one"):
        go(passes, 1, _RECURS)
    go(passes, 1, 5)
    go(passes, 2, 5)
    assert len(recorder.shapes) == 1


def test_no_memory_for_a_graph_is_no_failure() -> None:
    recorder = Recorder(error=torch.OutOfMemoryError("CUDA out of memory"))
    passes = RecurringPasses(double, recorder)
    go(passes, 1, _RECURS + 5)
    assert len(recorder.shapes) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_recorded_passes_on_the_card() -> None:
    backbone, engine = load_engine(TINY, RunOptions(device="cuda"))
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(), engine.lane():
        for _ in range(_RECURS + 3):
            pictures = torch.randint(0, 256, (4, 64, 96, 3), dtype=torch.uint8, generator=generator)
            expected = backbone.feature_map(pictures.cuda())
            torch.testing.assert_close(engine.feature_map(pictures), expected, rtol=1e-3, atol=1e-4)
        assert len(engine._local.passes._recorded) == 1  # type: ignore[attr-defined]


def test_a_release_drops_graphs_and_makes_room_for_others() -> None:
    recorder = Recorder()
    passes = RecurringPasses(double, recorder)
    for side in range(1, MOST_SHAPES + 1):
        go(passes, side, _RECURS)
    passes.release()
    replays = recorder.replays
    go(passes, 1, 1)
    assert recorder.replays == replays
    go(passes, 1, _RECURS)
    assert len(recorder.shapes) == MOST_SHAPES + 1
