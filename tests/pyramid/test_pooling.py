"""Spatial pyramid pooling against plain loops, torch's adaptive pooling and torchvision's roi_pool."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import roi_pool

from sppfeat.errors import UsageError
from sppfeat.pyramid.pooling import SpatialPyramidPool, pool_pyramid, pool_rois

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")),
]
LEVEL_SETS = [(6, 3, 2, 1), (4, 2, 1), (4, 3, 2, 1), (5,), (7, 1)]
POOLINGS = ["max", "avg", "gem"]
MEMORY = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
HALVES = [torch.bfloat16, torch.float16]


def random_map(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_rois(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    random = np.random.default_rng(seed)
    x, y = random.integers(0, width, (count, 2)), random.integers(0, height, (count, 2))
    x.sort(axis=1)
    y.sort(axis=1)
    return torch.from_numpy(np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1))


def assert_pooled(found: torch.Tensor, expected: np.ndarray, pooling: str, tolerance: float = 1e-5) -> None:
    assert list(found.shape) == list(expected.shape)
    ours = found.detach().double().cpu().numpy()
    if pooling == "max":
        np.testing.assert_array_equal(ours, expected)
    else:
        np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=tolerance)


# Whole maps.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("levels", LEVEL_SETS, ids=str)
@pytest.mark.parametrize("size", [(7, 10), (6, 12), (1, 1), (2, 3), (13, 5)], ids=str)
def test_whole_maps_agree_with_plain_loops(
    size: tuple[int, int], levels: tuple[int, ...], pooling: str, memory: str, device: str
) -> None:
    maps = random_map(2, 3, *size).contiguous(memory_format=MEMORY[memory])
    found = pool_pyramid(maps.to(device), levels, pooling=pooling)
    assert_pooled(found, reference.pool_maps(maps.numpy(), levels, pooling), pooling)


level_lists = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 17), st.integers(1, 17), level_lists, st.sampled_from(POOLINGS), st.integers(0, 99))
def test_any_size_and_levels_agree_with_plain_loops(
    height: int, width: int, levels: list[int], pooling: str, seed: int
) -> None:
    maps = random_map(1, 2, height, width, seed=seed)
    assert_pooled(
        pool_pyramid(maps, levels, pooling=pooling), reference.pool_maps(maps.numpy(), levels, pooling), pooling
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("levels", [*LEVEL_SETS, (12, 6, 4, 3, 2, 1)], ids=str)
@pytest.mark.parametrize("size", [(7, 7), (14, 19), (3, 40)], ids=str)
def test_max_is_adaptive_max_pooling_of_every_level(
    size: tuple[int, int], levels: tuple[int, ...], device: str
) -> None:
    """Levels taken from finer ones, too, are bit for bit what pooling the map again would give."""
    maps = random_map(2, 16, *size).to(device)
    expected = [F.adaptive_max_pool2d(maps, level).permute(0, 2, 3, 1).flatten(1) for level in levels]
    assert torch.equal(pool_pyramid(maps, levels), torch.cat(expected, 1))


def test_maxima_of_negative_maps_are_negative() -> None:
    maps = -random_map(2, 4, 7, 9).abs() - 0.5
    for levels in LEVEL_SETS:
        assert pool_pyramid(maps, levels).max() <= -0.5
        assert pool_rois(maps[0], random_rois(20, 7, 9), levels).max() <= -0.5


def test_a_row_holds_levels_in_the_order_given_then_bins_row_by_row_then_channels() -> None:
    # Channel c of cell (y, x) is 100c + 10y + x: every place in the result names where it came from.
    y, x = torch.meshgrid(torch.arange(2.0), torch.arange(2.0), indexing="ij")
    one = torch.stack([10 * y + x, 100 + 10 * y + x])
    whole, quarters = [[11, 111]], [[0, 100], [1, 101], [10, 110], [11, 111]]
    for levels, bins in (((1, 2), whole + quarters), ((2, 1), quarters + whole)):
        assert pool_pyramid(one[None], levels).reshape(5, 2).tolist() == bins
        assert pool_rois(one, torch.tensor([[0, 0, 1, 1]]), levels).reshape(5, 2).tolist() == bins


def test_a_level_given_twice_is_there_twice() -> None:
    maps = random_map(1, 3, 5, 5)
    assert torch.equal(pool_pyramid(maps, (2, 2)), pool_pyramid(maps, (2,)).repeat(1, 2))


# Windows.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("levels", LEVEL_SETS, ids=str)
def test_rois_agree_with_plain_loops(levels: tuple[int, ...], pooling: str, memory: str, device: str) -> None:
    maps = random_map(1, 2, 11, 14).contiguous(memory_format=MEMORY[memory])
    # The whole map, one cell, one row, one column, and what chance gives.
    special = torch.tensor([[0, 0, 13, 10], [13, 10, 13, 10], [2, 5, 12, 5], [4, 0, 4, 10]])
    rois = torch.cat([special, random_rois(8, 11, 14)])
    found = pool_rois(maps[0].to(device), rois.to(device), levels, pooling=pooling)
    assert_pooled(found, reference.pool_windows(maps[0].numpy(), rois.tolist(), levels, pooling), pooling)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 20), st.integers(1, 20), level_lists, st.sampled_from(POOLINGS))
def test_any_rois_agree_with_plain_loops(
    data: st.DataObject, height: int, width: int, levels: list[int], pooling: str
) -> None:
    def ends(length: int) -> tuple[int, int]:
        first = data.draw(st.integers(0, length - 1))
        return first, data.draw(st.integers(first, length - 1))

    rois = []
    for _ in range(data.draw(st.integers(1, 3))):
        (x1, x2), (y1, y2) = ends(width), ends(height)
        rois.append([x1, y1, x2, y2])
    one = random_map(2, height, width, seed=height * 100 + width)
    found = pool_rois(one, torch.tensor(rois), levels, pooling=pooling)
    assert_pooled(found, reference.pool_windows(one.numpy(), rois, levels, pooling), pooling)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_roi_is_pooled_as_a_map_of_its_own(pooling: str) -> None:
    one = random_map(4, 9, 12)
    found = pool_rois(one, torch.tensor([[3, 2, 9, 7]]), (6, 3, 2, 1), pooling=pooling)
    torch.testing.assert_close(found, pool_pyramid(one[None, :, 2:8, 3:10], (6, 3, 2, 1), pooling=pooling))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_no_rois_give_no_rows(pooling: str) -> None:
    none = torch.empty(0, 4, dtype=torch.int64)
    assert pool_rois(random_map(3, 5, 5), none, (2, 1), pooling=pooling).shape == (0, 15)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_rois_of_other_integer_types(dtype: torch.dtype) -> None:
    """Narrow integers must not overflow inside."""
    one, rois = random_map(2, 200, 210), torch.tensor([[0, 0, 209, 199], [100, 150, 200, 190]])
    assert torch.equal(pool_rois(one, rois.to(dtype), (7, 3)), pool_rois(one, rois, (7, 3)))


@pytest.mark.parametrize("device", DEVICES)
def test_max_of_rois_agrees_with_roi_pool(device: str) -> None:
    """torchvision computes the edges of bins in float32; where that rounds over an edge, plain loops decide."""
    one = random_map(3, 43, 64)
    rois = random_rois(300, 43, 64)
    boxes = torch.cat([torch.zeros(len(rois), 1), rois.float()], 1)
    for level in (1, 2, 3, 4, 5, 6, 7):
        theirs = roi_pool(one[None], boxes, level).permute(0, 2, 3, 1).flatten(1)
        ours = pool_rois(one.to(device), rois.to(device), (level,)).cpu()
        differ = (ours != theirs).any(1).nonzero().squeeze(1).tolist()
        assert len(differ) < len(rois) / 4
        if differ:
            expected = reference.pool_windows(one.numpy(), rois[differ].tolist(), (level,), "max")
            assert_pooled(ours[differ], expected, "max")


# Types of number.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.float64], ids=str)
def test_the_result_has_the_type_of_the_map(dtype: torch.dtype, pooling: str, device: str) -> None:
    maps = random_map(2, 5, 7, 9, dtype=dtype).to(device)
    rois = torch.tensor([[0, 0, 8, 6], [1, 2, 5, 4]], device=device)
    # Half precision has 8 or 11 bits; the exact mean of the rounded cells is what is rounded to it.
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    cells = maps.double().cpu().numpy()
    whole, windows = (
        pool_pyramid(maps, (3, 2, 1), pooling=pooling),
        pool_rois(maps[1], rois, (3, 2, 1), pooling=pooling),
    )
    assert whole.dtype == windows.dtype == dtype
    assert_pooled(whole, reference.pool_maps(cells, (3, 2, 1), pooling), pooling, tolerance)
    assert_pooled(windows, reference.pool_windows(cells[1], rois.tolist(), (3, 2, 1), pooling), pooling, tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_gem_of_large_and_of_no_values_stays_finite(dtype: torch.dtype, device: str) -> None:
    # 60000 cubed is far beyond half precision, and so is the cube of the floor; in float16 the floor is subnormal.
    for value, expected in ((60000.0, 60000.0), (0.0, 1e-6), (-5.0, 1e-6)):
        maps = torch.full((1, 2, 6, 6), value, dtype=dtype, device=device)
        for rows in (
            pool_pyramid(maps, (3, 1), pooling="gem"),
            pool_rois(maps[0], torch.tensor([[1, 1, 4, 5]]), (3, 1), pooling="gem"),
        ):
            torch.testing.assert_close(rows.double(), torch.full_like(rows, expected).double(), rtol=1e-2, atol=1e-7)


def test_gem_lies_between_mean_and_maximum_and_its_exponent_counts() -> None:
    maps = random_map(1, 4, 6, 6).abs() + 0.1
    rows = {p: pool_pyramid(maps, (2, 1), pooling="gem", gem_p=p) for p in (1.0, 3.0, 50.0)}
    torch.testing.assert_close(rows[1.0], pool_pyramid(maps, (2, 1), pooling="avg"))
    torch.testing.assert_close(rows[50.0], pool_pyramid(maps, (2, 1)), rtol=0.1, atol=0)
    assert (rows[1.0] < rows[3.0]).all() and (rows[3.0] < rows[50.0]).all()
    expected = reference.pool_maps(maps.numpy(), (2, 1), "gem", 2.5)
    assert_pooled(pool_pyramid(maps, (2, 1), pooling="gem", gem_p=2.5), expected, "gem")
    whole = torch.tensor([[0, 0, 5, 5]])
    assert_pooled(pool_rois(maps[0], whole, (2, 1), pooling="gem", gem_p=2.5), expected, "gem")


@pytest.mark.parametrize("gem_p", [3.0, 10.0, 40.0])
def test_gem_keeps_weak_bins_beside_strong_ones(gem_p: float) -> None:
    """After a ReLU many bins are all zeros; the powers of the other cells must not leak into them by rounding."""
    one = random_map(2, 30, 40).relu() * 1000 + 1
    one[:, 18:26, 20:28] = 0.25
    weak = torch.tensor([[20, 18, 27, 25]])
    for rows in (pool_rois(one, weak, (2, 1), pooling="gem", gem_p=gem_p), pool_rois(one, weak, (2, 1), pooling="avg")):
        torch.testing.assert_close(rows, torch.full((1, 10), 0.25))
    whole = pool_pyramid(one[None], (1,), pooling="gem", gem_p=gem_p)
    assert_pooled(whole, reference.pool_maps(one[None].numpy(), (1,), "gem", gem_p), "gem")


# Gradients.


def distinct_map(*shape: int) -> torch.Tensor:
    """Positive values further apart than gradcheck's step: the place of a maximum is certain."""
    count = int(np.prod(shape))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    return (0.5 + order.double() / count).reshape(shape).requires_grad_()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients(pooling: str, device: str) -> None:
    maps = distinct_map(1, 2, 4, 3).to(device)
    rois = torch.tensor([[0, 0, 2, 3], [1, 1, 2, 1]], device=device)
    assert torch.autograd.gradcheck(lambda m: pool_pyramid(m, (3, 2, 1), pooling=pooling), maps)
    assert torch.autograd.gradcheck(lambda m: pool_rois(m[0], rois, (3, 2, 1), pooling=pooling), maps)


