"""FAISS indexes over unit rows: building one without the matrix in memory, tuning it, and measuring its recall.

`index_choice` chooses one, unless a factory string is given. The search effort of HNSW and IVF (`efSearch`, `nprobe`)
is tuned on a sample of the rows: the least that finds the requested fraction of the 10 true neighbors.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sppfeat.errors import UsageError
from sppfeat.retrieval.faiss_library import faiss_errors, faiss_reason, from_device, load_faiss, on_device, typed
from sppfeat.retrieval.index_choice import Choice, choose_index, default_memory, list_count
from sppfeat.retrieval.segments import JoinedIndex
from sppfeat.store import UnitRows, normalize_rows

# Training rows per list. FAISS asks for 39, and uses at most 256.
TRAIN_PER_LIST: Final = 50
MIN_TRAIN: Final = 20_000
# A quarter of FAISS's default: its training reads every row in every round.
PQ_TRAIN_PER_CENTER: Final = 64
RECALL_K: Final = 10
TUNING_QUERIES: Final = 200
# What tuning begins with, and the highest efSearch that it tries: search memory per query grows with it.
LEAST_EFFORT: Final = {"nprobe": 1, "efSearch": 16}
MOST_EF_SEARCH: Final = 1024
_TRAIN_SEED: Final = 1234


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """How an index is built.

    factory: a FAISS factory string; None: automatic. memory: bytes that the index may take; None: half of what is free.
    recall: fraction of the 10 true neighbors that an approximate index is tuned to find, 0 to 1.
    measure: compare this many rows' neighbors with the exact ones. device: `cpu`, `cuda` or `cuda:N`.
    Raises UsageError, naming the field, for an invalid value.
    """

    factory: str | None = None
    memory: int | None = None
    recall: float = 0.97
    measure: int = 0
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UsageError(f"seed must be a whole number from 0, found {self.seed}")
        if self.factory is not None and not self.factory.strip():
            raise UsageError("factory must be a FAISS factory string, such as Flat or IVF256,SQ8, found nothing")
        if self.memory is not None and self.memory < 1:
            raise UsageError(f"memory must be above 0 bytes, found {self.memory}")
        if not 0 < self.recall <= 1:
            raise UsageError(f"recall must be above 0 and at most 1, found {self.recall}")
        if self.measure < 0:
            raise UsageError(f"measure_recall must be at least 0 queries, found {self.measure}")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise UsageError(f"an index's device must be cpu, cuda or cuda:N, found {self.device!r}")


@dataclass(frozen=True)
class BuiltIndex:
    """An index that is ready to search.

    effort: the tuned setting, such as `{"nprobe": 16}`. recall: of 10 neighbors, 0 to 1, on the rows that `effort` was
    tuned on, or on those of `measure`; None if it was not measured. queries_per_second: with `measure`.
    seconds: to train, fill and tune it.
    """

    index: Any
    choice: Choice
    effort: dict[str, int]
    recall: float | None
    measured: int
    queries_per_second: float | None
    seconds: float
    notes: list[str]


def build_index(rows: UnitRows, options: IndexOptions | None = None) -> BuiltIndex:
    """Train an index on a sample of the rows, fill it block by block, and tune its search effort.

    Raises UsageError for a factory string that FAISS rejects, or that needs more rows to train; DeviceError.
    """
    options = options or IndexOptions()
    started = time.perf_counter()
    choice = (
        choose_index(len(rows), rows.dim, options.memory)
        if options.factory is None
        else Choice(options.factory, None, "as given")
    )
    index = _create(choice.factory, len(rows), rows.dim)
    notes = _check_training(index, choice.factory, len(rows))
    if choice.note is not None:
        notes.append(choice.note)
    place = on_device(index, options.device)
    with faiss_errors(choice.factory):
        if not place.is_trained:
            place.train(rows.gather(rows.sample(_training_rows(index, rows, options.memory), _TRAIN_SEED)))
        fill(place, rows)
    index = from_device(place, options.device)
    effort: dict[str, int] = {}
    recall, speed, measured = None, None, 0
    if effort_name(index) is not None:
        which = rows.sample(TUNING_QUERIES, options.seed + 1)
        effort, recall = tune(index, rows, which, options.recall)
        measured = len(which)
        if recall < options.recall - 0.005:
            notes.append(f"found at most {100 * recall:.1f} % of the true neighbors, below {100 * options.recall:g} %")
    seconds = time.perf_counter() - started
    if options.measure:
        which = rows.sample(options.measure, options.seed + 2)
        recall, speed = measure(index, rows, which)
        measured = len(which)
    if is_exact(index) and recall is None:
        recall = 1.0
    return BuiltIndex(index, choice, effort, recall, measured, speed, seconds, notes)


def _create(factory: str, rows: int, dim: int) -> Any:
    faiss = load_faiss()
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except (RuntimeError, TypeError) as error:
        raise UsageError(
            f"factory {factory!r}: FAISS rejects it for inner products of {dim} values ({faiss_reason(error)}); "
            f"one that works: IVF{list_count(rows)},SQ8"
        ) from None
    return typed(index)


def _check_training(index: Any, factory: str, rows: int) -> list[str]:
    """Reject too few training rows; return notes if there are few. FAISS would warn on stderr, or fail halfway."""
    needs, advised = _training_needs(index)
    if rows < needs:
        raise UsageError(
            f"factory {factory!r}: needs at least {needs} rows to train, found {rows}; Flat is exact and needs none"
            + (f", IVF{list_count(rows)},SQ8 needs fewer" if rows >= 2 * 39 else "")
        )
    few = "few rows to train its lists and codes well: {:,}, recommended {:,}"
    return [few.format(rows, advised)] if rows < advised else []


def _training_needs(index: Any) -> tuple[int, int]:
    """The rows that training an index requires, and those it should have."""
    inner = core(index)
    counts = [1]
    if hasattr(inner, "nlist"):
        counts.append(inner.nlist)
        inner.cp.min_points_per_centroid = 1
    if hasattr(inner, "pq"):
        counts.append(inner.pq.ksub)
        inner.pq.cp.min_points_per_centroid = 1
        inner.pq.cp.max_points_per_centroid = PQ_TRAIN_PER_CENTER
    return max(counts), max(39 * count if count > 1 else 1 for count in counts)


def _training_rows(index: Any, rows: UnitRows, memory: int | None) -> int:
    """Number of training rows: enough for each list and code, in at most half of the memory budget."""
    needs, advised = _training_needs(index)
    inner = core(index)
    wanted = max(MIN_TRAIN, advised, TRAIN_PER_LIST * getattr(inner, "nlist", 1))
    budget = default_memory() if memory is None else memory
    return max(needs, min(wanted, budget // 2 // (4 * rows.dim)))


def fill(index: Any, rows: UnitRows) -> None:
    """Add all rows to a trained index, block by block."""
    for _, block in rows.blocks():
        index.add(block)


def core(index: Any) -> Any:
    """The actual index, below transforms and refinement."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    while True:
        if isinstance(index, faiss.IndexPreTransform):
            index = faiss.downcast_index(index.index)
        elif isinstance(index, faiss.IndexRefine):
            index = faiss.downcast_index(index.base_index)
        else:
            return index


