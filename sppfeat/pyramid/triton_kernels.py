"""Maxima over the bins of whole maps and of windows on an NVIDIA GPU: one launch for all levels that nest.

A program takes one window (a whole map is one, too) and some channels, reads each cell once for the finest level, and
computes the levels that divide it from those bins. With few windows, each of a window's rows of bins gets a program of
its own, and the last of them to finish computes the coarser levels. Maxima are exact, so the values are bit-identical
to the torch form, however the programs are scheduled.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl

# The types that the kernel reads and writes; it compares in float32, which represents all of them exactly.
DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_CELLS: Final = 16
_CHANNELS: Final = 64
# With fewer programs than this, a large GPU idles: rows of bins get programs of their own.
_ENOUGH_PROGRAMS: Final = 2048


@triton.jit
def _larger(a, b):  # type: ignore[no-untyped-def]
    # A NaN must reach the descriptor, which is then rejected.
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit  # type: ignore[untyped-decorator]
def _max_kernel(  # type: ignore[no-untyped-def]
    cells,  # [N, H, W, C]
    windows,  # [K, 5] int32: map, first column, first row, last column, last row
    rows,  # [K, bins, C]
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
    row = rows + window * bins * channels
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
        for done in range(0, bin_height * bin_width, CELLS):
            step = done + steps
            cell = first_cell + (y1 + step // bin_width) * width + x1 + step % bin_width
            there = (step < bin_height * bin_width)[:, None] & inside[None, :]
            values = tl.load(cells + cell[:, None] * channels + channel[None, :], mask=there, other=float("-inf"))
            best = _larger(best, values.to(tl.float32))
        pooled = tl.reduce(best, 0, _larger)
        tl.store(row + (start + at) * channels + channel, pooled.to(rows.dtype.element_ty), mask=inside)
    # What this program's threads wrote is read by others of them, or by another program's.
    tl.debug_barrier()
    last = True
    if SHARED:
        last = tl.atomic_add(finished + window * tl.num_programs(2) + tl.program_id(2), 1) == LEVEL - 1
    if last:
        for number in range(coarser_levels):
            level = tl.load(coarser + number * 2)
            first = tl.load(coarser + number * 2 + 1)
            side = LEVEL // level
            for at in range(level * level):
                best = tl.full([CELLS, CHANNELS], float("-inf"), tl.float32)
                for done in range(0, side * side, CELLS):
                    step = done + steps
                    finer = (at // level * side + step // side) * LEVEL + at % level * side + step % side
                    there = (step < side * side)[:, None] & inside[None, :]
                    values = tl.load(
                        row + (start + finer)[:, None] * channels + channel[None, :],
                        mask=there,
                        other=float("-inf"),
                        cache_modifier=".cg",  # bypass this SM's cache, which does not see other SMs' writes
                    )
                    best = _larger(best, values.to(tl.float32))
                pooled = tl.reduce(best, 0, _larger)
                tl.store(row + (first + at) * channels + channel, pooled.to(rows.dtype.element_ty), mask=inside)


def max_of_windows(cells: torch.Tensor, windows: torch.Tensor, levels: Sequence[int]) -> torch.Tensor:
    """Rows [K, bins * C] of K windows on maps; cells: [N, H, W, C], contiguous, of one of DTYPES.

    windows: [K, 5] int32 on the same device: which map, then first column, first row, last column and last row, in
    cells, inside the map.
    """
    _, height, width, channels = cells.shape
    bins = sum(level * level for level in levels)
    rows = cells.new_empty((len(windows), bins, channels))
    if not len(windows):
        return rows.flatten(1)
    blocks = triton.cdiv(channels, _CHANNELS)
    for level, start, count, coarser in _launches(tuple(levels), cells.device):
        shared = len(windows) * blocks < _ENOUGH_PROGRAMS
        finished = torch.zeros((len(windows), blocks) if shared else (1,), dtype=torch.int32, device=cells.device)
        _max_kernel[(len(windows), level if shared else 1, blocks)](
            cells,
            windows,
            rows,
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
            CELLS=_CELLS,
            CHANNELS=_CHANNELS,
        )
    return rows.flatten(1)


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
