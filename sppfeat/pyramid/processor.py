"""Maxima over the bins of many windows on a processor: the same values as `pyramid`'s torch form, without its waste.

A bin is the maximum of four look-ups in tables of block maxima (see `pyramid`). What costs is memory traffic: so all
tables stand in one array, windows are taken in groups whose rows stay in the cache through look-ups, maxima and the
levels above, and every result is written once, where it belongs. On small maps many windows share their bins, which
are then looked up once. `benchmarks/pyramid.py` compares it with one `roi_pool` a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

# Rows of pooled cells that are under way at a time. Half of this or twice as much is 5 to 15 % slower on a core with
# 2 MB of cache.
_GROUP_BYTES: Final = 1 << 20
# Of all tables together; beyond it the channels are taken in parts.
_TABLE_BYTES: Final = 1 << 26
_LEAST_CHANNELS: Final = 32
# From so many bins for each cell of the map on, enough of them are alike to pay for finding out.
_BINS_A_CELL: Final = 32


def max_of_rois(
    cells: torch.Tensor,
    edges: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]],
    levels: Sequence[int],
) -> torch.Tensor:
    """Rows [K, bins * C] of K windows on cells [H, W, C].

    edges: for every level that is no divisor of another, first and one-past-last cells [K, level] of its bins: top,
    bottom, left, right.
    """
    height, width, channels = cells.shape
    windows = len(next(iter(edges.values()))[0])
    rows = _empty((windows, sum(level * level for level in levels), channels), cells.dtype)
    powers = torch.tensor([max(1, n).bit_length() - 1 for n in range(max(height, width) + 1)])
    tall = 1 + max(int(powers[int((bottom - top).max())]) for top, bottom, _, _ in edges.values())
    wide = 1 + max(int(powers[int((right - left).max())]) for _, _, left, right in edges.values())
    looked_up: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
    for level, of_level in edges.items():
        which = None
        if windows * level * level > _BINS_A_CELL * height * width:
            of_level, which = _distinct(*of_level)
        looked_up[level] = _places(powers, wide, height, width, *of_level), which
    fitting = _TABLE_BYTES // (tall * wide * height * width * cells.itemsize)
    part = min(channels, max(_LEAST_CHANNELS, fitting))
    for first in range(0, channels, part):
        some = cells[:, :, first : first + part]
        tables = _tables(some, tall, wide)
        for level, (places, which) in looked_up.items():
            if which is not None:
                tables_or_bins, corners = _look_up(tables, places.flatten(1)), which[None]
            else:
                tables_or_bins, corners = tables, places
            _pool(tables_or_bins, corners, level, levels, rows[:, :, first : first + part])
    return rows.flatten(1)


def _distinct(
    top: torch.Tensor, bottom: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Edges [U, 1] of the bins that differ, and which of them each bin is, [K, level * level]."""
    height, width = int(bottom.max()) + 1, int(right.max()) + 1
    key = ((top * height + bottom) * (width * width))[:, :, None] + (left * width + right)[:, None, :]
    bins, which = torch.unique(key.flatten(1), return_inverse=True)
    bins = bins[:, None]
    rows, columns = bins // (width * width), bins % (width * width)
    return (rows // height, rows % height, columns // width, columns % width), which


def _tables(cells: torch.Tensor, tall: int, wide: int) -> torch.Tensor:
    """Block maxima, [tall * wide * H * W, C]: at (i, j, y, x) over 2^i x 2^j cells from (y, x) on, where they fit."""
    height, width, channels = cells.shape
    tables = cells.new_empty((tall, wide, height, width, channels))
    tables[0, 0] = cells
    for i in range(tall):
        rows = height - (1 << i) + 1
        if i:
            half = 1 << (i - 1)
            torch.maximum(tables[i - 1, 0, :rows], tables[i - 1, 0, half : half + rows], out=tables[i, 0, :rows])
        for j in range(1, wide):
            half, columns = 1 << (j - 1), width - (1 << j) + 1
            before = tables[i, j - 1, :rows]
            torch.maximum(before[:, :columns], before[:, half : half + columns], out=tables[i, j, :rows, :columns])
    return tables.flatten(0, 3)


def _places(
    powers: torch.Tensor,
    wide: int,
    height: int,
    width: int,
    top: torch.Tensor,
    bottom: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
) -> torch.Tensor:
    """Rows of the tables [4, K, level * level] whose maximum is that of the bin: blocks at its four corners."""
    a, b = powers[bottom - top], powers[right - left]
    table = ((a[:, :, None] * wide + b[:, None, :]) * (height * width)).flatten(1)
    upper, lower = (y * width for y in (top, bottom - (1 << a)))
    corners = [(y[:, :, None] + x[:, None, :]).flatten(1) for y in (upper, lower) for x in (left, right - (1 << b))]
    return torch.stack([table + corner for corner in corners])


def _look_up(tables: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Bins [U, C] from rows [4, U] of the tables."""
    best = tables.index_select(0, places[0])
    group = max(1, _GROUP_BYTES // (tables.shape[1] * tables.itemsize))
    for first in range(0, len(best), group):
        part = slice(first, first + group)
        for corner in places[1:, part]:
            torch.maximum(best[part], tables.index_select(0, corner), out=best[part])
    return best


def _pool(tables: torch.Tensor, places: torch.Tensor, level: int, levels: Sequence[int], rows: torch.Tensor) -> None:
    """Fill rows [K, bins, C] at a level and at the levels that divide it.

    places: [P, K, level * level], rows of the tables whose maximum is a bin.
    """
    windows, channels, bins = len(rows), tables.shape[1], level * level
    starts = [sum(m * m for m in levels[:at]) for at in range(len(levels))]
    coarser = sorted((n for n in set(levels) if n < level and level % n == 0), reverse=True)
    group = max(1, _GROUP_BYTES // (bins * channels * tables.itemsize))
    pooled, other = (tables.new_empty((min(group, windows) * bins, channels)) for _ in range(2))
    for first in range(0, windows, group):
        count = min(group, windows - first)
        out = rows[first : first + count]
        best, more = pooled[: count * bins], other[: count * bins]
        corners = places[:, first : first + count].flatten(1)
        torch.index_select(tables, 0, corners[0], out=best)
        for corner in corners[1:]:
            torch.index_select(tables, 0, corner, out=more)
            torch.maximum(best, more, out=best)
        done = {level: best.view(count, level, level, channels)}
        for n in coarser:
            # Bins of a level are unions of those of its multiples; the nearest one is the least work.
            finer = min(m for m in done if m % n == 0)
            done[n] = _of_squares(done[finer], finer // n)
        for n, start in zip(levels, starts, strict=True):
            if n in done:
                out[:, start : start + n * n] = done[n].flatten(1, 2)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Fresh memory, in large pages where NumPy gets them from the system: written in half the time of torch's."""
    try:
        return torch.from_numpy(np.empty(shape, str(dtype).removeprefix("torch.")))
    except TypeError:  # bfloat16
        return torch.empty(shape, dtype=dtype)


def _of_squares(cells: torch.Tensor, side: int) -> torch.Tensor:
    """Maxima over squares of `side` x `side` of cells [K, n * side, n * side, C]: [K, n, n, C]."""
    if side == cells.shape[1]:
        return cells.flatten(1, 2).amax(1)[:, None, None]
    best = cells[:, ::side]
    for step in range(1, side):
        best = torch.maximum(best, cells[:, step::side])
    narrow = best[:, :, ::side]
    for step in range(1, side):
        narrow = torch.maximum(narrow, best[:, :, step::side])
    return narrow
