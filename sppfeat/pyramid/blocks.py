"""Maxima and means over blocks of cells, in torch on any device: every block is a few look-ups in tables of blocks."""

from __future__ import annotations

import torch


def max_of_blocks(
    cells: torch.Tensor, top: torch.Tensor, bottom: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """Maxima [B, C] over the blocks top..bottom, left..right (exclusive ends) of cells [H, W, C]."""
    height, width, channels = cells.shape
    # The largest powers of two that fit in a block; two such spans, one at each end, cover it.
    powers = torch.tensor([max(1, n).bit_length() - 1 for n in range(max(height, width) + 1)], device=cells.device)
    a, b = powers[bottom - top], powers[right - left]
    output = cells.new_empty((len(top), channels))
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    tall = cells
    for i in range(int(a.max()) + 1 if len(top) else 0):
        if i:
            half = 1 << (i - 1)
            tall = torch.maximum(tall[: tall.shape[0] - half], tall[half:])
        table = tall
        for j in range(int(b.max()) + 1):
            if j:
                half = 1 << (j - 1)
                table = torch.maximum(table[:, : table.shape[1] - half], table[:, half:])
            chosen = ((a == i) & (b == j)).nonzero().squeeze(1)
            if len(chosen):
                rows, columns = table.shape[:2]
                flat = table.reshape(rows * columns, channels)
                y1, y2 = top[chosen], bottom[chosen] - (1 << i)
                x1, x2 = left[chosen], right[chosen] - (1 << j)
                upper = torch.maximum(flat[y1 * columns + x1], flat[y1 * columns + x2])
                lower = torch.maximum(flat[y2 * columns + x1], flat[y2 * columns + x2])
                parts.append((chosen, torch.maximum(upper, lower)))
    if not parts:
        return output
    return output.index_copy(0, torch.cat([at for at, _ in parts]), torch.cat([part for _, part in parts]))


def mean_of_blocks(
    cells: torch.Tensor, top: torch.Tensor, bottom: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """Means [B, C] over the blocks top..bottom, left..right (exclusive ends) of cells [H, W, C]."""
    height, width = bottom - top, right - left
    # Half precision is for storing, not for summing.
    tall = cells.float() if cells.dtype.itemsize < 4 else cells
    total = tall.new_zeros((len(top), cells.shape[2]))
    # A block is tiled with blocks of 2^a x 2^b cells, one per binary digit of its sides, the largest first.
    # Differences of running sums would need fewer look-ups, but lose a weak bin in the rounding of strong ones.
    for i in range(int(height.max()).bit_length() if len(top) else 0):
        if i:
            half = 1 << (i - 1)
            tall = tall[: tall.shape[0] - half] + tall[half:]
        y = top + (height >> (i + 1) << (i + 1))
        table = tall
        for j in range(int(width.max()).bit_length()):
            if j:
                half = 1 << (j - 1)
                table = table[:, : table.shape[1] - half] + table[:, half:]
            x = left + (width >> (j + 1) << (j + 1))
            chosen = ((height >> i) & (width >> j) & 1).nonzero().squeeze(1)
            if len(chosen):
                total.index_add_(0, chosen, table.flatten(0, 1)[(y * table.shape[1] + x)[chosen]])
    return total / (height * width).unsqueeze(1)
