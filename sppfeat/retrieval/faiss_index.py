"""FAISS indexes over unit rows: choosing one, building it without the matrix in memory, and measuring its recall.

The choice, unless a factory string is given (N rows of d values, a memory budget M):

    Flat        exact; while its 4 N d bytes fit into M and FLAT_BYTES, so that a query takes at most about 0.1 s
    HNSW32      a graph over the full rows; up to HNSW_ROWS, while 4 N d + 284 N bytes fit into M
    IVFn,SQ8    lists of rows, 8 bits per value; while N d + 8 N bytes and n centres fit into M
    IVFn,PQm    lists of rows of m bytes; m as large as fits into M

The search effort of HNSW and IVF (`efSearch`, `nprobe`) is tuned on a sample of the rows: the least that finds the
requested fraction of the 10 true neighbors.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import numpy as np

from sppfeat.errors import DeviceError, GalleryError, MissingExtraError, UsageError, one_line, require_extra
from sppfeat.machine import available_memory
from sppfeat.store import UnitRows

# At the 10 to 20 GB/s that two cores read, an exact search through this much takes 0.05 to 0.1 s per query: no more
# than describing the query.
FLAT_BYTES: Final = 1 << 30
# Building the graph takes about a millisecond of one core per row at 512 dimensions: beyond this, many hours.
HNSW_ROWS: Final = 5_000_000
HNSW_LINKS: Final = 32
# Links per row of HNSW32: 64 on the bottom level, 32 on the next for every 32nd row, and so on; offsets and levels.
HNSW_ROW_BYTES: Final = 284
ID_BYTES: Final = 8
# Training rows per list. FAISS asks for 39, and uses at most 256.
TRAIN_PER_LIST: Final = 50
MIN_TRAIN: Final = 20_000
# A quarter of FAISS's default: its training reads every row in every round.
PQ_TRAIN_PER_CENTRE: Final = 64
RECALL_K: Final = 10
TUNING_QUERIES: Final = 200
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
class Choice:
    """A factory string, about how many bytes its index takes (None: unknown), and why it was chosen."""

    factory: str
    bytes: int | None
    why: str


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


def load_faiss() -> ModuleType:
    """The module faiss. Raises MissingExtraError."""
    try:
        faiss = require_extra("faiss", "cpu", "similarity search")
    except RuntimeError as error:  # faiss-gpu without NVIDIA's libraries
        raise MissingExtraError(f"similarity search needs faiss, which fails to load: {one_line(error)}") from None
    # That version added the checks of an index from a file, graphs and sizes included.
    if not hasattr(faiss, "set_deserialization_vector_byte_limit"):
        raise MissingExtraError(
            f"similarity search needs faiss 1.15 or newer, found {faiss.__version__}: pip install -U 'sppfeat[cpu]'"
        )
    return faiss


def default_memory() -> int:
    """Half of the memory that this process may use."""
    return available_memory() // 2


def choose_index(rows: int, dim: int, memory: int | None = None) -> Choice:
    """The index for this many rows of this length; see the module. Raises UsageError if none fits into `memory`."""
    budget = default_memory() if memory is None else memory
    budget_text = (
        f"{_show_bytes(budget)} (--memory)" if memory else f"{_show_bytes(budget)} (half of the memory available)"
    )
    lists = list_count(rows)
    centres = 4 * dim * lists
    flat = 4 * rows * dim
    if flat <= min(budget, FLAT_BYTES):
        return Choice("Flat", flat, "exact; small enough to compare a query with every row")
    graph = flat + HNSW_ROW_BYTES * rows
    if graph <= budget and rows <= HNSW_ROWS:
        return Choice(f"HNSW{HNSW_LINKS}", graph, f"a graph over the full rows is the fastest that fits {budget_text}")
    coded = rows * (dim + ID_BYTES) + centres
    if coded <= budget:
        why = f"full rows would take {_show_bytes(flat)}; 8 bits per value fit {budget_text}"
        if graph <= budget:
            why = f"a graph over {rows:,} rows takes too long to build; 8 bits per value fit {budget_text}"
        return Choice(f"IVF{lists},SQ8", coded, why)
    for code in _code_sizes(dim):
        if rows * (code + ID_BYTES) + centres + 1024 * dim <= budget:
            taken = rows * (code + ID_BYTES) + centres + 1024 * dim
            why = f"8 bits per value would take {_show_bytes(coded)}; {code} bytes per row fit {budget_text}"
            return Choice(f"IVF{lists},PQ{code}", taken, why)
    smallest = rows * (_code_sizes(dim)[-1] + ID_BYTES) + centres
    raise UsageError(
        f"memory: {rows:,} rows of {dim:,} values take at least {_show_bytes(smallest)} in an index, found a budget of "
        f"{budget_text}; fewer dimensions (--project) take less"
    )


def list_count(rows: int) -> int:
    """Lists of an IVF index: the power of 2 near 4 sqrt(N), as FAISS advises, with at least 39 rows in each."""
    return max(1, min(1 << round(math.log2(4 * math.sqrt(max(rows, 1)))), 1 << int(math.log2(max(rows // 39, 1)))))


def _code_sizes(dim: int) -> list[int]:
    """Bytes per row that product quantisation can take, the most first: divisors of the dimension."""
    return [size for size in range(dim // 2, 0, -1) if dim % size == 0] or [1]


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


def typed(index: Any) -> Any:
    """A new index as an object of its own class. FAISS's casts do not keep alive what they point to; this does."""
    found = load_faiss().downcast_index(index)
    if found is not index and index.thisown:
        index.this.disown()
        found.this.acquire()
    return found


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
        inner.pq.cp.max_points_per_centroid = PQ_TRAIN_PER_CENTRE
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


