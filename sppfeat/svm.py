"""Linear SVMs for all classes at once: one against the rest, L2-regularised squared hinge.

For every class, with targets y_i = +1 or -1 (0: the row is left out), weights w and bias b minimise

    (|w|^2 + b^2) / 2  +  sum_i c_i max(0, 1 - y_i (w x_i + b))^2,      c_i = c, times positive_weight where y_i = +1:

the problem that liblinear, and so scikit-learn's LinearSVC, solves; b is the weight of a constant 1 appended to the
rows. `sppfeat.newton` minimises it, in one of two spaces:

    gram    few rows, many dimensions: w = sum_i a_i x_i, and all work is done on the Gram matrix of the rows, computed
            once and shared by every class, cost, fold and trial
    primal  many rows: w itself; every product reads the rows once, block by block
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from sppfeat.devices import resolve_device
from sppfeat.errors import UsageError, unknown_name
from sppfeat.newton import GramSpace, PrimalSpace, Rows, Space, minimize, to_tensor
from sppfeat.views import Matrix

ROUTES: Final = ("auto", "gram", "primal")
# Duality gap over objective at which a class is done. liblinear's default tolerance ends near 1e-4.
TOLERANCE: Final = 1e-5
# The largest Gram matrix that is chosen by itself: 23,000 rows.
GRAM_BYTES: Final = 1 << 31


@dataclass(frozen=True, kw_only=True)
class LinearSvm:
    """Linear scorers of K classes.

    weights: [K, D] float32. biases: [K] float32. classes: [K], in rising order. costs: [K], the C of each class.
    route: `gram` or `primal`, how it was trained. gaps: [K], by how much, relative to the best possible objective,
    each class's objective may at most lie above it.
    """

    weights: np.ndarray
    biases: np.ndarray
    classes: np.ndarray
    costs: np.ndarray
    route: str
    gaps: np.ndarray

    def scores(self, descriptors: Matrix, *, device: str = "cpu") -> np.ndarray:
        """[N, K] float32 scores of descriptors [N, D]; positive means: of that class."""
        if len(descriptors.shape) != 2 or descriptors.shape[1] != self.weights.shape[1]:
            raise UsageError(f"descriptors must be [N, {self.weights.shape[1]}], found {list(descriptors.shape)}")
        place = resolve_device(device)
        weights = torch.cat([to_tensor(self.weights, place), to_tensor(self.biases[:, None], place)], 1)
        return Rows(descriptors, None, place).margins(weights).T.cpu().numpy()

    def predict(self, descriptors: Matrix, *, device: str = "cpu") -> np.ndarray:
        """[N] the class of the highest score; of equal scores the class that comes first."""
        best: np.ndarray = self.classes[self.scores(descriptors, device=device).argmax(1)]
        return best


def train_linear_svm(
    descriptors: Matrix,
    labels: np.ndarray | Sequence[Any],
    *,
    c: float | np.ndarray,
    positive_weight: float = 1.0,
    device: str = "cpu",
    route: str = "auto",
    tolerance: float = TOLERANCE,
    names: Sequence[str] | None = None,
) -> LinearSvm:
    """Train one linear SVM for each class against the rest.

    descriptors: [N, D], any real type, memory-mapped or not; read block by block. labels: [N], one class a row, or
    [N, K] of +1, -1 and 0 (left out), where a row can be of several classes; classes are then 0 .. K-1.
    names: of the rows, for the text of errors. The other arguments are those of `SvmProblem` and `SvmProblem.solve`.
    Raises UsageError for rows that are not finite, for fewer than two classes, and for a class without both a
    positive and a negative row.
    """
    labels = np.asarray(labels)
    if labels.ndim == 2:
        targets, classes = _checked_targets(labels), np.arange(labels.shape[1])
    else:
        targets, classes = class_targets(labels)
        if len(classes) < 2:
            raise UsageError(f"labels must name at least two classes, found {len(classes)}: {classes.tolist()}")
    for sign, kind in ((1, "positive"), (-1, "negative")):
        if (lacking := ~(targets == sign).any(0)).any():
            raise UsageError(f"class {classes[lacking][0]}: expected at least one {kind} row, found none")
    problem = SvmProblem(descriptors, device=device, route=route, names=names)
    return problem.svm(problem.solve(targets, c=c, positive_weight=positive_weight, tolerance=tolerance), classes)


def class_targets(
    labels: np.ndarray | Sequence[Any], classes: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Targets [N, K] of +1 and -1 from labels [N], and the classes [K] in rising order, or as given."""
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise UsageError(f"labels must be [N], found {list(labels.shape)}")
    classes = np.unique(labels) if classes is None else np.asarray(classes)
    return np.where(labels[:, None] == classes, 1, -1).astype(np.int8), classes


