"""Exact search for a few queries: one pass over the rows as fast as memory delivers them.

FAISS compares fewer than 20 queries row by row on one thread; a matrix product takes a sixth of the time for one query.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from sppfeat.errors import require_extra

FEW: Final = 16
_SCORES: Final = 1 << 25
# Rows this much below the last one chosen are looked at again: products of a matrix round differently at its edges.
_ROUNDING: Final = 1e-5


def search_index(index: Any, units: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores [Q, k] float32, falling, and rows [Q, k] int64 of a FAISS index, which may be on a GPU.

    Of a Flat index in memory, equal rows have equal scores, and come in their order.
    """
    rows = _flat_rows(index) if len(units) <= FEW else None
    if rows is None or not 0 < k < len(rows) or len(units) * len(rows) > _SCORES:
        scores, found = index.search(units, k)
        return scores, found
    scores, found = np.empty((len(units), k), np.float32), np.empty((len(units), k), np.int64)
    for at, of_all in enumerate(units @ rows.T):
        last = np.partition(of_all, -k)[-k]
        near = np.flatnonzero(of_all >= last - _ROUNDING)
        if not len(near) >= k:  # of values that are not finite
            return index.search(units, k)  # type: ignore[no-any-return]
        exact = np.einsum("nd,d->n", rows[near], units[at])
        order = np.lexsort((near, -exact))[:k]
        scores[at], found[at] = exact[order], near[order]
    return scores, found


def _flat_rows(index: Any) -> np.ndarray | None:
    """[N, d] float32 the rows of a Flat index of inner products, in FAISS's own memory; None of any other."""
    faiss = require_extra("faiss", "cpu", "similarity search")
    index = faiss.downcast_index(index) if isinstance(index, faiss.Index) else index
    if type(index) is not faiss.IndexFlatIP and not (
        type(index) is faiss.IndexFlat and index.metric_type == faiss.METRIC_INNER_PRODUCT
    ):
        return None
    if not index.ntotal:
        return None
    rows: np.ndarray = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
    return rows
