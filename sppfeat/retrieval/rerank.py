"""The nearest images of a query in a new order, by how near they are to each other. Nothing is trained.

    expand      the query and each image become sums of themselves and their neighbors: alpha query expansion
                (Radenovic, Tolias, Chum 2018, arXiv:1711.02512, 5.3) with database-side augmentation (Arandjelovic,
                Zisserman 2012, "Three things everyone should know to improve object retrieval")
    reciprocal  images whose neighbors are those of the query: k-reciprocal encoding (Zhong, Zheng, Cao, Li 2017,
                arXiv:1701.08398)
    diffuse     images that a random walk over neighbors of neighbors reaches from the query: diffusion (Iscen, Tolias,
                Avrithis, Furon, Chum 2017, arXiv:1611.05113), truncated to the images given

All of them need only the cosine similarities of the query and M images, [1 + M, 1 + M] with the query first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from sppfeat.errors import UsageError, unknown_name

RERANKINGS: Final = ("none", "bins", "expand", "reciprocal", "diffuse")
# Few for sums, which a wrong neighbor spoils; the others only use neighbors that agree with each other.
NEIGHBORHOODS: Final = {"expand": 3, "reciprocal": 20, "diffuse": 20}
# Of parts of a million images, nearly all of the first ten are among so many, which are aligned in 0.6 s on two cores.
CANDIDATES: Final = {"rerank": 400, "parts": 10_000}
MAX_CANDIDATES: Final = 100_000
# Similarities of all of them with each other: 200 MB in float64, and seconds to solve for.
MAX_TOGETHER: Final = 5_000
MAX_ALPHA: Final = 100
# The weight of the original distance in Zhong et al., 4.1; theirs, too, is a local expansion by k2 = 6 for k1 = 20.
_ORIGINAL: Final = 0.3
_LOCAL: Final = 0.3
# The weight of walking on and the exponent of similarities: 0.99 and 3 in Iscen et al., 5.1; these find more on
# photographs of objects and of buildings.
_WALK: Final = 0.8
_SHARPEN: Final = 5.0
_UNREACHED: Final = 1e-6
# Rounding of a cosine similarity.
_EQUAL: Final = 1e-6


@dataclass(frozen=True, kw_only=True)
class RerankOptions:
    """How the nearest images of a query are ordered again.

    rerank: `none`; `bins`, by the best alignment of the query with a rectangle of an image's bins (see `alignment`); or
    `expand`, `reciprocal` or `diffuse`, by how near the images are to each other (see the module). candidates: how many
    images are ordered again; None: `CANDIDATES`. neighborhood: how many of an image's nearest those three use; None:
    `NEIGHBORHOODS`. alpha: exponent of the similarity that weighs a neighbor in `expand`.
    parts: the query may be a part of an image, and is looked for in all images of a gallery, or in its candidates.
    Raises UsageError, naming the field, for an invalid value.
    """

    rerank: str = "none"
    parts: bool = False
    candidates: int | None = None
    neighborhood: int | None = None
    alpha: float = 3.0

    def __post_init__(self) -> None:
        if self.rerank not in RERANKINGS:
            raise UsageError(unknown_name("rerank", self.rerank, RERANKINGS))
        if self.parts and self.rerank != "none":
            raise UsageError(f"parts orders by bins already: expected rerank none, found {self.rerank!r}")
        if not 1 <= self.count <= MAX_CANDIDATES:
            raise UsageError(f"candidates must be from 1 to {MAX_CANDIDATES} images, found {self.candidates}")
        if self.together and self.count > MAX_TOGETHER:
            raise UsageError(
                f"candidates must be at most {MAX_TOGETHER} images for rerank {self.rerank}, found {self.candidates}"
            )
        if self.neighborhood is not None and not 1 <= self.neighborhood <= MAX_TOGETHER:
            raise UsageError(f"neighborhood must be from 1 to {MAX_TOGETHER} images, found {self.neighborhood}")
        if not 0 <= self.alpha <= MAX_ALPHA:
            raise UsageError(f"alpha must be a number from 0 to {MAX_ALPHA}, found {self.alpha}")

    @property
    def count(self) -> int:
        """How many images are ordered again."""
        return CANDIDATES["parts" if self.parts else "rerank"] if self.candidates is None else self.candidates

    @property
    def aligned(self) -> bool:
        """Whether images are ordered by their bins."""
        return self.parts or self.rerank == "bins"

    @property
    def together(self) -> bool:
        """Whether images are ordered by how near they are to each other."""
        return self.rerank in NEIGHBORHOODS


def reordered(similar: np.ndarray, options: RerankOptions) -> np.ndarray:
    """[M] scores of M images, falling with distance, from cosine similarities [1 + M, 1 + M] of a query and them."""
    neighborhood = options.neighborhood or NEIGHBORHOODS[options.rerank]
    if options.rerank == "expand":
        return expand(similar, neighborhood, options.alpha)
    return {"reciprocal": reciprocal, "diffuse": diffuse}[options.rerank](similar, neighborhood)


def expand(similar: np.ndarray, neighborhood: int, alpha: float) -> np.ndarray:
    """[M] cosine similarities of sums: each vector plus its `neighborhood` nearest images, weighted by their
    similarity to the power `alpha`. The query is a neighbor of none."""
    weights = np.eye(len(similar))
    near = similar.astype(np.float64)
    near[:, 0] = -np.inf
    np.fill_diagonal(near, -np.inf)
    # What points away counts nothing whatever alpha is.
    nearest = _first(near, neighborhood) & (near > 0)
    weights[nearest] = near[nearest] ** alpha
    products = weights @ similar
    lengths = np.sqrt(np.maximum(np.einsum("ij,ij->i", products, weights), 1e-30))
    found: np.ndarray = (products[0] @ weights[1:].T) / (lengths[0] * lengths[1:])
    return found


def reciprocal(similar: np.ndarray, neighborhood: int) -> np.ndarray:
    """[M] 1 minus the distance of Zhong et al.: mostly the Jaccard distance of reciprocal neighbors."""
    distances = np.maximum(0, 2 - 2 * similar.astype(np.float64))
    largest = distances.max(1, keepdims=True)
    distances /= np.where(largest > _EQUAL, largest, np.inf)  # what is left between equal ones is rounding
    first = distances.copy()
    np.fill_diagonal(first, -1)  # before equal images
    near, close = _mutual(first, neighborhood), _mutual(first, max(1, round(neighborhood / 2)))
    # The closer neighbors of a neighbor join if two thirds of them are neighbors already.
    shared = near.astype(np.float32) @ close.T.astype(np.float32)
    joins = near & (shared >= 2 / 3 * close.sum(1))
    near |= (joins.astype(np.float32) @ close.astype(np.float32)) > 0
    codes = np.zeros(near.shape)
    codes[near] = np.exp(-distances[near])
    codes /= codes.sum(1, keepdims=True)
    local = _first(-first, max(1, round(_LOCAL * neighborhood)))
    codes = local.astype(np.float64) @ codes / local.sum(1, keepdims=True)
    common = np.minimum(codes[0], codes[1:]).sum(1)
    found: np.ndarray = 1 - (1 - _ORIGINAL) * (1 - common / (2 - common)) - _ORIGINAL * distances[0, 1:]
    return found


def diffuse(similar: np.ndarray, neighborhood: int) -> np.ndarray:
    """[M] how much of a walk that starts at the query is at each image, as parts of the largest.

    Unlike Iscen et al., the query is one of the nodes, and similarities count from their median on: those of
    descriptors without whitening are all high, and the walk would go everywhere.
    """
    apart = similar[1:, 1:][similar[1:, 1:] < 1 - _EQUAL]  # not of an image with itself or with a copy
    middle = float(np.median(apart)) if len(apart) else 0.0
    weights = np.maximum(similar.astype(np.float64) - middle, 0) / max(1 - middle, 1e-6)
    np.fill_diagonal(weights, 0)
    near = _first(weights, neighborhood)
    near &= near.T
    weights[~near] = 0
    weights[near] **= _SHARPEN
    degree = weights.sum(1)
    degree[degree == 0] = 1
    weights /= np.sqrt(degree[:, None] * degree)
    start = np.zeros(len(weights))
    start[0] = 1
    found: np.ndarray = np.linalg.solve(np.eye(len(weights)) - _WALK * weights, start)[1:]
    largest = found.max(initial=0)
    # What the walk does not reach comes last, in the order of the similarities.
    return (found / largest if largest > 0 else found) + _UNREACHED * similar[0, 1:]


def _first(values: np.ndarray, count: int) -> np.ndarray:
    """[N, M] whether a value is among the `count` largest of its row; of equal ones, the first are."""
    if count >= values.shape[1]:
        return np.ones(values.shape, bool)
    last = np.partition(values, -count, axis=1)[:, -count, None]
    larger, equal = values > last, values == last
    room = count - larger.sum(1)
    tied = np.flatnonzero(equal.sum(1) > room)
    equal[tied] &= equal[tied].cumsum(1) <= room[tied, None]
    found: np.ndarray = larger | equal
    return found


def _mutual(distances: np.ndarray, count: int) -> np.ndarray:
    """[N, N] whether two are among each other's `count` nearest, themselves not counted."""
    among = _first(-distances, count + 1)
    both: np.ndarray = among & among.T
    return both
