"""A map of a gallery: a point for each image, so that images that look alike are near each other.

Descriptors are projected onto their principal components, and these are laid out by t-SNE (van der Maaten, Hinton 2008)
with openTSNE (Policar, Strazar, Zupan 2024): from their first two components, and with a learning rate that grows with
their number (Kobak, Berens 2019; Belkina et al. 2019), so that the map as a whole means something, too. Of very many
images a sample is laid out, and the others are placed among their neighbors in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from sppfeat.errors import GalleryError, UsageError, require_extra
from sppfeat.machine import available_cores
from sppfeat.retrieval.arrays import read_arrays, write_arrays
from sppfeat.retrieval.faiss_index import reconstruct
from sppfeat.retrieval.faiss_library import faiss_errors, load_faiss
from sppfeat.store import normalize_rows

# More images than MOST are laid out by a sample of SAMPLE.
MOST: Final = 200_000
SAMPLE: Final = 100_000
SEED: Final = 0
# Fewer have too few neighbors for t-SNE: the first two components are their map.
_FEW: Final = 10
_COMPONENTS: Final = 50
# Rows that the components are learned from; and directions beside them, and rounds, that make them exact enough
# (Halko, Martinsson, Tropp 2011).
_LEARNED_FROM: Final = 20_000
_MORE_DIRECTIONS: Final = 14
_ROUNDS: Final = 4
_BLOCK_BYTES: Final = 64 << 20
_PERPLEXITY: Final = 30.0
# Beyond, neighbors come from lists of them instead of all comparisons.
_COMPARED: Final = 20_000
_LISTS_SEARCHED: Final = 24
# Interpolation is faster than trees beyond (Linderman et al. 2019; the default of openTSNE).
_INTERPOLATED: Final = 10_000
_EARLY, _LATE = 250, 500  # iterations, and how strongly neighbors attract in the first: the defaults of openTSNE
_EXAGGERATION: Final = 12.0
_EVERY: Final = 10
# Placing the others; values of openTSNE's `transform`, and fewer iterations: neighbors' median is a good start.
_PLACED_AT_ONCE: Final = 50_000
_PLACING_PERPLEXITY, _PLACING_NEIGHBORS, _PLACING = 5.0, 15, 100
# The least distance of two points: of float32 values up to 1.
_STEP: Final = 2.0**-23
_CURVE_BITS: Final = 16

Part = Callable[[float], None]
Stop = Callable[[], bool]


class Vectors(Protocol):
    """Rows [N, D] of any length, read a few at a time: an array, or what an index holds."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, D]."""

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray:
        """[n, D] at positions [n]."""


