"""Re-ordering by neighbors equals the formulas of the papers, step by step; in a search, and in an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeStore
from reference import diffused_scores, expanded_scores, reciprocal_scores, retrieval_precision

from sppfeat import UsageError
from sppfeat.retrieval import (
    RetrievalOptions,
    SearchOptions,
    create_gallery,
    evaluate_retrieval,
    open_gallery,
    search_descriptors,
    search_store,
)
from sppfeat.retrieval.faiss_index import IndexOptions
from sppfeat.retrieval.rerank import RerankOptions, diffuse, expand, reciprocal, reordered

TOGETHER = ("expand", "reciprocal", "diffuse")


def unit_vectors(count: int, dim: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(count, dim)) + 0.3
    units: np.ndarray = values / np.linalg.norm(values, axis=1, keepdims=True)
    return units


@pytest.mark.parametrize(("count", "neighborhood"), [(2, 1), (2, 5), (9, 3), (40, 1), (40, 6), (40, 20), (40, 100)])
def test_formulas(count: int, neighborhood: int) -> None:
    vectors = unit_vectors(count, 6, seed=count)
    similar = vectors @ vectors.T
    for alpha in (0.0, 1.0, 3.0):
        expected = expanded_scores(vectors[0], vectors[1:], neighborhood, alpha)
        assert expand(similar, neighborhood, alpha) == pytest.approx(expected, abs=1e-6)
    assert reciprocal(similar, neighborhood) == pytest.approx(reciprocal_scores(similar, neighborhood), abs=1e-6)
    assert diffuse(similar, neighborhood) == pytest.approx(diffused_scores(similar, neighborhood), abs=1e-6)


@pytest.mark.parametrize("rerank", TOGETHER)
def test_equal_opposite_and_single_images(rerank: str) -> None:
    """No division by zero, whatever is among them."""
    options = RerankOptions(rerank=rerank, neighborhood=3)
    same = np.ones((31, 31))
    assert np.isfinite(reordered(same, options)).all()
    assert len(reordered(np.ones((1, 1)), options)) == 0
    assert np.isfinite(reordered(np.array([[1, -1], [-1, 1.0]]), options)).all()
    assert np.isfinite(reordered(np.eye(20), options)).all()


@pytest.mark.parametrize("rerank", TOGETHER)
def test_the_nearest_of_many_is_the_image_itself(rerank: str) -> None:
    vectors = unit_vectors(60, 16)
    for at in (0, 17, 59):
        similar = np.vstack([vectors[at], vectors]) @ np.vstack([vectors[at], vectors]).T
        assert reordered(similar, RerankOptions(rerank=rerank)).argmax() == at


@pytest.mark.parametrize("rerank", TOGETHER)
@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "IVF2,Flat"])
def test_a_search(make_store: MakeStore, tmp_path: Path, rerank: str, factory: str) -> None:
    rows = unit_vectors(90, 16, seed=3)
    store = make_store(rows)
    create_gallery(store, tmp_path / "g", IndexOptions(factory=factory))
    gallery = open_gallery(tmp_path / "g")
    asked = unit_vectors(4, 16, seed=4)
    options = SearchOptions(k=12, rerank=rerank, neighborhood=5, candidates=30)
    found, scores = search_descriptors(gallery, asked, options)
    plain, _ = search_descriptors(gallery, asked, SearchOptions(k=30))
    held = np.float64(np.array(store.descriptors))
    held /= np.linalg.norm(held, axis=1, keepdims=True)
    for query, of_one, near, values in zip(asked, plain, found, scores, strict=True):
        candidates = of_one[of_one >= 0]
        together = np.vstack([query, held[candidates]])
        expected = reordered(together @ together.T, options)
        assert values[: len(near[near >= 0])] == pytest.approx(np.sort(expected)[::-1][:12], abs=1e-5)
        assert set(near[:5]) <= set(candidates[np.argsort(-expected)[:6]])
    own = search_store(gallery, store, SearchOptions(k=90, rerank=rerank, exclude_self=True))
    for name, answer in zip(store.names, own.answers, strict=True):
        assert name not in [one.name for one in answer.neighbors] and len(answer.neighbors) >= (
            89 if factory == "Flat" else 30
        )


def test_an_index_that_faiss_reads_without_its_quantizer(make_store: MakeStore, tmp_path: Path) -> None:
    """FAISS 1.15 by itself would crash here."""
    create_gallery(make_store(unit_vectors(90, 16)), tmp_path / "g", IndexOptions(factory="IVF4,PQ4x4fs"))
    options = SearchOptions(k=3, rerank="expand", neighborhood=2)
    found, scores = search_descriptors(open_gallery(tmp_path / "g"), unit_vectors(90, 16)[:5], options)
    assert (found >= 0).all() and (scores > 0.3).all()


@pytest.mark.parametrize("rerank", TOGETHER)
@pytest.mark.parametrize("at_once", [True, False])
def test_an_evaluation(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, rerank: str, at_once: bool) -> None:
    """What is not among the candidates keeps its order after them; an image is no neighbor of itself."""
    if not at_once:
        monkeypatch.setattr("sppfeat.retrieval.rankings._ALL_TOGETHER", 0)
    names = [f"thing{n % 5}/{n}.jpg" for n in range(40)]
    store = make_store(unit_vectors(40, 8, seed=1), names=names)
    units = np.float64(np.array(store.descriptors))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    options = RetrievalOptions(rerank=rerank, neighborhood=4, candidates=15)
    done = evaluate_retrieval(store, None, options)
    for query, name in enumerate(names):
        others = [row for row in np.argsort(-(units @ units[query]), kind="stable") if row != query]
        together = units[[query, *others[:15]]]
        scores = reordered(together @ together.T, options)
        ranked = [others[at] for at in np.argsort(-scores, kind="stable")] + others[15:]
        expected = retrieval_precision([row % 5 == query % 5 for row in ranked])
        assert done.average_precisions[name] == pytest.approx(100 * expected)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"rerank": "bin"}, "unknown rerank 'bin'"),
        ({"parts": True, "rerank": "bins"}, "parts orders by bins already"),
        ({"candidates": 0}, "candidates must be from 1"),
        ({"rerank": "diffuse", "candidates": 5001}, "candidates must be at most 5000 images for rerank diffuse"),
        ({"neighborhood": 0}, "neighborhood must be from 1"),
        ({"alpha": -1.0}, "alpha must be a number from 0 to 100"),
        ({"alpha": float("nan")}, "alpha must be a number from 0 to 100"),
    ],
)
@pytest.mark.parametrize("kind", [SearchOptions, RetrievalOptions])
def test_options(kind: Callable[..., Any], given: dict[str, Any], fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        kind(**given)


@pytest.mark.parametrize("name", ["expand", "reciprocal", "diffuse"])
def test_copies_have_the_score_of_copies(name: str) -> None:
    """Rounding between equal images is no distance, and most of the images may be copies."""
    rows = np.random.default_rng(0).normal(size=(9, 16))
    rows[:6] = rows[0]
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    similar = (units @ units.T + np.random.default_rng(1).uniform(-2e-8, 2e-8, (9, 9))).astype(np.float32)
    found = reordered(similar, RerankOptions(rerank=name))
    assert found[:5].min() > 0.9 and found[:5].min() > found[5:].max()
    alone = reordered(np.ones((3, 3), np.float32), RerankOptions(rerank=name))
    assert np.isfinite(alone).all() and alone[0] == pytest.approx(alone[1])