@contextlib.contextmanager
def faiss_errors(factory: str) -> Iterator[None]:
    """Raise FAISS errors within the block as GalleryError, with the reason on one line."""
    try:
        yield
    except (RuntimeError, MemoryError, AssertionError) as error:
        raise GalleryError(f"index {factory!r}: FAISS fails ({faiss_reason(error)}); Flat always works") from None


def faiss_reason(error: BaseException) -> str:
    """FAISS's reason without the C++ function that raised it."""
    text = one_line(error)
    found = re.search(r"Error: '(.*?)' failed(?::\s*(.*))?$", text)
    if found:
        return found[2] or found[1]
    return re.sub(r"^Error in .* at \S+:\d+: ", "", text)


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
    truth = true_neighbors(rows, which, queries)
    name = effort_name(index)
    limit = core(index).nlist if name == "nprobe" else 1024
    efforts = [effort for step in range(12) for effort in (1 << step, 3 << step >> 1) if effort <= limit]
    efforts = sorted({limit, *(effort for effort in efforts if name == "nprobe" or effort >= 16)})
    reached: dict[int, float] = {}
    for effort in efforts:
        set_effort(index, effort)
        reached[effort] = recall_of(neighbors_of(index, which, queries), truth)
        if reached[effort] >= target:
            break
    best = max(reached.values())
    wanted = target if best >= target else best - 0.005
    effort = min(one for one, recall in reached.items() if recall >= wanted)
    set_effort(index, effort)
    return {str(name): effort}, reached[effort]


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
        if (name := effort_name(index)) is not None:
            inner = core(index)
            set_effort(fresh, inner.nprobe if name == "nprobe" else inner.hnsw.efSearch)
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
    inner = core(index)
    if hasattr(inner, "make_direct_map") and inner.direct_map.no():
        inner.make_direct_map()
    flat = np.ascontiguousarray(rows, np.int64).ravel()
    if not len(flat):
        return np.zeros((0, index.d), np.float32)
    return np.asarray(index.reconstruct_batch(flat), np.float32)


def on_device(index: Any, device: str) -> Any:
    """The index on a GPU, or unchanged for `cpu`. Raises DeviceError."""
    if device == "cpu":
        return index
    faiss = load_faiss()
    number = int(device.partition(":")[2] or 0)
    if not hasattr(faiss, "StandardGpuResources"):
        raise DeviceError(
            f"device {device}: expected faiss-gpu, found faiss-cpu {faiss.__version__}: "
            "pip uninstall faiss-cpu && pip install 'sppfeat[gpu]'"
        )
    if number >= (usable := faiss.get_num_gpus()):
        raise DeviceError(f"device {device}: expected an NVIDIA GPU, found {usable or 'none'} usable by faiss")
    try:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), number, index)
    except RuntimeError as error:
        raise DeviceError(
            f"device {device}: this kind of index is not supported there ({faiss_reason(error)})"
        ) from None


def from_device(index: Any, device: str) -> Any:
    """The index, back in main memory."""
    return index if device == "cpu" else typed(load_faiss().index_gpu_to_cpu(index))


def _show_bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
