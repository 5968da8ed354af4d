"""Spatial pyramid pooling of a map of words: one word per cell instead of channels. The values are those of pooling the
one-hot map, [H, W, words] with a 1 at each cell's word, which is never made whole.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

import numpy as np

from sppfeat.pyramid.cpu import Edges, roi_edges

# Of the table of counts that windows look up, and of what is looked up at a time: with more words or windows, both are
# processed in parts.
_TABLE_BYTES: Final = 1 << 24


def level_weights(levels: Sequence[int]) -> dict[int, float]:
    """The weight of each level in pyramid matching, by how fine it is among the levels: with l = 0 for the coarsest and
    L for the finest of them, 1 / 2^L for the coarsest and 1 / 2^(L - l + 1) for the others. They add up to 1.

    Source: Lazebnik, Schmid, Ponce, "Beyond Bags of Features: Spatial Pyramid Matching for Recognizing Natural Scene
    Categories", CVPR 2006, equation 3. Its levels are 1, 2, 4, ...; here any can be left out.
    """
    finest = len(levels) - 1
    return {n: 0.5 ** (finest - rank + 1 if rank else finest) for rank, n in enumerate(sorted(levels))}


def pool_words(maps: np.ndarray, words: int, levels: Sequence[int], pooling: str) -> np.ndarray:
    """[N, bins * words] float32 of maps [N, H, W] of integers from 0 to words - 1.

    pooling: `avg`, the share of each word among a bin's cells, times the level's weight (see `level_weights`) divided
    by its number of bins; or `max`, 1 where a word occurs in the bin and 0 elsewhere, without weights.
    """
    count, height, width = maps.shape
    flat = maps.reshape(count, height * width).astype(np.int64, copy=False)
    rows = np.empty((count, sum(n * n for n in levels) * words), np.float32)
    start = 0
    for level in levels:
        cells, first_value, size = _bins_of_cells(height, width, level)
        first_value = first_value * words
        end = start + level * level * words
        for row, of_map in zip(rows, flat, strict=True):
            counts = np.bincount(first_value + of_map[cells], minlength=level * level * words)
            row[start:end] = _pooled(counts.reshape(-1, words), size[:, None], pooling).reshape(-1)
        rows[:, start:end] *= _factor(levels, level, pooling)
        start = end
    return rows


def pool_word_windows(
    word_map: np.ndarray, rois: np.ndarray, words: int, levels: Sequence[int], pooling: str
) -> np.ndarray:
    """[K, bins * words] float32 of K windows of one map [H, W]; see `pool_words`.

    rois: [K, 4] int64 cells x1, y1, x2, y2, inclusive ends, inside the map.
    """
    height, width = word_map.shape
    rows = np.empty((len(rois), sum(n * n for n in levels), words), np.float32)
    part = max(1, _TABLE_BYTES // (4 * (height + 1) * (width + 1)))
    for first in range(0, words, part):
        some = np.arange(first, min(first + part, words))
        place = slice(first, first + len(some))
        # Running sums of integers are exact. [H + 1, W + 1, part]: of each word, above and to the left.
        table = np.zeros((height + 1, width + 1, len(some)), np.int32)
        np.cumsum(word_map[:, :, None] == some, axis=0, dtype=np.int32, out=table[1:, 1:])
        np.cumsum(table[1:, 1:], axis=1, out=table[1:, 1:])
        start = 0
        for level in levels:
            end = start + level * level
            group = max(1, _TABLE_BYTES // (4 * level * level * len(some)))
            for at in range(0, len(rois), group):
                edges = roi_edges(rois[at : at + group], level)
                pooled = _of_table(table, edges, pooling)
                rows[at : at + group, start:end, place] = pooled * _factor(levels, level, pooling)
            start = end
    return rows.reshape(len(rois), rows.shape[1] * words)


def _of_table(table: np.ndarray, edges: Edges, pooling: str) -> np.ndarray:
    """[K, bins, part] of the bins of windows: their edges, [K, level] each, in a table of running sums."""
    top, bottom, left, right = edges
    upper, lower = top[:, :, None], bottom[:, :, None]
    begin, end = left[:, None, :], right[:, None, :]
    counts = table[lower, end] - table[upper, end] - table[lower, begin] + table[upper, begin]
    size = (lower - upper) * (end - begin)
    return _pooled(counts, size[..., None], pooling).reshape(len(top), top.shape[1] ** 2, table.shape[2])


# Large maps take 1 MB a level.
@functools.lru_cache(maxsize=64)
def _bins_of_cells(height: int, width: int, level: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every cell of every bin: its index in the map, and the bin's; and the number of cells [bins] of each bin.

    Where bins overlap, a cell is in several.
    """
    top, bottom, left, right = (
        edge[0] for edge in roi_edges(np.array([[0, 0, width - 1, height - 1]], np.int64), level)
    )
    index = np.arange(height * width).reshape(height, width)
    bins = [index[a:b, c:d].ravel() for a, b in zip(top, bottom, strict=True) for c, d in zip(left, right, strict=True)]
    size = np.array([len(cells) for cells in bins])
    return np.concatenate(bins), np.repeat(np.arange(len(bins)), size), size


def _pooled(counts: np.ndarray, size: np.ndarray, pooling: str) -> np.ndarray:
    found: np.ndarray = (counts > 0) if pooling == "max" else counts / size
    return found.astype(np.float32)


def _factor(levels: Sequence[int], level: int, pooling: str) -> np.float32:
    return np.float32(1 if pooling == "max" else level_weights(levels)[level] / (level * level))
