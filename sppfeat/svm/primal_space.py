"""Newton's method on the weights, for many rows, which every product reads once, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from sppfeat.svm.newton import Classes, System, in_threads, total
from sppfeat.svm.rows import Rows

# Sample rows in the preconditioner. More make it better, but each application slower.
_SAMPLE_ROWS: Final = 2048
# Conjugate gradients give up after this many products with all rows.
_MAX_CONJUGATE: Final = 150
# About as many as they take where they converge well, to compare with the work of a direct solution.
_USUAL_CONJUGATE: Final = 40
# The largest matrix of a direct solution, 200 MB; and the most values of rows gathered for one, 256 MB.
_DIRECT_SIDE: Final = 5000
_DIRECT_VALUES: Final = 1 << 25


@dataclass
class _System(System):
    """(1 + X' factors X) step = residual, Newton's system. factors: [K, N], 2 c on the active rows, 0 elsewhere."""

    factors: torch.Tensor
    residual: torch.Tensor


class PrimalSpace:
    """Vectors are w with b appended, [K, D + 1].

    Systems are solved by conjugate gradients, preconditioned by the same system of a sample of the rows; directly where
    that is less work, and, in double precision, where conjugate gradients do not converge.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._sample: torch.Tensor | None = None
        self._products: torch.Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self._rows.dtype

    def zeros(self, count: int) -> torch.Tensor:
        return torch.zeros((count, self._rows.dim + 1), device=self._rows.device, dtype=self.dtype)

    def margins(self, vectors: torch.Tensor) -> torch.Tensor:
        return self._rows.margins(vectors)

    def inner(self, vectors: torch.Tensor, others: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
        return total(vectors * others)

    def system(self, vectors: torch.Tensor, margins: torch.Tensor, classes: Classes) -> _System:
        weighed = torch.zeros_like(vectors)
        factors = torch.empty_like(margins)
        squares, linear = (torch.zeros(len(vectors), dtype=torch.float64, device=vectors.device) for _ in range(2))
        for place, block in self._rows.blocks():
            targets, costs = classes.costs(place, self.dtype)
            hinge = (1 - targets * margins[:, place]).clamp(min=0)
            factors[:, place] = 2 * costs * (hinge > 0)
            alpha = 2 * costs * hinge
            self._rows.add_weighted(weighed, targets * alpha, block)
            linear += total(alpha)
            squares += total(alpha * hinge) / 2
        residual = weighed - vectors
        objective = total(vectors.double() ** 2) / 2 + squares
        # 2 c hinge is a point of the dual problem, this far below; so is each multiple of it, and the best is known.
        near = total(residual.double() ** 2) / 2
        dual = linear**2 / (4 * squares + 2 * total(weighed.double() ** 2)).clamp(min=1e-300)
        gap = torch.minimum(near, objective - dual).clamp(min=0)
        return _System(vectors, margins, objective, gap, vectors, margins, factors, residual)

    def step(self, system: _System, classes: Classes, forcing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        steps, used = torch.zeros_like(system.residual), 0
        work = self._direct_work((system.factors > 0).sum(1).double()).amin(0)
        direct = work < 4.0 * _USUAL_CONJUGATE * len(self._rows) * (self._rows.dim + 1)
        if not direct.all():
            stepwise = (~direct).nonzero()[:, 0]
            steps[stepwise], solved, used = self._conjugate_gradients(system.of(stepwise), forcing[stepwise])
            direct[stepwise] = ~solved & (self.dtype == torch.float64) & work[stepwise].isfinite()
        if direct.any():
            most = float((system.factors > 0).sum(1)[direct].max())
            side = min(most, self._rows.dim + 1)
            taken = self.dtype.itemsize * (2 * side**2 + min(most, _DIRECT_SIDE) * (self._rows.dim + 1))
            in_threads(lambda at: self._solve_directly(system, at, steps), direct.nonzero()[:, 0].tolist(), taken)
            used += 1
        return steps, self._rows.margins(steps), used + 1

    def _direct_work(self, active: torch.Tensor) -> torch.Tensor:
        """[2, K] multiplications of a direct solution over the values, and over the active rows; infinite where it
        takes too much memory."""
        dim = self._rows.dim + 1
        over_values = active * dim**2 + dim**3 / 3
        over_rows = active**2 * dim + active**3 / 3
        large = (active > _DIRECT_SIDE) | (active * dim > _DIRECT_VALUES)
        return torch.stack(
            [over_values if dim <= _DIRECT_SIDE else over_values * torch.inf, torch.where(large, torch.inf, over_rows)]
        )

    def _conjugate_gradients(self, system: _System, forcing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Steps [K, D + 1], until half the square of the residual is at most `forcing` [K] times the gap; whether that
        was reached [K]; and how many products it took."""
        solution, solved = torch.zeros_like(system.residual), torch.zeros(len(forcing), dtype=torch.bool)
        solved = solved.to(system.residual.device)
        precondition = _Preconditioner(self, system.factors)
        live = torch.arange(len(forcing), device=solved.device)
        x, residual, factors, limit = solution.clone(), system.residual, system.factors, forcing * system.gap
        better = precondition(residual, live)
        direction, square = better, total(residual.double() * better.double())
        used = 0
        for used in range(_MAX_CONJUGATE + 1):
            going = (total(residual.double() ** 2) / 2 > limit) & (square > 0)
            solved[live] = ~going
            if going.sum() <= 0.8 * len(live):
                solution[live] = x
                live, x, direction, residual, factors, square, limit = (
                    v[going] for v in (live, x, direction, residual, factors, square, limit)
                )
            if not len(live) or used == _MAX_CONJUGATE:
                break
            image = self._product(direction, factors)
            curvature = total(direction.double() * image.double())
            rate = torch.where(curvature > 0, square / curvature, 0).to(self.dtype)[:, None]
            x = x + rate * direction
            residual = residual - rate * image
            better = precondition(residual, live)
            before, square = square, total(residual.double() * better.double())
            direction = better + torch.where(before > 0, square / before, 0).to(self.dtype)[:, None] * direction
        solution[live] = x
        return solution, solved, used

    def _product(self, steps: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        result = steps.clone()
        for place, block in self._rows.blocks():
            self._rows.add_weighted(result, factors[:, place] * self._rows.block_margins(steps, block), block)
        return result

    def _solve_directly(self, system: _System, at: int, steps: torch.Tensor) -> None:
        """Solve the system of one class, in place: `steps[at]` stays where rounding leaves no definite matrix."""
        factors, right = system.factors[at], system.residual[at]
        rows = factors.nonzero()[:, 0]
        over_values, over_rows = self._direct_work(factors.new_tensor([len(rows)], dtype=torch.float64))[:, 0].tolist()
        if over_rows <= over_values:
            part = self._rows.take(rows)
            matrix = part @ part.T
            matrix.diagonal().add_(1 / factors[rows])
            if (found := _solved(matrix, part @ right)) is not None:
                steps[at] = right - part.T @ found
            return
        dim = self._rows.dim + 1
        matrix = torch.eye(dim, dtype=self.dtype, device=right.device)
        for first in range(0, len(rows), _DIRECT_SIDE):
            some = rows[first : first + _DIRECT_SIDE]
            part = self._rows.take(some) * factors[some].sqrt()[:, None]
            matrix.addmm_(part.T, part)
        if (found := _solved(matrix, right)) is not None:
            steps[at] = found

    def sample(self) -> torch.Tensor:
        """[M, D + 1] a sample of the rows."""
        if self._sample is None:
            count = len(self._rows)
            chosen = np.arange(count)
            if count > _SAMPLE_ROWS:
                chosen = np.sort(np.random.default_rng(0).choice(count, _SAMPLE_ROWS, replace=False))
            self._sample = self._rows.take(torch.from_numpy(chosen))
        return self._sample

    def sample_products(self) -> torch.Tensor:
        """Products of the sample with itself, over its rows [D + 1, D + 1] or its values [M, M]: the smaller."""
        if self._products is None:
            sample = self.sample()
            self._products = sample.T @ sample if len(sample) >= sample.shape[1] else sample @ sample.T
        return self._products


class _Preconditioner:
    """Solves (1 + s X' X) x = r approximately, X a sample of the rows, for classes with mean factors s.

    Classes whose s is the same up to a factor of 4 share a matrix: that costs them at most a few iterations.
    """

    def __init__(self, space: PrimalSpace, factors: torch.Tensor) -> None:
        self._sample, products = space.sample(), space.sample_products()
        scale = total(factors) / len(self._sample)
        steps = torch.log2(scale.clamp(min=1e-30)).div(2).round()
        self._group = steps
        self._factors: dict[float, torch.Tensor] = {}
        for step in sorted(set(steps.tolist())):
            shared = 4.0**step
            matrix = products.double() * (shared if self._over_values else 1)
            matrix.diagonal().add_(1 if self._over_values else 1 / shared)
            factor, failed = torch.linalg.cholesky_ex(matrix)
            if failed:
                continue  # rounding, at a very large scale: conjugate gradients continue without it
            self._factors[step] = factor.to(factors.dtype)

    @property
    def _over_values(self) -> bool:
        return len(self._sample) >= self._sample.shape[1]

    def __call__(self, residual: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        result = residual.clone()
        groups = self._group[classes]
        for step, factor in self._factors.items():
            which = (groups == step).nonzero()[:, 0]
            if not len(which):
                continue
            right = residual[which].T
            if self._over_values:
                result[which] = torch.cholesky_solve(right, factor).T
            else:
                result[which] -= (self._sample.T @ torch.cholesky_solve(self._sample @ right, factor)).T
        return result


def _solved(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
    """[n] the solution of a positive definite system; None where rounding made it indefinite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return None if failed else torch.cholesky_solve(right[:, None], factor)[:, 0]
