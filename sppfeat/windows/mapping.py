"""Windows mapped onto feature maps, and to the scales that suit them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from sppfeat.backbones import Geometry
from sppfeat.errors import UsageError
from sppfeat.windows.boxes import areas

# A window's scale brings its area closest to the square of this side: the training size of ImageNet networks.
CANONICAL_SIDE: Final = 224


def outside(windows: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[K] whether each window of [K, 4] reaches outside an image of `size`, width and height."""
    width, height = size
    result: np.ndarray = (windows[:, :2] < 0).any(1) | (windows[:, 2] > width - 1) | (windows[:, 3] > height - 1)
    return result


def map_windows(
    windows: np.ndarray,
    size: tuple[int, int],
    input_size: tuple[int, int],
    columns: Geometry,
    rows: Geometry,
) -> np.ndarray:
    """Rois [K, 4] int64 (cells x1, y1, x2, y2, inclusive) of windows [K, 4] on a feature map.

    size: width and height of the upright original. input_size: of the network's input, to which the original was
    resized. columns, rows: the map's geometry along x and y, see `Description.geometry`.

    With stride S and offset o of the map, an edge at input pixel x lies at cell floor((x - o) / S) + 1 on the left and
    top, ceil((x - o) / S) - 1 on the right and bottom: the cells whose centers are strictly inside (He et al. 2014,
    section 4 and appendix A, where o is 0). If no center is inside, the roi is the cell nearest the window's middle.
    Edges on the image's border map to the map's border: otherwise a network with o = 0 would lose its first cells, and
    a window of the whole image would not have the image's descriptor.
    """
    windows = np.asarray(windows, np.float64)
    if windows.ndim != 2 or windows.shape[1] != 4:
        raise UsageError(f"windows must be [K, 4], found {list(windows.shape)}")
    first_x, last_x = _map_axis(windows[:, 0], windows[:, 2], size[0], input_size[0], columns)
    first_y, last_y = _map_axis(windows[:, 1], windows[:, 3], size[1], input_size[1], rows)
    return np.stack([first_x, first_y, last_x, last_y], 1)


def _map_axis(
    first: np.ndarray, last: np.ndarray, length: int, input_length: int, axis: Geometry
) -> tuple[np.ndarray, np.ndarray]:
    ratio = input_length / length
    # Resizing keeps the image's outer edges, which lie half a pixel outside the first and last centers.
    begin, end = ((edge + 0.5) * ratio - 0.5 - axis.offset for edge in (first, last))
    low = np.floor(begin / axis.stride) + 1
    high = np.ceil(end / axis.stride) - 1
    low[first <= 0] = 0
    high[last >= length - 1] = axis.size - 1
    between = low > high
    low[between] = high[between] = np.floor((begin + end)[between] / (2 * axis.stride) + 0.5)
    cells = np.clip(np.stack([low, high]), 0, axis.size - 1).astype(np.int64)
    return cells[0], cells[1]


def part_of_image(part: np.ndarray, input_size: tuple[int, int], columns: Geometry, rows: Geometry) -> np.ndarray:
    """[4] what part of an image a part [4] of its feature map is pooled from: the way back from `map_windows`.

    Both are x1, y1, x2, y2, edges from 0 to 1. Two cells meet in the middle between the pixels that they are centered
    on; the map's border is the image's.
    """
    along_x, along_y = (_edges(length, axis) for length, axis in zip(input_size, (columns, rows), strict=True))
    x1, y1, x2, y2 = part
    return np.array([along_x(x1), along_y(y1), along_x(x2), along_y(y2)])


def _edges(input_length: int, axis: Geometry) -> Callable[[float], float]:
    """Where along an image, from 0 to 1, a place along its map is."""
    cells = np.arange(axis.size + 1)
    # Pixel x reaches from x to x + 1 where edges are counted.
    places = ((axis.offset + axis.stride * (cells - 0.5) + 0.5) / input_length).clip(0, 1)
    places[0], places[-1] = 0, 1
    return lambda edge: float(np.interp(edge * axis.size, cells, places))


def nearest_scales(windows: np.ndarray, size: tuple[int, int], input_sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """[K] index of the input size that brings each window's area closest to 224 x 224; the first of equals.

    windows: [K, 4] on an original of `size`. input_sizes: width and height of the resized image, one per scale.
    """
    area = areas(windows) / (size[0] * size[1])
    scaled = area[:, None] * np.array([[width * height for width, height in input_sizes]], np.float64)
    result: np.ndarray = np.abs(scaled - CANONICAL_SIDE**2).argmin(1)
    return result
