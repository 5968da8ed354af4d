"""Linear SVMs for all classes at once: one against the rest, L2-regularised squared hinge.

For every class, with targets y_i = +1 or -1 (0: the row is left out), weights w and bias b minimise

    (|w|^2 + b^2) / 2  +  sum_i c_i max(0, 1 - y_i (w x_i + b))^2,      c_i = c, times positive_weight where y_i = +1:

the problem that liblinear, and so scikit-learn's LinearSVC, solves; b is the weight of a constant 1 appended to the
rows. Newton's method on active sets (Keerthi and DeCoste, "A Modified Finite Newton Method for Fast Solution of Large
Scale Linear SVMs", JMLR 2005; Chapelle, "Training a Support Vector Machine in the Primal", 2007), its linear systems by
conjugate gradients (small ones directly), in one of two spaces:

    gram    few rows, many dimensions: w = sum_i a_i x_i, and all work is done on the Gram matrix of the rows, computed
            once and shared by every class, cost, fold and trial
    primal  many rows: w itself; every product reads the rows once, block by block

Both stop at a duality gap, so at the same accuracy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch

from sppfeat.describe import resolve_device
from sppfeat.errors import UsageError, unknown_name

ROUTES: Final = ("auto", "gram", "primal")
# Duality gap over objective at which a class is done. liblinear's default tolerance ends near 1e-4.
TOLERANCE: Final = 1e-5
# The largest Gram matrix that is chosen by itself: 23,000 rows.
GRAM_BYTES: Final = 1 << 31
# Rows are turned into single precision in blocks of this size: larger ones leave the cache, and the allocator hands
# them back to the system every time, which takes as long as the products (0.65 s against 0.35 s at 64 MB).
_BLOCK_BYTES: Final = 1 << 24
# A matrix up to this size in single precision is turned once, and kept.
_KEPT_BYTES: Final = 1 << 27
_MAX_NEWTON: Final = 60
_MAX_CONJUGATE: Final = 500
# A linear system is solved to this part of the gap: the active rows will change anyway.
_FORCING: Final = 1e-3
_MIN_FORCING: Final = 1e-10
# Up to this many active rows a direct solution is faster than conjugate gradients, and better in the last digits.
_DIRECT_ROWS: Final = 256


@dataclass(frozen=True, kw_only=True)
class LinearSvm:
    """Linear scorers of K classes.

    weights: [K, D] float32. biases: [K] float32. classes: [K], in rising order. c: the cost it was trained with.
    route: `gram` or `primal`, how it was trained. gaps: [K], by how much, relative to the best possible objective,
    each class's objective may at most lie above it.
    """

    weights: np.ndarray
    biases: np.ndarray
    classes: np.ndarray
    c: float
    route: str
    gaps: np.ndarray

    def scores(self, descriptors: np.ndarray, *, device: str = "cpu") -> np.ndarray:
        """[N, K] float32 scores of descriptors [N, D]; positive means: of that class."""
        if descriptors.ndim != 2 or descriptors.shape[1] != self.weights.shape[1]:
            raise UsageError(f"descriptors must be [N, {self.weights.shape[1]}], found {list(descriptors.shape)}")
        place = resolve_device(device)
        weights = torch.cat([_tensor(self.weights, place), _tensor(self.biases[:, None], place)], 1)
        return _Rows(descriptors, None, place).margins(weights).T.cpu().numpy()

    def predict(self, descriptors: np.ndarray, *, device: str = "cpu") -> np.ndarray:
        """[N] the class of the highest score; of equal scores the class that comes first."""
        best: np.ndarray = self.classes[self.scores(descriptors, device=device).argmax(1)]
        return best


def train_linear_svm(
    descriptors: np.ndarray,
    labels: np.ndarray | Sequence[Any],
    *,
    c: float,
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

    rows: [M] the rows. solved: [K], false for a class that has no positive row: its scores are minus infinity.
    objectives, gaps: [K] float64, the objective and the relative duality gap. products: how often all rows were
    multiplied with the vectors of the classes; in the primal route, how often they were read.
    """

    rows: np.ndarray
    c: float
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
        descriptors: np.ndarray,
        *,
        device: str = "cpu",
        route: str = "auto",
        gram_bytes: int = GRAM_BYTES,
        names: Sequence[str] | None = None,
    ) -> None:
        if route not in ROUTES:
            raise UsageError(unknown_name("route", route, ROUTES))
        if descriptors.ndim != 2 or min(descriptors.shape) < 1:
            raise UsageError(f"descriptors must be [N, D] and not empty, found {list(descriptors.shape)}")
        count, dim = descriptors.shape
        if route == "auto":
            route = "gram" if count <= dim and 4 * count * count <= gram_bytes else "primal"
        self.route = route
        self._device = resolve_device(device)
        self._all = _Rows(descriptors, None, self._device)
        _require_finite(self._all, names)
        self._gram = self._all.gram() if route == "gram" else None

    def solve(
        self,
        targets: np.ndarray,
        rows: np.ndarray | None = None,
        *,
        c: float,
        positive_weight: float = 1.0,
        start: SvmSolution | None = None,
        tolerance: float = TOLERANCE,
    ) -> SvmSolution:
        """Train on rows [M] (None: all) with their targets [M, K] of +1, -1 and 0 (left out).

        start: a solution for the same rows and classes, such as that of the next smaller cost, to begin from.
        """
        for name, value in (("c", c), ("positive_weight", positive_weight), ("tolerance", tolerance)):
            if not (np.isfinite(value) and value > 0):
                raise UsageError(f"{name} must be a number above 0, found {value!r}")
        targets = _checked_targets(targets)
        chosen = self._chosen(rows)
        if len(targets) != len(chosen):
            raise UsageError(f"targets must have one row for each of {len(chosen)} descriptors, found {len(targets)}")
        solved = (targets == 1).any(0)
        wanted = torch.from_numpy(np.ascontiguousarray(targets.T)).to(self._device, torch.float32)
        space = self._space(chosen)
        begin = None
        if start is not None:
            if not np.array_equal(start.rows, chosen) or len(start.solved) != targets.shape[1]:
                raise UsageError("start must be a solution for the same rows and classes")
            begin = (start._vectors, start._margins)
        # A class that is not solved has nothing to pay for, and is done at once.
        counted = wanted.abs() * torch.from_numpy(solved).to(self._device)[:, None]
        costs = c * torch.where(wanted > 0, positive_weight, 1.0) * counted
        state = _newton(space, wanted, costs, begin, tolerance)
        return SvmSolution(
            rows=chosen,
            c=c,
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
            scores = _Rows(self._all.descriptors, chosen, self._device).margins(solution._vectors)
        else:
            scores = solution._vectors @ self._part_of_gram(solution.rows, chosen)
        result = scores.T.cpu().numpy()
        result[:, ~solution.solved] = -np.inf
        return result

    def svm(self, solution: SvmSolution, classes: np.ndarray) -> LinearSvm:
        """The solution as weights and biases, usable on other descriptors."""
        vectors = solution._vectors
        if self._gram is not None:
            vectors = _Rows(self._all.descriptors, solution.rows, self._device).weigh(vectors)
        weights = vectors.cpu().numpy()
        return LinearSvm(
            weights=np.ascontiguousarray(weights[:, :-1]),
            biases=np.where(solution.solved, weights[:, -1], -np.inf).astype(np.float32),
            classes=np.asarray(classes),
            c=solution.c,
            route=self.route,
            gaps=solution.gaps,
        )

    def _space(self, rows: np.ndarray) -> _Space:
        if self._gram is not None:
            return _Gram(self._part_of_gram(rows, rows))
        whole = np.array_equal(rows, np.arange(len(self._all)))
        return _Primal(self._all if whole else _Rows(self._all.descriptors, rows, self._device))

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


class _Rows:
    """Some rows of a matrix, as single-precision blocks [B, D]; a constant 1 is appended in every product."""

    def __init__(self, descriptors: np.ndarray, rows: np.ndarray | None, device: torch.device) -> None:
        self.descriptors = descriptors
        self._rows = rows
        self.device = device
        self._kept: list[tuple[slice, torch.Tensor]] = []

    def __len__(self) -> int:
        return len(self.descriptors) if self._rows is None else len(self._rows)

    @property
    def dim(self) -> int:
        return int(self.descriptors.shape[1])

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """The rows in order, turned into single precision again at every reading unless they are few."""
        if self._kept:
            yield from self._kept
            return
        size, keep = max(1, _BLOCK_BYTES // (4 * self.dim)), 4 * self.dim * len(self) <= _KEPT_BYTES
        turned = []
        for first in range(0, len(self), size):
            place = slice(first, min(first + size, len(self)))
            block = (place, _tensor(self.descriptors[place if self._rows is None else self._rows[place]], self.device))
            if keep:
                turned.append(block)
            yield block
        self._kept = turned

    def gram(self) -> torch.Tensor:
        """[N, N] inner products of the rows."""
        gram = torch.empty((len(self), len(self)), device=self.device)
        for place, block in self.blocks():
            for other, others in self.blocks():
                if other.start > place.start:
                    break
                products = (block @ others.T).add_(1)
                gram[place, other] = products
                gram[other, place] = products.T
        return gram

    def margins(self, weights: torch.Tensor) -> torch.Tensor:
        """[K, N] products of weights [K, D + 1] with the rows."""
        margins = weights.new_empty((len(weights), len(self)))
        for place, block in self.blocks():
            margins[:, place] = _margins(weights, block)
        return margins

    def weigh(self, factors: torch.Tensor) -> torch.Tensor:
        """[K, D + 1] sums of the rows, weighted by factors [K, N]."""
        total = factors.new_zeros((len(factors), self.dim + 1))
        for place, block in self.blocks():
            _add_weighted(total, factors[:, place], block)
        return total

    def curve(self, weights: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """[K, D + 1] `weigh(factors * margins(weights))`, in one reading."""
        total = torch.zeros_like(weights)
        for place, block in self.blocks():
            _add_weighted(total, factors[:, place] * _margins(weights, block), block)
        return total


def _margins(weights: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    return torch.addmm(weights[:, -1:], weights[:, :-1], block.T)


def _add_weighted(total: torch.Tensor, factors: torch.Tensor, block: torch.Tensor) -> None:
    total[:, :-1].addmm_(factors, block)
    total[:, -1] += factors.sum(1)


def _sum(values: torch.Tensor) -> torch.Tensor:
    return values.sum(1, dtype=torch.float64)


@dataclass
class _System:
    """K linear systems whose solutions are the minima if no row became active or inactive.

    matrix(factors) x (solution - vectors) = residual. A residual r left over costs about sum(weight * r^2).
    objective, gap: [K] float64, at `vectors`.
    """

    vectors: torch.Tensor
    margins: torch.Tensor
    factors: torch.Tensor
    residual: torch.Tensor
    weight: torch.Tensor
    objective: torch.Tensor
    gap: torch.Tensor

    def of(self, classes: torch.Tensor) -> _System:
        """The systems of some of the classes."""
        return _System(*(getattr(self, field.name)[classes] for field in dataclasses.fields(self)))


class _Space(Protocol):
    """Where the K weight vectors of Newton's method live, as rows of a matrix [K, P]."""

    def zeros(self, count: int) -> torch.Tensor:
        """The null vectors of `count` classes."""

    def inner(self, vectors: torch.Tensor, others: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
        """[K] float64 inner products of weight vectors with others, of which the margins [K, N] are known."""

    def system(
        self, vectors: torch.Tensor, margins: torch.Tensor, targets: torch.Tensor, costs: torch.Tensor
    ) -> _System:
        """The linear systems at some vectors with their margins [K, N], for targets and costs [K, N]."""

    def solve(self, system: _System, forcing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The steps [K, P] from `system.vectors` to the solutions, left over at most `forcing` [K] times the gap;
        their margins [K, N]; and how many products with all rows that took."""


class _Gram:
    """w = sum_i a_i x_i; vectors are a [K, N].

    At the minimum a_i = 2 c_i (y_i - z_i) on the active rows, where y_i z_i < 1, with margins z = gram a: the system
    (gram + 1 / (2 c)) a = y on the active rows.
    """

    def __init__(self, gram: torch.Tensor) -> None:
        self._gram = gram

    def zeros(self, count: int) -> torch.Tensor:
        return self._gram.new_zeros((count, len(self._gram)))

    def inner(self, vectors: torch.Tensor, others: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
        return _sum(vectors * margins)

    def system(
        self, vectors: torch.Tensor, margins: torch.Tensor, targets: torch.Tensor, costs: torch.Tensor
    ) -> _System:
        active = (targets * margins < 1) & (costs > 0)
        # With signs clipped, y a is a point of the dual problem, and the duality gap a sum of squares.
        vectors = torch.where(active & (targets * vectors > 0), vectors, 0)
        margins = vectors @ self._gram
        slack = 1 - targets * margins
        factors = torch.where(active, 1 / (2 * costs), 0)
        residual = torch.where(active, targets - margins - vectors * factors, 0)
        alpha = targets * vectors
        hinge = slack.clamp(min=0)
        gap = _sum(costs * (hinge - alpha * factors) ** 2) + _sum(alpha * (-slack).clamp(min=0))
        objective = _sum(vectors * margins) / 2 + _sum(costs * hinge**2)
        return _System(vectors, margins, factors, residual, costs, objective, gap)

    def solve(self, system: _System, forcing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        solution = torch.zeros_like(system.residual)
        sizes = (system.factors > 0).sum(1)

        def solve_one(at: int) -> None:
            rows = system.factors[at].nonzero()[:, 0]
            matrix = self._gram[rows][:, rows].double()
            matrix.diagonal().add_(system.factors[at, rows])
            right = system.residual[at, rows, None].double()
            factor, failed = torch.linalg.cholesky_ex(matrix)
            # Rounding can leave a Gram matrix of equal rows a little indefinite, which a very large cost does not hide.
            found = torch.linalg.solve(matrix, right) if failed else torch.cholesky_solve(right, factor)
            solution[at, rows] = found[:, 0].float()

        # Small systems: one thread for each, instead of all threads for one after the other, which mostly wait.
        with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(solve_one, (sizes <= _DIRECT_ROWS).nonzero()[:, 0].tolist()))
        many = (sizes > _DIRECT_ROWS).nonzero()[:, 0]
        used = 0
        if len(many):
            solution[many], used = _conjugate_gradients(
                self._product,
                system.residual[many],
                system.factors[many],
                system.weight[many],
                (forcing * system.gap)[many],
            )
        return solution, solution @ self._gram, used + 1

    def _product(self, steps: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        return torch.where(factors > 0, steps @ self._gram + factors * steps, 0)


class _Primal:
    """Vectors are w with b appended, [K, D + 1]. The system is Newton's: (1 + 2 X' c X) step = - gradient."""

    def __init__(self, rows: _Rows) -> None:
        self._rows = rows

    def zeros(self, count: int) -> torch.Tensor:
        return torch.zeros((count, self._rows.dim + 1), device=self._rows.device)

    def inner(self, vectors: torch.Tensor, others: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
        return _sum(vectors * others)

    def system(
        self, vectors: torch.Tensor, margins: torch.Tensor, targets: torch.Tensor, costs: torch.Tensor
    ) -> _System:
        hinge = (1 - targets * margins).clamp(min=0)
        residual = self._rows.weigh(2 * costs * targets * hinge) - vectors
        objective = _sum(vectors * vectors) / 2 + _sum(costs * hinge**2)
        # The dual point 2 c hinge is this far below; a bound that holds because the objective curves by at least 1.
        gap = _sum(residual**2) / 2
        weight = residual.new_full((len(residual), 1), 0.5)
        return _System(vectors, margins, 2 * costs * (hinge > 0), residual, weight, objective, gap)

    def solve(self, system: _System, forcing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        solution, used = _conjugate_gradients(
            self._product, system.residual, system.factors, system.weight, forcing * system.gap
        )
        return solution, self._rows.margins(solution), used + 1

    def _product(self, steps: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        return self._rows.curve(steps, factors).add_(steps)


@dataclass
class _State:
    """K classes after training; see `SvmSolution`."""

    vectors: torch.Tensor
    margins: torch.Tensor
    objectives: torch.Tensor
    gaps: torch.Tensor
    products: int


def _newton(
    space: _Space,
    targets: torch.Tensor,
    costs: torch.Tensor,
    start: tuple[torch.Tensor, torch.Tensor] | None,
    tolerance: float,
) -> _State:
    """Minimise the objectives of K classes; targets and costs [K, N]. A class leaves the batch when it is done."""
    count, device = len(targets), targets.device
    vectors, margins = start or (space.zeros(count), torch.zeros_like(targets))
    unknown = torch.full((count,), torch.inf, dtype=torch.float64, device=device)
    best = _State(vectors.clone(), margins.clone(), unknown.clone(), unknown.clone(), 0)
    live, forcing = torch.arange(count, device=device), torch.full_like(unknown, _FORCING)
    for _ in range(_MAX_NEWTON):
        system = space.system(vectors, margins, targets, costs)
        best.products += 1
        gaps = system.gap / system.objective.clamp(min=1e-300)
        # Near the limit of single precision gaps go up and down.
        better = gaps < best.gaps[live]
        at = live[better]
        best.vectors[at], best.margins[at] = system.vectors[better], system.margins[better]
        best.objectives[at], best.gaps[at] = system.objective[better], gaps[better]
        going = (gaps > tolerance) & (forcing > _MIN_FORCING)
        if not going.any():
            break
        live, forcing, vectors, margins, targets, costs = (
            values[going] for values in (live, forcing, vectors, margins, targets, costs)
        )
        system = system.of(going)
        step, step_margins, products = space.solve(system, forcing)
        best.products += products
        step += system.vectors - vectors
        step_margins += system.margins - margins
        length = _line_search(space, vectors, margins, step, step_margins, targets, costs)
        # Only a system that was solved too loosely can point upwards.
        forcing = torch.where(length > 0, forcing, _FORCING * forcing)
        vectors += length[:, None].float() * step
        margins += length[:, None].float() * step_margins
    return best


def _conjugate_gradients(
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    residual: torch.Tensor,
    factors: torch.Tensor,
    weight: torch.Tensor,
    limit: torch.Tensor,
) -> tuple[torch.Tensor, int]:
    """Solve matrix(factors) x = residual for every class, until sum(weight * residual^2) is at most limit [K]."""
    solution = torch.zeros_like(residual)
    live = torch.arange(len(residual), device=residual.device)
    x, direction, square = solution.clone(), residual, _sum(residual * residual)
    used = 0
    for used in range(_MAX_CONJUGATE):  # noqa: B007
        going = (_sum(weight * residual**2) > limit) & (square > 0)
        if going.sum() <= 0.8 * len(live):
            solution[live] = x
            live, x, direction, residual, factors, weight, square, limit, going = (
                v[going] for v in (live, x, direction, residual, factors, weight, square, limit, going)
            )
            if not len(live):
                break
        image = product(direction, factors)
        curvature = _sum(direction * image)
        rate = torch.where(going & (curvature > 0), square / curvature, 0).float()[:, None]
        x += rate * direction
        # Rounding can leave a Gram matrix without curvature in a direction: there the solution ends.
        residual = torch.where(curvature[:, None] > 0, residual - rate * image, 0)
        before, square = square, _sum(residual * residual)
        direction = residual + torch.where(going, square / before, 0).float()[:, None] * direction
    solution[live] = x
    return solution, used


def _line_search(
    space: _Space,
    vectors: torch.Tensor,
    margins: torch.Tensor,
    step: torch.Tensor,
    step_margins: torch.Tensor,
    targets: torch.Tensor,
    costs: torch.Tensor,
) -> torch.Tensor:
    """[K] float64: how far to go along each step. The slope is piecewise linear and rises, its zero is looked for."""
    linear, quadratic = space.inner(vectors, step, step_margins), space.inner(step, step, step_margins)
    pull = costs * targets * step_margins

    def slope(length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hinge = (1 - targets * (margins + length[:, None].float() * step_margins)).clamp(min=0)
        rise = quadratic + 2 * _sum(torch.where(hinge > 0, costs * step_margins**2, 0))
        return linear + length * quadratic - 2 * _sum(pull * targets.abs() * hinge), rise

    first, _ = slope(torch.zeros_like(linear))
    length, low, high = torch.ones_like(linear), torch.zeros_like(linear), torch.full_like(linear, torch.inf)
    for _ in range(10):
        value, rise = slope(length)
        if (value.abs() <= 0.1 * first.abs()).all():
            break
        low, high = torch.where(value < 0, length, low), torch.where(value > 0, length, high)
        guess = length - value / rise
        inside = (guess > low) & (guess < high)
        guess = torch.where(inside, guess, torch.where(high.isinf(), 2 * length, (low + high) / 2))
        length = torch.where(value.abs() <= 0.1 * first.abs(), length, guess)
    return torch.where(first < 0, length, 0)


def _tensor(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.array(values)).to(device).float()


def _checked_targets(targets: np.ndarray) -> np.ndarray:
    if targets.ndim != 2 or min(targets.shape) < 1 or not np.isin(targets, (-1, 0, 1)).all():
        raise UsageError(f"targets must be [N, K] of +1, -1 and 0, found {targets.dtype} {list(targets.shape)}")
    return targets.astype(np.int8)


def _require_finite(rows: _Rows, names: Sequence[str] | None) -> None:
    """Raise UsageError that names the rows with values that are not finite."""
    wrong = [
        place.start + int(row) for place, block in rows.blocks() for row in (~block.isfinite().all(1)).nonzero()[:, 0]
    ]
    if wrong:
        first = f"row {wrong[0]}" if names is None else names[wrong[0]]
        more = f", and {len(wrong) - 1} more row" + "s" * (len(wrong) > 2) if len(wrong) > 1 else ""
        raise UsageError(f"{first}: expected a descriptor of finite numbers, found NaN or infinity{more}")
