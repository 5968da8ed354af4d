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


def gradient_of_windows(
    feature_map: np.ndarray,
    rois: Sequence[Sequence[int]],
    levels: Sequence[int],
    pooling: str,
    of_rows: np.ndarray,
    gem_p: float = 3.0,
) -> np.ndarray:
    """The gradient [C, H, W] of a map, from that of its pooled windows [K, bins * C]; of equal maxima, the first's."""
    channels = len(feature_map)
    found = np.zeros(feature_map.shape)
    for (x1, y1, x2, y2), of_row in zip(rois, of_rows, strict=True):
        of_bins = iter(of_row.reshape(-1, channels).tolist())
        for level in levels:
            for top, bottom in bin_edges(y2 - y1 + 1, level):
                for left, right in bin_edges(x2 - x1 + 1, level):
                    places = [(y, x) for y in range(y1 + top, y1 + bottom) for x in range(x1 + left, x1 + right)]
                    for c, value in enumerate(next(of_bins)):
                        cells = [float(feature_map[c, y, x]) for y, x in places]
                        pooled = pool_cells(cells, pooling, gem_p)
                        if pooling == "max":
                            found[c][places[cells.index(pooled)]] += value
                            continue
                        for place, cell in zip(places, cells, strict=True):
                            slope = 1.0
                            if pooling == "gem":
                                slope = (cell / pooled) ** (gem_p - 1) if cell >= GEM_FLOOR else 0.0
                            found[c][place] += value * slope / len(cells)
    return found


def one_hot(word_map: np.ndarray, words: int) -> np.ndarray:
    """The map [words, H, W] of a map of words [H, W]: 1 at each cell's word, else 0."""
    height, width = word_map.shape
    found = np.zeros((words, height, width))
    for y in range(height):
        for x in range(width):
            found[word_map[y, x], y, x] = 1
    return found


def level_weights(levels: Sequence[int]) -> list[float]:
    """The weight of each level in pyramid matching: half of a finer one's, and the coarsest as much as the next."""
    falling = sorted(levels, reverse=True)
    weights, weight = {}, 1.0
    for n in falling[:-1]:
        weight /= 2
        weights[n] = weight
    weights[falling[-1]] = weight
    return [weights[n] for n in levels]


def pool_words(word_map: np.ndarray, words: int, levels: Sequence[int], pooling: str) -> np.ndarray:
    """Pool a map of words [H, W] into [bins * words]; with avg, each level by its weight, shared among its bins."""
    rows = []
    for level, weight in zip(levels, level_weights(levels), strict=True):
        pooled = pool_map(one_hot(word_map, words), [level], pooling)
        rows.append(pooled * (weight / (level * level) if pooling == "avg" else 1))
    return np.concatenate(rows).reshape(-1)


def normalize(descriptor: Sequence[float], kind: str) -> list[float]:
    """One descriptor, normalized by `l2`, `signed-sqrt-l2` or `none`; one of zeros stays as it is."""
    values = [float(v) for v in descriptor]
    if kind == "none":
        return values
    if kind == "signed-sqrt-l2":
        values = [math.copysign(math.sqrt(abs(v)), v) for v in values]
    length = math.sqrt(math.fsum(v * v for v in values))
    return [v / length for v in values] if length > 0 else values


def fuse(parts: Sequence[Sequence[float]], kind: str) -> list[float]:
    """Descriptors of one image at several scales as one: `mean`, `max` or `concat`."""
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
    """First and last cell of a window along one axis: the cells whose centers lie strictly between its edges.

    Edges on the image's border reach to the map's; where no center is inside, the cell nearest the window's middle.
    """
    begin = (first + 0.5) * input_length / length - 0.5
    end = (last + 0.5) * input_length / length - 0.5
    centers = [offset + stride * cell for cell in range(-1000, 1000)]
    inside = [
        cell
        for cell, center in zip(range(-1000, 1000), centers, strict=True)
        if (center > begin or (first <= 0 and cell >= 0)) and (center < end or (last >= length - 1 and cell < size))
    ]
    if inside:
        low, high = min(inside), max(inside)
        low, high = (0 if first <= 0 else low), (size - 1 if last >= length - 1 else high)
    else:
        middle = (begin + end) / 2
        low = high = max(range(-1000, 1000), key=lambda cell: (-abs(offset + stride * cell - middle), cell))
    return min(max(low, 0), size - 1), min(max(high, 0), size - 1)


