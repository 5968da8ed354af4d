"""Gradients of pooled windows on a CPU, against plain loops, numerical derivatives and torchvision's roi_pool."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_pool

from sppfeat.pyramid import gradients
from sppfeat.pyramid.pooling import SpatialPyramidPool, pool_rois

LEVEL_SETS = [(6, 3, 2, 1), (4, 2, 1), (5,), (7, 1), (2, 2)]
POOLINGS = ["max", "avg", "gem"]
MEMORY = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
# The whole map of 9 x 11, twice; one cell, one row, one column; windows that no level divides.
ROIS = [[0, 0, 10, 8], [0, 0, 10, 8], [10, 8, 10, 8], [2, 5, 9, 5], [4, 0, 4, 8], [1, 2, 7, 8], [3, 1, 7, 7]]


def tied_map(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """Few different values, negative ones and zeros of both signs among them: most maxima are in several cells."""
    values = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype) / 2
    values[torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.1] = -0.0
    return values


def random_values(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=dtype)


def gradient(
    feature_map: torch.Tensor,
    rois: list[list[int]],
    levels: tuple[int, ...],
    pooling: str = "max",
    *,
    of_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of a map [C, H, W], and the gradient of its pooled windows that it was computed from."""
    leaf = feature_map.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    windows = torch.tensor(rois, dtype=torch.int64).reshape(-1, 4)
    rows = pool_rois(leaf, windows, levels, pooling=pooling)
    if of_rows is None:
        of_rows = random_values(*rows.shape, dtype=rows.dtype)
    (found,) = torch.autograd.grad(rows, leaf, of_rows)
    return found, of_rows


def assert_gradient(
    feature_map: torch.Tensor, rois: list[list[int]], levels: tuple[int, ...], pooling: str, tolerance: float = 1e-9
) -> None:
    found, of_rows = gradient(feature_map, rois, levels, pooling)
    expected = reference.gradient_of_windows(
        feature_map.double().numpy(), rois, levels, pooling, of_rows.double().numpy()
    )
    assert found.dtype == feature_map.dtype and found.shape == feature_map.shape
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("levels", LEVEL_SETS, ids=str)
def test_gradients_agree_with_plain_loops(
    levels: tuple[int, ...], pooling: str, dtype: torch.dtype, memory: str
) -> None:
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for maps in (tied_map(1, 3, 9, 11, dtype=dtype), random_values(1, 3, 9, 11, dtype=dtype)):
        one = maps.contiguous(memory_format=MEMORY[memory])[0]
        assert_gradient(one, ROIS, levels, pooling, tolerance)


@settings(max_examples=60, deadline=None)
@given(
    st.data(),
    st.integers(1, 3),
    st.integers(1, 13),
    st.integers(1, 13),
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.sampled_from(POOLINGS),
)
def test_any_windows_agree_with_plain_loops(
    data: st.DataObject, channels: int, height: int, width: int, levels: list[int], pooling: str
) -> None:
    def ends(length: int) -> tuple[int, int]:
        first = data.draw(st.integers(0, length - 1))
        return first, data.draw(st.integers(first, length - 1))

    rois = []
    for _ in range(data.draw(st.integers(1, 4))):
        (x1, x2), (y1, y2) = ends(width), ends(height)
        rois.append([x1, y1, x2, y2])
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    one = tied_map(channels, height, width, dtype=dtype, seed=height * 100 + width)
    assert_gradient(one, rois, tuple(levels), pooling, 1e-9 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("levels", [(3, 2, 1), (4,)], ids=str)
def test_gradients_agree_with_differences(levels: tuple[int, ...], pooling: str) -> None:
    # Values further apart than gradcheck's step: the place of a maximum is certain.
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1)).double()
    one = (0.5 + order / 60).reshape(2, 5, 6).requires_grad_()
    rois = torch.tensor([[0, 0, 5, 4], [1, 1, 4, 3], [5, 4, 5, 4], [0, 2, 5, 2], [1, 1, 4, 3]])
    assert torch.autograd.gradcheck(lambda m: pool_rois(m, rois, levels, pooling=pooling), one)


