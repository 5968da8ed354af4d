"""The GPU kernels: in Triton's interpreter against plain loops, and on a GPU if there is one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sppfeat import SppFeatWarning, pool_pyramid, pool_rois
from sppfeat.pyramid import pooling as pyramid

triton = pytest.importorskip("triton")

# The interpreter has to be chosen before the kernels are defined. It takes a while for each value: few of them, and
# blocks that are smaller than channels and cells, so that every loop and mask is exercised.
INTERPRETED = """
import sys
import numpy as np
import torch
import reference
from sppfeat.pyramid import triton_kernels as pyramid_triton

pyramid_triton._CHANNELS, pyramid_triton._CELLS = 2, 4
random = np.random.default_rng(0)
for dtype, levels, size, shared in (
    (torch.float32, (6, 3, 2, 1), (5, 7), True),
    (torch.float32, (6, 3, 2, 1), (3, 2), False),
    (torch.bfloat16, (4, 3, 2, 1), (7, 4), True),
    (torch.float16, (1, 4, 4, 2), (4, 5), False),
):
    pyramid_triton._ENOUGH_PROGRAMS = 1 << 30 if shared else 0
    maps = torch.from_numpy(random.standard_normal((2, 3, *size), dtype=np.float32)).to(dtype)
    x, y = np.sort(random.integers(0, size[1], (2, 2))), np.sort(random.integers(0, size[0], (2, 2)))
    windows = [[1, 0, 0, size[1] - 1, size[0] - 1], *([0, x[k, 0], y[k, 0], x[k, 1], y[k, 1]] for k in range(2))]
    expected = [
        reference.pool_windows(maps[n].float().numpy(), [window], levels, "max")[0] for n, *window in windows
    ]
    cells = maps.permute(0, 2, 3, 1).contiguous()
    found = pyramid_triton.max_of_windows(cells, torch.tensor(windows, dtype=torch.int32), levels)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.float().numpy(), np.stack(expected))
nan = torch.zeros(1, 3, 3, 1)
nan[0, 1, 1, 0] = float("nan")
found = pyramid_triton.max_of_windows(nan, torch.tensor([[0, 0, 0, 2, 2]], dtype=torch.int32), (3, 1))
assert found.isnan().nonzero()[:, 1].tolist() == [4, 9], found
assert pyramid_triton.max_of_windows(nan, torch.zeros((0, 5), dtype=torch.int32), (3, 1)).shape == (0, 10)
print("equal")
"""

# Few different values, so that most maxima are in several cells; gradients whose sums are exact in float32, in any
# order, but not in half precisions.
INTERPRETED_GRADIENTS = """
import numpy as np
import torch
import reference
from sppfeat import pool_pyramid, pool_rois
from sppfeat.pyramid import gradients, pooling
from sppfeat.pyramid import triton_kernels as pyramid_triton

def first_cells(one, window, levels):
    # Cells of maxima [bins, C] in a window of a map [C, H, W].
    x1, y1, x2, y2 = window
    found = []
    for level in levels:
        for top, bottom in reference.bin_edges(y2 - y1 + 1, level):
            for left, right in reference.bin_edges(x2 - x1 + 1, level):
                places = [(y, x) for y in range(y1 + top, y1 + bottom) for x in range(x1 + left, x1 + right)]
                values = [[float(channel[place]) for place in places] for channel in one]
                chosen = [places[of.index(max(of))] for of in values]
                found.append([y * one.shape[2] + x for y, x in chosen])
    return found

def bits(values):
    return values.contiguous().view(torch.int32 if values.dtype == torch.float32 else torch.int16)

