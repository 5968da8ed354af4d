"""Resizing on an NVIDIA GPU with Pillow's whole numbers, normalizing, and writing into a batch: one launch per image.

A program makes some rows and columns of the resized image. It goes through the rows of the image that these depend on,
resizes each along the row to bytes, as Pillow does between its two passes, and adds them to the sums of its own rows.
Whole numbers are exact, so the bytes are those of `resample`; a side that does not change has weights of 1 alone, and
passes unchanged. What a byte becomes is looked up in a table that torch made, so that it is normalized and rounded as a
batch of bytes is, on every GPU.
"""

from __future__ import annotations

import functools
from typing import Final

import numpy as np
import torch
import triton
import triton.language as tl

from sppfeat.images import coefficients

# Of the resized image, what one program makes: rows, and values of these (three per pixel). More rows share more of the
# rows between the passes, and more programs fill the GPU.
_ROWS: Final = 8
_VALUES: Final = 64
# One warp: nothing has to be exchanged between threads.
_WARPS: Final = 1
# The bits behind the point of `coefficients`, and a half.
_BITS: Final = tl.constexpr(22)
_HALF: Final = tl.constexpr(1 << 21)


@triton.jit
def _byte(total):  # type: ignore[no-untyped-def]
    # int32 is enough: the absolute weights of an output sum to less than 1.6 * 2^22 (the most is Lanczos' near an edge,
    # 1.572; a test has the bound), and 1.6 * 2^22 * 255 + 2^21 < 2^31.
    return tl.minimum(tl.maximum((total + _HALF) >> _BITS, 0), 255)


_SIZES: Final = ("height", "width", "resized_height", "resized_width", "top", "left", "rows", "values", "taps_across",
                 "taps_down")  # fmt: skip


# Images have all sizes: without this, the kernel would be compiled anew for some of them.
@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=("pixels", "into"))  # type: ignore[untyped-decorator]
def _resize_kernel(  # type: ignore[no-untyped-def]
    pixels,  # [height, width, 3] uint8
    into,  # [rows, values / 3, 3]
    across,  # [1 + taps_across, resized_width] int32: the first input of each output, and weights from there on
    down,  # [1 + taps_down, resized_height] int32
    table,  # [256, 3], of the type of `into`: what each byte becomes
    height,
    width,
    resized_height,
    resized_width,
    top,
    left,
    rows,
    values,
    taps_across,
    taps_down,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
):
    value = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    has_value = value < values
    channel = value % 3
    column = left + value // 3
    first_column = tl.load(across + column, mask=has_value, other=0)
    begin_row = tl.program_id(1) * ROWS
    end_row = tl.minimum(begin_row + ROWS, rows)
    row = begin_row + tl.arange(0, ROWS)
    has_row = row < rows
    first_row = tl.load(down + top + row, mask=has_row, other=0)
    begin = tl.load(down + top + begin_row)
    end = tl.minimum(tl.load(down + top + end_row - 1) + taps_down, height)
    totals = tl.zeros([ROWS, VALUES], tl.int32)
    # In 64 bits: an image can have more than 2^31 values.
    row_values = width.to(tl.int64) * 3
    for y in range(begin, end):
        line = pixels + y * row_values + channel
        total = tl.zeros([VALUES], tl.int32)
        for tap in range(taps_across):
            x = first_column + tap
            weight = tl.load(across + (1 + tap) * resized_width + column, mask=has_value, other=0)
            total += weight * tl.load(line + x * 3, mask=has_value & (x < width), other=0).to(tl.int32)
        tap_down = y - first_row
        of_row = has_row & (tap_down >= 0) & (tap_down < taps_down)
        weights = tl.load(down + (1 + tap_down) * resized_height + top + row, mask=of_row, other=0)
        totals += weights[:, None] * _byte(total)[None, :]
    normalized = tl.load(table + _byte(totals) * 3 + channel[None, :])
    to = into + row.to(tl.int64)[:, None] * values + value[None, :]
    tl.store(to, normalized, mask=has_row[:, None] & has_value[None, :])


def resize_into(
    into: torch.Tensor,
    pixels: torch.Tensor,
    size: tuple[int, int],
    interpolation: str,
    table: torch.Tensor,
    corner: tuple[int, int] = (0, 0),
) -> None:
    """Resize an image, normalize it, and write it, or a part of it, into one image of a batch; all on one device.

    into: [3, h, w], channels last, as each image of a batch in torch.channels_last is. pixels: [H, W, 3] uint8,
    contiguous. size: width and height of the resized image, of which `into` takes h rows and w columns from `corner`
    on, its top and left. table: [256, 3] what each byte of each channel becomes, contiguous. Raises ValueError.
    """
    (width, height), (top, left) = size, corner
    channels, rows, columns = into.shape
    if channels != 3 or not into.permute(1, 2, 0).is_contiguous():
        raise ValueError(
            f"expected an image [3, h, w], channels last, found {list(into.shape)} with strides {into.stride()}"
        )
    for name, tensor, shape, dtype in (
        ("pixels", pixels, [*pixels.shape[:2], 3], torch.uint8),
        ("a table", table, [256, 3], into.dtype),
    ):
        if list(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"expected {name} {shape} of {dtype}, contiguous, found {list(tensor.shape)} of {tensor.dtype} with "
                f"strides {tensor.stride()}"
            )
    if min(top, left) < 0 or top + rows > height or left + columns > width:
        raise ValueError(
            f"expected a part of {width} x {height} pixels, found {columns} x {rows} from row {top}, column {left} on"
        )
    across, down = (
        _on_device(length, target, interpolation, pixels.device, _stream(pixels.device))
        for length, target in ((pixels.shape[1], width), (pixels.shape[0], height))
    )
    values = 3 * columns
    # Triton launches on the current device, whatever the tensors' device is.
    with torch.cuda.device_of(pixels):  # type: ignore[no-untyped-call]
        _resize_kernel[(triton.cdiv(values, _VALUES), triton.cdiv(rows, _ROWS))](
            pixels,
            into,
            across,
            down,
            table,
            pixels.shape[0],
            pixels.shape[1],
            height,
            width,
            top,
            left,
            rows,
            values,
            len(across) - 1,
            len(down) - 1,
            ROWS=_ROWS,
            VALUES=_VALUES,
            num_warps=_WARPS,
        )


# Images from cameras come in few sizes; one entry takes some 10 kB.
@functools.lru_cache(maxsize=1024)
def _on_device(length: int, target: int, interpolation: str, device: torch.device, stream: int) -> torch.Tensor:
    """`coefficients` as [1 + taps, target]: outputs side by side, as threads read them.

    stream: what uses them; another stream could still read what is dropped here and allocated again on this one.
    """
    first, weights = coefficients(length, target, interpolation)
    return torch.from_numpy(np.ascontiguousarray(np.vstack([first[None], weights.T]))).to(device)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
