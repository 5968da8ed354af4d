"""Spatial pyramid pooling on a CPU, in NumPy: the same values as `pooling`'s torch form.

Whole maps: rows of bins first, then their columns. Maxima over windows: a bin is the maximum of four look-ups in tables
of block maxima. The cost is memory traffic. So all tables are in one array, windows are processed in groups whose rows
stay in the cache through look-ups, maxima and coarser levels, and every result is written once, in place. On small maps
many windows share bins, which are then looked up once. `benchmarks/pyramid.py` compares it with a `roi_pool` per level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

Edges = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

# Rows of pooled cells in a group. Half of this or twice as much is 5 to 15 % slower on a core with 2 MB of cache.
_GROUP_BYTES: Final = 1 << 20
# Of all tables together; above it the channels are processed in parts.
_TABLE_BYTES: Final = 1 << 26
_LEAST_CHANNELS: Final = 32
# From this many bins per cell of the map, enough bins are equal to make it worth finding them.
_BINS_A_CELL: Final = 32
# Below this, gem's power would lose its gradient (Radenovic, Tolias, Chum 2018 use the same).
GEM_FLOOR: Final = 1e-6


def pool_maps(cells: np.ndarray, levels: Sequence[int], pooling: str, gem_p: float) -> np.ndarray:
    """[N, bins * C] float32 of maps [N, H, W, C] float32."""
    powers = _to_power(cells, pooling, gem_p)
    pooled: dict[int, np.ndarray] = {}
    for level in sorted(levels, reverse=True):
        # The bins of a level are unions of bins of its multiples, and maxima of maxima are exact; means are not.
        finer = min((n for n in pooled if n % level == 0), default=None) if pooling == "max" else None
        if finer is None:
            pooled[level] = _pool_grid(powers, level, pooling)
        else:
            pooled[level] = _of_squares(pooled[finer], finer // level)
    return _in_order(pooled, levels, pooling, gem_p)


def pool_windows(cells: np.ndarray, rois: np.ndarray, levels: Sequence[int], pooling: str, gem_p: float) -> np.ndarray:
    """[K, bins * C] float32 of K windows of one map [H, W, C] float32.

    rois: [K, 4] int64 cells x1, y1, x2, y2, inclusive ends, inside the map.
    """
    if pooling == "max":
        return max_of_rois(np.ascontiguousarray(cells), rois, levels)
    powers = _to_power(cells, pooling, gem_p)
    pooled = {level: _mean_of_blocks(powers, roi_edges(rois, level)) for level in levels}
    return _in_order(pooled, levels, pooling, gem_p)


def _in_order(pooled: dict[int, np.ndarray], levels: Sequence[int], pooling: str, gem_p: float) -> np.ndarray:
    """[N, bins * C] float32 of the levels' grids [N, level, level, C]."""
    count, channels = len(pooled[levels[0]]), pooled[levels[0]].shape[-1]
    rows = np.concatenate([pooled[level].reshape(count, level * level * channels) for level in levels], 1)
    if pooling == "gem":
        rows = np.power(np.maximum(rows, GEM_FLOOR**gem_p), 1 / gem_p)
    return rows.astype(np.float32, copy=False)


def _to_power(cells: np.ndarray, pooling: str, gem_p: float) -> np.ndarray:
    if pooling != "gem":
        return cells
    # Single precision cannot hold the 10th power of a large value, nor that of the floor.
    powers: np.ndarray = np.power(np.maximum(cells.astype(np.float64), GEM_FLOOR), gem_p)
    return powers


