"""Linear SVMs for all classes at once: one against the rest, with L2-regularized squared hinge loss.

For every class, with targets y_i = +1 or -1 (0: the row is excluded), weights w and bias b minimize

    (|w|^2 + b^2) / 2  +  sum_i c_i max(0, 1 - y_i (w x_i + b))^2,      c_i = c, times positive_weight where y_i = +1:

the problem that liblinear, and so scikit-learn's LinearSVC, solves; b is the weight of a constant 1 appended to the
rows. `sppfeat.svm.newton` minimizes it, in one of two spaces:

    gram    few rows, many dimensions: w = sum_i a_i x_i, and all work is done on the Gram matrix of the rows, computed
            once and shared by every class, cost and fold
    primal  many rows: w itself; every product reads the rows once, block by block
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch

from sppfeat.engines import resolve_device
from sppfeat.errors import UsageError, unknown_name
from sppfeat.store import Matrix
from sppfeat.svm.gram_space import GramBasis, GramSpace
from sppfeat.svm.model import CONVERGED, LinearSvm, require_finite
from sppfeat.svm.newton import Classes, Minimum, Space, minimize, minimize_along
from sppfeat.svm.primal_space import PrimalSpace
from sppfeat.svm.rows import Rows, to_tensor

ROUTES: Final = ("auto", "gram", "primal")
# Duality gap over objective at which a class is done.
TOLERANCE: Final = 1e-5
# The largest Gram matrix chosen automatically: 11,585 rows. Solving takes up to twice as much on top, and 1 GiB.
GRAM_BYTES: Final = 1 << 30
# Rows up to this size are solved in double precision from the start; larger ones in single precision, then in double
# for the classes that need it.
_DOUBLE_BYTES: Final = 1 << 28
# Working memory for the classes that are solved at once.
_CHUNK_BYTES: Final = 1 << 29


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
    """Train one linear SVM per class against the rest.

    descriptors: [N, D], any real type, memory-mapped or not; read block by block. labels: [N], one class per row, or
    [N, K] of +1, -1 and 0 (excluded), where a row can have several classes; classes are then 0 .. K-1.
    names: of the rows, for error messages. The other arguments are those of `SvmProblem` and `SvmProblem.solve`.
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
    targets = (labels[:, None] == classes).view(np.int8)
    targets *= 2
    targets -= 1
    return targets, classes


@dataclass(frozen=True)
class SvmSolution:
    """SVMs of K classes, trained on some rows of a problem.

    rows: [M] the rows. costs: [K] the C of each class. solved: [K], false for a class without a positive row: its
    scores are minus infinity. objectives, gaps: [K] float64, the objective and the relative duality gap. products: how
    often all rows were multiplied with the vectors of classes; in the primal route, how often they were read.
    """

    rows: np.ndarray
    costs: np.ndarray
    solved: np.ndarray
    objectives: np.ndarray
    gaps: np.ndarray
    products: int
    _vectors: torch.Tensor

    def with_classes(self, which: np.ndarray, other: SvmSolution) -> SvmSolution:
        """This solution, with some classes [K] bool taken from another for the same rows."""
        taken = torch.from_numpy(which).to(self._vectors.device)
        return replace(
            self,
            costs=np.where(which, other.costs, self.costs),
            objectives=np.where(which, other.objectives, self.objectives),
            gaps=np.where(which, other.gaps, self.gaps),
            _vectors=torch.where(taken[:, None], other._vectors, self._vectors),
        )