pyramid_triton._CHANNELS, pyramid_triton._CELLS = 2, 4
random = np.random.default_rng(0)
zeros = [-1.0, -0.0, 0.0]
for dtype, levels, size, shared, values, part in (
    (torch.float32, (6, 3, 2, 1), (5, 7), True, [-2.0, 1.0, 3.0], 1 << 24),
    (torch.float32, (4, 2, 1), (6, 5), False, [-float("inf"), -float("inf"), -float("inf"), -1.0], 1),
    (torch.bfloat16, (3, 2), (7, 4), True, zeros, 1),
    (torch.float16, (1, 4, 4, 2), (4, 5), False, [1.0, 2.0], 1 << 24),
    (torch.float32, (2, 1), (3, 4), True, [0.0], 1 << 24),
    (torch.bfloat16, (3, 1), (4, 3), False, [-float("inf")], 1 << 24),
):
    pyramid_triton._ENOUGH_PROGRAMS, pyramid_triton._WIDE_VALUES = 1 << 30 if shared else 0, part
    maps = torch.from_numpy(random.choice(values, (2, 3, *size)).astype(np.float32)).to(dtype)
    x, y = np.sort(random.integers(0, size[1], (2, 2))), np.sort(random.integers(0, size[0], (2, 2)))
    windows = [[1, 0, 0, size[1] - 1, size[0] - 1], *([0, x[k, 0], y[k, 0], x[k, 1], y[k, 1]] for k in range(2))]
    windows.append(windows[0])
    of_windows = torch.tensor(windows, dtype=torch.int32)
    cells = maps.permute(0, 2, 3, 1).contiguous()
    expected = pyramid_triton.max_of_windows(cells, of_windows, levels)
    leaf = cells.clone().requires_grad_()
    rows = pyramid_triton.max_of_windows(leaf, of_windows, levels)
    assert torch.equal(bits(rows.detach()), bits(expected))
    arguments, _ = rows.grad_fn.saved_tensors
    assert arguments.dtype == torch.int32
    assert arguments.tolist() == [first_cells(maps[n].float().numpy(), window, levels) for n, *window in windows]
    of_rows = torch.from_numpy(random.choice([1.0, 3.0, 5.0, 256.0], tuple(rows.shape))).to(dtype)
    (found,) = torch.autograd.grad(rows, leaf, of_rows)
    loops = np.zeros(maps.shape)
    steps = torch.zeros(cells.shape)
    for n in range(2):
        chosen = [k for k in range(4) if windows[k][0] == n]
        rois = torch.tensor([windows[k][1:] for k in chosen])
        of_map = of_rows[chosen].float()
        loops[n] = reference.gradient_of_windows(maps[n].float().numpy(), rois.tolist(), levels, "max", of_map.numpy())
        one = cells[n].float().requires_grad_()
        (steps[n],) = torch.autograd.grad(gradients.max_of_windows(one, rois, levels), one, of_map)
    assert found.dtype == dtype and found.shape == cells.shape
    assert torch.equal(found, torch.from_numpy(loops).permute(0, 2, 3, 1).to(dtype))
    assert torch.equal(found, steps.to(dtype))

# The first cell, 8, is in the fifth bin of level 6, and 13 in the first.
two = torch.zeros(1, 12, 12, 1)
two[0, 1, 1] = two[0, 0, 8] = 1
window = torch.tensor([[0, 0, 0, 11, 11]], dtype=torch.int32)
_, arguments = pyramid_triton._launch(two, window, (1, 6), with_arguments=True)
assert arguments.flatten().tolist()[:6] == [8, 13, 2, 4, 6, 8]

nan = torch.zeros(1, 3, 4, 1)
nan[0, 2, 0, 0] = nan[0, 1, 2, 0] = float("nan")
nan[0, 0, 0, 0] = float("inf")
window = torch.tensor([[0, 0, 0, 3, 2]], dtype=torch.int32)
rows, arguments = pyramid_triton._launch(nan, window, (2, 1), with_arguments=True)
assert rows.isnan().tolist() == [[False, True, True, True, True]] and arguments.flatten().tolist() == [0, 6, 8, 6, 6]

# The layers above, as on a GPU.
rois = torch.tensor([[0, 0, 4, 3], [1, 1, 3, 3], [4, 3, 4, 3]])
one = torch.from_numpy(random.choice([-1.0, 0.0, 2.0], (3, 4, 5)).astype(np.float32))

def loss(feature_map):
    rows = pool_rois(feature_map, rois, (2, 1))
    return (rows * torch.arange(rows.numel()).view(rows.shape)).sum()

def gradient(feature_map, create_graph=False):
    leaf = feature_map.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf).square(), leaf, create_graph=create_graph)
    return found

