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


def test_interpreted_kernels_agree_with_plain_loops() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, timeout=250, env=env)
    assert done.returncode == 0 and done.stdout == "equal\n", done.stderr


@pytest.mark.filterwarnings("ignore::UserWarning:triton.*")  # about its own defaults
@pytest.mark.parametrize("capability", [75, 90])
def test_kernels_compile_without_a_gpu(capability: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sppfeat.pyramid.triton_kernels import _max_kernel

    pointers = {"cells": "*bf16", "rows": "*bf16"} | dict.fromkeys(("windows", "coarser", "finished"), "*i32")
    numbers = dict.fromkeys(("height", "width", "channels", "bins", "start", "coarser_levels"), "i32")
    fixed = {"LEVEL": 6, "SHARED": True, "CELLS": 16, "CHANNELS": 64}
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
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
