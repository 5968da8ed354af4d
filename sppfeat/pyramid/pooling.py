"""Spatial pyramid pooling of whole feature maps and of windows on them.

Source: He, Zhang, Ren, Sun, "Spatial Pyramid Pooling in Deep Convolutional Networks for Visual Recognition", ECCV 2014
(arXiv:1406.4729). Level n is an n x n grid; on a map of height h and width w, bin (i, j) covers rows floor(i*h/n) up to
ceil((i+1)*h/n), exclusive, and columns likewise: never empty, overlapping where n does not divide h. A pooled row holds
the levels in the order given, the bins of a level row by row, and each bin's channels next to each other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import nn

from sppfeat.errors import SppFeatWarning, UsageError, one_line, unknown_name
from sppfeat.pyramid.blocks import max_of_blocks, mean_of_blocks
from sppfeat.pyramid.cpu import GEM_FLOOR, max_of_rois
from sppfeat.pyramid.gradients import max_of_windows, mean_of_blocks_with_gradient
from sppfeat.recipe import MAX_GEM_P, MAX_LEVEL, POOLINGS

# The types that NumPy has, too; it has no bfloat16.
_NUMPY_DTYPES: Final = (torch.float16, torch.float32, torch.float64)


def pool_pyramid(
    feature_map: torch.Tensor, levels: Sequence[int], *, pooling: str = "max", gem_p: float = 3.0
) -> torch.Tensor:
    """Pool whole maps [N, C, H, W] into [N, bins * C], in the map's dtype; differentiable.

    pooling: `max`, `avg`, or `gem`, the generalized mean of values clamped from below at 1e-6, with exponent `gem_p`.
    Fastest on channels-last maps. Raises UsageError for other shapes, levels or poolings.
    """
    _check(levels, pooling, gem_p)
    if feature_map.dim() != 4 or min(feature_map.shape[1:]) < 1:
        raise UsageError(f"feature_map must be [N, C, H, W] and not empty, found {list(feature_map.shape)}")
    cells = _to_power(feature_map, pooling, gem_p)
    # Channels last is what makes every later step, and the copy into the result, stream.
    cells = cells.contiguous(memory_format=torch.channels_last)
    # With a gradient, torch's pooling can be differentiated any number of times.
    if _suits_triton(cells, pooling) and not _wants_gradient(feature_map):
        maps = torch.arange(len(cells), dtype=torch.int32, device=cells.device)[:, None]
        corners = [torch.full_like(maps, end) for end in (0, 0, cells.shape[3] - 1, cells.shape[2] - 1)]
        rows = _by_triton(cells.permute(0, 2, 3, 1), torch.cat([maps, *corners], 1), levels)
        if rows is not None:
            return rows
    adaptive = F.adaptive_max_pool2d if pooling == "max" else F.adaptive_avg_pool2d
    return _pool_levels(lambda level: adaptive(cells, level), levels, pooling, gem_p).to(feature_map.dtype)


def pool_rois(
    feature_map: torch.Tensor,
    rois: torch.Tensor,
    levels: Sequence[int],
    *,
    pooling: str = "max",
    gem_p: float = 3.0,
) -> torch.Tensor:
    """Pool K windows of one map [C, H, W] into [K, bins * C], in the map's dtype; differentiable.

    rois: [K, 4] whole numbers x1, y1, x2, y2 in feature-map cells, inclusive ends, inside the map.
    Each roi is pooled as a separate map, from tables in which every bin is a few look-ups: maxima or sums over
    blocks of 2^a x 2^b cells. Raises UsageError for rois that are empty or reach outside the map.

    On a CPU, differentiable once (see `gradients`): of equal maxima of a bin, the first cell gets the gradient. So it
    is on an NVIDIA GPU, with maxima in float32 or half precision, where Triton works (see `triton_kernels`).
    """
    _check(levels, pooling, gem_p)
    if feature_map.dim() != 3 or min(feature_map.shape) < 1:
        raise UsageError(f"feature_map must be [C, H, W] and not empty, found {list(feature_map.shape)}")
    _check_rois(rois, feature_map.shape[1], feature_map.shape[2])
    rois = rois.to(device=feature_map.device, dtype=torch.int64)
    cells = _to_power(feature_map.permute(1, 2, 0), pooling, gem_p).contiguous()
    # What torch compiles with a gradient stays in torch.
    if _suits_triton(cells, pooling) and not (_wants_gradient(feature_map) and torch.compiler.is_compiling()):
        windows = torch.cat([torch.zeros_like(rois[:, :1]), rois], 1).to(torch.int32)
        rows = _by_triton(cells[None], windows, levels)
        if rows is not None:
            return rows
    if pooling == "max" and cells.device.type == "cpu":
        if _wants_gradient(feature_map):
            # Half precision is for storing, not for summing: gradients are rounded to it once.
            wide = cells.float() if cells.dtype.itemsize < 4 else cells
            return max_of_windows(wide, rois, levels).to(feature_map.dtype)
        if cells.dtype in _NUMPY_DTYPES:
            return torch.from_numpy(max_of_rois(cells.detach().numpy(), rois.numpy(), levels))
    if pooling == "max":
        blocks = max_of_blocks
    elif cells.device.type == "cpu" and _wants_gradient(feature_map):
        blocks = mean_of_blocks_with_gradient
    else:
        blocks = mean_of_blocks
    return pool_blocks(cells, rois, levels, pooling, gem_p, blocks).to(feature_map.dtype)


def pool_blocks(
    cells: torch.Tensor,
    rois: torch.Tensor,
    levels: Sequence[int],
    pooling: str,
    gem_p: float,
    blocks: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """The torch form of `pool_rois`: rows [K, bins * C] of windows on cells [H, W, C], with gem their powers.

    blocks: `blocks.max_of_blocks`, `blocks.mean_of_blocks`, or a function like them.
    """

    def pool(level: int) -> torch.Tensor:
        y1, y2, x1, x2 = _roi_edges(rois, level)
        grid = (len(rois), level, level)
        top, bottom = (edge[:, :, None].expand(grid).reshape(-1) for edge in (y1, y2))
        left, right = (edge[:, None, :].expand(grid).reshape(-1) for edge in (x1, x2))
        return blocks(cells, top, bottom, left, right).view(*grid, cells.shape[2]).permute(0, 3, 1, 2)

    return _pool_levels(pool, levels, pooling, gem_p)


class SpatialPyramidPool(nn.Module):
    """`pool_pyramid` and `pool_rois` as a layer, for a network that ends in fully connected layers.

    forward(feature_map [N, C, H, W]) -> [N, bins * C]
    forward(feature_map [N, C, H, W], rois: N tensors [K_n, 4]) -> [sum of K_n, bins * C]
    """

    def __init__(self, levels: Sequence[int] = (6, 3, 2, 1), *, pooling: str = "max", gem_p: float = 3.0) -> None:
        super().__init__()
        _check(levels, pooling, gem_p)
        self.levels = tuple(levels)
        self.pooling = pooling
        self.gem_p = gem_p

    @property
    def bins(self) -> int:
        """Bins of the pyramid: the output has this many times the map's channels."""
        return sum(level * level for level in self.levels)

    def forward(self, feature_map: torch.Tensor, rois: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        """Pool whole maps, or the windows of each; see the class."""
        if rois is None:
            return pool_pyramid(feature_map, self.levels, pooling=self.pooling, gem_p=self.gem_p)
        if len(rois) != len(feature_map):
            raise UsageError(f"rois must be one tensor per map, expected {len(feature_map)}, found {len(rois)}")
        if not len(rois):
            return feature_map.new_zeros((0, self.bins * feature_map.shape[1]))
        return torch.cat(
            [
                pool_rois(one, windows, self.levels, pooling=self.pooling, gem_p=self.gem_p)
                for one, windows in zip(feature_map, rois, strict=True)
            ]
        )

    def extra_repr(self) -> str:
        return f"levels={self.levels}, pooling={self.pooling!r}"


def _wants_gradient(feature_map: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and feature_map.requires_grad


# Set once the kernels have failed here, so that they are tried, and warned about, only once.
_triton_failed = False


def _suits_triton(cells: torch.Tensor, pooling: str) -> bool:
    """Whether the kernels of `triton_kernels` can compute this."""
    return (
        cells.device.type == "cuda"
        and pooling == "max"
        and cells.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and not _triton_failed
    )


def _by_triton(cells: torch.Tensor, windows: torch.Tensor, levels: Sequence[int]) -> torch.Tensor | None:
    """`triton_kernels.max_of_windows`; None, with a warning the first time, if it does not work."""
    global _triton_failed
    try:
        from sppfeat.pyramid.triton_kernels import max_of_windows

        # Triton launches on the current device, whatever the tensors' device is.
        with torch.cuda.device_of(cells):  # type: ignore[no-untyped-call]
            return max_of_windows(cells, windows, levels)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler that is missing, or too old for the driver or the GPU, can fail in any way
        _triton_failed = True
        warnings.warn(
            f"the pyramid's Triton kernels do not work here ({one_line(error)}); falling back to PyTorch",
            SppFeatWarning,
            stacklevel=3,
        )
        return None


def _check(levels: Sequence[int], pooling: str, gem_p: float) -> None:
    if not len(levels) or not all(isinstance(n, int) and 1 <= n <= MAX_LEVEL for n in levels):
        raise UsageError(f"levels must be whole numbers from 1 to {MAX_LEVEL}, such as 6,3,2,1, found {tuple(levels)}")
    if pooling not in POOLINGS:
        raise UsageError(unknown_name("pooling", pooling, POOLINGS))
    if not 1 <= gem_p <= MAX_GEM_P:
        raise UsageError(f"gem_p must be a number from 1 to {MAX_GEM_P:g}, found {gem_p!r}")


def _check_rois(rois: torch.Tensor, height: int, width: int) -> None:
    if rois.dim() != 2 or rois.shape[1] != 4 or rois.is_floating_point():
        raise UsageError(f"rois must be whole numbers [K, 4], found {rois.dtype} {list(rois.shape)}")
    x1, y1, x2, y2 = rois.unbind(1)
    wrong = (x1 < 0) | (y1 < 0) | (x2 < x1) | (y2 < y1) | (x2 >= width) | (y2 >= height)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise UsageError(f"roi {at}: expected x1 <= x2 < {width} and y1 <= y2 < {height}, found {rois[at].tolist()}")


def _pool_levels(
    pool: Callable[[int], torch.Tensor], levels: Sequence[int], pooling: str, gem_p: float
) -> torch.Tensor:
    """Rows [N, bins * C] from maps [N, C, level, level], each pooled or, where levels nest, taken from a finer one."""
    pooled: dict[int, torch.Tensor] = {}
    for level in sorted(levels, reverse=True):
        # The bins of a level are unions of bins of its multiples, and maxima of maxima are exact; means are not.
        finer = min((n for n in pooled if n % level == 0), default=None) if pooling == "max" else None
        pooled[level] = pool(level) if finer is None else F.max_pool2d(pooled[finer], finer // level)
    rows = torch.cat([pooled[level].permute(0, 2, 3, 1).flatten(1) for level in levels], 1)
    return rows.clamp(min=GEM_FLOOR**gem_p).pow(1 / gem_p) if pooling == "gem" else rows


def _to_power(cells: torch.Tensor, pooling: str, gem_p: float) -> torch.Tensor:
    if pooling == "avg" and cells.dtype.itemsize < 4:
        return cells.float()  # half precision is for storing, not for summing; the result is rounded once
    if pooling != "gem":
        return cells
    # Single precision cannot hold the 10th power of a large value, nor that of the floor.
    return cells.double().clamp(min=GEM_FLOOR).pow(gem_p)


def _roi_edges(rois: torch.Tensor, level: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """First and one-past-last rows, then columns, [K, level] each, of the bins of rois."""
    return (*_roi_bins(rois[:, 1], rois[:, 3], level), *_roi_bins(rois[:, 0], rois[:, 2], level))


def _roi_bins(first: torch.Tensor, last: torch.Tensor, level: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First and one-past-last cell [K, level] of the bins along one axis of rois."""
    steps = torch.arange(level, device=first.device)
    length = (last - first + 1)[:, None]
    start = first[:, None] + steps * length // level
    end = first[:, None] + ((steps + 1) * length + level - 1) // level
    return start, end
