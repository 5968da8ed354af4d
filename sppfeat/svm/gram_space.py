"""Newton's method on the Gram matrix, for few rows of many values; every linear system is solved directly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from sppfeat.svm.newton import Classes, System, in_threads, total
from sppfeat.svm.primal_space import PrimalSpace
from sppfeat.svm.rows import Rows

# The inverse that classes share is used while it holds at least 5 of double precision's 16 digits.
_INVERSE_CONDITION: Final = 1e11


@dataclass
class _System(System):
    """(gram + ridge) x (solution - start) = residual, on the rows where ridge [K, N] is above 0: the active ones."""

    ridge: torch.Tensor
    residual: torch.Tensor


class GramSpace:
    """w = sum_i a_i x_i; vectors are a [K, N], in double precision.

    At the minimum a_i = 2 c_i (y_i - z_i) on the active rows, where y_i z_i < 1, with margins z = gram a: the system
    (gram + 1 / (2 c)) a = y on the active rows. Where they are the minority, it is solved as is; where they are
    the majority, with the inverse of the system of all rows, which all classes share, and a system of the others.
    """

    def __init__(self, gram: torch.Tensor) -> None:
        self._gram = gram
        self._lengths = gram.diagonal().clamp(min=0).sqrt()
        self._shared: _AllRows | None = None

    def zeros(self, count: int) -> torch.Tensor:
        return self._gram.new_zeros((count, len(self._gram)))

    def margins(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors @ self._gram

    def inner(self, vectors: torch.Tensor, others: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
        return total(vectors * margins)

    def system(self, vectors: torch.Tensor, margins: torch.Tensor, classes: Classes) -> _System:
        targets, costs = classes.costs(slice(None), torch.float64)
        hinge = (1 - targets * margins).clamp(min=0)
        before = total(vectors * margins) / 2 + total(costs * hinge**2)
        active = (hinge > 0) & (costs > 0)
        ridge = torch.where(active, 1 / (2 * costs), 0)
        # With signs clipped, y a is a point of the dual problem, and the duality gap a sum of squares.
        start = torch.where(active & (targets * vectors > 0), vectors, 0)
        start_margins = start @ self._gram
        slack = 1 - targets * start_margins
        residual = torch.where(active, targets - start_margins - start * ridge, 0)
        alpha = targets * start
        gap = total(costs * (slack.clamp(min=0) - alpha * ridge) ** 2) + total(alpha * (-slack).clamp(min=0))
        objective = total(start * start_margins) / 2 + total(costs * slack.clamp(min=0) ** 2)
        point, point_margins = start, start_margins
        # Where rows are linearly dependent, many a give the same w, and clipping can move w far off. Then w itself is
        # the point, and 2 c hinge that of the dual problem, as in `PrimalSpace`.
        spoiled = (gap > before).nonzero()[:, 0]
        if len(spoiled):
            apart = vectors[spoiled] - 2 * (costs * targets * hinge)[spoiled]
            own = total(apart * (apart @ self._gram)) / 2
            spoiled, own = spoiled[own < gap[spoiled]], own[own < gap[spoiled]]
            point, point_margins = start.clone(), start_margins.clone()
            point[spoiled], point_margins[spoiled] = vectors[spoiled], margins[spoiled]
            gap[spoiled], objective[spoiled] = own.clamp(min=0), before[spoiled]
        # Large a that cancel in w leave rounding errors that the gap does not show.
        gap += torch.finfo(point.dtype).eps * (point.abs() @ self._lengths) ** 2
        return _System(point, point_margins, objective, gap, start, start_margins, ridge, residual)

    def step(self, system: _System, classes: Classes, forcing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        active = system.ridge > 0
        steps = torch.zeros_like(system.residual)
        common = 1 / (2 * float(classes.negative[0]))
        odd = system.ridge != common
        many = self._by_all_rows(common, odd, active) & (classes.negative == classes.negative[0])

        def solve_active(at: int) -> None:
            rows = active[at].nonzero()[:, 0]
            matrix = _part(self._gram, rows)
            matrix.diagonal().add_(system.ridge[at, rows])
            steps[at, rows] = _solve(matrix, system.residual[at, rows])

        few = (~many).nonzero()[:, 0]
        in_threads(solve_active, few.tolist(), _solving_bytes(active[few]))
        if self._shared is not None and many.any():
            which = many.nonzero()[:, 0]
            whole = torch.cholesky_solve(system.residual[which].T, self._shared.factor).T
            corrections = torch.zeros_like(whole)
            others = odd[which].any(1).nonzero()[:, 0]
            inverse = self._shared.inverse() if len(others) else whole

            def solve_odd(at: int) -> None:
                rows = odd[which[at]].nonzero()[:, 0]
                matrix = _part(inverse, rows)
                ridge = system.ridge[which[at], rows]
                weighted = ridge > 0
                matrix.diagonal().add_(torch.where(weighted, 1 / (ridge - common), 0))
                definite = not bool((ridge[weighted] < common).any())
                corrections[at, rows] = _solve(matrix, whole[at, rows], definite=definite)

            in_threads(solve_odd, others.tolist(), _solving_bytes(odd[which[others]]))
            if len(others):
                whole -= corrections @ inverse
            steps[which] = torch.where(active[which], whole, 0)
        return steps, steps @ self._gram, 1

    def _by_all_rows(self, common: float, odd: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """[K] which systems are solved with that of all rows, because `odd` [K, N], where they differ, are fewer."""
        few, many = odd.sum(1).double(), active.sum(1).double()
        wanted = few < many
        known = self._shared is not None and self._shared.ridge == common
        if not known and float(((many**3 - few**3) / 3)[wanted].sum()) > len(self._gram) ** 3 / 3:
            self._shared = None  # two of them may not fit
            if float(self._gram.diagonal().sum()) < _INVERSE_CONDITION * common:
                matrix = self._gram.clone()
                matrix.diagonal().add_(common)
                factor, failed = torch.linalg.cholesky_ex(matrix)
                if not failed:
                    self._shared, known = _AllRows(common, factor), True
        return wanted if known else torch.zeros_like(wanted)


class _AllRows:
    """The system of all rows with one ridge, factored, and inverted on demand."""

    def __init__(self, ridge: float, factor: torch.Tensor) -> None:
        self.ridge, self.factor = ridge, factor
        self._inverse: torch.Tensor | None = None

    def inverse(self) -> torch.Tensor:
        if self._inverse is None:
            unit = torch.eye(len(self.factor), dtype=self.factor.dtype, device=self.factor.device)
            lower = torch.linalg.solve_triangular(self.factor, unit, upper=False)
            self._inverse = lower.T @ lower  # in a third of the time of `cholesky_inverse`
        return self._inverse


class GramBasis:
    """The eigenbasis of a Gram matrix: the same rows, as few values as the matrix has dimensions.

    Where rows are linearly dependent and costs very large, a of 1e8 and more cancel in w, beyond double precision; the
    weights in this basis do not.
    """

    def __init__(self, gram: torch.Tensor) -> None:
        values, vectors = torch.linalg.eigh(gram)
        solid = values > len(gram) * torch.finfo(gram.dtype).eps * values[-1]
        self._lengths, self._vectors = values[solid].sqrt(), vectors[:, solid]
        self.space = PrimalSpace(
            Rows((self._vectors * self._lengths).cpu().numpy(), None, gram.device, gram.dtype, constant=0.0)
        )

    def weights(self, factors: torch.Tensor) -> torch.Tensor:
        """[K, R + 1] weights in this basis of vectors a [K, N]."""
        return torch.nn.functional.pad((factors @ self._vectors) * self._lengths, (0, 1))

    def factors(self, weights: torch.Tensor) -> torch.Tensor:
        """[K, N] the shortest a of weights [K, R + 1]."""
        shortest: torch.Tensor = (weights[:, :-1] / self._lengths) @ self._vectors.T
        return shortest


def _part(matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A new matrix [n, n] of some rows and columns."""
    part: torch.Tensor = matrix.index_select(0, rows).index_select(1, rows)
    return part


def _solving_bytes(rows: torch.Tensor) -> float:
    """Bytes for the largest system of classes, rows [K, N] bool: rows of the whole, the matrix, its factor."""
    side = float(rows.sum(1).max()) if len(rows) else 0.0
    return 8 * side * (rows.shape[1] + 2 * side)


def _solve(matrix: torch.Tensor, right: torch.Tensor, *, definite: bool = True) -> torch.Tensor:
    """[n] the solution of matrix x = right [n], for a symmetric matrix [n, n], which is overwritten."""
    if not len(right):
        return right
    if definite:
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return torch.cholesky_solve(right[:, None], factor)[:, 0]
    else:
        solved, failed = torch.linalg.solve_ex(matrix, right)
        if not failed and bool(solved.isfinite().all()):
            solution: torch.Tensor = solved
            return solution
    # Rounding can leave a Gram matrix of equal rows slightly indefinite, which a very large cost does not hide:
    # directions that are only rounding are dropped.
    values, vectors = torch.linalg.eigh(matrix)
    solid = values.abs() > len(right) * torch.finfo(matrix.dtype).eps * values.abs().max()
    shortest: torch.Tensor = vectors[:, solid] @ ((vectors[:, solid].T @ right) / values[solid])
    return shortest
