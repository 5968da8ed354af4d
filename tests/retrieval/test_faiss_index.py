"""Indexes: the choice, building block by block, recall, and what FAISS rejects."""

from __future__ import annotations

import re

import numpy as np
import pytest
from conftest import MakeStore

from sppfeat import DeviceError, UsageError
from sppfeat.retrieval.faiss_index import (
    IndexOptions,
    build_index,
    choose_index,
    core,
    list_count,
    load_faiss,
    measure,
    true_neighbors,
)
from sppfeat.store.unit_vectors import unit_rows


def clustered(count: int, clusters: int = 40, dim: int = 32, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(5).normal(size=(clusters, dim))
    return centres[np.arange(count) % clusters] + 0.7 * generator.normal(size=(count, dim))


@pytest.mark.parametrize(
    ("rows", "dim", "memory", "factory", "why"),
    [
        (75, 16_000, None, "Flat", "exact"),
        (10_000, 512, 20_000_000, "IVF256,SQ8", "take 20.5 MB; 8 bits per value fit 20.0 MB (--memory)"),
        (600_000, 512, 2_000_000_000, "HNSW32", "a graph over the full rows is the fastest that fits 2.00 GB"),
        (1_000_000, 512, 4_000_000_000, "HNSW32", "fits 4.00 GB (--memory)"),
        (1_000_000, 512, 1_000_000_000, "IVF4096,SQ8", "full rows would take 2.05 GB"),
        (1_000_000, 512, 250_000_000, "IVF4096,PQ128", "128 bytes per row fit 0.25 GB"),
        (10_000_000, 64, 64_000_000_000, "IVF16384,SQ8", "a graph over 10,000,000 rows takes too long to build"),
    ],
)
def test_choice(rows: int, dim: int, memory: int | None, factory: str, why: str) -> None:
    chosen = choose_index(rows, dim, memory)
    assert chosen.factory == factory and why in chosen.why
    assert memory is None or (chosen.bytes is not None and chosen.bytes <= memory)


def test_no_index_fits() -> None:
    with pytest.raises(
        UsageError, match=r"1,000,000 rows of 512 values take at least .* a budget of 1.0 MB .*--project"
    ):
        choose_index(1_000_000, 512, 1_000_000)


def test_every_list_can_be_trained() -> None:
    for rows in (1, 38, 39, 100, 5_000, 10**6, 10**8):
        lists = list_count(rows)
        assert lists == 1 or rows >= 39 * lists


@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "IVF32,SQ8", "IVF32,PQ4x4"])
def test_what_is_built_is_what_the_memory_says(make_store: MakeStore, factory: str) -> None:
    """The estimated bytes match the file within a tenth, and searching reaches the reported recall."""
    rows = unit_rows(make_store(clustered(3000)))
    built = build_index(rows, IndexOptions(factory=factory, recall=0.9, measure=150))
    assert built.index.ntotal == 3000 and built.measured == 150
    assert built.recall is not None and built.queries_per_second is not None and built.queries_per_second > 0
    again, _ = measure(built.index, rows, rows.sample(150, 2))
    assert built.recall == pytest.approx(again, abs=0.02)
    assert built.recall == 1 if factory == "Flat" else built.recall > (0.1 if "PQ" in factory else 0.85)
    assert bool(built.notes) == (factory == "IVF32,PQ4x4")  # few rows to train, and codes that lose too much


def test_sizes_of_the_rule(make_store: MakeStore) -> None:
    """The rule's estimate of an index's size is right within a twentieth."""
    faiss = load_faiss()
    rows = unit_rows(make_store(clustered(4000)))
    flat, graph = 4 * 32 * 4000, 4 * 32 * 4000 + 284 * 4000
    for factory, expected in (
        ("Flat", flat),
        ("HNSW32", graph),
        ("IVF64,SQ8", 4000 * (32 + 8) + 4 * 32 * 64),
    ):
        built = build_index(rows, IndexOptions(factory=factory))
        assert len(faiss.serialize_index(built.index)) == pytest.approx(expected, rel=0.05)


def test_true_neighbors_equal_numpy(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sppfeat.store.unit_vectors.BLOCK_BYTES", 4 * 32 * 37)  # many blocks, the last one shorter
    rows = unit_rows(make_store(clustered(500)))
    which = rows.sample(60, 0)
    units = rows.take(slice(None))
    cosines = np.float64(units[which]) @ np.float64(units).T
    cosines[np.arange(60), which] = -np.inf
    assert true_neighbors(rows, which, rows.take(which)).tolist() == np.argsort(-cosines)[:, :10].tolist()


def test_effort_is_the_least_that_finds_enough(make_store: MakeStore) -> None:
    rows = unit_rows(make_store(clustered(3000)))
    low = build_index(rows, IndexOptions(factory="IVF64,Flat", recall=0.3))
    high = build_index(rows, IndexOptions(factory="IVF64,Flat", recall=1.0))
    assert low.effort["nprobe"] < high.effort["nprobe"] <= 64
    assert low.recall is not None and high.recall is not None and 0.3 <= low.recall < high.recall == 1
    assert core(high.index).nprobe == high.effort["nprobe"]


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("bogus", "factory 'bogus': FAISS rejects it .*could not parse index string bogus.*one that works: IVF"),
        ("IVF4,PQ7", "should be a multiple of the number of subquantizers.*; one that works: IVF32,SQ8"),
        ("LSH", "FAISS rejects it for inner products of 32 values"),
        (
            "IVF4096,PQ8",
            r"needs at least 4096 rows to train, found 1500; Flat is exact .*IVF32,SQ8 needs",
        ),
        ("IVF4,PQ8x10", "needs at least|rejects"),
        ("", "factory must be a FAISS factory string"),
    ],
)
def test_factories_that_cannot_be(make_store: MakeStore, factory: str, message: str) -> None:
    rows = unit_rows(make_store(clustered(1500)))
    if factory == "IVF4,PQ8x10":  # 1024 centres per code
        rows = rows.only(np.arange(300))
    with pytest.raises(UsageError, match=message):
        build_index(rows, IndexOptions(factory=factory))


def test_examples_in_messages_work(make_store: MakeStore) -> None:
    for count in (50, 300, 1500):
        rows = unit_rows(make_store(clustered(count)))
        with pytest.raises(UsageError) as refused:
            build_index(rows, IndexOptions(factory="bogus"))
        example = re.search(r"one that works: (\S+)$", str(refused.value))
        assert example is not None
        assert build_index(rows, IndexOptions(factory=example[1])).index.ntotal == count


def test_bad_options() -> None:
    for change, message in (
        ({"memory": 0}, "memory must be above 0"),
        ({"recall": 0.0}, "recall must be above 0"),
        ({"recall": 1.1}, "recall must be"),
        ({"measure": -1}, "measure_recall must be"),
        ({"device": "auto"}, "an index's device must be cpu, cuda or cuda:N"),
    ):
        with pytest.raises(UsageError, match=message):
            IndexOptions(**change)  # type: ignore[arg-type]


def test_no_gpu_is_said(make_store: MakeStore) -> None:
    with pytest.raises(DeviceError, match="device cuda: expected (faiss-gpu, found faiss-cpu|an NVIDIA GPU, found)"):
        if getattr(load_faiss(), "get_num_gpus", int)():
            pytest.skip("there is a GPU")
        build_index(unit_rows(make_store(clustered(50))), IndexOptions(device="cuda"))
