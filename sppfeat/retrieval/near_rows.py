"""Which rows are near each other, among millions: every pair of them, exactly.

A few coordinates of a unit vector in an orthonormal basis, and the length of what remains of it, are a unit vector too,
and the cosine of two such short vectors is never below that of the long ones (Cauchy-Schwarz). Pairs whose short cosine
is below the threshold are passed over without a loss, and only the others are compared as stored. The basis, the
principal directions of a sample, makes the others few. The short vectors are sorted into boxes, and boxes that are
further apart than any near pair are passed over as a whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np

from sppfeat.machine import available_cores
from sppfeat.retrieval.linkage import ROUNDING
from sppfeat.store import UnitRows, block_rows

_T = TypeVar("_T")

# Whether pairs of rows, by two positions and the cosine of each, belong together.
Same = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

# Rows that give the basis, and that tell how well it does, half each.
SAMPLE: Final = 2048
# The rounding of float32 in cosines of short vectors, with a margin of ten.
_SHORT_ROUNDING: Final = 1e-5
# Numbers of coordinates to choose from.
_SHORT: Final = (16, 24, 32, 48, 64, 96, 128, 192, 256)
# Coordinates kept for a second look at what the first ones leave.
_LONG: Final = 128
# What looking at a pair again costs, in coordinates of a pair compared: 950 ns against 0.0145, measured on one core.
_AGAIN: Final = 65_000
# Rows in a box: small enough to pass over many, large enough for matrix products at full speed.
_BOX: Final = 512
# Rows that a box is compared with at once: the scores stay near the processor.
_PASSING: Final = 2048
# Multiplications of a product up to which OpenBLAS uses one thread.
_UNSHARED: Final = 1 << 18
# Pairs linked, or looked at again, at once.
WAITING_PAIRS: Final = 1 << 16


@dataclass(frozen=True)
class _Short:
    """Short unit vectors of N rows, sorted into boxes. order: [N] the row of each, by number.

    first: [B * _BOX, k + 1] what all pairs are compared by, then zeros. more: [N, m + 1] all their coordinates, m >= k.
    low, high: [B, k + 1] the corners of the boxes.
    """

    order: np.ndarray
    first: np.ndarray
    more: np.ndarray
    low: np.ndarray
    high: np.ndarray


def equal_rows(rows: UnitRows) -> np.ndarray:
    """[N] the position of the first row that is stored with the same bytes: each row's own if there is no other.

    Rows of zeros, which have no direction, equal none.
    """
    checksums = np.asarray(rows.store.checksum[rows.rows])
    order = np.argsort(checksums, kind="stable")
    alike = np.flatnonzero(checksums[order[1:]] == checksums[order[:-1]])
    equal = np.zeros(len(rows), bool)  # which of `order` equals the one before it
    size = max(1, block_rows(rows.dim) // 2)
    for start in range(0, len(alike), size):
        places = alike[start : start + size]
        before, after = (rows.store.descriptors[rows.rows[order[places + step]]] for step in (0, 1))
        equal[places + 1] = (before == after).all(1) & before.any(1)
    starts = np.maximum.accumulate(np.where(equal, 0, np.arange(len(rows))))
    first = np.empty(len(rows), np.int64)
    first[order] = order[starts]
    return first


def near_components(
    rows: UnitRows,
    which: np.ndarray,
    threshold: float,
    progress: Callable[[float], None] = lambda part: None,
    same: Same | None = None,
) -> list[np.ndarray]:
    """The rows that pairs at or above the threshold link, directly or through others: ascending positions of each set.

    which: ascending positions to compare. same: which of the pairs count; None: all. Sets have two rows or more, and
    come in the order of their first rows.
    Needs about 4 * (_LONG + 2 k) bytes a row, where k, about 16 to 64, is chosen on a sample.
    """
    if len(which) < 2:
        return []
    short = _shorten(rows, which, threshold, lambda part: progress(0.2 * part))
    links = _Links(len(which))
    one: list[np.ndarray] = []
    other: list[np.ndarray] = []
    for part, a, b in _candidates(short, links, threshold - ROUNDING - _SHORT_ROUNDING):
        one.append(a)
        other.append(b)
        if sum(map(len, one)) >= WAITING_PAIRS:
            _compare(rows, which, links, np.concatenate(one), np.concatenate(other), threshold, same)
            one, other = [], []
        progress(0.2 + 0.8 * part)
    if one:
        _compare(rows, which, links, np.concatenate(one), np.concatenate(other), threshold, same)
    return [which[group] for group in links.groups()]


def _compare(
    rows: UnitRows,
    which: np.ndarray,
    links: _Links,
    one: np.ndarray,
    other: np.ndarray,
    threshold: float,
    same: Same | None,
) -> None:
    """Link those pairs whose rows, as stored, reach the threshold, and which are the same."""
    by_row = np.lexsort((other, one))
    one, other = one[by_row], other[by_row]
    size = max(1, block_rows(rows.dim) // 4)
    while len(one):
        # Pairs that are linked by now need no look; where many rows are alike, they are nearly all.
        new = links.apart(one, other)
        one, other = one[new], other[new]
        a, b = one[:size], other[:size]
        one, other = one[size:], other[size:]
        needed, places = np.unique(np.concatenate([a, b]), return_inverse=True)
        units = rows.take(which[needed])
        scores = np.einsum("nd,nd->n", units[places[: len(a)]], units[places[len(a) :]])
        near = np.flatnonzero(scores >= threshold - ROUNDING)
        if same is not None:
            near = near[same(which[a[near]], which[b[near]], scores[near])]
        links.join(a[near], b[near])


def _candidates(short: _Short, links: _Links, least: float) -> Iterator[tuple[float, np.ndarray, np.ndarray]]:
    """Pairs whose short cosine reaches `least` and that are not linked yet, by numbers of rows; the part done, 0 to 1.

    Every such pair comes once, in either order.
    """
    boxes = len(short.low)
    for box, (one, other) in enumerate(_in_turn(lambda box: _pairs_of(short, box, least), boxes)):
        for at in range(0, len(one), WAITING_PAIRS):
            a, b = one[at : at + WAITING_PAIRS], other[at : at + WAITING_PAIRS]
            new = links.apart(short.order[a], short.order[b])
            a, b = a[new], b[new]
            passes = np.einsum("nd,nd->n", short.more[a], short.more[b]) >= least
            yield box / boxes, short.order[a[passes]], short.order[b[passes]]
        yield (box + 1) / boxes, np.zeros(0, np.int64), np.zeros(0, np.int64)


def _in_turn(work: Callable[[int], _T], count: int) -> Iterator[_T]:
    """The results of `work` for 0, 1, ... in order, from one thread per core; a few are ahead of the caller."""
    threads = available_cores()
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[_T]] = deque()
        try:
            for number in range(count):
                waiting.append(pool.submit(work, number))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _pairs_of(short: _Short, box: int, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Places of pairs whose short cosine reaches `least`: rows of a box, and later ones of it and of later boxes."""
    furthest = 2 - 2 * least + _SHORT_ROUNDING  # the square of the distance of two unit vectors
    gaps = np.maximum(short.low[box:] - short.high[box], short.low[box] - short.high[box:])
    np.maximum(gaps, 0, out=gaps)
    near = box + np.flatnonzero(np.einsum("bk,bk->b", gaps, gaps) <= furthest)
    width = short.first.shape[1]
    # Products too small for BLAS to share among threads of its own: where others use the cores, those wait for each
    # other, and took 30 times as long.
    tall = _BOX // 8
    wide = min(_BOX, 1 << int(np.log2(max(1, _UNSHARED // (tall * width)))))
    own = short.first[box * _BOX : (box + 1) * _BOX].reshape(-1, 1, tall, width)
    found = [np.zeros((2, 0), np.int64)]
    for run in np.split(near, np.flatnonzero(np.diff(near) > 1) + 1):
        for at in range(int(run[0]) * _BOX, (int(run[-1]) + 1) * _BOX, _PASSING):
            passing = short.first[at : min(at + _PASSING, (int(run[-1]) + 1) * _BOX)].reshape(1, -1, wide, width)
            hits = _true_places(own @ passing.transpose(0, 1, 3, 2) >= least)
            if len(hits):
                which, group, row, column = np.unravel_index(hits, (len(own), passing.shape[1], tall, wide))
                found.append(np.stack([box * _BOX + which * tall + row, at + group * wide + column]))
    one, other = np.concatenate(found, 1)
    real = (one < other) & (other < len(short.order))
    return one[real], other[real]


def _true_places(mask: np.ndarray) -> np.ndarray:
    """The places of True in a mask of a multiple of 8 values, as one row. They are few: 8 are passed over at a time."""
    flat = mask.reshape(-1)
    places = (8 * np.flatnonzero(flat.view(np.uint64))[:, None] + np.arange(8)).reshape(-1)
    true: np.ndarray = places[flat[places]]
    return true


def _shorten(rows: UnitRows, which: np.ndarray, threshold: float, progress: Callable[[float], None]) -> _Short:
    basis, width = _basis(rows, which, threshold)
    first = np.empty((len(which), width + 1), np.float32)
    more = np.empty((len(which), basis.shape[1] + 1), np.float32)
    for start, block in rows.blocks(which):
        part = slice(start, start + len(block))
        places = block @ basis
        squares = np.einsum("nd,nd->n", block, block)
        for target, count in ((first, width), (more, basis.shape[1])):
            target[part, :count] = places[:, :count]
            left = squares - np.einsum("nd,nd->n", places[:, :count], places[:, :count])
            target[part, count] = np.sqrt(np.maximum(left, 0))
        progress(part.stop / len(which))
    order = _boxes(first)
    first, more = first[order], more[order]
    starts = np.arange(0, len(which), _BOX)
    low, high = (limit.reduceat(first, starts, axis=0) for limit in (np.minimum, np.maximum))
    return _Short(order, np.pad(first, ((0, -len(first) % _BOX), (0, 0))), more, low, high)


def _basis(rows: UnitRows, which: np.ndarray, threshold: float) -> tuple[np.ndarray, int]:
    """Orthonormal directions [dim, m], and how many of them to compare all pairs by."""
    chosen = which
    if len(which) > SAMPLE:
        chosen = which[np.sort(np.random.default_rng(0).choice(len(which), SAMPLE, replace=False))]
    sample = rows.gather(chosen)
    fitted, held = sample[::2].astype(np.float64), sample[1::2]
    if len(fitted) >= rows.dim:
        _, directions = np.linalg.eigh(fitted.T @ fitted)
    else:
        weights, mixes = np.linalg.eigh(fitted @ fitted.T)
        directions = fitted.T @ mixes[:, weights > 1e-9 * weights[-1]]
    # The strongest come first. Their number is at most the larger number to choose from.
    directions = np.linalg.qr(directions[:, ::-1][:, : max(_LONG, *_SHORT)])[0].astype(np.float32)
    places = held @ directions
    above = np.triu_indices(len(held), 1)
    true = (held @ held.T)[above]
    costs = {}
    widths = {min(width, directions.shape[1]) for width in _SHORT}
    for width in sorted(widths):
        short = places[:, :width]
        left = np.sqrt(np.maximum(np.einsum("nd,nd->n", held, held) - np.einsum("nd,nd->n", short, short), 0))
        cosines = (short @ short.T + np.outer(left, left))[above]
        costs[width] = width + _AGAIN * float(((cosines >= threshold) & (true < threshold)).mean() if len(true) else 0)
    width = min(costs, key=lambda one: (costs[one], one))
    return np.ascontiguousarray(directions[:, : max(width, _LONG)]), width


def _boxes(points: np.ndarray) -> np.ndarray:
    """The order of points [N, d] in which those of a box are together: halved where they are widest, again and again.

    All boxes but the last are full.
    """
    order = np.arange(len(points))
    waiting = [(0, len(points))]
    while waiting:
        start, end = waiting.pop()
        if end - start > _BOX:
            part = order[start:end]
            # The spread of some tells which side is the widest.
            side = int(points[part[:: max(1, len(part) // 4096)]].std(0).argmax())
            middle = max(1, (end - start) // 2 // _BOX) * _BOX
            order[start:end] = part[np.argpartition(points[part, side], middle)]
            waiting += [(start, start + middle), (start + middle, end)]
    return order


class _Links:
    """Which rows are linked, through any number of pairs: every row points towards the lowest of its set."""

    def __init__(self, count: int) -> None:
        self._lowest = np.arange(count)

    def apart(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """[P] which pairs are not linked yet."""
        new: np.ndarray = self._find(one) != self._find(other)
        return new

    def join(self, one: np.ndarray, other: np.ndarray) -> None:
        """Link pairs of rows: the lowest numbers spread until nothing changes."""
        while len(one):
            # Sets, by their lowest rows: only these change, however many rows there are.
            a, b = self._find(one), self._find(other)
            differ = a != b
            one, other, a, b = one[differ], other[differ], a[differ], b[differ]
            np.minimum.at(self._lowest, np.maximum(a, b), np.minimum(a, b))

    def _find(self, rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._lowest[rows]
        while not np.array_equal(further := self._lowest[found], found):
            found = further
        self._lowest[rows] = found
        return found

    def groups(self) -> list[np.ndarray]:
        """Rows of each set of two or more, in rising order."""
        lowest = self._find(np.arange(len(self._lowest)))
        order = np.argsort(lowest, kind="stable")
        starts = np.flatnonzero(np.diff(lowest[order], prepend=-1))
        return [part for part in np.split(order, starts[1:]) if len(part) > 1]