def test_gradients_agree_with_roi_pool() -> None:
    """On windows whose sides 6 divides: torchvision computes the edges of other bins in float32."""
    random = np.random.default_rng(0)
    sides = random.integers(1, 6, (400, 2)) * 6
    first = random.integers(0, [64, 43] - sides + 1)
    rois = torch.from_numpy(np.concatenate([first, first + sides - 1], 1))
    one = random_values(5, 43, 64, dtype=torch.float32).requires_grad_()
    boxes = torch.cat([torch.zeros(len(rois), 1), rois.float()], 1)
    levels = (6, 3, 2, 1)
    ours = pool_rois(one, rois, levels)
    theirs = torch.cat([roi_pool(one[None], boxes, n).permute(0, 2, 3, 1).flatten(1) for n in levels], 1)
    assert torch.equal(ours, theirs)
    of_rows = random_values(*ours.shape, dtype=torch.float32)
    torch.testing.assert_close(
        torch.autograd.grad(ours, one, of_rows), torch.autograd.grad(theirs, one, of_rows), rtol=1e-5, atol=1e-4
    )


def test_of_equal_maxima_the_first_cell_of_the_bin_gets_the_whole_gradient() -> None:
    for values, first in (
        ([[1.0, 2, 2], [2, 1, 2]], 1),
        ([[-0.0, 0, -1], [0, 0, 0]], 0),
        ([[-3.0, -2, -2], [-2, -2, -3]], 1),
    ):
        for dtype in (torch.float32, torch.float64):
            found, _ = gradient(torch.tensor([values], dtype=dtype), [[0, 0, 2, 1]], (1,), of_rows=torch.ones(1, 1))
            assert found.flatten().tolist() == [float(at == first) for at in range(6)]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients_of_a_cell_in_many_windows_add_up(pooling: str) -> None:
    # Whole numbers: sums are exact in any order.
    one = tied_map(2, 9, 11, dtype=torch.float32)
    rows = torch.ones(1, 5 * 2)
    once, _ = gradient(one, [[1, 2, 7, 8]], (2, 1), pooling, of_rows=rows)
    often, _ = gradient(one, [[1, 2, 7, 8]] * 300, (2, 1), pooling, of_rows=rows.expand(300, -1))
    torch.testing.assert_close(often, once * 300)
    assert once.abs().sum() > 0


@pytest.mark.parametrize("pooling", POOLINGS)
def test_no_windows_give_no_gradient(pooling: str) -> None:
    found, _ = gradient(tied_map(3, 5, 7), [], (2, 1), pooling)
    assert found.shape == (3, 5, 7) and not found.any()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_values_are_those_without_gradients(dtype: torch.dtype, pooling: str) -> None:
    one = random_values(3, 9, 11).to(dtype)
    one[0, 4, 4] = float("nan")
    rois = torch.tensor(ROIS)
    with torch.no_grad():
        expected = pool_rois(one, rois, (6, 3, 2, 1), pooling=pooling)
    found = pool_rois(one.requires_grad_(), rois, (6, 3, 2, 1), pooling=pooling)
    assert found.requires_grad and found.dtype == dtype
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=0, equal_nan=True)
    if pooling == "max":
        assert expected.isnan().any()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_half_precision_are_rounded_once(dtype: torch.dtype, pooling: str) -> None:
    one = (random_values(3, 9, 11).abs() + 0.1).to(dtype)
    rois = ROIS * 40
    of_rows = torch.ones(len(rois), 5 * 3, dtype=dtype)
    found, _ = gradient(one, rois, (2, 1), pooling, of_rows=of_rows)
    expected, _ = gradient(one.float(), rois, (2, 1), pooling, of_rows=of_rows.float())
    eps = torch.finfo(dtype).eps
    # The power of `gem` is rounded before its gradient is known.
    torch.testing.assert_close(found.float(), expected, rtol=(3 if pooling == "gem" else 1) * eps, atol=eps)


def test_ranks_computed_again_and_in_parts_are_those_that_were_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    one = tied_map(3, 9, 11, dtype=torch.float32)
    # Whole numbers, so that sums do not depend on how they are split.
    of_rows = torch.randint(-9, 9, (3 * len(ROIS), 50 * 3), generator=torch.Generator().manual_seed(0)).float()
    kept, _ = gradient(one, ROIS * 3, (6, 3, 2, 1), of_rows=of_rows)
    asked: list[int] = []

    def counted(cells: np.ndarray, rois: np.ndarray, levels: tuple[int, ...]) -> np.ndarray:
        asked.append(len(rois))
        return max_of_rois(cells, rois, levels)

    max_of_rois = gradients.max_of_rois
    monkeypatch.setattr(gradients, "max_of_rois", counted)
    gradient(one, ROIS * 3, (6, 3, 2, 1), of_rows=of_rows)
    assert asked == [21, 21]  # of values and of ranks, both in forward
    asked.clear()
    monkeypatch.setattr(gradients, "KEPT_BYTES", 0)
    monkeypatch.setattr(gradients, "_AGAIN_VALUES", 8 * 150)
    monkeypatch.setattr(gradients, "_WIDE_VALUES", 1)
    again, _ = gradient(one, ROIS * 3, (6, 3, 2, 1), of_rows=of_rows)
    assert asked == [21, 8, 8, 5]
    assert torch.equal(again, kept)


