"""Which shapes are recorded, with a fake recorder; and with the real one if there is a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from conftest import TINY

from sppfeat import RunOptions, SppFeatWarning
from sppfeat.backbones.network import Network
from sppfeat.engines.cuda_graphs import _RECURS, MOST_SHAPES, Pass, RecurringPasses, capture_into_one_pool
from sppfeat.engines.engine import load_engine


def double(images: torch.Tensor) -> torch.Tensor:
    return images * 2.0


class Recorder:
    """Stands in for `capture`; its passes add `off` to each value."""

    def __init__(self, off: float = 0.0, error: Exception | None = None) -> None:
        self.shapes: list[torch.Size] = []
        self.replays = 0
        self._off, self._error = off, error

    def __call__(self, run: Pass, images: torch.Tensor) -> Pass:
        self.shapes.append(images.shape)
        if self._error is not None:
            raise self._error

        def replay(images: torch.Tensor) -> torch.Tensor:
            self.replays += 1
            return run(images) + self._off

        return replay


def go(passes: Callable[[torch.Tensor], torch.Tensor], side: int, times: int) -> None:
    for number in range(times):
        images = torch.full((2, side), float(number + 1))
        assert torch.equal(passes(images), 2 * images)


def test_only_shapes_that_recur_are_recorded() -> None:
    recorder = Recorder()
    passes = RecurringPasses(double, lambda: recorder)
    go(passes, 1, _RECURS - 1)
    assert not recorder.shapes
    go(passes, 1, 4)
    assert recorder.shapes == [torch.Size((2, 1))] and recorder.replays == 1 + 3


def test_the_shapes_used_last_stay_recorded() -> None:
    recorder = Recorder()
    passes = RecurringPasses(double, lambda: recorder)
    for side in range(1, MOST_SHAPES + 1):
        go(passes, side, _RECURS)
    go(passes, 1, 1)  # so that 2 is the one used longest ago
    go(passes, MOST_SHAPES + 1, _RECURS)
    replays = recorder.replays
    for side in (1, *range(3, MOST_SHAPES + 2)):
        go(passes, side, 1)
    assert recorder.replays == replays + MOST_SHAPES
    go(passes, 2, _RECURS - 1)
    assert recorder.replays == replays + MOST_SHAPES and len(recorder.shapes) == MOST_SHAPES + 1
    go(passes, 2, 1)
    assert recorder.shapes[-1] == torch.Size((2, 2))


def test_shapes_that_never_recur_are_forgotten() -> None:
    recorder = Recorder()
    passes = RecurringPasses(double, lambda: recorder)
    go(passes, 1, _RECURS - 1)
    for side in range(2, 2000):
        go(passes, side, 1)
    assert len(passes._seen) < 100
    go(passes, 1, 1)
    assert not recorder.shapes


def test_graphs_share_memory_until_all_are_dropped() -> None:
    recorders: list[Recorder] = []

    def new_recorder() -> Recorder:
        recorders.append(Recorder())
        return recorders[-1]

    passes = RecurringPasses(double, new_recorder)
    assert not recorders
    for side in range(1, MOST_SHAPES + 4):
        go(passes, side, _RECURS)
    assert [len(recorder.shapes) for recorder in recorders] == [MOST_SHAPES + 3]
    passes.release()
    go(passes, 1, _RECURS)
    assert [len(recorder.shapes) for recorder in recorders] == [MOST_SHAPES + 3, 1]


def test_captures_of_a_lane_use_one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA is faked: what counts is which pool each graph is told to use."""
    pools: list[object] = []

    @contextlib.contextmanager
    def graph(graph: object, *, pool: object, **rest: object) -> Iterator[None]:
        pools.append(pool)
        yield

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    for _ in range(2):
        capture = capture_into_one_pool()
        for side in (1, 2):
            capture(double, torch.zeros(2, side))
    assert pools[0] is pools[1] and pools[2] is pools[3] and pools[1] is not pools[2]


@pytest.mark.parametrize(
    ("recorder", "reason"),
    [
        (Recorder(off=1.0), "values differ"),
        (Recorder(error=RuntimeError("operation not permitted\nx")), "not permitted"),
    ],
)
def test_graphs_that_do_not_work_are_given_up_with_one_warning(recorder: Recorder, reason: str) -> None:
    passes = RecurringPasses(double, lambda: recorder)
    with pytest.warns(SppFeatWarning, match=f"CUDA graphs do not work here .*{reason}.*one by one"):
        go(passes, 1, _RECURS)
    go(passes, 1, 5)
    go(passes, 2, 5)
    assert len(recorder.shapes) == 1


def test_no_memory_for_a_graph_is_not_a_failure() -> None:
    recorder = Recorder(error=torch.OutOfMemoryError("CUDA out of memory"))
    passes = RecurringPasses(double, lambda: recorder)
    go(passes, 1, _RECURS + 5)
    assert len(recorder.shapes) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_recorded_passes_on_the_gpu() -> None:
    network = Network(TINY)
    engine = load_engine(network, RunOptions(device="cuda"))
    random = np.random.default_rng(0)
    with engine.lane():
        for _ in range(_RECURS + 3):
            images = random.integers(0, 256, (4, 64, 96, 3), np.uint8)
            expected = network.backbone.feature_maps(torch.from_numpy(images).cuda())[0]
            torch.testing.assert_close(engine.feature_maps(images)[0], expected, rtol=1e-3, atol=1e-4)
        assert len(engine._local.passes._recorded) == 1  # type: ignore[attr-defined]


def test_a_release_drops_graphs_and_makes_room_for_others() -> None:
    recorder = Recorder()
    passes = RecurringPasses(double, lambda: recorder)
    for side in range(1, MOST_SHAPES + 1):
        go(passes, side, _RECURS)
    passes.release()
    replays = recorder.replays
    go(passes, 1, 1)
    assert recorder.replays == replays
    go(passes, 1, _RECURS)
    assert len(recorder.shapes) == MOST_SHAPES + 1