def box_overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two windows of whole pixels, both ends inclusive."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + 1)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
    area_a, area_b = ((x[2] - x[0] + 1) * (x[3] - x[1] + 1) for x in (a, b))
    return width * height / (area_a + area_b - width * height)


def voted_boxes(kept: np.ndarray, boxes: np.ndarray, votes: np.ndarray, overlap: float) -> np.ndarray:
    """Each kept box moved to the mean, by votes, of the boxes that overlap it by more than `overlap`."""
    result = []
    for one in kept:
        near = [(vote, box) for vote, box in zip(votes, boxes, strict=True) if box_overlap(one, box) > overlap]
        total = sum(vote for vote, _ in near)
        result.append(sum(vote * box for vote, box in near) / total if total > 0 else one)
    return np.array(result, np.float64).reshape(-1, 4)


def suppress(
    boxes: Sequence[Sequence[float]], scores: Sequence[float], labels: Sequence[int], overlap: float
) -> list[int]:
    """Greedy suppression within each label: numbers of the boxes that stay, the best score first."""
    stay: list[int] = []
    for at in sorted(range(len(boxes)), key=lambda i: (-scores[i], i)):
        if all(labels[at] != labels[o] or box_overlap(boxes[at], boxes[o]) <= overlap for o in stay):
            stay.append(at)
    return stay


def voc_eval(
    images: Sequence[dict[str, list]],
    overlap: float,
    method: str,  # type: ignore[type-arg]
) -> float:
    """Average precision of a class as in VOCevaldet.m and VOCap.m; images have boxes, difficult, found, scores."""

    every = [(-s, p, d) for p, one in enumerate(images) for d, s in enumerate(one["scores"])]
    every.sort(key=lambda entry: (entry[0], entry[1], entry[2]))
    positives = sum(not d for one in images for d in one["difficult"])
    taken: set[tuple[int, int]] = set()
    true, false, precisions, recalls = 0, 0, [], []
    for _, p, d in every:
        one = images[p]
        best, which = -1.0, -1
        for g, box in enumerate(one["boxes"]):
            if (shared := box_overlap(one["found"][d], box)) > best:
                best, which = shared, g
        if best >= overlap and one["difficult"][which]:
            continue
        if best >= overlap and (p, which) not in taken:
            taken.add((p, which))
            true += 1
        else:
            false += 1
        precisions.append(true / (true + false))
        recalls.append(true / positives)
    if method == "11-point":
        total = 0.0
        for tenth in range(11):
            # Compared as whole numbers, so that 3 of 10 reaches 0.3.
            above = [
                p for p, r in zip(precisions, recalls, strict=True) if round(r * positives) * 10 >= tenth * positives
            ]
            total += max(above, default=0.0)
        return total / 11
    area, before = 0.0, 0.0
    for at, recall in enumerate(recalls):
        area += (recall - before) * max(precisions[at:])
        before = recall
    return area


def oxford_precision(ranking: Sequence[str], positive: set[str], ambiguous: set[str]) -> float:
    """Average precision of names as the program of Oxford5k walks them, rank by rank, skipping the ambiguous."""
    precision, recall, area = 1.0, 0.0, 0.0
    seen, found = 0, 0
    for name in ranking:
        if name in ambiguous:
            continue
        seen += 1
        found += name in positive
        area += (found / len(positive) - recall) * (precision + found / seen) / 2
        precision, recall = found / seen, found / len(positive)
    return area


def precision_at(ranking: Sequence[str], positive: set[str], junk: set[str], k: int) -> float:
    """Precision at k of revisited Oxford and Paris: without junk, and no further down than the last positive name."""
    kept = [name for name in ranking if name not in junk]
    end = min(k, 1 + max(place for place, name in enumerate(kept) if name in positive))
    return len([name for name in kept[:end] if name in positive]) / end


