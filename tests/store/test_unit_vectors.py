"""Rows of a store: read in blocks, however many are requested, and kept if they are read again and again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import MakeStore

from sppfeat.retrieval.evaluation import RetrievalOptions, evaluate_retrieval
from sppfeat.retrieval.faiss_index import IndexOptions, build_index
from sppfeat.retrieval.whitening import ProjectionOptions, learn_projection
from sppfeat.store import unit_vectors as rows_module
from sppfeat.store.reading import Store
from sppfeat.store.unit_vectors import UnitRows, image_of, unit_rows


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each reading of a store took, from files whose blocks hold 50 rows of 16 values."""
    counts: list[int] = []
    take = UnitRows.take

    def counted(self: UnitRows, which: slice | np.ndarray) -> np.ndarray:
        values = take(self, which)
        if self.kept is None:
            counts.append(len(values))
        return values

    monkeypatch.setattr(UnitRows, "take", counted)
    monkeypatch.setattr(rows_module, "BLOCK_BYTES", 4 * 16 * 50)
    return counts


def of_things(make_store: MakeStore, count: int) -> Store:
    values = np.random.default_rng(0).normal(size=(count, 16))
    return make_store(values, names=[f"{number % 9}/{number}.jpg" for number in range(count)])


def test_gathering_reads_blocks(make_store: MakeStore, read: list[int]) -> None:
    store = of_things(make_store, 400)
    rows = unit_rows(store, learn_projection(unit_rows(store), ProjectionOptions(dims=3)))
    which = rows.sample(170, 0)
    expected = rows.take(which)
    read.clear()
    assert np.array_equal(rows.gather(which), expected)
    assert read == [50, 50, 50, 20]


def test_training_gathers_projected_blocks(make_store: MakeStore, read: list[int]) -> None:
    store = of_things(make_store, 400)
    rows = unit_rows(store, learn_projection(unit_rows(store), ProjectionOptions(dims=4)))
    read.clear()
    built = build_index(rows, IndexOptions(factory="IVF4,SQ8", measure=300))
    assert built.index.ntotal == 400 and max(read) <= 50


def test_evaluation_reads_the_gallery_once(
    make_store: MakeStore, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = of_things(make_store, 300)
    monkeypatch.setattr("sppfeat.retrieval.rankings._SCORE_BYTES", 4 * 300 * 20)  # 15 blocks of queries
    options = RetrievalOptions(rerank="expand", candidates=20)
    kept = evaluate_retrieval(store, None, options)
    assert sum(read) == 2 * 300  # once as the gallery, once as queries
    read.clear()
    monkeypatch.setattr(rows_module, "available_memory", lambda: 4 * 16 * 300)
    streamed = evaluate_retrieval(store, None, options)
    assert sum(read) > 15 * 300
    assert streamed.average_precisions == kept.average_precisions


def test_kept_rows_stay_as_they_are(make_store: MakeStore) -> None:
    rows = unit_rows(of_things(make_store, 30)).in_memory()
    before = rows.take(slice(None))
    rows.take(slice(None))[:] = 7
    for _, block in rows.blocks():
        block -= 1
    assert np.array_equal(rows.take(slice(None)), before)
    assert np.array_equal(rows.only(np.array([3, 8])).take(slice(None)), before[[3, 8]])


@pytest.mark.parametrize("window", ["nan,0,1,1", "0,0,inf,9", "5,5,1,9", "0,9,9,3"])
def test_windows_that_no_image_has(tmp_path: Path, window: str) -> None:
    assert image_of("/images", f"a.jpg#{window}") == (f"/images/a.jpg#{window}", None)  # an image's name
    assert image_of("/images", "a.jpg#1,2,3,4") == ("/images/a.jpg", (1, 2, 3, 4))
    (tmp_path / f"a.jpg#{window}").write_bytes(b"")  # an image may be named like a window
    assert image_of(str(tmp_path), f"a.jpg#{window}") == (f"{tmp_path}/a.jpg#{window}", None)