def is_exact(index: Any) -> bool:
    """Whether it compares a query with every full row."""
    return isinstance(load_faiss().downcast_index(index), load_faiss().IndexFlat)


def effort_name(index: Any) -> str | None:
    """The name of an index's search effort setting; None if it has none."""
    inner = core(index)
    if hasattr(inner, "nprobe"):
        return "nprobe"
    return "efSearch" if hasattr(inner, "hnsw") else None


def effort_of(index: Any) -> dict[str, int]:
    """The search effort of an index; empty if it has none."""
    name, inner = effort_name(index), core(index)
    if name is None:
        return {}
    return {name: int(inner.nprobe if name == "nprobe" else inner.hnsw.efSearch)}


def set_effort(index: Any, value: int) -> None:
    """Set the search effort of an index."""
    inner = core(index)
    if effort_name(index) == "nprobe":
        inner.nprobe = value
    else:
        inner.hnsw.efSearch = value


def tune(index: Any, rows: UnitRows, which: np.ndarray, target: float) -> tuple[dict[str, int], float]:
    """Set the least effort that finds `target` of the true neighbors of the rows `which`; return it and the recall.

    If no effort does, use the least that comes within half a point of the best.
    """
    queries = rows.gather(which)
    return _tune(index, which, queries, true_neighbors(rows, which, queries), target, 1)


