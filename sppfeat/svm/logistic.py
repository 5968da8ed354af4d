"""Multinomial logistic regression over all classes at once, as linear probes are evaluated (Radford et al. 2021).

Weights W [K, D] and biases b [K] minimize

    |W|^2 / 2  +  C sum_i ( log sum_k exp(w_k x_i + b_k)  -  w_y(i) x_i - b_y(i) ):

what scikit-learn's LogisticRegression minimizes; biases are free. L-BFGS minimizes it, in one of two spaces: that of
the rows themselves, or, with fewer rows than values, that of coordinates in which all inner products are the same.

Where b is at its minimum for W, the objective exceeds its minimum by at most |g|^2 / 2, g being the gradient of W,
since |W|^2 / 2 is strongly convex. That bound is the gap told, with b brought there by Newton's method first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch

from sppfeat.engines import resolve_device
from sppfeat.errors import UsageError
from sppfeat.store import Matrix
from sppfeat.svm import SvmOptions, accuracy_per_class, mean_over_classes
from sppfeat.svm.cost_selection import FOLDS, folds
from sppfeat.svm.model import require_finite
from sppfeat.svm.rows import Rows

# Gap over objective at which a fit ends.
TOLERANCE: Final = 1e-5
# L-BFGS: steps kept, and steps and new starts until the fit is given up; it then tells its gap.
_HISTORY: Final = 10
_STEPS: Final = 2000
_ROUNDS: Final = 6
# Steps of Newton's method for the biases alone.
_CENTERINGS: Final = 50
# The largest Gram matrix [N, N]: 11,585 rows.
_GRAM_BYTES: Final = 1 << 30
# Rows up to this size are kept in double precision.
_DOUBLE_BYTES: Final = 1 << 29
# Added to the squares of rows, relative to their mean, so that equal rows have coordinates of their own.
_RIDGE: Final = 1e-9


@dataclass(frozen=True)
class LogisticSolution:
    """weights [P, K] in the problem's space, and biases [K]. objective, gap: as fractions of it; see the module."""

    weights: torch.Tensor
    biases: torch.Tensor
    objective: float
    gap: float
    steps: int


