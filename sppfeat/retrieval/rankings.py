"""Rankings of a whole gallery, exactly, and re-ordered as a search would: what `evaluation` scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from sppfeat.retrieval.bins import bin_layout, bins_of, learn_from
from sppfeat.retrieval.channels import to_bytes
from sppfeat.retrieval.parts import Matching, order_by_bins, part_matching, whole_matching
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
    bin_dim: int | None = None,
    boxes: bool = False,
) -> Iterator[Ranking]:
    """For each query, all rows by falling score, equal ones in their order; the query's own rows are last.

    own: by name, the rows of each query's own image, which are no neighbors. queries: with `parts`, of descriptors at
    several scales, one after the other. bin_dim: values of a bin, as a gallery would keep it; None: all channels.
    boxes: find them in all rows that are aligned, which takes as long again.
    """
    options = options or RerankOptions()
    bins = None
    if options.aligned:
        layout = bin_layout(rows.store.recipe, rows.store.dim)
        if options.parts:
            channels = None if bin_dim is None else learn_from(layout, rows, bin_dim)
            matching = part_matching(layout, channels)
        else:
            matching = whole_matching(layout, learn_from(layout, rows, bin_dim))
        bins = _RowBins(rows, matching, boxes)
    if bins is not None and options.parts:
        every = np.arange(len(rows))
        for at, name in enumerate(queries.names):
            others = np.setdiff1d(every, own.get(name, ()))
            yield bins.ranking(_described(queries, at), others, np.setdiff1d(every, others))
        return
    rows = rows.in_memory()  # every block of queries reads all of them
    size = max(1, _SCORE_BYTES // (4 * len(rows)))
    together = None
    if options.together and len(rows) <= _ALL_TOGETHER:
        together = np.empty((len(rows), len(rows)), np.float32)
        for start, block in rows.blocks():
            together[start : start + len(block)] = _scores(rows, block)
    for start in range(0, len(queries), size):
        scores = _scores(rows, queries.take(slice(start, start + size)))
        for at, (name, one) in enumerate(zip(queries.names[start : start + size], scores, strict=True), start):
            mine = own.get(name, np.zeros(0, np.int64))
            one[mine] = -np.inf
            order = np.argsort(-one, kind="stable")
            near = order[: min(options.count, len(order) - len(mine))]
            after = order[len(near) :]
            if bins is not None:
                yield bins.ranking(_described(queries, at), np.sort(near), after)
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


@dataclass(frozen=True)
class _RowBins:
    """The bins of a store's rows, as a gallery would keep them, and how queries are looked for in them."""

    rows: UnitRows
    matching: Matching
    boxes: bool

    def take(self, which: np.ndarray) -> np.ndarray:
        """[n, side, side, C]."""
        found, channels = bins_of(self.matching.layout, self.rows, which), self.matching.channels
        return to_bytes(found) if channels is None else channels.decode(channels.encode(found))

    def ranking(self, query: np.ndarray, near: np.ndarray, after: np.ndarray) -> Ranking:
        """The rows `near` by their bins for a query [F * D], then those `after`."""
        descriptors = query.reshape(-1, self.rows.store.dim)
        found = order_by_bins(self.matching, descriptors, near, self.take, len(near) if self.boxes else 0)
        return Ranking(np.concatenate([found.rows, after]), found.boxes if self.boxes else None)


def _scores(rows: UnitRows, units: np.ndarray) -> np.ndarray:
    scores = np.empty((len(units), len(rows)), np.float32)
    for start, block in rows.blocks():
        scores[:, start : start + len(block)] = units @ block.T
    return scores


def _scores_of(rows: UnitRows, which: np.ndarray) -> np.ndarray:
    units = normalize_rows(rows.take(which))
    scores: np.ndarray = units @ units.T
    return scores