# The layer.


def test_layer_is_the_functions() -> None:
    layer = SpatialPyramidPool((3, 1), pooling="gem", gem_p=2.0)
    maps = random_map(3, 4, 8, 9)
    rois = [random_rois(2, 8, 9, 1), torch.empty(0, 4, dtype=torch.int64), random_rois(5, 8, 9, 2)]
    assert layer.bins == 10
    assert torch.equal(layer(maps), pool_pyramid(maps, (3, 1), pooling="gem", gem_p=2.0))
    expected = [pool_rois(m, r, (3, 1), pooling="gem", gem_p=2.0) for m, r in zip(maps, rois, strict=True)]
    assert torch.equal(layer(maps, rois), torch.cat(expected))
    assert SpatialPyramidPool().bins == 50
    assert repr(layer) == "SpatialPyramidPool(levels=(3, 1), pooling='gem')"
    with pytest.raises(UsageError, match="one tensor per map, expected 3, found 2"):
        layer(maps, rois[:2])


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_a_network_with_the_layer_learns(device: str, windows: bool) -> None:
    """One step down the gradient lowers the loss, and reaches the convolution below the pyramid."""
    torch.manual_seed(0)
    trunk = nn.Conv2d(3, 4, 3).to(device)
    pool = SpatialPyramidPool((2, 1))
    head = nn.Linear(pool.bins * 4, 2).to(device)
    rois = [random_rois(2, 10, 12, 3), random_rois(1, 10, 12, 4)] if windows else None
    images = random_map(2, 3, 12, 14).to(device)
    target = torch.tensor([0, 1, 0] if windows else [0, 1], device=device)
    optimizer = torch.optim.SGD([*trunk.parameters(), *head.parameters()], lr=0.01)

    def loss() -> torch.Tensor:
        return F.cross_entropy(head(pool(trunk(images), rois)), target)

    before = loss()
    before.backward()
    assert trunk.weight.grad is not None and trunk.weight.grad.abs().sum() > 0
    optimizer.step()
    assert loss() < before


