"""Maxima over the bins of whole maps and of windows on an NVIDIA GPU: one launch for all levels that nest.

A program takes one window (a whole map is one, too) and some channels, reads each cell once for the finest level, and
computes the levels that divide it from those bins. With few windows, each of a window's rows of bins gets a program of
its own, and the last of them to finish computes the coarser levels. Maxima are exact, so the values are bit-identical
to the torch form, however the programs are scheduled.

For a gradient, the same kernel also writes, for each bin and channel, the cell of the map that its value is from: of
equal maxima the first, row by row, as on a CPU (see `gradients`), and a NaN before any number. Backward adds each bin's
gradient at that cell, in float32. A GPU does so in any order: the last digits of a gradient can differ from one time to
the next, unless `torch.use_deterministic_algorithms` is on, which torch's own addition obeys at some cost.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final, NoReturn

import torch
import triton
import triton.language as tl

# The types that the kernel reads and writes; it compares in float32, which represents all of them exactly.
DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_CELLS: Final = 16
_CHANNELS: Final = 64
# With fewer programs than this, a large GPU idles: rows of bins get programs of their own.
_ENOUGH_PROGRAMS: Final = 2048
# Above every cell of a map: the place of what is not a maximum.
_NOWHERE: Final = tl.constexpr(2**31 - 1)
# Cells that take 8 bytes for a while in backward, and gradients in float32: of so many bins and channels at a time.
_WIDE_VALUES: Final = 1 << 24


@triton.jit
def _larger(a, b):  # type: ignore[no-untyped-def]
    # A NaN must reach the descriptor, which is then rejected.
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _cells_of(largest, values, places):  # type: ignore[no-untyped-def]
    # The places of those values that are the largest. Where there is a NaN, the largest is one and equals nothing.
    return tl.where((values == largest) | (values != values), places, _NOWHERE)


@triton.jit  # type: ignore[untyped-decorator]
def _max_kernel(  # type: ignore[no-untyped-def]
    cells,  # [N, H, W, C]
    windows,  # [K, 5] int32: map, first column, first row, last column, last row
    rows,  # [K, bins, C]
    arguments,  # [K, bins, C] int32: the cell of each maximum within its map; only with ARGUMENTS
    coarser,  # [M, 2] int32: a level that divides the finest, and where its bins start
    finished,  # [K, programs over channels] int32 zeros
    height,
    width,
    channels,
    bins,
    start,
    coarser_levels,
    LEVEL: tl.constexpr,
    SHARED: tl.constexpr,
    ARGUMENTS: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    # In 64 bits: a batch of large maps has more than 2^31 values.
    window = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    first_cell = tl.load(windows + window * 5).to(tl.int64) * height * width
    left = tl.load(windows + window * 5 + 1)
    top = tl.load(windows + window * 5 + 2)
    tall = tl.load(windows + window * 5 + 4) - top + 1
    wide = tl.load(windows + window * 5 + 3) - left + 1
    row = window * bins * channels
    steps = tl.arange(0, CELLS)
    first_bin = 0
    last_bin = LEVEL * LEVEL
    if SHARED:
        first_bin = tl.program_id(1) * LEVEL
        last_bin = first_bin + LEVEL
    for at in range(first_bin, last_bin):
        i = at // LEVEL
        j = at % LEVEL
        y1 = top + i * tall // LEVEL
        x1 = left + j * wide // LEVEL
        bin_height = top + ((i + 1) * tall + LEVEL - 1) // LEVEL - y1
        bin_width = left + ((j + 1) * wide + LEVEL - 1) // LEVEL - x1
        best = tl.full([CELLS, CHANNELS], float("-inf"), tl.float32)
        first = tl.full([CELLS, CHANNELS], _NOWHERE, tl.int32)
        for done in range(0, bin_height * bin_width, CELLS):
            step = done + steps
            # Steps past the last cell of the bin are in rows below it: never the first of equal ones.
            cell = (y1 + step // bin_width) * width + x1 + step % bin_width
            there = (step < bin_height * bin_width)[:, None] & inside[None, :]
            source = cells + (first_cell + cell)[:, None] * channels + channel[None, :]
            values = tl.load(source, mask=there, other=float("-inf")).to(tl.float32)
            larger = _larger(best, values)
            if ARGUMENTS:
                first = tl.minimum(_cells_of(larger, best, first), _cells_of(larger, values, cell[:, None]))
            best = larger
        pooled = tl.reduce(best, 0, _larger)
        to = row + (start + at) * channels + channel
        tl.store(rows + to, pooled.to(rows.dtype.element_ty), mask=inside)
        if ARGUMENTS:
            tl.store(arguments + to, tl.min(_cells_of(pooled[None, :], best, first), 0), mask=inside)
    # What this program's threads wrote is read by others of them, or by another program's.
    tl.debug_barrier()
    last = True
    if SHARED:
        last = tl.atomic_add(finished + window * tl.num_programs(2) + tl.program_id(2), 1) == LEVEL - 1
    if last:
        for number in range(coarser_levels):
            level = tl.load(coarser + number * 2)
            level_start = tl.load(coarser + number * 2 + 1)
            side = LEVEL // level
            for at in range(level * level):
                best = tl.full([CELLS, CHANNELS], float("-inf"), tl.float32)
                first = tl.full([CELLS, CHANNELS], _NOWHERE, tl.int32)
                for done in range(0, side * side, CELLS):
                    step = done + steps
                    finer = (at // level * side + step // side) * LEVEL + at % level * side + step % side
                    there = (step < side * side)[:, None] & inside[None, :]
                    source = row + (start + finer)[:, None] * channels + channel[None, :]
                    # .cg bypasses this SM's cache, which does not see other SMs' writes.
                    values = tl.load(rows + source, mask=there, other=float("-inf"), cache_modifier=".cg")
                    values = values.to(tl.float32)
                    larger = _larger(best, values)
                    if ARGUMENTS:
                        # The first of a bin can be further down than that of the next: cells are compared, not bins.
                        cell = tl.load(arguments + source, mask=there, other=_NOWHERE, cache_modifier=".cg")
                        first = tl.minimum(_cells_of(larger, best, first), _cells_of(larger, values, cell))
                    best = larger
                pooled = tl.reduce(best, 0, _larger)
                to = row + (level_start + at) * channels + channel
                tl.store(rows + to, pooled.to(rows.dtype.element_ty), mask=inside)
                if ARGUMENTS:
                    tl.store(arguments + to, tl.min(_cells_of(pooled[None, :], best, first), 0), mask=inside)


def max_of_windows(cells: torch.Tensor, windows: torch.Tensor, levels: Sequence[int]) -> torch.Tensor:
    """Rows [K, bins * C] of K windows on maps; cells: [N, H, W, C], contiguous, of one of DTYPES; differentiable once.

    windows: [K, 5] int32 on the same device: which map, then first column, first row, last column and last row, in
    cells, inside the map. A second derivative raises RuntimeError. For a gradient, an int32 per value is kept.
    """
    if torch.is_grad_enabled() and cells.requires_grad:
        pooled: torch.Tensor = _MaxOfWindows.apply(cells, windows, tuple(levels))[0]
        return pooled
    return _launch(cells, windows, levels, with_arguments=False)[0]


def _launch(
    cells: torch.Tensor, windows: torch.Tensor, levels: Sequence[int], *, with_arguments: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`max_of_windows`, and the cells [K, bins, C], int32, within their maps that the values are from, if asked for."""
    _, height, width, channels = cells.shape
    bins = sum(level * level for level in levels)
    rows = cells.new_empty((len(windows), bins, channels))
    arguments = torch.empty(rows.shape if with_arguments else (0,), dtype=torch.int32, device=cells.device)
    if not len(windows):
        return rows.flatten(1), arguments
    blocks = triton.cdiv(channels, _CHANNELS)
    for level, start, count, coarser in _launches(tuple(levels), cells.device):
        shared = len(windows) * blocks < _ENOUGH_PROGRAMS
        finished = torch.zeros((len(windows), blocks) if shared else (1,), dtype=torch.int32, device=cells.device)
        _max_kernel[(len(windows), level if shared else 1, blocks)](
            cells,
            windows,
            rows,
            arguments,
            coarser,
            finished,
            height,
            width,
            channels,
            bins,
            start,
            count,
            LEVEL=level,
            SHARED=shared,
            ARGUMENTS=with_arguments,
            CELLS=_CELLS,
            CHANNELS=_CHANNELS,
        )
    return rows.flatten(1), arguments