for dtype in (torch.float32, torch.bfloat16):
    feature_map = one.to(dtype)
    pooling._suits_triton = lambda *arguments: False
    expected, values = gradient(feature_map), pool_rois(feature_map, rois, (2, 1))
    pooling._suits_triton = lambda *arguments: True
    found = gradient(feature_map)
    assert found.dtype == dtype and torch.equal(found, expected)
    assert torch.equal(pool_rois(feature_map.clone().requires_grad_(), rois, (2, 1)), values)
torch.testing.assert_close(torch.func.grad(lambda feature_map: loss(feature_map).square())(one), gradient(one))
try:
    gradient(one, create_graph=True).sum().backward()
    raise SystemExit("a second derivative")
except RuntimeError as error:
    assert str(error) == "pool_rois with maxima is differentiable only once on a GPU", error
leaf = one.clone().requires_grad_()
none = pool_rois(leaf, rois[:0], (2, 1))
assert none.shape == (0, 15) and not torch.autograd.grad(none.sum(), leaf)[0].any()
leaf = one[None].clone().requires_grad_()
(first,) = torch.autograd.grad(pool_pyramid(leaf, (2, 1)).square().sum(), leaf, create_graph=True)
first.square().sum().backward()
assert leaf.grad.any() and not pooling._triton_failed
print("equal")
"""


@pytest.mark.parametrize("script", [INTERPRETED, INTERPRETED_GRADIENTS], ids=["values", "gradients"])
def test_interpreted_kernels_agree_with_plain_loops(script: str) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=250, env=env)
    assert done.returncode == 0 and done.stdout == "equal\n", done.stderr


@pytest.mark.filterwarnings("ignore::UserWarning:triton.*")  # about its own defaults
@pytest.mark.parametrize("capability", [75, 90])
@pytest.mark.parametrize("arguments", [False, True])
def test_kernels_compile_without_a_gpu(arguments: bool, capability: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sppfeat.pyramid.triton_kernels import _max_kernel

    pointers = {"cells": "*bf16", "rows": "*bf16"} | dict.fromkeys(
        ("windows", "arguments", "coarser", "finished"), "*i32"
    )
    numbers = dict.fromkeys(("height", "width", "channels", "bins", "start", "coarser_levels"), "i32")
    fixed = {"LEVEL": 6, "SHARED": True, "ARGUMENTS": arguments, "CELLS": 16, "CHANNELS": 64}
    signature = {name: (pointers | numbers).get(name, "constexpr") for name in _max_kernel.arg_names}
    kernel = triton.compile(
        ASTSource(fn=_max_kernel, signature=signature, constexprs=fixed), target=GPUTarget("cuda", capability, 32)
    )
    assert len(kernel.asm["cubin"]) > 1000


@pytest.mark.parametrize("windows", [False, True])
def test_a_kernel_that_fails_warns_once(monkeypatch: pytest.MonkeyPatch, windows: bool) -> None:
    """As on a GPU whose driver is too old for the compiler; the choice by device is faked."""
    calls = []

    def fail(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        raise RuntimeError("PTX was compiled with an unsupported toolchain\nmore")

    module = type(sys)("sppfeat.pyramid.triton_kernels")
    module.max_of_windows = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sppfeat.pyramid.triton_kernels", module)
    monkeypatch.setattr(pyramid, "_triton_failed", False)
    monkeypatch.setattr(pyramid, "_suits_triton", lambda *arguments: not pyramid._triton_failed)
    maps = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 7, 9), dtype=np.float32))
    rois = torch.tensor([[1, 2, 5, 6]])

    def pool() -> torch.Tensor:
        return pool_rois(maps[0], rois, (3, 1)) if windows else pool_pyramid(maps, (3, 1))

    with pytest.warns(
        SppFeatWarning, match="Triton kernels do not work here .PTX was .* toolchain.; falling back to PyTorch"
    ):
        first = pool()
    assert torch.equal(pool(), first) and len(calls) == 1  # the second time, without a warning
    monkeypatch.setattr(pyramid, "_suits_triton", lambda *arguments: False)
    assert torch.equal(pool(), first)


def test_kernels_launch_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is faked: what counts is that the launch happens inside the guard of these tensors."""
    inside: list[torch.Tensor] = []

    @contextlib.contextmanager
    def guard(tensor: torch.Tensor) -> Iterator[None]:
        inside.append(tensor)
        yield
        inside.clear()

    def launch(cells: torch.Tensor, *rest: object) -> torch.Tensor:
        assert inside and inside[0] is cells
        return torch.ones(1, 30)

    module = type(sys)("sppfeat.pyramid.triton_kernels")
    module.max_of_windows = launch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sppfeat.pyramid.triton_kernels", module)
    monkeypatch.setattr(torch.cuda, "device_of", guard)
    monkeypatch.setattr(pyramid, "_triton_failed", False)
    monkeypatch.setattr(pyramid, "_suits_triton", lambda *arguments: True)
    assert bool((pool_pyramid(torch.zeros(1, 3, 7, 9), (3, 1)) == 1).all())