def best_rectangle(
    query: np.ndarray,
    bins: np.ndarray,
    cells: int = 3,
    *,
    least: int = 1,
    power: float = 0.0,
    mean: np.ndarray | None = None,
    matrix: np.ndarray | None = None,
) -> tuple[float, list[list[float]], list[float]]:
    """The best score of a query, cells [cells * cells, C], over rectangles of bins [n, n, C], one by one.

    Rectangles have sides of at least `least` bins, and their scores are weighted by their part of the area to a power.
    With a mean [C] and a matrix [C, W], cells are whitened, as those of the query are already.
    Also the boxes of all rectangles, x1, y1, x2, y2 in bins with exclusive ends, and their scores.
    """
    n = len(bins)
    boxes, scores = [], []
    for top in range(n):
        for bottom in range(top + least, n + 1):
            for left in range(n):
                for right in range(left + least, n + 1):
                    part = bins[top:bottom, left:right]
                    score = 0.0
                    for i, (y1, y2) in enumerate(bin_edges(bottom - top, cells)):
                        for j, (x1, x2) in enumerate(bin_edges(right - left, cells)):
                            cell = np.array([max(part[y1:y2, x1:x2, c].ravel().tolist()) for c in range(bins.shape[2])])
                            cell = cell / (math.sqrt(sum(value * value for value in cell.tolist())) or 1.0)
                            if mean is not None and matrix is not None:
                                cell = matrix.T @ (cell - mean)
                                cell = cell / (np.linalg.norm(cell) or 1.0)
                            score += float(np.dot(query[i * cells + j], cell))
                    boxes.append([float(left), float(top), float(right), float(bottom)])
                    weight = ((bottom - top) * (right - left) / n**2) ** power
                    scores.append(score / cells**2 * (weight if score > 0 else 1 / weight))
    return max(scores), boxes, scores


def expanded_scores(query: np.ndarray, rows: np.ndarray, neighborhood: int, alpha: float) -> list[float]:
    """Cosines of sums: the query, and each row, plus its nearest rows, weighted by their cosine to the power alpha."""

    def together(vector: np.ndarray, others: list[int]) -> np.ndarray:
        near = sorted(others, key=lambda row: -round(float(vector @ rows[row]), 9))[:neighborhood]
        total = vector.copy()
        for row in near:
            cosine = float(vector @ rows[row])
            if cosine > 0:
                total = total + cosine**alpha * rows[row]
        return total / np.linalg.norm(total)

    every = list(range(len(rows)))
    asked = together(query, every)
    return [float(asked @ together(rows[row], [one for one in every if one != row])) for row in every]


def reciprocal_scores(similar: np.ndarray, k: int) -> list[float]:
    """1 minus the distance of Zhong et al. 2017 (equations 2 to 12), with sets; the query is the first."""
    count = len(similar)
    distance = [[max(0.0, 2 - 2 * float(value)) for value in row] for row in similar]
    distance = [[value / (max(row) or 1) for value in row] for row in distance]
    order = [
        sorted(range(count), key=lambda one: (one != at, distance[at][one]))  # noqa: B023
        for at in range(count)
    ]

    def mutual(at: int, size: int) -> set[int]:
        return {one for one in order[at][: size + 1] if at in order[one][: size + 1]}

    codes = []
    for at in range(count):
        near = mutual(at, k)
        joined = set(near)
        for one in near:
            close = mutual(one, max(1, round(k / 2)))
            if len(near & close) >= 2 / 3 * len(close):
                joined |= close
        code = [math.exp(-distance[at][one]) if one in joined else 0.0 for one in range(count)]
        codes.append([value / sum(code) for value in code])
    size = max(1, round(0.3 * k))
    codes = [[sum(codes[one][at] for one in order[row][:size]) / size for at in range(count)] for row in range(count)]
    found = []
    for at in range(1, count):
        common = sum(min(pair) for pair in zip(codes[0], codes[at], strict=True))
        either = sum(max(pair) for pair in zip(codes[0], codes[at], strict=True))
        found.append(1 - 0.7 * (1 - common / either) - 0.3 * distance[0][at])
    return found