# Bad input.


@pytest.mark.parametrize("levels", [(), (0,), (2, -1), (65,), (1.5,), ("2",)], ids=str)
def test_bad_levels(levels: tuple[int, ...]) -> None:
    for attempt in (
        lambda: pool_pyramid(random_map(1, 2, 4, 4), levels),
        lambda: pool_rois(random_map(2, 4, 4), torch.tensor([[0, 0, 1, 1]]), levels),
        lambda: SpatialPyramidPool(levels),
    ):
        with pytest.raises(UsageError, match="levels must be whole numbers from 1 to 64") as caught:
            attempt()
        assert f"found {levels}" in str(caught.value)


def test_unknown_pooling_names_the_known() -> None:
    for attempt in (
        lambda: pool_pyramid(random_map(1, 2, 4, 4), (1,), pooling="mx"),
        lambda: pool_rois(random_map(2, 4, 4), torch.tensor([[0, 0, 1, 1]]), (1,), pooling="mx"),
        lambda: SpatialPyramidPool((1,), pooling="mx"),
    ):
        with pytest.raises(UsageError, match="unknown pooling 'mx': expected one of max, avg, gem"):
            attempt()


@pytest.mark.parametrize("shape", [(2, 4, 4), (1, 2, 0, 4), (1, 0, 3, 4)], ids=str)
def test_bad_maps(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"must be \[N, C, H, W\] and not empty, found"):
        pool_pyramid(torch.zeros(shape), (1,))
    with pytest.raises(UsageError, match=r"must be \[C, H, W\] and not empty, found"):
        pool_rois(torch.zeros((1, *shape) if len(shape) == 3 else shape[1:]), torch.tensor([[0, 0, 0, 0]]), (1,))