class SvmProblem:
    """A set of rows; SVMs of any cost are trained on subsets of it: folds, a path of costs.

    descriptors: [., D], kept as is and read block by block. only: which rows [N] of them; None: all.
    device: as in `RunOptions`. route: `gram`, `primal`, or `auto`: gram where there are at most twice as many rows as
    dimensions, so that its systems are no larger, and the Gram matrix fits into `gram_bytes`; afterwards,
    the route taken. names: of the descriptors, for error messages.
    Raises UsageError for rows that are not finite.
    """

    def __init__(
        self,
        descriptors: Matrix,
        only: np.ndarray | None = None,
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
        chosen = None if only is None else _checked_rows(only, descriptors.shape[0])
        count, dim = descriptors.shape[0] if chosen is None else len(chosen), descriptors.shape[1]
        if route == "auto":
            route = "gram" if count <= 2 * dim and 8 * count * count <= gram_bytes else "primal"
        self.route = route
        self._device = torch.device(resolve_device(device))
        self._all = Rows(descriptors, chosen, self._device)
        self._gram = self._all.to(torch.float64).gram() if route == "gram" else None
        squares = self._all.squares() if self._gram is None else self._gram.diagonal()
        if not bool(squares.isfinite().all()):
            _require_finite(self._all, chosen, names)
        self._mean_square = float(squares.mean())
        self._solver: _Solver | None = None

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
        """Train on rows [M] (None: all) with their targets [M, K] of +1, -1 and 0 (excluded).

        c: for all classes, or [K] one per class.
        start: where to start: a solution for the same classes, such as that of the next smaller cost, or of fewer
        rows; or weights [K, D] and biases [K] that fit some of the rows, which the primal route uses.
        Classes are independent, and solved in batches so that memory stays bounded, whatever K.
        """
        for name, value in (("c", c), ("positive_weight", positive_weight), ("tolerance", tolerance)):
            if not (np.isfinite(value).all() and np.all(np.asarray(value) > 0)):
                raise UsageError(f"{name} must be a number above 0, found {value!r}")
        targets = _checked_targets(targets)
        count = targets.shape[1]
        if np.ndim(c) and np.shape(c) != (count,):
            raise UsageError(f"c must be one number, or one per class ({count}), found {np.shape(c)[0]}")
        each = np.broadcast_to(np.asarray(c, np.float64), (count,))
        chosen = np.arange(len(self._all)) if rows is None else _checked_rows(rows, len(self._all))
        if len(targets) != len(chosen):
            raise UsageError(f"targets must have one row per descriptor ({len(chosen)}), found {len(targets)}")
        begin = self._begin(start, chosen, count)
        solved = (targets == 1).any(0)
        # A class without a positive row has nothing to minimize, and is done at once.
        negative = torch.from_numpy(np.where(solved, each, 0.0)).to(self._device)
        positive = negative * positive_weight
        vectors: list[torch.Tensor] = []
        objectives, gaps, products = np.empty(count), np.empty(count), 0
        size = max(1, _CHUNK_BYTES // self._class_bytes(len(chosen)))
        for first in range(0, count, size):
            part = slice(first, min(first + size, count))
            wanted = torch.from_numpy(np.ascontiguousarray(targets[:, part].T)).to(self._device)
            classes = Classes(wanted, positive[part], negative[part])
            state = self._minimize(chosen, classes, None if begin is None else begin[part], tolerance)
            vectors.append(state.vectors)
            objectives[part], gaps[part] = state.objectives.cpu().numpy(), state.gaps.cpu().numpy()
            products += state.products
        return SvmSolution(
            rows=chosen,
            costs=each,
            solved=solved,
            objectives=objectives,
            gaps=gaps,
            products=products,
            _vectors=vectors[0] if len(vectors) == 1 else torch.cat(vectors),
        )

    def scores(self, solution: SvmSolution, rows: np.ndarray | None = None) -> np.ndarray:
        """[M, K] float32 scores of rows [M] (None: all) of this problem."""
        chosen = np.arange(len(self._all)) if rows is None else _checked_rows(rows, len(self._all))
        if self._gram is None:
            scores = self._all.only(chosen).margins(solution._vectors.float())
        else:
            scores = solution._vectors @ self._part_of_gram(solution.rows, chosen)
        result = scores.T.float().cpu().numpy()
        result[:, ~solution.solved] = -np.inf
        return result

    def svm(self, solution: SvmSolution, classes: np.ndarray) -> LinearSvm:
        """The solution as weights and biases, usable on other descriptors."""
        vectors = solution._vectors
        if self._gram is not None:
            vectors = self._all.only(solution.rows).to(torch.float64).weigh(vectors)
        weights = vectors.cpu().numpy()
        return LinearSvm(
            weights=np.ascontiguousarray(weights[:, :-1]),
            biases=np.where(solution.solved, weights[:, -1], -np.inf),
            classes=np.asarray(classes),
            costs=solution.costs,
            route=self.route,
            gaps=solution.gaps,
        )

    def _minimize(self, rows: np.ndarray, classes: Classes, start: torch.Tensor | None, tolerance: float) -> Minimum:
        """Solve some classes; retry those that the first method does not bring near the tolerance with the second."""
        if self._solver is None or not np.array_equal(self._solver.rows, rows):
            self._solver = None  # two of them may not fit
            chosen = self._all if len(rows) == len(self._all) and _rising(rows) else self._all.only(rows)
            self._solver = _Solver(rows, chosen, None if self._gram is None else self._part_of_gram(rows, rows))
        solver = self._solver
        costs = float(classes.positive.maximum(classes.negative).max())
        stiffness = costs * self._mean_square
        state = minimize_along(solver.first, classes, start, tolerance, 0.0 if start is not None else stiffness)
        state.vectors = state.vectors.double()
        loose = (state.gaps > max(tolerance, min(10 * tolerance, CONVERGED))).nonzero()[:, 0]
        if len(loose) and self._gram is not None:
            basis = solver.basis()
            found = minimize_along(
                basis.space, classes.of(loose), basis.weights(state.vectors[loose]), tolerance, stiffness
            )
            found.vectors = basis.factors(found.vectors)
            state.replace(loose, found)
        elif len(loose) and (space := solver.double()) is not None:
            state.replace(loose, minimize(space, classes.of(loose), state.vectors[loose], tolerance))
        return state

    def _begin(
        self, start: SvmSolution | tuple[np.ndarray, np.ndarray] | None, rows: np.ndarray, count: int
    ) -> torch.Tensor | None:
        """The vectors [K, P] to start from, for these rows."""
        if isinstance(start, tuple):
            weights, biases = start
            expected = (count, self._all.dim)
            if weights.shape != expected or biases.shape != expected[:1]:
                raise UsageError(f"start must be weights {list(expected)} and biases, found {list(weights.shape)}")
            if self._gram is not None:
                return None
            return torch.from_numpy(np.concatenate([weights, biases[:, None]], 1)).to(self._device)
        if start is None:
            return None
        if len(start.solved) != count:
            raise UsageError(f"start must be a solution of {count} classes, found one of {len(start.solved)}")
        if self._gram is None or np.array_equal(start.rows, rows):
            return start._vectors
        # The solution has nothing on new rows; removed rows are dropped from it.
        whole = start._vectors.new_zeros((count, len(self._all)))
        whole[:, torch.from_numpy(start.rows)] = start._vectors
        return whole[:, torch.from_numpy(rows)]

    def _class_bytes(self, rows: int) -> int:
        """About the most bytes that solving one class takes."""
        # Gram: vectors and margins of points and steps, hinges, ridges, products. Primal: targets, margins, the step's
        # margins, factors, each once more while classes leave the batch; and directions as long as a row.
        return rows * 8 * 16 if self._gram is not None else rows * (1 + 2 * 3 * 8) + 10 * 8 * (self._all.dim + 1)

    def _part_of_gram(self, rows: np.ndarray, columns: np.ndarray) -> torch.Tensor:
        """[R, C] products of some rows with others, without copying the whole matrix."""
        assert self._gram is not None
        count = len(self._gram)
        if len(rows) == len(columns) == count and _rising(rows) and _rising(columns):
            return self._gram
        part = self._gram.new_empty((len(rows), len(columns)))
        chosen = torch.from_numpy(columns).to(self._device)
        for first in range(0, len(rows), 256):
            block = torch.from_numpy(rows[first : first + 256]).to(self._device)
            part[first : first + 256] = self._gram[block][:, chosen]
        return part


class _Solver:
    """The spaces in which some rows are solved; kept for the next call, which is often for the same rows.

    first: the Gram matrix, if there is one; else the rows, in double precision where they are few.
    """

    def __init__(self, rows: np.ndarray, values: Rows, gram: torch.Tensor | None) -> None:
        self.rows = rows
        self._values, self._gram = values, gram
        self._basis: GramBasis | None = None
        few = 8 * len(rows) * (values.dim + 1) <= _DOUBLE_BYTES
        self.first: Space = (
            PrimalSpace(values.to(torch.float64 if few else torch.float32)) if gram is None else GramSpace(gram)
        )

    def basis(self) -> GramBasis:
        assert self._gram is not None
        if self._basis is None:
            self._basis = GramBasis(self._gram)
        return self._basis

    def double(self) -> PrimalSpace | None:
        """The rows in double precision, where the first method had them in single."""
        single = isinstance(self.first, PrimalSpace) and self.first.dtype == torch.float32
        return PrimalSpace(self._values.to(torch.float64)) if single else None


def _rising(rows: np.ndarray) -> bool:
    return bool((np.diff(rows) > 0).all())


def _checked_rows(rows: np.ndarray, count: int) -> np.ndarray:
    rows = np.asarray(rows)
    numbers = rows.ndim == 1 and rows.dtype.kind in "iu" and len(rows) > 0
    if not numbers or not 0 <= rows.min() <= rows.max() < count:
        raise UsageError(f"rows must be numbers [M] from 0 to {count - 1}, found {rows.dtype} {rows}")
    return np.ascontiguousarray(rows, dtype=np.int64)


def _checked_targets(targets: np.ndarray) -> np.ndarray:
    if targets.ndim == 2 and min(targets.shape) > 0:
        if targets.dtype == np.int8 and -1 <= targets.min() <= targets.max() <= 1:
            return targets
        if targets.dtype != np.int8 and np.isin(targets, (-1, 0, 1)).all():
            return targets.astype(np.int8)
    raise UsageError(f"targets must be [N, K] of +1, -1 and 0, found {targets.dtype} {list(targets.shape)}")


def scores_on(
    svm: LinearSvm, device: str, descriptors: Matrix, rows: np.ndarray | None, names: Sequence[str] | None
) -> np.ndarray:
    """`LinearSvm.scores` by torch, on any device."""
    place = torch.device(resolve_device(device))
    chosen = Rows(descriptors, rows, place)
    trained = np.isfinite(svm.biases)
    weights = np.concatenate([svm.weights, np.where(trained, svm.biases, 0)[:, None]], 1)
    found: np.ndarray = chosen.margins(to_tensor(weights, place, torch.float32)).T.cpu().numpy()
    if not np.isfinite(found).all():
        _require_finite(chosen, rows, names)
    found[:, ~trained] = -np.inf
    return found


def _require_finite(rows: Rows, places: np.ndarray | None, names: Sequence[str] | None) -> None:
    """Raise UsageError, naming the rows with values that are not finite; places: of the rows among the names."""
    parts = [place.start + (~block.isfinite().all(1)).nonzero()[:, 0].cpu().numpy() for place, block in rows.blocks()]
    wrong = np.concatenate(parts)
    require_finite(wrong if places is None else places[wrong], names)
