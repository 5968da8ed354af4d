"""Rankings of a whole gallery, exactly, and re-ordered as a search would: what `evaluation` scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from sppfeat.retrieval.bins import BinLayout, bin_layout, to_bytes
from sppfeat.retrieval.parts import order_by_bins, rectangles_for
from sppfeat.retrieval.rerank import RerankOptions, reordered
from sppfeat.store import UnitRows, normalize_rows

# Scores of a block of queries against the whole gallery, in float32.
_SCORE_BYTES: Final = 1 << 27
# Similarities of all rows with each other are computed once for galleries of up to this many rows: 256 MB.
_ALL_TOGETHER: Final = 8192


@dataclass(frozen=True)
class Ranking:
    """All rows [N] of a gallery for a query, the nearest first.

    boxes: [M, 4] where the query was found in the first M rows, x1, y1, x2, y2 from 0 to 1 of the image's width and
    height; None if it was not looked for.
    """

    order: np.ndarray
    boxes: np.ndarray | None = None


def rankings(
    rows: UnitRows,
    queries: UnitRows,
    own: Mapping[str, np.ndarray],
    options: RerankOptions | None = None,
    *,
    boxes: bool = False,
) -> Iterator[Ranking]:
    """For each query, all rows by falling score, equal ones in their order; the query's own rows are last.

    own: by name, the rows of each query's own image, which are no neighbors. queries: with `parts`, of descriptors at
    several scales, one after the other. boxes: find them in all rows that are aligned, which takes as long again.
    """
    options = options or RerankOptions()
    if options.parts:
        every = np.arange(len(rows))
        layout = bin_layout(rows.store.recipe, rows.store.dim)
        for at, name in enumerate(queries.names):
            others = np.setdiff1d(every, own.get(name, ()))
            yield _aligned(rows, layout, _described(queries, at), others, np.setdiff1d(every, others), True, boxes)
        return
    rows = rows.in_memory()  # every block of queries reads all of them
    size = max(1, _SCORE_BYTES // (4 * len(rows)))
    together = None
    if options.together and len(rows) <= _ALL_TOGETHER:
        together = _scores(rows, rows.take(slice(0, len(rows))))
    for start in range(0, len(queries), size):
        scores = _scores(rows, queries.take(slice(start, start + size)))
        for at, (name, one) in enumerate(zip(queries.names[start : start + size], scores, strict=True), start):
            mine = own.get(name, np.zeros(0, np.int64))
            one[mine] = -np.inf
            order = np.argsort(-one, kind="stable")
            near = order[: min(options.count, len(order) - len(mine))]
            after = order[len(near) :]
            if options.rerank == "bins":
                layout = bin_layout(rows.store.recipe, rows.store.dim)
                yield _aligned(rows, layout, _described(queries, at), np.sort(near), after, False, boxes)
            elif options.together:
                similar = np.ones((1 + len(near),) * 2, np.float32)
                similar[0, 1:] = similar[1:, 0] = one[near]
                similar[1:, 1:] = _scores_of(rows, near) if together is None else together[np.ix_(near, near)]
                found = reordered(similar, options)
                yield Ranking(np.concatenate([near[np.lexsort((near, -found))], after]))
            else:
                yield Ranking(order)


def _described(queries: UnitRows, at: int) -> np.ndarray:
    """[D] a query's descriptor as the store has it."""
    found: np.ndarray = queries.store.descriptors[queries.rows[at : at + 1]][0]
    return found


def _aligned(
    rows: UnitRows,
    layout: BinLayout,
    query: np.ndarray,
    near: np.ndarray,
    after: np.ndarray,
    parts: bool,
    boxes: bool,
) -> Ranking:
    """The rows `near` by their bins, as a gallery would keep them, and then those `after`."""

    def bins_of(which: np.ndarray) -> np.ndarray:
        return to_bytes(layout.take(rows.store.descriptors[rows.rows[which]]))

    shapes = rectangles_for(layout, parts=parts)
    found = order_by_bins(layout, query.reshape(-1, rows.store.dim), near, bins_of, shapes, len(near) if boxes else 0)
    return Ranking(np.concatenate([found.rows, after]), found.boxes if boxes else None)


def _scores(rows: UnitRows, units: np.ndarray) -> np.ndarray:
    scores = np.empty((len(units), len(rows)), np.float32)
    for start, block in rows.blocks():
        scores[:, start : start + len(block)] = units @ block.T
    return scores


def _scores_of(rows: UnitRows, which: np.ndarray) -> np.ndarray:
    units = normalize_rows(rows.take(which))
    scores: np.ndarray = units @ units.T
    return scores