class LogisticProblem:
    """A set of rows; fits of any C on subsets of it: folds, a path of C.

    descriptors: [., D], read block by block. only: which rows [N] of them. device: as in `RunOptions`. names: of the
    descriptors, for error messages.
    Raises UsageError for rows that are not finite.
    """

    def __init__(
        self, descriptors: Matrix, only: np.ndarray, *, device: str = "cpu", names: Sequence[str] | None = None
    ) -> None:
        place = torch.device(resolve_device(device))
        self._rows = Rows(descriptors, np.ascontiguousarray(only, np.int64), place, torch.float64, constant=0.0)
        count, dim = len(self._rows), self._rows.dim
        self._factor: torch.Tensor | None = None
        self._ridge = 0.0
        if count < dim and 8 * count * count <= _GRAM_BYTES:
            gram = self._rows.gram()
            _require_finite(gram.diagonal().isfinite(), only, names)
            self._ridge = _RIDGE * float(gram.diagonal().mean().clamp(min=1e-300))
            gram.diagonal().add_(self._ridge)
            self._factor = torch.linalg.cholesky(gram)
            self._points = self._factor
        else:
            dtype = torch.float64 if 8 * count * dim <= _DOUBLE_BYTES else torch.float32
            self._points = torch.empty((count, dim), dtype=dtype, device=place)
            for part, block in self._rows.blocks():
                self._points[part] = block
            _require_finite(self._points.isfinite().all(1), only, names)
        self.route = "gram" if self._factor is not None else "primal"

    def solve(
        self,
        labels: np.ndarray,
        classes: int,
        rows: np.ndarray | None = None,
        *,
        c: float,
        start: LogisticSolution | None = None,
        tolerance: float = TOLERANCE,
    ) -> LogisticSolution:
        """Fit rows [M] (None: all) of this problem with labels [M], numbers below `classes`.

        start: a solution for the same classes, such as that of the next smaller C.
        """
        points = self._points if rows is None else self._points[torch.from_numpy(rows).to(self._points.device)]
        fit = _Fit(points, torch.from_numpy(np.asarray(labels, np.int64)).to(points.device), classes, c)
        weights = points.new_zeros((points.shape[1], classes)) if start is None else start.weights.clone()
        biases = weights.new_zeros(classes) if start is None else start.biases.clone()
        found = fit.minimize(weights, biases, tolerance)
        return found if self._factor is None else self._without_ridge(found, fit, rows)

    def _without_ridge(self, found: LogisticSolution, fit: _Fit, rows: np.ndarray | None) -> LogisticSolution:
        """The same weights, judged by the rows as they are: inner products of coordinates have a ridge besides."""
        assert self._factor is not None
        factors = torch.linalg.solve_triangular(self._factor.T, found.weights, upper=True)
        mine = slice(None) if rows is None else torch.from_numpy(rows).to(factors.device)
        products = fit.points @ found.weights - self._ridge * factors[mine]
        biases, decrement = fit.center(products, found.biases, 1e-8 * found.objective)
        loss, residual = fit.losses(products + biases)
        inner = found.weights.square().sum() - self._ridge * factors.square().sum()
        slope = found.weights + fit.points.T @ residual
        factors[mine] += residual
        square = slope.square().sum() - self._ridge * factors.square().sum()
        objective = inner.clamp(min=0) / 2 + loss
        gap = float((square.clamp(min=0) / 2 + decrement) / objective.clamp(min=1e-300))
        return replace(found, biases=biases, objective=float(objective), gap=gap)

    def scores(self, solution: LogisticSolution, rows: np.ndarray | None = None) -> np.ndarray:
        """[M, K] float32 scores of rows [M] (None: all) of this problem."""
        points = self._points if rows is None else self._points[torch.from_numpy(rows).to(self._points.device)]
        found: np.ndarray = (points @ solution.weights + solution.biases).float().cpu().numpy()
        return found

    def weights(self, solution: LogisticSolution) -> tuple[np.ndarray, np.ndarray]:
        """Weights [K, D] and biases [K], usable on other descriptors."""
        weights = solution.weights.T
        if self._factor is not None:
            factors = torch.linalg.solve_triangular(self._factor.T, solution.weights, upper=True).T
            weights = self._rows.weigh(factors.contiguous())[:, :-1]
        return weights.double().cpu().numpy(), solution.biases.double().cpu().numpy()