def _pool_grid(cells: np.ndarray, level: int, pooling: str) -> np.ndarray:
    """[N, level, level, C] maxima or means of maps [N, H, W, C]."""
    count, height, width, channels = cells.shape
    reduce: Any = np.maximum.reduce if pooling == "max" else np.add.reduce
    rows = np.empty((count, level, width, channels), cells.dtype)
    sides = [(n * height // level, -(-(n + 1) * height // level)) for n in range(level)]
    for at, (first, end) in enumerate(sides):
        reduce(cells[:, first:end], axis=1, out=rows[:, at])
    tall = np.array([end - first for first, end in sides])
    bins = np.empty((count, level, level, channels), cells.dtype)
    sides = [(n * width // level, -(-(n + 1) * width // level)) for n in range(level)]
    for at, (first, end) in enumerate(sides):
        reduce(rows[:, :, first:end], axis=2, out=bins[:, :, at])
    if pooling != "max":
        wide = np.array([end - first for first, end in sides])
        bins /= (tall[:, None] * wide[None, :]).astype(cells.dtype)[None, :, :, None]
    return bins


def roi_edges(rois: np.ndarray, level: int) -> Edges:
    """First and one-past-last rows, then columns, [K, level] each, of the bins of rois [K, 4]."""
    return (*_roi_bins(rois[:, 1], rois[:, 3], level), *_roi_bins(rois[:, 0], rois[:, 2], level))


def _roi_bins(first: np.ndarray, last: np.ndarray, level: int) -> tuple[np.ndarray, np.ndarray]:
    """First and one-past-last cell [K, level] of the bins along one axis of rois."""
    steps = np.arange(level)
    length = (last - first + 1)[:, None]
    return first[:, None] + steps * length // level, first[:, None] + ((steps + 1) * length + level - 1) // level


def _mean_of_blocks(cells: np.ndarray, edges: Edges) -> np.ndarray:
    """Means [K, level, level, C] of the bins of windows on cells [H, W, C]."""
    windows, level = edges[0].shape
    grid = (windows, level, level)
    top, bottom = (np.broadcast_to(edge[:, :, None], grid).ravel() for edge in edges[:2])
    left, right = (np.broadcast_to(edge[:, None, :], grid).ravel() for edge in edges[2:])
    height, width = bottom - top, right - left
    tall = cells
    total = np.zeros((len(top), cells.shape[2]), cells.dtype)
    # A block is tiled with blocks of 2^a x 2^b cells, one per binary digit of its sides, the largest first.
    # Differences of running sums would need fewer look-ups, but lose a weak bin in the rounding of strong ones.
    for i in range(int(height.max(initial=0)).bit_length()):
        if i:
            half = 1 << (i - 1)
            tall = tall[: len(tall) - half] + tall[half:]
        y = top + (height >> (i + 1) << (i + 1))
        table = tall
        for j in range(int(width.max(initial=0)).bit_length()):
            if j:
                half = 1 << (j - 1)
                table = table[:, : table.shape[1] - half] + table[:, half:]
            x = left + (width >> (j + 1) << (j + 1))
            chosen = np.flatnonzero((height >> i) & (width >> j) & 1)
            total[chosen] += table[y[chosen], x[chosen]]
    total /= (height * width).astype(cells.dtype)[:, None]
    return total.reshape(*grid, cells.shape[2])


def max_of_rois(cells: np.ndarray, rois: np.ndarray, levels: Sequence[int]) -> np.ndarray:
    """Rows [K, bins * C] of K windows, rois [K, 4], on cells [H, W, C], in the cells' dtype."""
    height, width, channels = cells.shape
    windows = len(rois)
    rows = np.empty((windows, sum(level * level for level in levels), channels), cells.dtype)
    if not windows:
        return rows.reshape(0, rows.shape[1] * channels)
    finest = [n for n in dict.fromkeys(levels) if not any(m > n and m % n == 0 for m in levels)]
    edges = {level: roi_edges(rois, level) for level in finest}
    powers = np.array([max(1, n).bit_length() - 1 for n in range(max(height, width) + 1)])
    tall = 1 + max(int(powers[(bottom - top).max()]) for top, bottom, _, _ in edges.values())
    wide = 1 + max(int(powers[(right - left).max()]) for _, _, left, right in edges.values())
    looked_up: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
    for level, of_level in edges.items():
        which = None
        if windows * level * level > _BINS_A_CELL * height * width:
            of_level, which = _distinct(of_level)
        looked_up[level] = _places(powers, wide, height, width, of_level), which
    fitting = _TABLE_BYTES // (tall * wide * height * width * cells.itemsize)
    part = min(channels, max(_LEAST_CHANNELS, fitting))
    for first in range(0, channels, part):
        tables = _tables(cells[:, :, first : first + part], tall, wide)
        for level, (places, which) in looked_up.items():
            if which is not None:
                tables_or_bins, corners = _look_up(tables, places.reshape(4, -1)), which[None]
            else:
                tables_or_bins, corners = tables, places
            _pool(tables_or_bins, corners, level, levels, rows[:, :, first : first + part])
    return rows.reshape(windows, -1)


def _distinct(edges: Edges) -> tuple[Edges, np.ndarray]:
    """Edges [U, 1] of the distinct bins, and the index of each bin among them, [K, level * level]."""
    top, bottom, left, right = edges
    height, width = int(bottom.max()) + 1, int(right.max()) + 1
    key = ((top * height + bottom) * (width * width))[:, :, None] + (left * width + right)[:, None, :]
    bins, which = np.unique(key.ravel(), return_inverse=True)
    bins = bins[:, None]
    rows, columns = bins // (width * width), bins % (width * width)
    return (rows // height, rows % height, columns // width, columns % width), which.reshape(len(key), -1)


def _tables(cells: np.ndarray, tall: int, wide: int) -> np.ndarray:
    """Block maxima, [tall * wide * H * W, C]: at (i, j, y, x) over 2^i x 2^j cells from (y, x) on, where they fit."""
    height, width, channels = cells.shape
    tables = np.empty((tall, wide, height, width, channels), cells.dtype)
    tables[0, 0] = cells
    for i in range(tall):
        rows = height - (1 << i) + 1
        if i:
            half = 1 << (i - 1)
            np.maximum(tables[i - 1, 0, :rows], tables[i - 1, 0, half : half + rows], out=tables[i, 0, :rows])
        for j in range(1, wide):
            half, columns = 1 << (j - 1), width - (1 << j) + 1
            before = tables[i, j - 1, :rows]
            np.maximum(before[:, :columns], before[:, half : half + columns], out=tables[i, j, :rows, :columns])
    return tables.reshape(-1, channels)


def _places(powers: np.ndarray, wide: int, height: int, width: int, edges: Edges) -> np.ndarray:
    """Rows of the tables [4, K, level * level] whose maximum is the bin's: blocks at its four corners."""
    top, bottom, left, right = edges
    a, b = powers[bottom - top], powers[right - left]
    table = ((a[:, :, None] * wide + b[:, None, :]) * (height * width)).reshape(len(top), -1)
    upper, lower = (y * width for y in (top, bottom - (1 << a)))
    corners = [
        (y[:, :, None] + x[:, None, :]).reshape(len(top), -1) for y in (upper, lower) for x in (left, right - (1 << b))
    ]
    return np.stack([table + corner for corner in corners])


def _look_up(tables: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Bins [U, C] from rows [4, U] of the tables."""
    best: np.ndarray = tables.take(places[0], axis=0)
    group = max(1, _GROUP_BYTES // (tables.shape[1] * tables.itemsize))
    for first in range(0, len(best), group):
        part = slice(first, first + group)
        for corner in places[1:, part]:
            np.maximum(best[part], tables.take(corner, axis=0), out=best[part])
    return best


def _pool(tables: np.ndarray, places: np.ndarray, level: int, levels: Sequence[int], rows: np.ndarray) -> None:
    """Fill rows [K, bins, C] at a level and at the levels that divide it.

    places: [P, K, level * level], rows of the tables whose maximum is a bin.
    """
    windows, channels, bins = len(rows), tables.shape[1], level * level
    starts = [sum(m * m for m in levels[:at]) for at in range(len(levels))]
    coarser = sorted((n for n in set(levels) if n < level and level % n == 0), reverse=True)
    group = max(1, _GROUP_BYTES // (bins * channels * tables.itemsize))
    pooled, other = (np.empty((min(group, windows) * bins, channels), tables.dtype) for _ in range(2))
    for first in range(0, windows, group):
        count = min(group, windows - first)
        out = rows[first : first + count]
        best, more = pooled[: count * bins], other[: count * bins]
        corners = places[:, first : first + count].reshape(len(places), -1)
        # `clip` spares NumPy the copy with which it would undo a failure half way; all places are inside.
        tables.take(corners[0], axis=0, out=best, mode="clip")
        for corner in corners[1:]:
            tables.take(corner, axis=0, out=more, mode="clip")
            np.maximum(best, more, out=best)
        done = {level: best.reshape(count, level, level, channels)}
        for n in coarser:
            # Bins of a level are unions of those of its multiples; the nearest one is the least work.
            finer = min(m for m in done if m % n == 0)
            done[n] = _of_squares(done[finer], finer // n)
        for n, start in zip(levels, starts, strict=True):
            if n in done:
                out[:, start : start + n * n] = done[n].reshape(count, n * n, channels)


def _of_squares(cells: np.ndarray, side: int) -> np.ndarray:
    """Maxima over squares of `side` x `side` of cells [K, n * side, n * side, C]: [K, n, n, C]."""
    if side == 1:
        return cells
    best: np.ndarray = cells[:, ::side]
    for step in range(1, side):
        best = np.maximum(best, cells[:, step::side])
    narrow: np.ndarray = best[:, :, ::side]
    for step in range(1, side):
        narrow = np.maximum(narrow, best[:, :, step::side])
    return narrow
