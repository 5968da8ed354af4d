"""Resizing on a GPU: the kernel in Triton's interpreter, bit by bit, and on a GPU if there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from sppfeat.images.resampling import resample

triton = pytest.importorskip("triton")

FILTERS = ("bilinear", "bicubic", "lanczos")

# The interpreter has to be chosen before the kernel is defined. It takes a while for each tap: few of them, and blocks
# that are smaller than most of these images, so that every loop and mask is exercised.
INTERPRETED = """
import itertools
import numpy as np
import torch
from PIL import Image
from sppfeat.engines import card_resize
from sppfeat.images.resampling import resample

card_resize._ROWS, card_resize._VALUES = 4, 16
scale = (1 / (255 * torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64))).float()
shift = -(torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225]))
random = np.random.default_rng(0)
dtypes = itertools.cycle((torch.float32, torch.bfloat16, torch.float16))
extremes = itertools.cycle((False, True))
for size, to, part in (
    ((9, 12), (7, 5), None),  # fewer rows, and fewer columns; each: height and width
    ((4, 3), (5, 7), None),
    ((6, 11), (9, 4), None),
    ((12, 5), (2, 8), None),
    ((9, 8), (9, 5), None),  # rows alone are resized
    ((9, 8), (5, 8), None),  # columns alone
    ((6, 7), (6, 7), None),
    ((1, 1), (3, 4), None),
    ((13, 3), (1, 1), None),
    ((10, 13), (8, 11), (1, 2, 5, 6)),  # top, left, rows, columns
    ((6, 7), (6, 9), (0, 2, 6, 6)),
    ((5, 5), (9, 9), (4, 4, 5, 5)),
):
    for interpolation in ("bilinear", "bicubic", "lanczos"):
        dtype, extreme = next(dtypes), next(extremes)
        pixels = random.integers(0, 2, (*size, 3)) * 255 if extreme else random.integers(0, 256, (*size, 3))
        pixels = pixels.astype(np.uint8)
        top, left, rows, columns = part or (0, 0, *to)
        resized = resample(Image.fromarray(pixels), to[::-1], interpolation)[top : top + rows, left : left + columns]
        expected = torch.from_numpy(resized.copy())[None].permute(0, 3, 1, 2).float()
        expected = expected.mul_(scale.view(3, 1, 1)).add_(shift.view(3, 1, 1)).to(dtype)
        table = torch.arange(256)[:, None].float().mul(scale).add_(shift).to(dtype)
        batch = torch.full((3, 3, rows, columns), 77, dtype=dtype).contiguous(memory_format=torch.channels_last)
        card_resize.resize_into(batch[1], torch.from_numpy(pixels), to[::-1], interpolation, table, (top, left))
        assert torch.equal(batch[1], expected[0]), (size, to, part, interpolation, dtype)
        assert bool((batch[::2] == 77).all())
print("equal")
"""


def test_the_interpreted_kernel_gives_the_same_bits() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, timeout=250, env=env)
    assert done.returncode == 0 and done.stdout == "equal\n", done.stderr


# `warmup` compiles as a launch does, for the GPU that the driver names.
COMPILED_ONCE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

driver.set_active(Driver())
from sppfeat.engines.card_resize import _resize_kernel

pixels, into = torch.zeros(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.bfloat16)
numbers = torch.zeros(64, dtype=torch.int32)
for sizes, at in (([16, 16, 32, 32, 0, 0, 32, 96, 4, 4], 0), ([17, 1, 3, 33, 1, 2, 3, 9, 1, 5], 3), ([1] * 10, 1)):
    fixed = dict(ROWS=8, VALUES=64, num_warps=1, grid=(1, 1))
    _resize_kernel.warmup(pixels[at:], into[at:], numbers, numbers, into, *sizes, **fixed)
compiled = _resize_kernel.device_caches[0][0]
print(len(compiled))
"""


def test_the_kernel_is_compiled_once_for_all_sizes() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILED_ONCE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "1\n", done.stderr


@pytest.mark.filterwarnings("ignore::UserWarning:triton.*")  # about its own defaults
@pytest.mark.parametrize("into", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("capability", [75, 80, 90])
def test_the_kernel_compiles_without_a_gpu(capability: int, into: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sppfeat.engines.card_resize import _ROWS, _SIZES, _VALUES, _WARPS, _resize_kernel

    pointers = {"pixels": "*u8", "into": f"*{into}", "table": f"*{into}", "across": "*i32", "down": "*i32"}
    signature = {
        name: (pointers | dict.fromkeys(_SIZES, "i32")).get(name, "constexpr") for name in _resize_kernel.arg_names
    }
    kernel = triton.compile(
        ASTSource(fn=_resize_kernel, signature=signature, constexprs={"ROWS": _ROWS, "VALUES": _VALUES}),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": _WARPS},
    )
    assert len(kernel.asm["cubin"]) > 1000
    assert kernel.metadata.shared == 0  # threads exchange nothing


def test_what_does_not_fit_is_refused() -> None:
    from sppfeat.engines.card_resize import resize_into

    pixels, into, table = torch.zeros(6, 5, 3, dtype=torch.uint8), torch.zeros(4, 4, 3), torch.zeros(256, 3)
    image = into.permute(2, 0, 1)
    for wrong, message in (
        (torch.zeros(3, 4, 4), "channels last, found .3, 4, 4. with strides .16, 4, 1."),
        (torch.zeros(4, 4, 4).permute(2, 0, 1), "expected an image .3, h, w., channels last, found .4, 4, 4."),
    ):
        with pytest.raises(ValueError, match=message):
            resize_into(wrong, pixels, (4, 4), "bicubic", table)
    for other in (pixels.float(), pixels[:, ::2], torch.zeros(6, 5, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="expected pixels .* of torch.uint8, contiguous, found"):
            resize_into(image, other, (4, 4), "bicubic", table)
    for other in (table.half(), table[:255], torch.zeros(3, 256).T):
        with pytest.raises(ValueError, match="expected a table .256, 3. of torch.float32, contiguous, found"):
            resize_into(image, pixels, (4, 4), "bicubic", other)
    for corner in ((-1, 0), (0, -1), (1, 0), (0, 2)):
        with pytest.raises(ValueError, match="expected a part of 5 x 4 pixels, found 4 x 4 from row"):
            resize_into(image, pixels, (5, 4), "bicubic", table, corner)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size, to", [((375, 500), (224, 299)), ((60, 41), (300, 224)), ((1200, 1600), (224, 1600))])
def test_on_the_gpu(size: tuple[int, int], to: tuple[int, int], dtype: torch.dtype) -> None:
    from sppfeat.engines.card_resize import resize_into

    random = np.random.default_rng(0)
    table = torch.arange(256.0)[:, None].mul(torch.tensor([0.013, 0.017, 0.019])).sub_(1.8).to(dtype)
    rows, columns = to[0] - 9, to[1] - 14
    for interpolation in FILTERS:
        pixels = random.integers(0, 256, (*size, 3), np.uint8)
        resized = torch.from_numpy(resample(Image.fromarray(pixels), to[::-1], interpolation)[5:-4, 8:-6].copy())
        expected = table[resized.long(), torch.arange(3)].permute(2, 0, 1)
        batch = torch.full((3, 3, rows, columns), 77, dtype=dtype, device="cuda")
        batch = batch.contiguous(memory_format=torch.channels_last)
        resize_into(batch[1], torch.from_numpy(pixels).cuda(), to[::-1], interpolation, table.cuda(), (5, 8))
        assert torch.equal(batch[1].cpu(), expected) and bool((batch[::2] == 77).all())
