"""A few queries of a Flat index are answered as FAISS answers many, and equal rows in their order."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from sppfeat.retrieval.flat import FEW, search_index


def units(count: int, dim: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("count", [1, 2, 50, 5000])
@pytest.mark.parametrize("dim", [1, 7, 512])
@pytest.mark.parametrize("k", [1, 2, 49, 50, 51])
def test_as_every_row_compared(count: int, dim: int, k: int) -> None:
    rows, queries = units(count, dim), units(FEW, dim, 1)
    index = faiss.IndexFlatIP(dim)
    index.add(rows)
    scores, found = search_index(index, queries, k)
    assert scores.shape == found.shape == (FEW, k)
    exact = queries.astype(np.float64) @ rows.T.astype(np.float64)
    wanted = -np.sort(-exact, axis=1)[:, :k]
    assert scores[:, : wanted.shape[1]] == pytest.approx(wanted, abs=1e-6)
    there = found >= 0
    assert there.sum() == FEW * min(k, count)
    assert np.take_along_axis(exact, np.where(there, found, 0), 1)[there] == pytest.approx(scores[there], abs=1e-6)


def test_equal_rows_come_in_their_order_wherever_they_are() -> None:
    """At the edges of a matrix product, too."""
    rows = units(1003, 37)
    same = [0, 1, 5, 500, 998, 1000, 1001, 1002]
    rows[same] = rows[0]
    index = faiss.IndexFlatIP(37)
    index.add(rows)
    for k in (3, len(same), 20):
        scores, found = search_index(index, rows[:1], k)
        assert found[0, : min(k, len(same))].tolist() == same[:k]
        assert (scores[0, : min(k, len(same))] == scores[0, 0]).all()


def test_other_indexes_are_left_to_faiss() -> None:
    rows = units(300, 16)
    for factory in ("HNSW8", "SQ8", "PCA8,Flat"):
        index = faiss.index_factory(16, factory, faiss.METRIC_INNER_PRODUCT)
        index.train(rows)
        index.add(rows)
        assert (search_index(index, rows[:2], 3)[1] == index.search(rows[:2], 3)[1]).all()
    far = faiss.IndexFlatL2(16)
    far.add(rows)
    assert (search_index(far, rows[:2], 3)[1] == far.search(rows[:2], 3)[1]).all()


def test_values_that_are_not_finite() -> None:
    rows = units(100, 16)
    rows[3] = np.nan
    index = faiss.IndexFlatIP(16)
    index.add(rows)
    scores, found = search_index(index, rows[:1], 5)
    assert scores.shape == found.shape == (1, 5)
