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
    core,
    measure,
    reconstruct,
    set_effort,
    true_neighbors,
)
from sppfeat.retrieval.faiss_library import load_faiss
from sppfeat.retrieval.index_choice import FLAT_BYTES, choose_index, list_count
from sppfeat.store.unit_vectors import unit_rows


def clustered(count: int, clusters: int = 40, dim: int = 32, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centers = np.random.default_rng(5).normal(size=(clusters, dim))
    return centers[np.arange(count) % clusters] + 0.7 * generator.normal(size=(count, dim))


@pytest.mark.parametrize(
    ("rows", "dim", "memory", "factory", "why"),
    [
        (75, 16_000, None, "Flat", "exact"),
        (10_000, 512, 20_000_000, "HR512,IVF256,SQ8", "take 20.5 MB; 8 bits per value fit 20.0 MB (--memory)"),
        (600_000, 512, 2_000_000_000, "HNSW32", "a graph over the full rows is the fastest that fits 2.00 GB"),
        (1_000_000, 512, 4_000_000_000, "HNSW32", "fits 4.00 GB (--memory)"),
        (1_000_000, 512, 1_000_000_000, "HR512,IVF4096,SQ8", "full rows would take 2.05 GB"),
        (1_000_000, 512, 500_000_000, "HR512,IVF4096,RaBitQ7", "8 bits per value would take 0.53 GB; 7 bits"),
        (1_000_000, 512, 250_000_000, "HR512,IVF4096,RaBitQ3", "3 bits per value fit 0.25 GB"),
        (1_000_000, 512, 100_000_000, "HR512,IVF4096,RaBitQ", "1 bit per value fit 0.10 GB"),
        (1_000_000, 600, 1_000_000_000, "RR600,IVF4096,SQ8", "full rows would take 2.40 GB"),
        (10_000_000, 64, 64_000_000_000, "HR64,IVF16384,SQ8", "a graph over 10,000,000 rows of 64 values takes too"),
        (100_000, 16_000, 64_000_000_000, "HR16384,IVF1024,SQ8", "a graph over 100,000 rows of 16,000 values takes"),
        (20_000, 16_000, 64_000_000_000, "HNSW32", "fits 64.00 GB (--memory)"),
    ],
)
def test_choice(rows: int, dim: int, memory: int | None, factory: str, why: str) -> None:
    chosen = choose_index(rows, dim, memory)
    assert chosen.factory == factory and why in chosen.why
    assert memory is None or (chosen.bytes is not None and chosen.bytes <= memory)


ROWS = (50, 3_000, 70_000, 1_000_000, 30_000_000)
DIMS = (2, 16, 100, 512, 2_048, 16_000)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dim", DIMS)
def test_choices_over_sizes(rows: int, dim: int) -> None:
    """Whatever is chosen fits, can be made and trained with these rows, and more memory never gives a worse kind."""
    faiss = load_faiss()
    order = ["RaBitQ", *(f"RaBitQ{bits}" for bits in range(2, 8)), "SQ8", "HNSW32", "Flat"]
    ranks, bytes_ = [], []
    for memory in np.geomspace(4 * rows * dim / 100, 5 * rows * (dim + 100), 25).astype(int).tolist():
        try:
            chosen = choose_index(rows, dim, memory)
        except UsageError as refused:
            assert not ranks and "take at least" in str(refused)
            found = re.search(r"--project (\d+) fits", str(refused))
            assert found is None or choose_index(rows, int(found[1]), memory)
            continue
        assert chosen.bytes is not None and chosen.bytes <= memory
        ranks.append(order.index(chosen.factory.split(",")[-1]))
        bytes_.append(chosen.bytes)
        if dim <= 512:  # making a full rotation of more takes long
            index = faiss.index_factory(dim, chosen.factory, faiss.METRIC_INNER_PRODUCT)
            lists = getattr(core(index), "nlist", 1)
            assert lists == 1 or rows >= 39 * lists
    assert ranks and ranks == sorted(ranks) and bytes_ == sorted(bytes_)
    assert order[ranks[-1]] == "Flat" if 4 * rows * dim <= FLAT_BYTES else ranks[-1] >= order.index("SQ8")


def test_long_rows_are_told_of_projections(make_store: MakeStore) -> None:
    note = choose_index(100_000, 16_000, 8_000_000_000).note
    assert note is not None and "--project 512 would take 0.20 GB (Flat) instead of 1.7" in note
    assert choose_index(100_000, 512, 100_000_000).note is None
    assert choose_index(10_000, 16_000, 8_000_000_000).note is None  # exact
    rows = unit_rows(make_store(clustered(80, dim=1100)))
    built = build_index(rows, IndexOptions(memory=300_000))
    assert built.choice.factory == "HR2048,IVF2,SQ8"
    assert any(re.fullmatch(r"rows of 1,100 values are slow .*: --project 512 would .*", note) for note in built.notes)


def test_no_index_fits() -> None:
    with pytest.raises(
        UsageError, match=r"1,000,000 rows of 512 values take at least .* a budget of 1.0 MB .*--project"
    ):
        choose_index(1_000_000, 512, 1_000_000)
    with pytest.raises(UsageError, match=r"at least 8.* MB .* a budget of 60.0 MB \(--memory\); --project 256 fits"):
        choose_index(1_000_000, 512, 60_000_000)


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


def test_sizes_of_the_rule(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule's estimate of an index's size is right within a fiftieth, and never 1 kB below the file."""
    faiss = load_faiss()
    kinds = set()
    for dim in (32, 40):
        rows = unit_rows(make_store(clustered(4000, dim=dim), f"{dim}.h5"))
        for memory in (4000 * (4 * dim), 4000 * 48, 4000 * 45, 4000 * 40, 4000 * 36, 4000 * 32, 4000 * 29):
            built = build_index(rows, IndexOptions(memory=memory))
            kinds.add(built.choice.factory)
            size = len(faiss.serialize_index(built.index))
            assert built.choice.bytes == pytest.approx(size, rel=0.02, abs=1000) and size <= memory + 1000
    assert len(kinds) >= 6
    monkeypatch.setattr("sppfeat.retrieval.index_choice.FLAT_BYTES", 1)
    built = build_index(rows, IndexOptions(memory=1 << 30))
    assert built.choice.factory == "HNSW32"
    assert built.choice.bytes == pytest.approx(len(faiss.serialize_index(built.index)), rel=0.03)


@pytest.mark.parametrize(
    "factory", ["Flat", "HR64,IVF16,SQ8", "RR40,IVF16,RaBitQ7", *(f"HR64,IVF16,RaBitQ{b}" for b in range(2, 8))]
)
def test_rows_are_decoded(make_store: MakeStore, factory: str) -> None:
    """What the index returns as a row is close to it, and more so with more bits; padded rotations are turned back."""
    rows = unit_rows(make_store(clustered(1500, dim=40)))
    index = build_index(rows, IndexOptions(factory=factory)).index
    again = load_faiss().deserialize_index(load_faiss().serialize_index(index))
    which = np.array([7, 3, 1499, 7])
    bits = int(factory[-1]) if factory[-1].isdigit() else 23
    for held in (index, again):
        errors = np.linalg.norm(reconstruct(held, which) - rows.take(slice(None))[which], axis=1)
        assert (errors < 2 * 0.5**bits + 1e-6).all(), errors


def test_scores_are_those_of_decoded_rows(make_store: MakeStore) -> None:
    """The scores of a row against two queries differ by what its decoded form says: an offset of the row cancels."""
    rows = unit_rows(make_store(clustered(1500, dim=40)))
    queries = rows.take(slice(0, 10))
    for factory in ("HR64,IVF16,RaBitQ4", "RR40,IVF16,RaBitQ2"):
        index = build_index(rows, IndexOptions(factory=factory, recall=1.0)).index
        set_effort(index, 16)
        _, found = index.search(queries, 1500)
        assert (np.sort(found) == np.arange(1500)).all()
        scores = np.take_along_axis(index.search(queries, 1500)[0], np.argsort(found), 1)
        near = np.argsort(-scores[0])[:8]  # scores of candidates that cannot be among the k are of the first bit alone
        expected = queries @ reconstruct(index, near).T
        np.testing.assert_allclose(np.diff(scores[:, near], axis=0), np.diff(expected, axis=0), atol=1e-4)


def test_few_bits_find_most_neighbors(make_store: MakeStore) -> None:
    """Codes of 3 bits per value find 0.9 of the neighbors of the benchmark's rows, whose values weigh unequally."""
    generator = np.random.default_rng(0)
    weights = np.arange(1, 129) ** -0.5
    centers, noise = generator.normal(size=(40, 128)) * weights, generator.normal(size=(4000, 128)) * weights
    rows = unit_rows(make_store(centers[np.arange(4000) % 40] + 0.7 * noise))
    built = build_index(rows, IndexOptions(memory=400_000, measure=200))
    assert built.choice.factory == "HR128,IVF64,RaBitQ3" and built.recall is not None and built.recall > 0.85


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
    if factory == "IVF4,PQ8x10":  # 1024 centers per code
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
