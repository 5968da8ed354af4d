"""Newton's method for the linear SVMs of many classes at once; `sppfeat.svm` says what is minimised.

Newton's method on active sets (Keerthi and DeCoste, "A Modified Finite Newton Method for Fast Solution of Large Scale
Linear SVMs", JMLR 2005; Chapelle, "Training a Support Vector Machine in the Primal", 2007), its linear systems by
conjugate gradients, in one of two spaces: `GramSpace` and `PrimalSpace`. Both stop at a duality gap, so at the same
accuracy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch

from sppfeat.views import Matrix

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


class Rows:
    """Some rows of a matrix, as single-precision blocks [B, D]; a constant 1 is appended in every product."""

    def __init__(self, descriptors: Matrix, rows: np.ndarray | None, device: torch.device) -> None:
        self.descriptors = descriptors
        self._rows = rows
        self.device = device
        self._kept: list[tuple[slice, torch.Tensor]] = []

    def __len__(self) -> int:
        return int(self.descriptors.shape[0]) if self._rows is None else len(self._rows)

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
            block = (
                place,
                to_tensor(self.descriptors[place if self._rows is None else self._rows[place]], self.device),
            )
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

    matrix(factors) x (solution - start) = residual. A residual r left over costs about sum(weight * r^2).
    vectors, margins: the point to stop at if it is good enough; objective, gap: [K] float64, there.
    """

    vectors: torch.Tensor
    margins: torch.Tensor
    start: torch.Tensor
    start_margins: torch.Tensor
    factors: torch.Tensor
    residual: torch.Tensor
    weight: torch.Tensor
    objective: torch.Tensor
    gap: torch.Tensor

    def of(self, classes: torch.Tensor) -> _System:
        """The systems of some of the classes."""
        return _System(*(getattr(self, field.name)[classes] for field in dataclasses.fields(self)))


class Space(Protocol):
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
        """The steps [K, P] from `system.start` to the solutions, left over at most `forcing` [K] times the gap;
        their margins [K, N]; and how many products with all rows that took."""


class GramSpace:
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
        hinge = (1 - targets * margins).clamp(min=0)
        before = _sum(vectors * margins) / 2 + _sum(costs * hinge**2)
        active = (hinge > 0) & (costs > 0)
        # With signs clipped, y a is a point of the dual problem, and the duality gap a sum of squares.
        start = torch.where(active & (targets * vectors > 0), vectors, 0)
        start_margins = start @ self._gram
        slack = 1 - targets * start_margins
        factors = torch.where(active, 1 / (2 * costs), 0)
        residual = torch.where(active, targets - start_margins - start * factors, 0)
        alpha = targets * start
        gap = _sum(costs * (slack.clamp(min=0) - alpha * factors) ** 2) + _sum(alpha * (-slack).clamp(min=0))
        objective = _sum(start * start_margins) / 2 + _sum(costs * slack.clamp(min=0) ** 2)
        point, point_margins = start, start_margins
        # Where rows depend on each other, many a make one w, and clipping can throw w far off. Then w itself is the
        # point, and 2 c hinge the one of the dual problem, as in `PrimalSpace`.
        spoiled = (gap > before).nonzero()[:, 0]
        if len(spoiled):
            apart = vectors[spoiled] - 2 * (costs * targets * hinge)[spoiled]
            own = _sum(apart * (apart @ self._gram)) / 2
            spoiled, own = spoiled[own < gap[spoiled]], own[own < gap[spoiled]]
            point, point_margins = start.clone(), start_margins.clone()
            point[spoiled], point_margins[spoiled] = vectors[spoiled], margins[spoiled]
            gap[spoiled], objective[spoiled] = own.clamp(min=0), before[spoiled]
        return _System(point, point_margins, start, start_margins, factors, residual, costs, objective, gap)

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


class PrimalSpace:
    """Vectors are w with b appended, [K, D + 1]. The system is Newton's: (1 + 2 X' c X) step = - gradient."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def zeros(self, count: int) -> torch.Tensor:
        return torch.zeros((count, self._rows.dim + 1), device=self._rows.device)

    def margins(self, vectors: torch.Tensor) -> torch.Tensor:
        """[K, N] of vectors [K, D + 1]."""
        return self._rows.margins(vectors)

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
        active = 2 * costs * (hinge > 0)
        return _System(vectors, margins, vectors, margins, active, residual, weight, objective, gap)

    def solve(self, system: _System, forcing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        solution, used = _conjugate_gradients(
            self._product, system.residual, system.factors, system.weight, forcing * system.gap
        )
        return solution, self._rows.margins(solution), used + 1

    def _product(self, steps: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        return self._rows.curve(steps, factors).add_(steps)


@dataclass
class Minimum:
    """K classes after training; see `SvmSolution`."""

    vectors: torch.Tensor
    margins: torch.Tensor
    objectives: torch.Tensor
    gaps: torch.Tensor
    products: int


def minimize(
    space: Space,
    targets: torch.Tensor,
    costs: torch.Tensor,
    start: tuple[torch.Tensor, torch.Tensor] | None,
    tolerance: float,
) -> Minimum:
    """Minimise the objectives of K classes; targets and costs [K, N]. A class leaves the batch when it is done."""
    count, device = len(targets), targets.device
    vectors, margins = start or (space.zeros(count), torch.zeros_like(targets))
    unknown = torch.full((count,), torch.inf, dtype=torch.float64, device=device)
    best = Minimum(vectors.clone(), margins.clone(), unknown.clone(), unknown.clone(), 0)
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
        step += system.start - vectors
        step_margins += system.start_margins - margins
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
    space: Space,
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


def to_tensor(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.array(values)).to(device).float()
