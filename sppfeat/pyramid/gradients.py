"""Gradients of pooled windows on a CPU: what autograd would compute through every table and look-up, in one step.

Maxima: cells are replaced by their ranks, per channel. `cpu.max_of_rois` then gives, instead of the largest value of a
bin, the rank of its cell; ranks of two bytes are less to read and to keep than values. Where cells of a bin are equal,
the first of them, row by row, gets the whole gradient. Ranks of bins are kept from forward to backward, those of very
many bins computed again.

Means (`avg` and `gem`): the steps of `blocks.mean_of_blocks` backwards. Each gradient is added once to every entry of a
table that its block is made of, and every table, the largest blocks first, to the table of blocks half as large.

Gradients are added in the same order every time, with the same number of threads. `benchmarks/pyramid.py` compares with
a `roi_pool` per level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NoReturn

import numpy as np
import torch
import torch.nn.functional as F

from sppfeat.pyramid.blocks import mean_of_blocks
from sppfeat.pyramid.cpu import max_of_rois

# Of the ranks of all bins, which take half of what float32 rows do; above it, they are computed again in backward,
# which then takes half as long again.
KEPT_BYTES: Final = 1 << 28
# Bins of which ranks are computed again at a time: enough to make little of the tables, which are made again, too.
_AGAIN_VALUES: Final = 1 << 25
# Ranks or places of cells that take 8 bytes for a while, at a time: with more, they leave the cache.
_WIDE_VALUES: Final = 1 << 19


def max_of_windows(cells: torch.Tensor, rois: torch.Tensor, levels: Sequence[int]) -> torch.Tensor:
    """Maxima [K, bins * C] over the bins of K windows on cells [H, W, C], float32 or float64; differentiable once.

    rois: [K, 4] int64 cells x1, y1, x2, y2, inclusive ends, inside the map. Everything is on the CPU. A second
    derivative raises RuntimeError.
    """
    rows, _, _ = _MaxOfWindows.apply(cells, rois, tuple(levels))
    pooled: torch.Tensor = rows
    return pooled


def mean_of_blocks_with_gradient(
    cells: torch.Tensor, top: torch.Tensor, bottom: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """`blocks.mean_of_blocks` of cells [H, W, C], float32 or float64, on the CPU; differentiable once."""
    means: torch.Tensor = _MeanOfBlocks.apply(cells, top, bottom, left, right)
    return means


class _Once(torch.autograd.Function):
    """What computes a gradient: a function of its own, so that `torch.func.grad`, too, hands it plain tensors."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> NoReturn:
        raise RuntimeError("pool_rois is differentiable only once on a CPU")