class HeldVectors:
    """The rows that a FAISS index holds, exact or decoded."""

    def __init__(self, index: Any) -> None:
        self._index = index

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, D]."""
        return int(self._index.ntotal), int(self._index.d)

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray:
        """[n, D] at positions [n]."""
        return reconstruct(self._index, rows)


class _Stopped(Exception):
    """The caller wants no more."""


def check_map() -> None:
    """Raise MissingExtraError unless a map can be made here. Call it before the work."""
    load_faiss()
    _tsne()


def lay_out(
    vectors: Vectors, *, seed: int = SEED, progress: Part = lambda part: None, stop: Stop = lambda: False
) -> np.ndarray | None:
    """Points [N, 2] float32 of vectors [N, D], in row order: x to the right and y down, both from 0 to 1.

    The longer side of the map is 1, and the other has the same scale. No two points are equal. The same vectors, seed
    and number of threads give the same points. progress: called with the fraction of the work done, 0 to 1. stop: asked
    often; once it is true, the result is None. Raises UsageError for values that are not finite, MissingExtraError.
    """
    count = vectors.shape[0]
    if count < 1:
        raise UsageError("expected vectors to lay out, found none")
    check_map()
    generator = np.random.default_rng(seed)
    chosen = np.arange(count)
    if count > MOST:
        chosen = np.sort(generator.choice(count, SAMPLE, replace=False))
    share = 1.0 if len(chosen) == count else 0.5

    def tell(done: float) -> None:
        if stop():
            raise _Stopped
        progress(min(done, 1.0))

    try:
        components = _Components(vectors, chosen, generator, lambda part: tell(share * 0.1 * part))
        values = np.empty((len(chosen), components.kept), np.float32)
        for done, block in components.of(chosen):
            values[done - len(block) : done] = block
            tell(share * (0.1 + 0.1 * done / len(chosen)))
        if len(chosen) < _FEW:
            return _scaled(np.pad(values, ((0, 0), (0, 2)))[:, :2], generator)
        embedding = _embedded(values, seed, lambda part: tell(share * (0.2 + 0.8 * part)))
        if len(chosen) == count:
            return _scaled(np.asarray(embedding), generator)
        others = np.setdiff1d(np.arange(count), chosen, assume_unique=True)
        points = np.empty((count, 2), np.float64)
        # Their grid moves the embedding: it is read at the end.
        for done, placed in _placed(embedding, components, others):
            points[others[done - len(placed) : done]] = placed
            tell(share + (1 - share) * done / len(others))
        points[chosen] = np.asarray(embedding)
        return _scaled(points, generator)
    except _Stopped:
        return None


class _Components:
    """Principal components of unit rows, learned from some of them."""

    def __init__(self, vectors: Vectors, chosen: np.ndarray, generator: np.random.Generator, tell: Part) -> None:
        self._vectors = vectors
        dim = vectors.shape[1]
        sample = chosen
        if len(chosen) > _LEARNED_FROM:
            sample = np.sort(generator.choice(chosen, _LEARNED_FROM, replace=False))
        total = np.zeros(dim)
        for _, units in self._units(sample):
            total += units.sum(0, dtype=np.float64)
        self._mean = (total / len(sample)).astype(np.float32)
        wide = min(dim, len(sample), _COMPONENTS + _MORE_DIRECTIONS)
        basis = np.linalg.qr(generator.normal(size=(dim, wide)))[0]
        for turn in range(_ROUNDS):
            # The covariance times the basis; the last time, within the basis.
            image = np.zeros((dim, wide))
            small = basis.astype(np.float32)
            for done, units in self._units(sample):
                units -= self._mean
                image += units.T @ (units @ small)
                tell((turn + done / len(sample)) / _ROUNDS)
            if turn < _ROUNDS - 1:
                basis = np.linalg.qr(image)[0]
        within = basis.T @ image
        axes = np.linalg.eigh((within + within.T) / 2)[1][:, ::-1][:, :_COMPONENTS]
        found = basis @ axes
        # Either direction of a component is one: the same every time.
        found *= np.where(found[np.abs(found).argmax(0), np.arange(found.shape[1])] < 0, -1, 1)
        self._axes = found.astype(np.float32)

    @property
    def kept(self) -> int:
        """Values of a projected row."""
        return int(self._axes.shape[1])

    def of(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Blocks [n, kept] of rows projected, and how many are done with each."""
        for done, units in self._units(rows):
            yield done, (units - self._mean) @ self._axes

    def _units(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        size = max(1, _BLOCK_BYTES // (4 * max(1, self._vectors.shape[1])))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            units = np.array(self._vectors[part], np.float32)
            normalize_rows(units)
            yield start + len(part), units


class _Lists:
    """Nearest rows among [N, d] float32 values: of all, or, among many, of lists of them."""

    def __init__(self, values: np.ndarray) -> None:
        faiss = load_faiss()
        self._values = values
        self._index: Any = faiss.IndexFlatL2(values.shape[1])
        with faiss_errors("IVF"):
            if len(values) > _COMPARED:
                lists = int(2 * len(values) ** 0.5)
                self._coarse = self._index
                self._index = faiss.IndexIVFFlat(self._coarse, values.shape[1], lists, faiss.METRIC_L2)
                self._index.nprobe = min(lists, _LISTS_SEARCHED)
                self._index.train(values)
            self._index.add(values)

    def near(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows [Q, k] and distances [Q, k] of the k nearest, the nearest first."""
        squares, rows = self._index.search(queries, k)
        if len(few := np.flatnonzero((rows < 0).any(1))):
            # Their lists hold fewer than k.
            squares[few], rows[few] = load_faiss().knn(queries[few], self._values, k)
        return rows, np.sqrt(np.maximum(squares, 0))


def _embedded(values: np.ndarray, seed: int, tell: Part) -> Any:
    """The t-SNE embedding of [N, d] values, N of at least 10."""
    tsne = _tsne()
    count = len(values)
    perplexity = min(_PERPLEXITY, (count - 1) / 3)
    k = min(count - 1, int(3 * perplexity))
    lists = _Lists(values)
    rows, distances = np.empty((count, k), np.int64), np.empty((count, k), np.float32)
    size = max(1, _BLOCK_BYTES // (16 * k))
    for start in range(0, count, size):
        part = slice(start, start + size)
        rows[part], distances[part] = _without_self(*lists.near(values[part], k + 1), start)
        tell(0.2 * min(1.0, (start + size) / count))
    cores = available_cores()
    known = tsne.nearest_neighbors.PrecomputedNeighbors(rows, distances.astype(np.float64))
    affinities = tsne.affinity.PerplexityBasedNN(perplexity=perplexity, knn_index=known, n_jobs=cores)
    # For those that are placed later.
    known.query = lambda queries, k: lists.near(np.ascontiguousarray(queries, np.float32), k)
    start_points = np.pad(values.astype(np.float64), ((0, 0), (0, 2)))[:, :2]
    spread = start_points[:, 0].std()
    # Equal rows start at different points, or the tree of all points could not part them.
    start_points = start_points * (1e-4 / (spread if spread > 0 else 1.0))
    start_points += np.random.default_rng(seed).normal(0, 1e-7, start_points.shape)
    told = _Told(tell)
    embedding = tsne.TSNEEmbedding(
        start_points,
        affinities,
        negative_gradient_method="fft" if count > _INTERPOLATED else "bh",
        learning_rate="auto",
        n_jobs=cores,
        random_state=seed,
        callbacks=[told],
        callbacks_every_iters=_EVERY,
    )
    for iterations, exaggeration in ((_EARLY, _EXAGGERATION), (_LATE, 1.0)):
        embedding.optimize(iterations, inplace=True, exaggeration=exaggeration, propagate_exception=True)
    embedding -= (embedding.max(0) + embedding.min(0)) / 2
    embedding.gradient_descent_params |= {"callbacks": None}
    return embedding


class _Told:
    """Calls `tell` as iterations go by; what it raises ends them."""

    def __init__(self, tell: Part) -> None:
        self._tell, self._done = tell, 0

    def __call__(self, iteration: int, error: float, embedding: np.ndarray) -> bool:
        self._done += _EVERY
        self._tell(0.2 + 0.8 * min(1.0, self._done / (_EARLY + _LATE)))
        return False


def _without_self(rows: np.ndarray, distances: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    """[n, k] of [n, k + 1] without row start + i in the i-th; without the last where equal rows came before it."""
    own = rows == np.arange(start, start + len(rows))[:, None]
    own[~own.any(1), -1] = True
    return rows[~own].reshape(len(rows), -1), distances[~own].reshape(len(rows), -1)


def _placed(embedding: Any, components: _Components, others: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Points of other rows among those of an embedding, and how many are done with each block."""
    for start in range(0, len(others), _PLACED_AT_ONCE):
        part = others[start : start + _PLACED_AT_ONCE]
        values = np.concatenate([block for _, block in components.of(part)])
        placed = embedding.prepare_partial(
            values, perplexity=_PLACING_PERPLEXITY, k_neighbors=_PLACING_NEIGHBORS, k=_PLACING_NEIGHBORS
        )
        placed.optimize(_PLACING, inplace=True, learning_rate=0.1, exaggeration=1.5, momentum=0.8, max_grad_norm=0.25)
        yield start + len(part), np.asarray(placed)


def _scaled(points: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """[N, 2] float32 from 0 to 1, in the middle, with the same scale for both axes; no two are equal."""
    if not np.isfinite(points).all():
        raise GalleryError("the map has points that are not finite")
    low, high = points.min(0), points.max(0)
    side = float((high - low).max())
    unit = (points - (low + high) / 2) / (side if side > 0 else 1.0) + 0.5
    found: np.ndarray = np.clip(unit, 0, 1).astype(np.float32)
    reach = 1
    while len(again := _repeated(found)):
        reach = min(2 * reach, 1 << 20)
        moves = generator.integers(-reach, reach + 1, (len(again), 2)) * _STEP
        found[again] = np.clip(found[again] + moves, 0, 1)
    return found


def _repeated(points: np.ndarray) -> np.ndarray:
    """Rows of points [N, 2] that are equal to one before them."""
    codes = np.ascontiguousarray(points + np.float32(0)).view(np.uint64)[:, 0]  # no -0.0
    first = np.unique(codes, return_index=True)[1]
    return np.setdiff1d(np.arange(len(points)), first, assume_unique=True)


def tile_order(points: np.ndarray) -> np.ndarray:
    """Rows [N] uint32 along a Hilbert curve of points [N, 2] from 0 to 1: neighbors in it are near each other."""
    cells = 1 << _CURVE_BITS
    x, y = np.clip(np.asarray(points, np.float64) * cells, 0, cells - 1).astype(np.int64).T
    along = np.zeros(len(x), np.int64)
    half = cells >> 1
    while half:
        right, low = (x & half) > 0, (y & half) > 0
        along += half * half * ((3 * right) ^ low)
        # The quarter is turned, so that the curve enters it where it left the one before.
        turned = ~low
        flipped = turned & right
        x, y = np.where(flipped, cells - 1 - x, x), np.where(flipped, cells - 1 - y, y)
        x, y = np.where(turned, y, x), np.where(turned, x, y)
        half >>= 1
    return np.argsort(along, kind="stable").astype(np.uint32)


def write_map(file: Path, points: np.ndarray) -> None:
    """Write points [N, 2] to a file. Raises GalleryError."""
    write_arrays(file, {"points": np.ascontiguousarray(points, np.float32)})


def read_map(file: Path, count: int) -> np.ndarray:
    """The points [count, 2] float32 in a file. Raises GalleryError for any other file, and for points elsewhere."""
    points: np.ndarray = read_arrays(file, {"points": (count, 2)})["points"]
    if points.min() < 0 or points.max() > 1:
        raise GalleryError(f"{file}: expected points from 0 to 1, found {points.min():g} to {points.max():g}")
    return points


def _tsne() -> Any:
    """The module openTSNE. Raises MissingExtraError."""
    tsne = require_extra("openTSNE", "map", "a layout of all images")
    for part in ("affinity", "nearest_neighbors"):
        require_extra(f"openTSNE.{part}", "map", "a layout of all images")
    return tsne