def retune(index: Any, added: int, target: float, seed: int = 0) -> tuple[dict[str, int], float]:
    """The same after `added` rows joined the index at its end, half of the sample from them, without a store of all.

    Neighbors are compared with those that the highest effort finds, of rows as the index holds them. Rows that are more
    need at least the effort that fewer needed.
    """
    generator = np.random.default_rng(seed)
    total, half = index.ntotal, TUNING_QUERIES // 2
    new = generator.choice(added, min(half, added), replace=False) + total - added
    which = np.union1d(generator.choice(total, min(half, total), replace=False), new)
    queries = normalize_rows(reconstruct(index, which))
    if hasattr(core(index), "direct_map"):
        # Made to find rows, it would be written with the index, 8 bytes per row, and never read.
        core(index).set_direct_map_type(load_faiss().DirectMap.NoMap)
    name = str(effort_name(index))
    before = effort_of(index)
    set_effort(index, _highest_effort(index))
    truth = neighbors_of(index, which, queries)
    return _tune(index, which, queries, truth, target, before[name])


def _tune(
    index: Any, which: np.ndarray, queries: np.ndarray, truth: np.ndarray, target: float, least: int
) -> tuple[dict[str, int], float]:
    name = str(effort_name(index))
    limit = _highest_effort(index)
    least = min(max(least, LEAST_EFFORT[name]), limit)
    efforts = {least, limit, *(effort for step in range(limit.bit_length()) for effort in (1 << step, 3 << step >> 1))}
    reached: dict[int, float] = {}
    for effort in sorted(effort for effort in efforts if least <= effort <= limit):
        set_effort(index, effort)
        reached[effort] = recall_of(neighbors_of(index, which, queries), truth)
        # Once twice the effort finds nothing more, the codes are the limit.
        if reached[effort] >= target or (
            effort >= 64 and len(reached) > 2 and reached[effort] <= reached[sorted(reached)[-3]]
        ):
            break
    best = max(reached.values())
    wanted = target if best >= target else best - 0.005
    effort = min(one for one, recall in reached.items() if recall >= wanted)
    set_effort(index, effort)
    return {name: effort}, reached[effort]


def _highest_effort(index: Any) -> int:
    return int(core(index).nlist) if effort_name(index) == "nprobe" else MOST_EF_SEARCH


def measure(index: Any, rows: UnitRows, which: np.ndarray) -> tuple[float, float]:
    """Recall of the rows `which` against exact search, 0 to 1, and queries per second, all at once."""
    queries = rows.gather(which)
    started = time.perf_counter()
    found = neighbors_of(index, which, queries)
    seconds = time.perf_counter() - started
    return recall_of(found, true_neighbors(rows, which, queries)), len(which) / seconds