class _Fit:
    """The objective on some points [M, P], with labels [M]."""

    def __init__(self, points: torch.Tensor, labels: torch.Tensor, classes: int, c: float) -> None:
        self.points, self._labels, self._c = points, labels, c
        self._each = torch.arange(len(labels), device=points.device)
        self._counts = torch.bincount(labels, minlength=classes).double()

    def evaluate(
        self, weights: torch.Tensor, biases: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The objective, its gradients for weights and biases, and the products of points and weights [M, K]."""
        products = self.points @ weights
        loss, residual = self.losses(products + biases)
        objective = weights.double().square().sum() / 2 + loss
        return objective, torch.addmm(weights, self.points.T, residual), residual.sum(0), products

    def losses(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """C times the sum of the losses of scores [M, K], and its gradient for them [M, K]."""
        logs = torch.log_softmax(scores, 1)
        loss = -self._c * logs[self._each, self._labels].double().sum()
        residual = logs.exp_()
        residual[self._each, self._labels] -= 1
        residual *= self._c
        return loss, residual

    def center(
        self, products: torch.Tensor, biases: torch.Tensor, tolerance: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best biases for products of points and weights, and by how much they may still exceed the minimum.

        Newton's method, until its decrement, which estimates that, is below the tolerance. The biases' sum, which
        changes nothing, is 0.
        """
        products, biases = products.double(), biases.double()
        decrement = biases.new_tensor(float("inf"))
        for _ in range(_CENTERINGS):
            shares = torch.softmax(products + biases, 1)
            gradient = shares.sum(0) - self._counts
            hessian = torch.diag(shares.sum(0)) - shares.T @ shares
            scale = hessian.diagonal().mean()
            # The sum is free, and classes that nothing tells apart leave others free.
            hessian += scale / len(biases)
            hessian.diagonal().add_(1e-10 * scale)
            step = torch.linalg.solve(hessian, gradient)
            decrement = self._c * (step @ gradient).clamp(min=0) / 2
            if float(decrement) <= tolerance:
                break
            biases = biases - step * (2 / step.abs().max()).clamp(max=1)
        return biases - biases.mean(), decrement

    def minimize(self, weights: torch.Tensor, biases: torch.Tensor, tolerance: float) -> LogisticSolution:
        """L-BFGS over weights and biases, until the gap is small or no step lowers the objective."""
        steps, rounds = 0, 0
        while True:
            objective, _, _, products = self.evaluate(weights, biases)
            exact, decrement = self.center(products, biases, 1e-3 * tolerance * float(objective))
            biases = exact.to(weights.dtype)
            objective, gradient, _, _ = self.evaluate(weights, biases)
            exceeded = gradient.double().square().sum() / 2 + decrement
            gap = float(exceeded / objective.clamp(min=1e-300))
            if gap <= tolerance or steps >= _STEPS or rounds == _ROUNDS:
                break
            # Where the gap was small for other biases, the next round continues to a smaller one.
            rounds += 1
            weights, biases, more = self._descend(weights, biases, tolerance * 0.3**rounds)
            steps += more
        return LogisticSolution(weights, biases, float(objective), gap, steps)

    def _descend(
        self, weights: torch.Tensor, biases: torch.Tensor, tolerance: float
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        weights, biases = weights.clone().requires_grad_(), biases.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [weights, biases],
            max_iter=_STEPS,
            history_size=_HISTORY,
            line_search_fn="strong_wolfe",
            tolerance_grad=0.0,
            tolerance_change=0.0,
        )
        calls = 0

        class _Near(Exception):
            pass

        def closure() -> torch.Tensor:
            nonlocal calls
            calls += 1
            with torch.no_grad():
                objective, gradient, slope, _ = self.evaluate(weights, biases)
            weights.grad, biases.grad = gradient, slope
            near = float(gradient.double().square().sum()) / 2 <= tolerance * float(objective)
            if near and float(slope.abs().max()) <= 1e-4 * self._c * len(self._labels):
                raise _Near
            return objective.to(weights.dtype)

        with contextlib.suppress(_Near):
            optimizer.step(closure)  # type: ignore[no-untyped-call]
        return weights.detach(), biases.detach(), calls


@dataclass(frozen=True)
class Choice:
    """The C chosen, and what `sppfeat.svm.cost_selection.Choice` says besides."""

    cost: float
    curve: list[tuple[float, float]]
    start: LogisticSolution | None = None
    gap: float = 0.0


def choose_regularization(problem: LogisticProblem, labels: np.ndarray, classes: int, options: SvmOptions) -> Choice:
    """The C with the best mean accuracy per class in cross-validation; the smallest of equally good ones.

    labels: [N] of the problem's rows, numbers below `classes`. Raises UsageError where no class has two rows.
    """
    if len(options.costs) == 1:
        return Choice(options.costs[0], [])
    fold = folds(labels, options)
    if not (fold > 0).any():
        raise UsageError(
            f"C cannot be chosen by cross-validation: expected a class with at least 2 training images, found 1 in "
            f"each of {classes}; set one C"
        )
    costs, each = sorted(options.costs), np.arange(classes)
    values, gap = np.full((FOLDS, len(costs)), np.nan), 0.0
    starts: list[LogisticSolution] = []
    for number in range(FOLDS):
        fit, held = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        if not len(fit) or not len(held):
            continue
        solution, starts = None, []
        for at, cost in enumerate(costs):
            solution = problem.solve(labels[fit], classes, fit, c=cost, start=solution)
            gap = max(gap, solution.gap)
            starts.append(solution)
            predicted = problem.scores(solution, held).argmax(1)
            values[number, at] = mean_over_classes(accuracy_per_class(labels[held], predicted, each))
    mean = np.nanmean(values, 0)
    best = int(mean.argmax())
    return Choice(costs[best], list(zip(costs, mean.tolist(), strict=True)), starts[best], gap)


def _require_finite(finite: torch.Tensor, only: np.ndarray, names: Sequence[str] | None) -> None:
    """Raise UsageError, naming the first row, unless all rows are `finite` [N]."""
    require_finite(np.asarray(only)[(~finite).cpu().numpy()], names)