class _MaxOfWindows(torch.autograd.Function):
    @staticmethod
    def forward(
        cells: torch.Tensor, windows: torch.Tensor, levels: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _launch(cells, windows, levels, with_arguments=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        cells, windows, _ = inputs
        _, arguments = output
        ctx.shape = cells.shape
        ctx.mark_non_differentiable(arguments)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(arguments, windows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, None, None]:
        if gradient is None:
            return None, None, None
        return _GradientOfMax.apply(gradient, *ctx.saved_tensors, ctx.shape), None, None


class _GradientOfMax(torch.autograd.Function):
    """A function of its own, so that a second derivative is refused, and `torch.func.grad` hands it plain tensors."""

    @staticmethod
    def forward(
        gradient: torch.Tensor, arguments: torch.Tensor, windows: torch.Tensor, shape: torch.Size
    ) -> torch.Tensor:
        """Gradient of cells of that shape, [N, H, W, C], in the dtype of that of rows [K, bins * C]."""
        maps, height, width, channels = shape
        total = torch.zeros((maps * height * width, channels), device=gradient.device)
        first_cell = windows[:, :1, None].long() * (height * width)
        count = max(1, _WIDE_VALUES // gradient.shape[1])
        for first in range(0, len(gradient), count):
            part = slice(first, first + count)
            places = (first_cell[part] + arguments[part]).flatten(0, 1)
            total.scatter_add_(0, places, gradient[part].reshape(places.shape).float())
        return total.view(shape).to(gradient.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> NoReturn:
        raise RuntimeError("pool_rois with maxima is differentiable only once on a GPU")


@functools.lru_cache(maxsize=64)
def _launches(levels: tuple[int, ...], device: torch.device) -> list[tuple[int, int, int, torch.Tensor]]:
    """For every level that does not divide another: where its bins start, and how many levels are made from it, with
    these and their starts [M, 2] on the device. A level that is asked for again is made from itself.
    """
    starts = [sum(n * n for n in levels[:at]) for at in range(len(levels))]
    launches, taken = [], set[int]()
    for level in sorted(set(levels), reverse=True):
        if level in taken:
            continue
        start = starts[levels.index(level)]
        coarser = [
            (n, at) for n, at in zip(levels, starts, strict=True) if level % n == 0 and n not in taken and at != start
        ]
        taken |= {level, *(n for n, _ in coarser)}
        places = torch.tensor(coarser or [(1, 0)], dtype=torch.int32, device=device)
        launches.append((level, start, len(coarser), places))
    return launches