def diffused_scores(similar: np.ndarray, k: int) -> list[float]:
    """The walk of Iscen et al. 2017 (equations 2 to 6) from the query, the first, step by step until it ends."""
    count = len(similar)
    middle = sorted(value for value in similar[1:, 1:].ravel().tolist() if value < 1 - 1e-6) or [0.0]
    median = (middle[(len(middle) - 1) // 2] + middle[len(middle) // 2]) / 2
    close = [[max(0.0, float(value) - median) / max(1 - median, 1e-6) for value in row] for row in similar]
    near = [
        sorted((one for one in range(count) if one != at), key=lambda one: -close[at][one])[:k]  # noqa: B023
        for at in range(count)
    ]
    weight = [
        [close[at][one] ** 5 if at in near[one] and one in near[at] else 0.0 for one in range(count)]
        for at in range(count)
    ]
    degree = [sum(row) or 1 for row in weight]
    step = [[weight[at][one] / math.sqrt(degree[at] * degree[one]) for one in range(count)] for at in range(count)]
    start = np.eye(count)[0]
    found = start.copy()
    for _ in range(300):
        found = 0.8 * np.array(step) @ found + start
    found = found[1:]
    return list(found / (found.max() or 1) + 1e-6 * similar[0, 1:])


def complete_linkage(similar: np.ndarray, threshold: float) -> set[frozenset[int]]:
    """Groups of two or more of N rows with similarities [N, N]: equal rows (similarity 1) first, then the two groups
    whose least similar pair is the most similar, until none reaches the threshold; of ties, the pair of the first rows.
    """
    order = {
        (a, b): (similar[a, b], -a, -b)
        for a in range(len(similar))
        for b in range(a + 1, len(similar))
        if similar[a, b] >= threshold
    }
    groups = [{row} for row in range(len(similar))]
    while True:
        best = None
        for at, one in enumerate(groups):
            for to in range(at):
                pairs = [(min(a, b), max(a, b)) for a in one for b in groups[to]]
                if all(pair in order for pair in pairs):
                    least = min(order[pair] for pair in pairs)
                    if best is None or least > best[0]:
                        best = least, at, to
        if best is None:
            return {frozenset(group) for group in groups if len(group) > 1}
        groups[best[2]] |= groups.pop(best[1])


def knn_votes(train: np.ndarray, test: np.ndarray, targets: np.ndarray, k: int, temperature: float) -> np.ndarray:
    """Shares of the votes of each test row's k nearest training rows, one after the other; see `knn_scores`."""
    scores = np.zeros((len(test), targets.shape[1]))
    for at, row in enumerate(test.astype(float)):
        similar = []
        for other in train.astype(float):
            lengths = np.linalg.norm(row) * np.linalg.norm(other)
            similar.append(row @ other / lengths if lengths else 0.0)
        # Rounded, so that equal similarities are equal whatever their last digits; of equal ones the first count.
        order = sorted(range(len(train)), key=lambda one: (-round(similar[one], 5), one))[:k]
        total = sum(np.exp((similar[one] - similar[order[0]]) / temperature) for one in order)
        for one in order:
            scores[at] += (targets[one] == 1) * np.exp((similar[one] - similar[order[0]]) / temperature) / total
    return scores


def filter_weight(interpolation: str, x: float) -> float:
    if interpolation == "bilinear":
        return max(0.0, 1 - abs(x))
    if interpolation == "lanczos":
        if not -3 <= x < 3:
            return 0.0
        return 1.0 if x == 0 else math.sin(math.pi * x) / (math.pi * x) * math.sin(math.pi * x / 3) / (math.pi * x / 3)
    assert interpolation == "bicubic"
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def line_weights(length: int, target: int, interpolation: str) -> list[tuple[int, list[int]]]:
    """Of each output its first input, and the weights from it on in 1 / 2^22, as Pillow rounds them."""
    scale = length / target
    stretch = max(scale, 1.0)
    support = {"bilinear": 1, "bicubic": 2, "lanczos": 3}[interpolation] * stretch
    found = []
    for at in range(target):
        center = (at + 0.5) * scale
        first, end = max(0, int(center - support + 0.5)), min(length, int(center + support + 0.5))
        weights = [filter_weight(interpolation, (i - center + 0.5) / stretch) for i in range(first, end)]
        total = sum(weights)
        found.append((first, [math.floor(abs(w) / total * 2**22 + 0.5) * (1 if w >= 0 else -1) for w in weights]))
    return found


def resize_line(line: Sequence[int], length: int, interpolation: str) -> list[int]:
    """One line of bytes at another length."""
    resized = []
    for first, weights in line_weights(len(line), length, interpolation):
        total = sum(w * value for w, value in zip(weights, line[first : first + len(weights)], strict=True))
        resized.append(min(255, max(0, (total + 2**21) >> 22)))
    return resized


def resize(pixels: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Pixels [height, width, 3] at a width and height: rows first, then columns, bytes between them."""
    width, height = size
    wide = np.empty((len(pixels), width, 3), np.uint8)
    for y, c in np.ndindex(len(pixels), 3):
        line = pixels[y, :, c].tolist()
        wide[y, :, c] = line if len(line) == width else resize_line(line, width, interpolation)
    resized = np.empty((height, width, 3), np.uint8)
    for x, c in np.ndindex(width, 3):
        line = wide[:, x, c].tolist()
        resized[:, x, c] = line if len(line) == height else resize_line(line, height, interpolation)
    return resized
