"""Complete linkage: groups of rows in which every pair reaches a threshold.

Rows are joined two groups at a time, the most similar first; how similar two groups are is their least similar pair.
Equal similarities count by the order of the rows, so that the groups do not depend on how they were computed: by chains
of nearest neighbors, which takes the square of the rows in time (Murtagh, The Computer Journal 26, 1983).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from sppfeat.store import UnitRows, block_rows

# Cosines of equal rows differ from 1 by the rounding of float32.
ROUNDING: Final = 1e-6
# Similarities closer than this are equal: the rounding of float32 orders nothing.
_STEPS: Final = 1 << 20
# Rows whose similarities are kept at once, in 13 bytes a pair: 900 MB.
LINKAGE_ROWS: Final = 8192
# Rows compared with all others at once where there are more.
_BLOCK: Final = 256


@dataclass(frozen=True)
class Linked:
    """Groups of two or more rows, by ascending position. pairs: of rows that reach the threshold. exact: whether the
    groups are those of complete linkage; else every pair in a group reaches the threshold all the same.
    """

    groups: list[np.ndarray]
    pairs: int
    exact: bool = True


def link_rows(
    rows: UnitRows,
    which: np.ndarray,
    copies: np.ndarray,
    threshold: float,
    same: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> Linked:
    """Complete linkage among the rows at the ascending positions `which`.

    copies: [N] the equal rows that each of the positions stands for, itself included; they count in `pairs`.
    same: which pairs may be in one group, by two positions and the cosine of each, instead of those that reach the
    threshold.
    With more than LINKAGE_ROWS of them, each row instead joins the first group whose rows it reaches, one row after the
    other: no group has a pair below the threshold, but a row may be in another group than that of its nearest.
    """
    if len(which) > LINKAGE_ROWS:
        return _first_fit(rows, which, copies, threshold)
    units = rows.take(which) if len(which) <= block_rows(rows.dim) else None
    scores = units @ units.T if units is not None else _scores(rows, which)
    near = np.triu(scores >= threshold - ROUNDING, 1)
    if same is not None:
        one, other = np.triu_indices(len(which), 1)
        near[one, other] = same(which[one], which[other], scores[one, other])
    pairs = sum(int(copies[row] * copies[reached].sum()) for row, reached in enumerate(near))
    return Linked([which[group] for group in complete_linkage(scores, near)], pairs)


def complete_linkage(scores: np.ndarray, near: np.ndarray) -> list[np.ndarray]:
    """Groups of two or more of N rows, by ascending number.

    scores: [N, N] similarities, of which those above the diagonal count. near: [N, N] which of these may be in a group.
    """
    count = len(scores)
    # No two pairs are equally near: similarities, then the order of the rows, as one number. 0: not in one group.
    ranks = np.zeros((count, count), np.int64)
    for start in range(0, count, _BLOCK):
        part = slice(start, start + _BLOCK)
        steps = np.clip(np.rint(scores[part] * _STEPS), 1, _STEPS).astype(np.int64)
        order = np.arange((count - start) * count, (count - start - len(steps)) * count, -1).reshape(steps.shape)
        found = (steps * (count * count) + order) * near[part]
        ranks[part] += found
        ranks[:, part] += found.T
    members = {row: [row] for row in np.flatnonzero(ranks.any(1)).tolist()}
    done: list[list[int]] = []
    chain: list[int] = []
    while members:
        tip = chain[-1] if chain else next(iter(members))
        nearest = int(ranks[tip].argmax())
        if not ranks[tip, nearest]:
            done.append(members.pop(tip))
            chain.clear()
        elif len(chain) > 1 and chain[-2] == nearest:
            del chain[-2:]
            stays, goes = min(tip, nearest), max(tip, nearest)
            ranks[stays] = ranks[:, stays] = np.minimum(ranks[tip], ranks[nearest])
            ranks[goes] = ranks[:, goes] = 0
            members[stays] += members.pop(goes)
        else:
            chain += [nearest] if chain else [tip, nearest]
    return sorted((np.sort(group) for group in done if len(group) > 1), key=lambda group: int(group[0]))


def _scores(rows: UnitRows, which: np.ndarray) -> np.ndarray:
    """[N, N] float32 of rows too long to be in memory together; below the diagonal not all are computed."""
    found = np.zeros((len(which), len(which)), np.float32)
    size = max(1, block_rows(rows.dim) // 2)
    for top in range(0, len(which), size):
        left = rows.take(which[top : top + size])
        for start in range(top, len(which), size):
            right = left if start == top else rows.take(which[start : start + size])
            found[top : top + size, start : start + size] = left @ right.T
    return found


def _first_fit(rows: UnitRows, which: np.ndarray, copies: np.ndarray, threshold: float) -> Linked:
    groups = []
    pairs = 0
    taken = np.zeros(len(which), bool)
    for start in range(0, len(which), _BLOCK):
        near = _near(rows, which[start : start + _BLOCK], which[start:], threshold)
        later = np.triu(near, 1)
        pairs += int(copies[start : start + len(near)] @ (later @ copies[start:]))
        for leader in range(len(near)):
            if not taken[start + leader]:
                free = start + np.flatnonzero(later[leader] & ~taken[start:])
                group = np.concatenate([[start + leader], free[_compatible(rows, which[free], threshold)]])
                taken[group] = True
                if len(group) > 1:
                    groups.append(which[group])
    return Linked(groups, pairs, exact=False)


def _compatible(rows: UnitRows, which: np.ndarray, threshold: float) -> np.ndarray:
    """[N] which rows are taken if each is that reaches all taken before it."""
    fits = np.ones(len(which), bool)
    for start in range(0, len(which), _BLOCK):
        block = start + np.flatnonzero(fits[start : start + _BLOCK])
        near = _near(rows, which[block], which[start:], threshold)
        for row, reached in zip(block, near, strict=True):
            if fits[row]:
                fits[row + 1 :] &= reached[row + 1 - start :]
    return fits


def _near(rows: UnitRows, some: np.ndarray, others: np.ndarray, threshold: float) -> np.ndarray:
    """[S, N] which of the others reach the threshold with each row."""
    found = np.zeros((len(some), len(others)), bool)
    size = block_rows(rows.dim)
    for top in range(0, len(some), size):
        units = rows.take(some[top : top + size])
        for start in range(0, len(others), size):
            scores = units @ rows.take(others[start : start + size]).T
            found[top : top + size, start : start + size] = scores >= threshold - ROUNDING
    return found
