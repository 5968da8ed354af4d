"""PCA and whitening: shorter descriptors, in which no direction of the gallery's own variation dominates.

Learned from unit rows x with mean m and covariance C = V diag(l) V', the largest eigenvalues first:

    y = diag(s) V' (x - m),     s_i = ((1 - shrinkage) l_i + shrinkage mean(l))^(-power / 2)

over the K components kept. Power 0 is PCA (s = 1), power 1 whitening (Jegou, Chum 2012, "Negative evidences and
co-occurences in image retrieval"). Shrinkage avoids amplifying directions that few rows can tell from noise.
A descriptor is projected, then normalized to length 1 again.

Three routes to the same components, chosen by the shape of the N rows of D values:

    gram        N <= D: eigenvectors of the N x N matrix of inner products, carried over to the D dimensions
    covariance  D < N: eigenvectors of the D x D matrix
    randomized  both large: subspace iteration from a random start (Halko, Martinsson, Tropp 2011), which reads the
                rows a few times and keeps only D x K values
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from sppfeat.errors import UsageError
from sppfeat.images import absolute
from sppfeat.store import BLOCK_BYTES, UnitRows, normalize_rows

DEFAULT_DIMS: Final = 512
# Eigenvectors of a matrix of this side take 10 s on 2 cores; beyond it the randomized route is faster.
EXACT_SIDE: Final = 4096
# More rows hardly change 512 components, but cost time: the randomized route reads them 6 times.
LEARNING_ROWS: Final = 50_000
# Extra components, and rounds, of the randomized route.
OVERSAMPLING: Final = 32
ROUNDS: Final = 5
# Relative to the largest eigenvalue; anything below is rounding of float32 products.
RANK_TOLERANCE: Final = 1e-6
# Rows per kept component below which the weakest variances are mostly those of the sample: with N = 3 K rows of noise
# of equal variance, estimated variances already differ by a factor of 14 (Marchenko and Pastur, 1967).
ENOUGH_ROWS: Final = 3


@dataclass(frozen=True, kw_only=True)
class ProjectionOptions:
    """How descriptors are projected.

    dims: components to keep; fewer if the rows have no more. whiten: also scale the components.
    power: of the scaling, 0 to 1. shrinkage: of the eigenvalues towards their mean, 0 to 1.
    Raises UsageError, naming the field, for an invalid value.
    """

    dims: int = DEFAULT_DIMS
    whiten: bool = False
    power: float = 1.0
    shrinkage: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UsageError(f"seed must be a whole number from 0, found {self.seed}")
        if self.dims < 1:
            raise UsageError(f"project must be at least 1 dimension, found {self.dims}")
        for name, value in (("whiten_power", self.power), ("shrinkage", self.shrinkage)):
            if not 0 <= value <= 1:
                raise UsageError(f"{name} must be a number from 0 to 1, found {value}")


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A learned projection of D dimensions onto K.

    mean: [D] float32. matrix: [D, K] float32, scaling included. eigenvalues: [K] float32, falling.
    kept: fraction of the rows' variance in the K components, 0 to 1. power: 0 without whitening.
    learned_from: the store. rows: how many of its rows were used. route: `gram`, `covariance` or `randomized`.
    """

    mean: np.ndarray
    matrix: np.ndarray
    eigenvalues: np.ndarray
    kept: float
    power: float
    shrinkage: float
    learned_from: str
    rows: int
    route: str

    @property
    def dim(self) -> int:
        """Length of a projected descriptor, K."""
        return int(self.matrix.shape[1])

    def apply(self, units: np.ndarray) -> np.ndarray:
        """[N, K] float32 rows of length 1, from unit rows [N, D] float32, which are overwritten."""
        units -= self.mean
        return normalize_rows(units @ self.matrix)

    def notes(self, asked: int) -> list[str]:
        """What the user should know: that fewer components are kept than were asked for, or whitened by few rows."""
        found = []
        if self.dim < asked:
            size = f"{self.rows} rows of {len(self.mean)} values"
            found.append(f"project: {asked} components asked, {self.dim} kept: {size} have no more")
        if self.power and self.rows < ENOUGH_ROWS * self.dim:
            found.append(
                f"whiten: learned from {self.rows} rows for {self.dim} components, expected at least "
                f"{ENOUGH_ROWS * self.dim}: the weakest are chance; --whitening-from a larger store, or a "
                "smaller --project"
            )
        return found


