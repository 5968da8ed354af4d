"""Engines that make rows as they are stored: the same descriptors and reasons. The GPU is faked: torch is the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

from sppfeat import Recipe, RunOptions
from sppfeat.engines import stores_rows, torch_rows
from sppfeat.engines.torch_engine import TorchEngine
from sppfeat.engines.torch_rows import stored_rows
from sppfeat.extraction import branch
from sppfeat.extraction.pipeline import Described, Describer
from sppfeat.extraction.values import finite_rows, normalize, to_stored

ON_CPU = RunOptions(engine="torch", device="cpu", batch_size=3)


def test_only_torch_stores_rows_on_gpus() -> None:
    assert stores_rows("torch", "cuda:1") and stores_rows("torch", "cuda")
    assert not any(stores_rows(*each) for each in (("torch", "cpu"), ("openvino", "cpu"), ("sift", "cpu")))


@pytest.mark.parametrize("kind", ["l2", "signed-sqrt-l2", "none"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_are_those_of_numpy(kind: str, dtype: str) -> None:
    random = np.random.default_rng(0)
    layers = [random.normal(size=(5, count)).astype(np.float32) * size for count, size in ((40, 1e-3), (7, 100.0))]
    layers[0][2] = 0  # a layer without values keeps its zeros
    layers[1][3] = 0
    expected = to_stored(np.concatenate([normalize(each, kind) for each in layers], 1), dtype)
    stored, largest = stored_rows([torch.from_numpy(each) for each in layers], kind, dtype)
    found = finite_rows(stored.numpy(), largest.numpy(), dtype)
    for row, as_expected in zip(found, expected, strict=True):
        assert isinstance(row, np.ndarray) and isinstance(as_expected, np.ndarray) and row.dtype == as_expected.dtype
        # A unit of float16 where the sum fell on the other side of a tie.
        np.testing.assert_allclose(row, as_expected, rtol=1e-3 if dtype == "float16" else 1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 65_520.0, -65_520.0])
def test_rows_that_are_not_finite_have_the_reason_of_numpy(bad: float) -> None:
    rows = np.ones((3, 8), np.float32)
    rows[1, 5] = bad
    found = [each.numpy() for each in stored_rows([torch.from_numpy(rows)], "none", "float16")]
    expected = to_stored(rows, "float16")[1]
    assert isinstance(expected, str)
    assert finite_rows(found[0], found[1], "float16")[1] == expected
    assert all(isinstance(finite_rows(found[0], found[1], "float16")[at], np.ndarray) for at in (0, 2))


def described(recipe: Recipe, folder: Path) -> dict[int, Described]:
    return {each.position: each for each in Describer(recipe, ON_CPU).describe(sorted(folder.iterdir()))}


@pytest.mark.parametrize(
    "recipe",
    [
        TINY,
        replace(TINY, normalize="signed-sqrt-l2", pooling="avg", dtype="float32"),
        replace(TINY, layer="conv1.2,layer2"),
        replace(TINY, scales=(64, 96)),
    ],
    ids=["one", "signed", "layers", "scales"],
)
def test_descriptors_are_those_of_other_engines(
    recipe: Recipe, make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_images(7)
    expected = described(recipe, images)
    calls = []
    monkeypatch.setattr(branch, "stores_rows", lambda engine, device: True)
    pool_stored = TorchEngine.pool_stored

    def counted(self: TorchEngine, maps: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        calls.append(len(maps))
        return pool_stored(self, maps)

    monkeypatch.setattr(TorchEngine, "pool_stored", counted)
    found = described(recipe, images)
    assert bool(calls) == (len(recipe.scales) == 1)  # several scales are fused before they are stored
    assert found.keys() == expected.keys() and any(each.rows is not None for each in found.values())
    for position, each in found.items():
        other = expected[position]
        assert each.error == other.error
        if each.rows is not None and other.rows is not None:
            assert each.rows.dtype == other.rows.dtype
            np.testing.assert_allclose(each.rows, other.rows, rtol=1e-3, atol=1e-6)


class Event:
    """Stands in for CUDA's."""

    def __init__(self, done: list[str]) -> None:
        self._done = done

    def record(self) -> None:
        self._done.append("record")

    def synchronize(self) -> None:
        self._done.append("synchronize")


def test_rows_on_a_gpu_are_waited_for_behind_all_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class OnGpu:
        """As much of a tensor on a GPU as is used."""

        device, shape, dtype = torch.device("cuda"), (2,), torch.float32

    class Pinned:
        def copy_(self, other: object, *, non_blocking: bool) -> None:
            assert isinstance(other, OnGpu) and non_blocking
            done.append("copy")

    def empty(shape: tuple[int, ...], *, dtype: torch.dtype, pin_memory: bool) -> Pinned:
        assert (shape, dtype, pin_memory) == ((2,), torch.float32, True)
        return Pinned()

    monkeypatch.setattr(torch_rows.torch, "empty", empty)
    monkeypatch.setattr(torch_rows.torch.cuda, "Event", lambda: Event(done))
    assert len(torch_rows.copied_out([OnGpu(), OnGpu()])) == 2  # type: ignore[list-item]
    assert done == ["copy", "copy", "record", "synchronize"]