@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_threads_share_the_windows(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one = tied_map(3, 9, 11, dtype=torch.float32)
    rois = [*ROIS, *ROIS, *ROIS, *ROIS, ROIS[0]]
    of_rows = torch.randint(-9, 9, (len(rois), 50 * 3), generator=torch.Generator().manual_seed(0)).float()
    expected = reference.gradient_of_windows(one.double().numpy(), rois, (6, 3, 2, 1), "max", of_rows.numpy())
    shares = set()

    def noted(values: torch.Tensor, maps: int, channels: int) -> torch.Tensor:
        shares.add(maps)
        return as_maps(values, maps, channels)

    as_maps = gradients._as_maps
    monkeypatch.setattr(gradients, "_as_maps", noted)
    monkeypatch.setattr(gradients, "_WIDE_VALUES", 6 * one.numel())
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found, _ = gradient(one, rois, (6, 3, 2, 1), of_rows=of_rows)
    assert np.array_equal(found.numpy(), expected)
    # More totals than 3 would take longer to add up than they spare; 29 windows cannot be shared evenly by 2 or 3.
    assert shares == {1, min(threads, 3)}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients_are_the_same_each_time(pooling: str) -> None:
    one = tied_map(64, 9, 11, dtype=torch.float32)
    of_rows = random_values(len(ROIS) * 50, 50 * 64, dtype=torch.float32)
    first, _ = gradient(one, ROIS * 50, (6, 3, 2, 1), pooling, of_rows=of_rows)
    for _ in range(3):
        assert torch.equal(gradient(one, ROIS * 50, (6, 3, 2, 1), pooling, of_rows=of_rows)[0], first)


def test_maps_of_more_cells_than_two_bytes_number() -> None:
    one = tied_map(2, 190, 200, dtype=torch.float32)
    assert gradients.ranks_of_cells(one.permute(1, 2, 0).numpy()).dtype == np.int32
    for pooling in POOLINGS:
        assert_gradient(one, [[190, 180, 199, 189], [0, 0, 6, 4], [95, 100, 110, 109]], (3, 1), pooling, 1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ranks_are_the_order_of_values_and_then_of_cells(dtype: type[np.floating]) -> None:
    cells = tied_map(6, 7, 3).numpy().astype(dtype)
    cells[0, 0], cells[5, 6] = np.inf, -np.inf
    ranks = gradients.ranks_of_cells(cells)
    assert ranks.shape == cells.shape and ranks.dtype == np.int16
    for c in range(3):
        values, places = cells[:, :, c].ravel().tolist(), ranks[:, :, c].ravel().tolist()
        expected = sorted(range(42), key=lambda at: (values[at], -at))
        assert [places.index(rank) for rank in range(42)] == expected


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_second_derivative_is_an_error(pooling: str) -> None:
    one = random_values(2, 5, 6).requires_grad_()
    rows = pool_rois(one, torch.tensor([[0, 0, 5, 4]]), (2, 1), pooling=pooling)
    (first,) = torch.autograd.grad(rows.square().sum(), one, create_graph=True)
    with pytest.raises(RuntimeError, match="pool_rois is differentiable only once on a CPU"):
        first.sum().backward()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients_as_a_function(pooling: str) -> None:
    one = random_values(2, 9, 11)
    of_rows = random_values(len(ROIS), 5 * 2)

    def loss(feature_map: torch.Tensor) -> torch.Tensor:
        return (pool_rois(feature_map, torch.tensor(ROIS), (2, 1), pooling=pooling) * of_rows).sum()

    torch.testing.assert_close(torch.func.grad(loss)(one), gradient(one, ROIS, (2, 1), pooling, of_rows=of_rows)[0])


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients_through_the_layer(pooling: str, memory: str) -> None:
    maps = tied_map(2, 3, 9, 11).contiguous(memory_format=MEMORY[memory]).requires_grad_()
    rois = [ROIS, ROIS[2:4]]
    rows = SpatialPyramidPool((3, 2), pooling=pooling)(maps, [torch.tensor(windows) for windows in rois])
    of_rows = random_values(*rows.shape)
    rows.backward(of_rows)
    assert maps.grad is not None
    for one, windows, part, found in zip(maps, rois, of_rows.split([7, 2]), maps.grad, strict=True):
        expected = reference.gradient_of_windows(one.detach().numpy(), windows, (3, 2), pooling, part.numpy())
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)