class _MaxOfWindows(torch.autograd.Function):
    @staticmethod
    def forward(
        cells: torch.Tensor, rois: torch.Tensor, levels: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows [K, bins * C], ranks of cells [H, W, C], and of bins: [K, bins * C], or none where they are not kept."""
        values = cells.detach().contiguous().numpy()
        ranks = ranks_of_cells(values)
        rows = max_of_rois(values, rois.numpy(), levels)
        kept = rows.size * ranks.itemsize <= KEPT_BYTES
        bins = max_of_rois(ranks, rois.numpy(), levels) if kept else ranks[:0, 0]
        return torch.from_numpy(rows), torch.from_numpy(ranks), torch.from_numpy(bins)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        _, rois, ctx.levels = inputs
        _, ranks, bins = output
        ctx.mark_non_differentiable(ranks, bins)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ranks, bins, rois)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, None, None]:
        if gradient is None:
            return None, None, None
        return _GradientOfMax.apply(gradient, *ctx.saved_tensors, ctx.levels), None, None


class _GradientOfMax(_Once):
    @staticmethod
    def forward(
        gradient: torch.Tensor, ranks: torch.Tensor, bins: torch.Tensor, rois: torch.Tensor, levels: tuple[int, ...]
    ) -> torch.Tensor:
        """Gradient [H, W, C] of cells, from that of rows [K, bins * C]."""
        height, width, channels = ranks.shape
        by_rank = gradient.new_zeros((height * width, channels))
        windows = max(1, _AGAIN_VALUES // gradient.shape[1])
        for first in range(0, len(gradient), windows):
            part = slice(first, first + windows)
            places = bins[part].numpy() if len(bins) else max_of_rois(ranks.numpy(), rois[part].numpy(), levels)
            _add_rows(by_rank, places, gradient[part])
        flat, of_cells = by_rank.view(-1).numpy(), ranks.view(by_rank.shape).numpy()
        cells = torch.empty_like(by_rank)
        rows = max(1, _WIDE_VALUES // channels)
        for first in range(0, height * width, rows):
            places = of_cells[first : first + rows] * np.int64(channels) + np.arange(channels)
            flat.take(places, out=cells[first : first + rows].numpy(), mode="clip")
        return cells.view(ranks.shape)


def ranks_of_cells(cells: np.ndarray) -> np.ndarray:
    """Ranks [H, W, C] from 0 to H * W - 1 of the cells of each channel, int16 or int32, the largest value's highest.

    Of equal cells, the first in the order of rows has the highest rank.
    """
    height, width, channels = cells.shape
    count = height * width
    ranks = np.empty((count, channels), np.int16 if count <= np.iinfo(np.int16).max else np.int32)
    rising = np.arange(count, dtype=ranks.dtype)[None]
    part_of_channels = max(1, _WIDE_VALUES // count)
    for first in range(0, channels, part_of_channels):
        part = slice(first, first + part_of_channels)
        # Backwards, so that of equal ones the first cell is sorted last.
        order = count - 1 - _order(cells.reshape(count, channels)[::-1, part].T)
        of_part = np.empty(order.shape, ranks.dtype)
        np.put_along_axis(of_part, order, rising, 1)
        ranks[:, part] = of_part.T
    return ranks.reshape(height, width, channels)


def _order(values: np.ndarray) -> np.ndarray:
    """Places [C, R], int64, of values [C, R] in rising order, those of equal ones in their order."""
    if values.dtype != np.float32:
        return np.argsort(values, axis=1, kind="stable")
    # Sorting whole numbers, value and place in one, is three to five times as fast as a stable sort of places.
    # Adding 0 makes one zero of the two; the bits of negative values fall where their values rise.
    bits = np.ascontiguousarray(values + np.float32(0)).view(np.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64) << 32
    keys |= np.arange(values.shape[1])
    keys.sort(axis=1)
    order: np.ndarray = keys & 0xFFFFFFFF
    return order


def _add_rows(total: torch.Tensor, places: np.ndarray, gradient: torch.Tensor) -> None:
    """Add gradient [K, bins * C] to total [R, C], at row places [K, bins * C] of each value's own channel."""
    channels = total.shape[1]
    # Not less than the map, which is filled with zeros and added once for each group.
    windows = max(1, min(len(gradient), max(_WIDE_VALUES, total.numel()) // gradient.shape[1]))
    # A thread adds its share of a group to a total of its own: where adding up the totals takes less than it spares.
    shares = max(1, min(torch.get_num_threads(), windows, _WIDE_VALUES // (2 * total.numel())))
    windows -= windows % shares
    # Memory that is used again spares a third of the time: new pages are slow.
    wide = torch.empty((windows, gradient.shape[1]), dtype=torch.int64)
    added = total.new_empty((shares, *total.shape))
    first = 0
    while first < len(gradient):
        left = min(windows, len(gradient) - first)
        # The last few windows cannot be shared evenly.
        maps = shares if left >= shares else 1
        count = left - left % maps
        part = slice(first, first + count)
        wide.numpy()[:count] = places[part]
        # What torch calls the backward of adaptive pooling is a loop over the values of each map, that adds them at
        # given places, in their order; with channels last it is ten times as fast as `scatter_add_`.
        torch.ops.aten.adaptive_max_pool2d_backward.grad_input(
            _as_maps(gradient[part], maps, channels),
            _as_maps(added[:maps], maps, channels),
            _as_maps(wide[:count], maps, channels),
            grad_input=_as_maps(added[:maps], maps, channels),
        )
        for one in added[:maps]:
            np.add(total.numpy(), one.numpy(), out=total.numpy())
        first += count


def _as_maps(values: torch.Tensor, maps: int, channels: int) -> torch.Tensor:
    """Values as maps [maps, C, R, 1], channels last."""
    return values.reshape(maps, -1, 1, channels).permute(0, 3, 1, 2)


class _MeanOfBlocks(torch.autograd.Function):
    @staticmethod
    def forward(cells: torch.Tensor, *edges: torch.Tensor) -> torch.Tensor:
        return mean_of_blocks(cells, *edges)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        cells, *edges = inputs
        ctx.shape = cells.shape
        ctx.save_for_backward(*edges)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _GradientOfMean.apply(gradient, ctx.shape, *ctx.saved_tensors), None, None, None, None


class _GradientOfMean(_Once):
    @staticmethod
    def forward(gradient: torch.Tensor, shape: torch.Size, *edges: torch.Tensor) -> torch.Tensor:
        """Gradient [H, W, C] of cells of that shape, from that of means [B, C] over blocks with edges [B]."""
        top, bottom, left, right = (edge.numpy() for edge in edges)
        tall, wide = bottom - top, right - left
        gradient = gradient.contiguous()
        share = torch.from_numpy(1 / (tall * wide)).to(gradient.dtype)
        # Over blocks of 2^i x 1 cells, and of 2^i x 2^j cells, by their first cell.
        columns = gradient.new_zeros((0, *shape[1:]))
        for i in reversed(range(int(tall.max(initial=1)).bit_length())):
            height = shape[0] - (1 << i) + 1
            y = top + (tall >> (i + 1) << (i + 1))
            table = gradient.new_zeros((height, 0, shape[2]))
            for j in reversed(range(int(wide.max(initial=1)).bit_length())):
                width = shape[1] - (1 << j) + 1
                x = left + (wide >> (j + 1) << (j + 1))
                chosen = np.flatnonzero((tall >> i) & (wide >> j) & 1)
                larger, table = table, _sums(gradient, share, chosen, (y * width + x)[chosen], height * width)
                table = table.view(height, width, shape[2])
                table[:, : larger.shape[1]] += larger
                table[:, width - larger.shape[1] :] += larger
            table[: len(columns)] += columns
            table[height - len(columns) :] += columns
            columns = table
        return columns


def _sums(
    gradient: torch.Tensor, share: torch.Tensor, chosen: np.ndarray, places: np.ndarray, count: int
) -> torch.Tensor:
    """Sums [count, C] of the chosen rows of a gradient [B, C], each times its share, by the place of each of them."""
    order = torch.from_numpy(chosen[np.argsort(places, kind="stable")])
    ends = np.cumsum(np.bincount(places, minlength=count))
    first = torch.from_numpy(np.concatenate([[0], ends[:-1]]))
    return F.embedding_bag(order, gradient, first, mode="sum", per_sample_weights=share[order])