def test_out_of_memory_is_not_a_failure_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(sys)("sppfeat.pyramid.triton_kernels")

    def fail(*arguments: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    module.max_of_windows = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sppfeat.pyramid.triton_kernels", module)
    monkeypatch.setattr(pyramid, "_suits_triton", lambda *arguments: True)
    with pytest.raises(torch.OutOfMemoryError):
        pool_pyramid(torch.zeros(1, 3, 7, 9), (3, 1))
    assert not pyramid._triton_failed


def test_what_is_compiled_with_a_gradient_stays_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are faked: a value that the torch form does not give."""
    module = type(sys)("sppfeat.pyramid.triton_kernels")
    module.max_of_windows = lambda cells, windows, levels: cells.new_full((1, 30), 7)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sppfeat.pyramid.triton_kernels", module)
    monkeypatch.setattr(pyramid, "_suits_triton", lambda *arguments: True)
    one = torch.zeros(3, 7, 9, requires_grad=True)
    rois = torch.tensor([[1, 2, 5, 6]])
    assert bool((pool_rois(one, rois, (3, 1)) == 7).all())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert bool((pool_rois(one, rois, (3, 1)) == 0).all())
    assert bool((pool_rois(one.detach(), rois, (3, 1)) == 7).all())


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 320, 7, 10), (32, 320, 7, 10), (2, 256, 43, 64), (3, 33, 5, 4)])
def test_on_the_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(shape, generator=generator).to(dtype)
    random = np.random.default_rng(0)
    x, y = np.sort(random.integers(0, shape[3], (900, 2))), np.sort(random.integers(0, shape[2], (900, 2)))
    rois = torch.from_numpy(np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1))
    for levels in ((6, 3, 2, 1), (4, 3, 2, 1), (5,)):
        assert torch.equal(pool_pyramid(maps.cuda(), levels).cpu(), pool_pyramid(maps, levels))
        assert torch.equal(pool_rois(maps[0].cuda(), rois, levels).cpu(), pool_rois(maps[0], rois, levels))
    assert not pyramid._triton_failed


@needs_gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(320, 7, 10), (256, 43, 64), (33, 5, 4)])
def test_gradients_on_the_gpu(shape: tuple[int, ...], dtype: torch.dtype, deterministic: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randint(-2, 3, shape, generator=generator).to(dtype)
    random = np.random.default_rng(0)
    for count in (3, 900):  # with few windows, rows of bins have programs of their own
        x, y = np.sort(random.integers(0, shape[2], (count, 2))), np.sort(random.integers(0, shape[1], (count, 2)))
        rois = torch.from_numpy(np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1))
        for levels in ((6, 3, 2, 1), (4, 3, 2, 1), (5,)):
            found = []
            for device in ("cpu", "cuda"):
                leaf = one.to(device, copy=True).requires_grad_()
                rows = pool_rois(leaf, rois, levels)
                # Whole numbers: sums are exact in any order.
                of_rows = torch.arange(rows.numel()).view(rows.shape) % 7
                before = torch.are_deterministic_algorithms_enabled()
                torch.use_deterministic_algorithms(deterministic)
                try:
                    rows.backward(of_rows.to(rows))
                finally:
                    torch.use_deterministic_algorithms(before)
                assert leaf.grad is not None
                found.append((rows.detach().cpu(), leaf.grad.cpu()))
            assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    leaf = one.cuda().requires_grad_()
    rows = pool_rois(leaf, torch.tensor([[0, 0, 3, 4]]), (2, 1))
    (first,) = torch.autograd.grad(rows.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="pool_rois with maxima is differentiable only once on a GPU"):
        first.sum().backward()
    assert not pyramid._triton_failed