@dataclass(frozen=True)
class SvmSolution:
    """SVMs of K classes, trained on some rows of a problem.

    rows: [M] the rows. costs: [K] the C of each class. solved: [K], false for a class that has no positive row: its
    scores are minus infinity. objectives, gaps: [K] float64, the objective and the relative duality gap. products: how
    often all rows were multiplied with the vectors of the classes; in the primal route, how often they were read.
    """

    rows: np.ndarray
    costs: np.ndarray
    solved: np.ndarray
    objectives: np.ndarray
    gaps: np.ndarray
    products: int
    _vectors: torch.Tensor
    _margins: torch.Tensor


class SvmProblem:
    """A set of rows, on subsets of which SVMs of any cost are trained: folds, trials, a path of costs.

    descriptors: [N, D], kept as they are and read block by block. device: as in `RunOptions`.
    route: `gram`, `primal`, or `auto`: gram where the rows are no more than the dimensions and their Gram matrix fits
    into `gram_bytes`; afterwards, the route taken. names: of the rows, for errors.
    Raises UsageError for rows that are not finite.
    """

    def __init__(
        self,
        descriptors: Matrix,
        *,
        device: str = "cpu",
        route: str = "auto",
        gram_bytes: int = GRAM_BYTES,
        names: Sequence[str] | None = None,
    ) -> None:
        if route not in ROUTES:
            raise UsageError(unknown_name("route", route, ROUTES))
        if len(descriptors.shape) != 2 or min(descriptors.shape) < 1:
            raise UsageError(f"descriptors must be [N, D] and not empty, found {list(descriptors.shape)}")
        count, dim = descriptors.shape
        if route == "auto":
            route = "gram" if count <= dim and 4 * count * count <= gram_bytes else "primal"
        self.route = route
        self._device = resolve_device(device)
        self._all = Rows(descriptors, None, self._device)
        _require_finite(self._all, names)
        self._gram = self._all.gram() if route == "gram" else None

    def solve(
        self,
        targets: np.ndarray,
        rows: np.ndarray | None = None,
        *,
        c: float | np.ndarray,
        positive_weight: float = 1.0,
        start: SvmSolution | tuple[np.ndarray, np.ndarray] | None = None,
        tolerance: float = TOLERANCE,
    ) -> SvmSolution:
        """Train on rows [M] (None: all) with their targets [M, K] of +1, -1 and 0 (left out).

        c: of all classes, or [K] of each.
        start: what to begin from: a solution for the same rows and classes, such as that of the next smaller cost; or
        weights [K, D] and biases [K] that fit some of the rows, which the primal route makes use of.
        """
        for name, value in (("c", c), ("positive_weight", positive_weight), ("tolerance", tolerance)):
            if not (np.isfinite(value).all() and np.all(np.asarray(value) > 0)):
                raise UsageError(f"{name} must be a number above 0, found {value!r}")
        targets = _checked_targets(targets)
        if np.ndim(c) and np.shape(c) != targets.shape[1:]:
            raise UsageError(
                f"c must be one number, or one for each of {targets.shape[1]} classes, found {np.shape(c)[0]}"
            )
        each = np.broadcast_to(np.asarray(c, np.float64), targets.shape[1:])
        chosen = self._chosen(rows)
        if len(targets) != len(chosen):
            raise UsageError(f"targets must have one row for each of {len(chosen)} descriptors, found {len(targets)}")
        solved = (targets == 1).any(0)
        wanted = torch.from_numpy(np.ascontiguousarray(targets.T)).to(self._device, torch.float32)
        space = self._space(chosen)
        begin = None
        if isinstance(start, tuple):
            weights, biases = start
            expected = (targets.shape[1], self._all.dim)
            if weights.shape != expected or biases.shape != expected[:1]:
                raise UsageError(f"start must be weights {list(expected)} and biases, found {list(weights.shape)}")
            if isinstance(space, PrimalSpace):
                vectors = torch.from_numpy(np.concatenate([weights, biases[:, None]], 1)).to(
                    self._device, torch.float32
                )
                begin = (vectors, space.margins(vectors))
        elif start is not None:
            if not np.array_equal(start.rows, chosen) or len(start.solved) != targets.shape[1]:
                raise UsageError("start must be a solution for the same rows and classes")
            begin = (start._vectors, start._margins)
        # A class that is not solved has nothing to pay for, and is done at once.
        counted = wanted.abs() * torch.from_numpy(solved).to(self._device)[:, None]
        costs = torch.from_numpy(each.astype(np.float32)).to(self._device)[:, None] * counted
        costs *= torch.where(wanted > 0, positive_weight, 1.0)
        state = minimize(space, wanted, costs, begin, tolerance)
        return SvmSolution(
            rows=chosen,
            costs=each,
            solved=solved,
            objectives=state.objectives.cpu().numpy(),
            gaps=state.gaps.cpu().numpy(),
            products=state.products,
            _vectors=state.vectors,
            _margins=state.margins,
        )

    def scores(self, solution: SvmSolution, rows: np.ndarray | None = None) -> np.ndarray:
        """[M, K] float32 scores of rows [M] (None: all) of this problem."""
        chosen = self._chosen(rows)
        if self._gram is None:
            scores = Rows(self._all.descriptors, chosen, self._device).margins(solution._vectors)
        else:
            scores = solution._vectors @ self._part_of_gram(solution.rows, chosen)
        result = scores.T.cpu().numpy()
        result[:, ~solution.solved] = -np.inf
        return result

    def svm(self, solution: SvmSolution, classes: np.ndarray) -> LinearSvm:
        """The solution as weights and biases, usable on other descriptors."""
        vectors = solution._vectors
        if self._gram is not None:
            vectors = Rows(self._all.descriptors, solution.rows, self._device).weigh(vectors)
        weights = vectors.cpu().numpy()
        return LinearSvm(
            weights=np.ascontiguousarray(weights[:, :-1]),
            biases=np.where(solution.solved, weights[:, -1], -np.inf).astype(np.float32),
            classes=np.asarray(classes),
            costs=solution.costs,
            route=self.route,
            gaps=solution.gaps,
        )

    def _space(self, rows: np.ndarray) -> Space:
        if self._gram is not None:
            return GramSpace(self._part_of_gram(rows, rows))
        whole = np.array_equal(rows, np.arange(len(self._all)))
        return PrimalSpace(self._all if whole else Rows(self._all.descriptors, rows, self._device))

    def _part_of_gram(self, rows: np.ndarray, columns: np.ndarray) -> torch.Tensor:
        assert self._gram is not None
        first, second = (torch.from_numpy(chosen).to(self._device) for chosen in (rows, columns))
        return self._gram[first][:, second]

    def _chosen(self, rows: np.ndarray | None) -> np.ndarray:
        if rows is None:
            return np.arange(len(self._all))
        rows = np.asarray(rows)
        numbers = rows.ndim == 1 and rows.dtype.kind in "iu" and len(rows) > 0
        if not numbers or not 0 <= rows.min() <= rows.max() < len(self._all):
            raise UsageError(f"rows must be numbers [M] from 0 to {len(self._all) - 1}, found {rows.dtype} {rows}")
        return np.ascontiguousarray(rows, dtype=np.int64)


def _checked_targets(targets: np.ndarray) -> np.ndarray:
    if targets.ndim != 2 or min(targets.shape) < 1 or not np.isin(targets, (-1, 0, 1)).all():
        raise UsageError(f"targets must be [N, K] of +1, -1 and 0, found {targets.dtype} {list(targets.shape)}")
    return targets.astype(np.int8)


def _require_finite(rows: Rows, names: Sequence[str] | None) -> None:
    """Raise UsageError that names the rows with values that are not finite."""
    wrong = [
        place.start + int(row) for place, block in rows.blocks() for row in (~block.isfinite().all(1)).nonzero()[:, 0]
    ]
    if wrong:
        first = f"row {wrong[0]}" if names is None else names[wrong[0]]
        more = f", and {len(wrong) - 1} more row" + "s" * (len(wrong) > 2) if len(wrong) > 1 else ""
        raise UsageError(f"{first}: expected a descriptor of finite numbers, found NaN or infinity{more}")