@pytest.mark.parametrize(
    "roi",
    [[3, 0, 2, 1], [0, 2, 1, 1], [-1, 0, 1, 1], [0, -2, 1, 1], [0, 0, 6, 1], [0, 0, 1, 4]],
    ids=["inverted x", "inverted y", "left of", "above", "right of", "below"],
)
def test_rois_must_lie_on_the_map(roi: list[int]) -> None:
    with pytest.raises(UsageError) as caught:
        pool_rois(random_map(2, 4, 6), torch.tensor([[0, 0, 5, 3], roi]), (1,))
    assert str(caught.value) == f"roi 1: expected x1 <= x2 < 6 and y1 <= y2 < 4, found {roi}"


@pytest.mark.parametrize("rois", [torch.zeros(2, 4), torch.zeros(4, dtype=torch.int64), torch.zeros(1, 5).long()])
def test_rois_must_be_whole_numbers_in_fours(rois: torch.Tensor) -> None:
    with pytest.raises(UsageError, match=r"rois must be whole numbers \[K, 4\], found torch\.(float32|int64)"):
        pool_rois(random_map(2, 4, 6), rois, (1,))


@pytest.mark.parametrize("dtype", HALVES)
def test_means_of_half_precision_are_rounded_once(dtype: torch.dtype) -> None:
    maps = torch.rand((1, 8, 61, 67), generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = pool_pyramid(maps.double(), (3, 1), pooling="avg").float().to(dtype)
    found = pool_pyramid(maps, (3, 1), pooling="avg")
    assert float((found.float() - expected.float()).abs().max()) <= torch.finfo(dtype).eps
    assert (found == expected).float().mean() > 0.95