def neighbors_of(index: Any, which: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """[Q, 10] nearest rows of rows of the index itself, without themselves; -1 where there are fewer."""
    _, found = index.search(queries, min(RECALL_K + 1, index.ntotal))
    return _without(found, which)


def true_neighbors(rows: UnitRows, which: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The same as `neighbors_of`, by comparing with every row, read block by block."""
    faiss = load_faiss()
    scores = np.full((len(which), 0), 0, np.float32)
    found = np.zeros((len(which), 0), np.int64)
    for start, block in rows.blocks():
        more, at = faiss.knn(queries, block, min(RECALL_K + 1, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        scores, found = np.hstack([scores, more]), np.hstack([found, at + start])
        order = np.argsort(-scores, axis=1, kind="stable")[:, : RECALL_K + 1]
        scores, found = np.take_along_axis(scores, order, 1), np.take_along_axis(found, order, 1)
    return _without(found, which)


def _without(found: np.ndarray, which: np.ndarray) -> np.ndarray:
    """[Q, k] rows found [Q, k + 1] without the query's own, or without the last if that was not found."""
    own = found == which[:, None]
    own[~own.any(1), -1] = True
    left: np.ndarray = found[~own].reshape(len(found), -1)
    return left


def recall_of(found: np.ndarray, truth: np.ndarray) -> float:
    """Fraction of the true neighbors [Q, k] that were found [Q, k], 0 to 1."""
    if not truth.size:
        return 1.0
    return float(np.mean([len(np.intersect1d(one, true)) for one, true in zip(found, truth, strict=True)])) / len(
        truth[0]
    )


def drop_rows(index: Any, remove: np.ndarray, factory: str) -> Any:
    """An index without the rows at the rising positions `remove`; the remaining rows keep their order, without gaps.

    Lists and flat codes can drop rows; any other index, such as a graph, is rebuilt from the rows that it holds.
    Raises GalleryError for an index that can do neither.
    """
    faiss = load_faiss()
    with faiss_errors(factory):
        if isinstance(index, faiss.IndexFlatCodes):
            index.remove_ids(remove)
            return index
        if isinstance(index, faiss.IndexIVF):
            _drop_from_lists(index, remove)
            return index
        if isinstance(index, faiss.IndexPreTransform):
            inner = faiss.downcast_index(index.index)
            if isinstance(inner, faiss.IndexFlatCodes | faiss.IndexIVF):
                drop_rows(inner, remove, factory)
                index.ntotal = inner.ntotal
                return index
        keep = np.setdiff1d(np.arange(index.ntotal), remove)
        fresh = _create(factory, len(keep), index.d)
        values = reconstruct(index, keep)
        if not fresh.is_trained:
            _check_training(fresh, factory, len(keep))
            fresh.train(values)
        fresh.add(values)
        for effort in effort_of(index).values():
            set_effort(fresh, effort)
        return fresh


def _drop_from_lists(index: Any, remove: np.ndarray) -> None:
    faiss = load_faiss()
    total = index.ntotal
    index.set_direct_map_type(faiss.DirectMap.NoMap)
    index.remove_ids(remove)
    # Lists keep the rows' old ids; ours are positions in the list of names.
    moved = np.arange(total) - np.searchsorted(remove, np.arange(total))
    for at in range(index.nlist):
        size = index.invlists.list_size(at)
        if size:
            ids = faiss.rev_swig_ptr(index.invlists.get_ids(at), size)
            ids[:] = moved[ids]


def reconstruct(index: Any, rows: np.ndarray) -> np.ndarray:
    """[n, d] float32 vectors at these positions, as the index holds them: exact, or decoded."""
    if isinstance(index, JoinedIndex):
        late = rows >= index.base.ntotal
        found = np.empty((len(rows), index.d), np.float32)
        found[~late] = reconstruct(index.base, rows[~late])
        found[late] = reconstruct(index.added, rows[late] - index.base.ntotal)
        return found
    inner = core(index)
    if hasattr(inner, "make_direct_map") and inner.direct_map.no():
        inner.make_direct_map()
    flat = np.ascontiguousarray(rows, np.int64).ravel()
    if not len(flat):
        return np.zeros((0, index.d), np.float32)
    return _decoded(index, flat)


def _decoded(index: Any, rows: np.ndarray) -> np.ndarray:
    """The same for an index or a part of one, whose map of rows exists."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        values = _decoded(index.index, rows)
        for at in reversed(range(index.chain.size())):
            transform = faiss.downcast_VectorTransform(index.chain.at(at))
            if isinstance(transform, faiss.HadamardRotation) and transform.d_in < transform.d_out:
                # FAISS turns back only rows that it did not pad.
                square = faiss.HadamardRotation(transform.d_out)
                square.init(transform.seed)
                values = np.ascontiguousarray(square.reverse_transform(values)[:, : transform.d_in])
            else:
                values = transform.reverse_transform(values)
        return values
    if isinstance(index, faiss.IndexIVFRaBitQ) and index.rabitq.nb_bits > 1:
        return _decoded_bits(index, rows)
    return np.asarray(index.reconstruct_batch(rows), np.float32)


def _decoded_bits(index: Any, rows: np.ndarray) -> np.ndarray:
    """[n, d] rows of RaBitQ codes of several bits per value. FAISS 1.15 itself decodes the first bit alone.

    A code is a bit per value, 12 bytes, the other bits per value (lowest first), a term of scores, and the factor f:
    with u the number that all bits of a value make, the first one being the highest, it stands for f (u - middle).
    """
    faiss = load_faiss()
    d, extra = index.d, index.rabitq.nb_bits - 1
    first, rest = (d + 7) // 8, (d * extra + 7) // 8
    codes = np.empty((len(rows), index.rabitq.code_size), np.uint8)
    lists = np.empty(len(rows), np.int64)
    for at, row in enumerate(rows.tolist()):
        place = index.direct_map.get(row)
        lists[at] = faiss.lo_listno(place)
        code = index.invlists.get_single_code(int(lists[at]), faiss.lo_offset(place))
        codes[at] = faiss.rev_swig_ptr(code, codes.shape[1])
    high = np.unpackbits(codes[:, :first], axis=1, count=d, bitorder="little").astype(np.float32)
    low = np.unpackbits(codes[:, first + 12 : first + 12 + rest], axis=1, count=d * extra, bitorder="little")
    weights = (1 << np.arange(extra)).astype(np.float32)
    whole = high * (1 << extra) + low.reshape(-1, d, extra).astype(np.float32) @ weights
    factor = np.ascontiguousarray(codes[:, -4:]).view("<f4")
    centers = faiss.downcast_index(index.quantizer).reconstruct_batch(lists)
    decoded: np.ndarray = centers + factor * (whole - ((1 << extra) - 0.5))
    return decoded.astype(np.float32)