def learn_projection(rows: UnitRows, options: ProjectionOptions | None = None) -> Projection:
    """Learn a projection from unprojected rows, or from a sample if there are very many.

    Raises UsageError for fewer than two rows, or if all rows are equal.
    """
    options = options or ProjectionOptions()
    if rows.projection is not None:
        raise UsageError("expected rows that are not projected yet")
    if len(rows) < 2:
        raise UsageError(f"{rows.store.place}: expected at least 2 described images to project, found {len(rows)}")
    which = rows.sample(LEARNING_ROWS, options.seed)
    mean, total = _moments(rows, which)
    side = min(len(which), rows.dim)
    wanted = min(options.dims, len(which) - 1, rows.dim)
    if side > EXACT_SIDE and wanted + OVERSAMPLING < side // 2:
        route = "randomized"
        values, vectors = _randomized(rows, which, mean, wanted, options.seed)
    elif len(which) <= rows.dim:
        route = "gram"
        values, vectors = _by_gram(rows, which, mean, wanted)
    else:
        route = "covariance"
        values, vectors = _by_covariance(rows, which, mean, wanted)
    solid = values > RANK_TOLERANCE * max(float(values[0]), 1e-12)
    if not solid.any() or total < 1e-10:
        raise UsageError(f"{rows.store.place}: its {len(which)} descriptors are all equal: there is nothing to project")
    values, vectors = values[solid], vectors[:, solid]
    # An eigenvector's sign is arbitrary; this fixes it, so that the same rows give the same projection.
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])])
    power = options.power if options.whiten else 0.0
    scales = ((1 - options.shrinkage) * values + options.shrinkage * values.mean()) ** (-power / 2)
    return Projection(
        mean=mean.astype(np.float32),
        matrix=np.ascontiguousarray(vectors * scales, np.float32),
        eigenvalues=values.astype(np.float32),
        kept=min(1.0, float(values.sum() / total)),
        power=power,
        shrinkage=options.shrinkage if options.whiten else 0.0,
        learned_from=absolute(rows.store.place),
        rows=len(which),
        route=route,
    )


def _moments(rows: UnitRows, which: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean [D] float64 of the rows, and the sum of the variances of all dimensions."""
    total = np.zeros(rows.dim)
    squares = 0.0
    for _, block in rows.blocks(which):
        total += block.sum(0, dtype=np.float64)
        squares += float(np.einsum("nd,nd->", block, block, dtype=np.float64))
    mean = total / len(which)
    return mean, squares / len(which) - float(mean @ mean)


def _by_gram(rows: UnitRows, which: np.ndarray, mean: np.ndarray, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and vectors [D, K] from the inner products of the centered rows, in blocks of dimensions."""
    count, dim = len(which), rows.dim
    size = max(1, BLOCK_BYTES // (4 * count))
    lengths = np.concatenate([_raw_lengths(rows, which[at : at + 1024]) for at in range(0, count, 1024)])
    center = mean.astype(np.float32)
    store_rows = rows.rows[which]

    def columns(start: int) -> np.ndarray:
        part: np.ndarray = rows.store.descriptors[store_rows, start : start + size].astype(np.float32)
        part /= lengths[:, None]
        part -= center[start : start + size]
        return part

    gram = np.zeros((count, count))
    for start in range(0, dim, size):
        part = columns(start)
        gram += part @ part.T
    values, left = _leading(gram / count, wanted)
    vectors = np.empty((dim, len(values)))
    carry = (left / np.sqrt(np.maximum(values, 1e-30) * count)).astype(np.float32)
    for start in range(0, dim, size):
        vectors[start : start + size] = columns(start).T @ carry
    return values, vectors


def _raw_lengths(rows: UnitRows, which: np.ndarray) -> np.ndarray:
    """[n] float32 lengths that `UnitRows.take` divides the rows' stored values by."""
    values = rows.store.descriptors[rows.rows[which]].astype(np.float64)
    lengths = np.sqrt(np.einsum("nd,nd->n", values, values))
    lengths[lengths == 0] = 1
    single: np.ndarray = lengths.astype(np.float32)
    return single


def _by_covariance(rows: UnitRows, which: np.ndarray, mean: np.ndarray, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    center = mean.astype(np.float32)
    covariance = np.zeros((rows.dim, rows.dim))
    for _, block in rows.blocks(which):
        block -= center
        covariance += block.T @ block
    return _leading(covariance / len(which), wanted)


def _randomized(
    rows: UnitRows, which: np.ndarray, mean: np.ndarray, wanted: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Subspace iteration: each round multiplies a basis by the covariance, reading the rows once."""
    center = mean.astype(np.float32)
    width = wanted + OVERSAMPLING
    basis = np.random.default_rng(seed).standard_normal((rows.dim, width), np.float32)
    for _ in range(ROUNDS):
        image = np.zeros((rows.dim, width))
        for _, block in rows.blocks(which):
            block -= center
            image += block.T @ (block @ basis)
        basis = np.linalg.qr(image)[0].astype(np.float32)
    small = np.zeros((width, width))
    for _, block in rows.blocks(which):
        block -= center
        inside = block @ basis
        small += inside.T @ inside
    values, inner = _leading(small / len(which), wanted)
    return values, basis @ inner


def _leading(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest eigenvalues of a symmetric matrix, falling, and their vectors as columns."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return values[::-1][:count], vectors[:, ::-1][:, :count]
