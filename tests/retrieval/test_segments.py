"""Rows in two parts: arrays and indexes that answer as one."""

from __future__ import annotations

import numpy as np
import pytest

from sppfeat.retrieval.faiss_index import reconstruct
from sppfeat.retrieval.faiss_library import load_faiss
from sppfeat.retrieval.segments import JoinedIndex, JoinedValues


def test_values_are_indexed_as_one_array() -> None:
    whole = np.arange(60, dtype=np.int8).reshape(10, 2, 3)
    joined = JoinedValues(whole[:7], whole[7:])
    assert len(joined) == 10 and joined.shape == whole.shape
    for rows in ([0, 9, 7, 6, 6], [], [-1, -10], np.array([[3, 8]]), slice(None), slice(5, 9), slice(8, 1, -3)):
        rows = np.array(rows, np.int64) if isinstance(rows, list) else rows
        np.testing.assert_array_equal(joined[rows], whole[rows])
    assert joined[np.array([8])].dtype == np.int8
    for row in (10, -11):
        with pytest.raises(IndexError):
            joined[np.array([row])]


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat"])
@pytest.mark.parametrize("split", [1, 50, 99])
def test_an_index_of_two_parts_answers_as_one(factory: str, split: int) -> None:
    faiss = load_faiss()
    rows = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
    rows[60:70] = rows[20:30]
    base, added = faiss.index_factory(8, factory, faiss.METRIC_INNER_PRODUCT), faiss.IndexFlatIP(8)
    base.train(rows)
    base.add(rows[:split])
    added.add(rows[split:])
    joined = JoinedIndex(base, added)
    assert (joined.ntotal, joined.d) == (100, 8)
    np.testing.assert_array_equal(reconstruct(joined, np.array([99, 0, split])), rows[[99, 0, split]])
    exact = rows @ rows.T
    for k in (1, 5, 70, 100):
        if factory != "Flat":
            base.nprobe = 8
        scores, found = joined.search(rows, k)
        assert scores.shape == found.shape == (100, k)
        np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :k], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(np.take_along_axis(exact, found, 1), scores, rtol=1e-5, atol=1e-5)
    if factory != "Flat" and split > 40:
        base.nprobe = 1
        scores, found = joined.search(rows, 100)
        missing = found < 0
        assert (
            missing.any() and (scores[missing] == -np.inf).all() and not np.diff(missing.astype(int), axis=1).min() < 0
        )
