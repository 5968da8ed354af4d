"""Slow, obvious implementations to compare with: plain loops over cells, none of the library's code."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

GEM_FLOOR = 1e-6


def bin_edges(length: int, level: int) -> list[tuple[int, int]]:
    """First and one-past-last cell of each of `level` bins over `length` cells: floor(i*h/n) .. ceil((i+1)*h/n)."""
    return [(math.floor(i * length / level), math.ceil((i + 1) * length / level)) for i in range(level)]


def pool_cells(cells: list[float], pooling: str, gem_p: float) -> float:
    """One bin of one channel."""
    if pooling == "max":
        return max(cells)
    if pooling == "avg":
        return math.fsum(cells) / len(cells)
    assert pooling == "gem"
    return (math.fsum(max(cell, GEM_FLOOR) ** gem_p for cell in cells) / len(cells)) ** (1 / gem_p)


def pool_map(feature_map: np.ndarray, levels: Sequence[int], pooling: str, gem_p: float = 3.0) -> np.ndarray:
    """Pool one map [C, H, W] into [bins, C]."""
    channels, height, width = feature_map.shape
    rows = []
    for level in levels:
        for top, bottom in bin_edges(height, level):
            for left, right in bin_edges(width, level):
                bin_of_channels = []
                for c in range(channels):
                    cells = [float(feature_map[c, y, x]) for y in range(top, bottom) for x in range(left, right)]
                    bin_of_channels.append(pool_cells(cells, pooling, gem_p))
                rows.append(bin_of_channels)
    return np.array(rows)


def pool_maps(maps: np.ndarray, levels: Sequence[int], pooling: str, gem_p: float = 3.0) -> np.ndarray:
    """Pool maps [N, C, H, W] into [N, bins * C]."""
    return np.stack([pool_map(one, levels, pooling, gem_p).reshape(-1) for one in maps])


def pool_windows(
    feature_map: np.ndarray, rois: Sequence[Sequence[int]], levels: Sequence[int], pooling: str, gem_p: float = 3.0
) -> np.ndarray:
    """Pool windows x1, y1, x2, y2 (inclusive ends) of one map [C, H, W] into [K, bins * C]."""
    return np.stack(
        [
            pool_map(feature_map[:, y1 : y2 + 1, x1 : x2 + 1], levels, pooling, gem_p).reshape(-1)
            for x1, y1, x2, y2 in rois
        ]
    )


def normalize(descriptor: Sequence[float], kind: str) -> list[float]:
    """One descriptor, normalised by `l2`, `signed-sqrt-l2` or `none`; one of zeros stays as it is."""
    values = [float(v) for v in descriptor]
    if kind == "none":
        return values
    if kind == "signed-sqrt-l2":
        values = [math.copysign(math.sqrt(abs(v)), v) for v in values]
    length = math.sqrt(math.fsum(v * v for v in values))
    return [v / length for v in values] if length > 0 else values


def fuse(parts: Sequence[Sequence[float]], kind: str) -> list[float]:
    """Descriptors of one picture at several scales as one: `mean`, `max` or `concat`."""
    if kind == "concat":
        return [float(v) for part in parts for v in part]
    columns = list(zip(*parts, strict=True))
    if kind == "max":
        return [float(max(column)) for column in columns]
    return [math.fsum(column) / len(column) for column in columns]


def cosine_ranking(queries: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows in the order of falling cosine similarity with each query, equal ones in their order; and the cosines."""

    def units(values: np.ndarray) -> np.ndarray:
        return np.array([normalize(row, "l2") for row in values])

    cosines = units(queries) @ units(rows).T
    order = np.argsort(-np.round(cosines, 12), axis=1, kind="stable")
    return order, np.take_along_axis(cosines, order, 1)


def retrieval_precision(relevant: Sequence[bool], *, trapezoid: bool = False) -> float:
    """Average precision of a ranking of all relevant rows, rank by rank; Oxford's compute_ap.cpp with `trapezoid`."""
    total, found, area, recall, precision = sum(relevant), 0, 0.0, 0.0, 1.0
    for rank, hit in enumerate(relevant, 1):
        found += hit
        new_recall, new_precision = found / total, found / rank
        area += (new_recall - recall) * ((precision + new_precision) / 2 if trapezoid else new_precision)
        recall, precision = new_recall, new_precision
    return area


def principal_components(rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean [D], eigenvalues [K] of the covariance and their vectors [D, K], of rows [N, D] brought to length 1."""
    units = np.array([normalize(row, "l2") for row in rows])
    mean = units.mean(0)
    _, singular, vectors = np.linalg.svd(units - mean, full_matrices=False)
    return mean, singular[:count] ** 2 / len(rows), vectors[:count].T


def map_edge_pair(
    first: float, last: float, length: int, input_length: int, size: int, stride: int, offset: float
) -> tuple[int, int]:
    """First and last cell of a window along one axis: the cells whose centres lie strictly between its edges.

    Edges on the picture's border reach to the map's; where no centre is inside, the cell nearest the window's middle.
    """
    begin = (first + 0.5) * input_length / length - 0.5
    end = (last + 0.5) * input_length / length - 0.5
    centres = [offset + stride * cell for cell in range(-1000, 1000)]
    inside = [
        cell
        for cell, centre in zip(range(-1000, 1000), centres, strict=True)
        if (centre > begin or (first <= 0 and cell >= 0)) and (centre < end or (last >= length - 1 and cell < size))
    ]
    if inside:
        low, high = min(inside), max(inside)
        low, high = (0 if first <= 0 else low), (size - 1 if last >= length - 1 else high)
    else:
        middle = (begin + end) / 2
        low = high = max(range(-1000, 1000), key=lambda cell: (-abs(offset + stride * cell - middle), cell))
    return min(max(low, 0), size - 1), min(max(high, 0), size - 1)
