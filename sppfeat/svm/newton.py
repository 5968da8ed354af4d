"""Newton's method for the linear SVMs of many classes at once; `sppfeat.svm.solver` says what is minimized.

Newton's method on active sets (Keerthi and DeCoste, "A Modified Finite Newton Method for Fast Solution of Large Scale
Linear SVMs", JMLR 2005; Chapelle, "Training a Support Vector Machine in the Primal", 2007), with an exact line search,
in one of two spaces: `gram_space` and `primal_space`. Both stop at a duality gap, so at the same
accuracy; a class that does not get there keeps its best point and that point's gap.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

_MAX_NEWTON: Final = 200
# An iterative solution of a linear system stops at this fraction of the gap: the active rows will change anyway.
_FORCING: Final = 1e-2
_MIN_FORCING: Final = 1e-9
# Costs up to this, times the mean square of the rows, are minimized directly; larger ones in stages, to this tolerance.
_MILD: Final = 100.0
_ON_THE_WAY: Final = 1e-2
# After this many steps in a row that gain nothing within the precision of the numbers, more steps will not help.
_MAX_STALE: Final = 3
# The fraction of a slope that may remain where a line search ends.
_SLOPE: Final = 1e-3
# Relative change of the margins below which a step does not count; and the longest step, in Newton steps.
_STILL: Final = 1e-13
_LONGEST: Final = 1e3
# Memory for all classes that are solved in parallel.
_THREAD_BYTES: Final = 1 << 30
# Margins that the line search reads at once, over all classes.
_SEARCH_VALUES: Final = 1 << 22


@dataclass
class Classes:
    """The targets of N rows for K classes, and their costs.

    targets: [K, N] int8, +1, -1, or 0 for an excluded row. positive, negative: [K] float64, the cost of a row
    of target +1, and of one of target -1.
    """

    targets: torch.Tensor
    positive: torch.Tensor
    negative: torch.Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def of(self, which: torch.Tensor | slice) -> Classes:
        """Some of the classes."""
        return Classes(self.targets[which], self.positive[which], self.negative[which])

    def costs(self, columns: slice, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Targets and costs [K, B] of some rows; an excluded row has cost 0."""
        targets = self.targets[:, columns]
        costs = torch.where(targets > 0, self.positive[:, None].to(dtype), self.negative[:, None].to(dtype))
        return targets.to(dtype), costs * (targets != 0)


@dataclass
class System:
    """K linear systems whose solutions are the minima if no row became active or inactive.

    vectors, margins: the point to stop at if it is good enough; objective, gap: [K] float64, there.
    start, start_margins: the point that steps start from. `of` also selects the fields that a space adds.
    """

    vectors: torch.Tensor
    margins: torch.Tensor
    objective: torch.Tensor
    gap: torch.Tensor
    start: torch.Tensor
    start_margins: torch.Tensor

    def of(self, which: torch.Tensor) -> Any:
        """The systems of some of the classes."""
        fields = {field.name: getattr(self, field.name)[which] for field in dataclasses.fields(self)}
        return type(self)(**fields)


class Space(Protocol):
    """Where the K weight vectors of Newton's method live, as rows of a matrix [K, P]."""

    def zeros(self, count: int) -> torch.Tensor:
        """The null vectors of `count` classes."""

    def margins(self, vectors: torch.Tensor) -> torch.Tensor:
        """[K, N] of vectors [K, P]."""

    def inner(self, vectors: torch.Tensor, others: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
        """[K] float64 inner products of weight vectors with others, whose margins [K, N] are known."""

    def system(self, vectors: torch.Tensor, margins: torch.Tensor, classes: Classes) -> System:
        """The linear systems at some vectors with their margins [K, N]."""

    def step(self, system: Any, classes: Classes, forcing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The steps [K, P] from `system.start` to the solutions; their margins [K, N]; and how many products with all
        rows that took. Iterative solutions stop at about `forcing` [K] times the gap."""


@dataclass
class Minimum:
    """K classes after training: vectors [K, P], objectives and relative gaps [K] float64; see `SvmSolution`."""

    vectors: torch.Tensor
    objectives: torch.Tensor
    gaps: torch.Tensor
    products: int

    def replace(self, which: torch.Tensor, better: Minimum) -> None:
        """Replace the minima of some classes where the others are better."""
        gained = better.gaps < self.gaps[which]
        at = which[gained]
        self.vectors[at] = better.vectors[gained]
        self.objectives[at], self.gaps[at] = better.objectives[gained], better.gaps[gained]
        self.products += better.products


def minimize_along(
    space: Space, classes: Classes, start: torch.Tensor | None, tolerance: float, stiffness: float
) -> Minimum:
    """Minimize the objectives of K classes through a series of rising costs, each the start of the next.

    stiffness: costs times the mean square of the rows. Where it is large, many rows lie near the margin, and Newton's
    method takes hundreds of steps from afar, but few from the minimum of a tenth of the cost.
    """
    products = 0
    for step in range(max(0, math.ceil(math.log10(max(stiffness, 1e-300) / _MILD))), 0, -1):
        part = 10.0**-step
        reached = minimize(
            space, Classes(classes.targets, part * classes.positive, part * classes.negative), start, _ON_THE_WAY
        )
        start, products = reached.vectors, products + reached.products
    found = minimize(space, classes, start, tolerance)
    found.products += products
    return found


def minimize(space: Space, classes: Classes, start: torch.Tensor | None, tolerance: float) -> Minimum:
    """Minimize the objectives of K classes, starting from vectors [K, P]. A class leaves the batch when it is done."""
    count = len(classes)
    vectors = space.zeros(count)
    if start is not None:
        vectors = start.to(vectors.dtype)
    margins = vectors.new_zeros(classes.targets.shape) if start is None else space.margins(vectors)
    unknown = torch.full((count,), torch.inf, dtype=torch.float64, device=vectors.device)
    best = Minimum(vectors.clone(), unknown.clone(), unknown.clone(), int(start is not None))
    live = torch.arange(count, device=vectors.device)
    forcing, lowest = torch.full_like(unknown, _FORCING), unknown.clone()
    stale = torch.zeros(count, dtype=torch.int64, device=vectors.device)
    rounding = 4 * torch.finfo(vectors.dtype).eps
    for _ in range(_MAX_NEWTON):
        system = space.system(vectors, margins, classes)
        best.products += 1
        gaps = system.gap / system.objective.clamp(min=1e-300)
        # An objective is a sum of squares: below 0, it is nothing but rounding.
        gaps = torch.where((system.objective >= 0) & gaps.isfinite(), gaps, torch.inf)
        # Near the limit of precision, gaps fluctuate.
        better = gaps < best.gaps[live]
        at = live[better]
        best.vectors[at] = system.vectors[better]
        best.objectives[at], best.gaps[at] = system.objective[better], gaps[better]
        gained = system.objective < lowest * (1 - rounding)
        lowest = torch.minimum(lowest, system.objective)
        stale = torch.where(gained | better, 0, stale + 1)
        going = (gaps > tolerance) & (forcing > _MIN_FORCING) & (stale < _MAX_STALE)
        if not going.any():
            break
        if not going.all():
            live, forcing, lowest, stale, vectors, margins = (
                values[going] for values in (live, forcing, lowest, stale, vectors, margins)
            )
            classes, system = classes.of(going), system.of(going)
        step, step_margins, products = space.step(system, classes, forcing)
        best.products += products
        step += system.start - vectors
        step_margins += system.start_margins - margins
        length = _line_search(space, vectors, margins, step, step_margins, classes)
        # Only a system that was solved too loosely can point uphill.
        forcing = torch.where(length > 0, forcing, _FORCING * forcing)
        vectors = vectors + length[:, None].to(step.dtype) * step
        margins = margins + length[:, None].to(step.dtype) * step_margins
    return best


def total(values: torch.Tensor) -> torch.Tensor:
    """[K] float64 sums of the rows of values."""
    return values.sum(1, dtype=torch.float64)


def in_threads(work: Callable[[int], None], classes: Sequence[int], bytes_each: float) -> None:
    """Work on each class, which takes at most `bytes_each`: several in parallel, as memory allows.

    One thread per class is faster than all threads on one class at a time, which mostly wait.
    """
    if not classes:
        return
    threads = torch.get_num_threads()
    workers = max(1, min(threads, len(classes), int(_THREAD_BYTES // max(bytes_each, 1))))
    try:
        with ThreadPoolExecutor(
            workers, initializer=torch.set_num_threads, initargs=(max(1, threads // workers),)
        ) as pool:
            list(pool.map(work, classes))
    finally:
        torch.set_num_threads(threads)  # later threads inherit what a thread sets


def _line_search(
    space: Space,
    vectors: torch.Tensor,
    margins: torch.Tensor,
    step: torch.Tensor,
    step_margins: torch.Tensor,
    classes: Classes,
) -> torch.Tensor:
    """[K] float64: how far to go along each step. The slope is piecewise linear and rising; this finds its zero."""
    linear, quadratic = space.inner(vectors, step, step_margins), space.inner(step, step, step_margins)
    count, columns = margins.shape
    width = max(1, _SEARCH_VALUES // count)
    parts = [slice(first, min(first + width, columns)) for first in range(0, columns, width)]

    def slope(length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pull, rise = torch.zeros_like(linear), torch.zeros_like(linear)
        for part in parts:
            targets, costs = classes.costs(part, torch.float64)
            moving = step_margins[:, part].double()
            hinge = (1 - targets * (margins[:, part].double() + length[:, None] * moving)).clamp(min=0)
            pull += (costs * targets * moving * hinge).sum(1)
            rise += torch.where(hinge > 0, costs * moving**2, 0).sum(1)
        return linear + length * quadratic - 2 * pull, quadratic + 2 * rise

    first, _ = slope(torch.zeros_like(linear))
    # Where rows are linearly dependent, a step may change only the vectors and no margin: its slope is rounding, and
    # following it could lead anywhere. Such a step is taken as is.
    still = step_margins.abs().amax(1).double() <= _STILL * margins.abs().amax(1).double().clamp(min=1)
    length, low, high = torch.ones_like(linear), torch.zeros_like(linear), torch.full_like(linear, torch.inf)
    for _ in range(60):
        value, rise = slope(length)
        if (still | (value.abs() <= _SLOPE * first.abs())).all():
            break
        low, high = torch.where(value < 0, length, low), torch.where(value > 0, length, high)
        guess = length - value / rise
        inside = (guess > low) & (guess < high)
        guess = torch.where(inside, guess, torch.where(high.isinf(), 2 * length, (low + high) / 2))
        length = torch.where(still | (value.abs() <= _SLOPE * first.abs()), length, guess.clamp(max=_LONGEST))
    return torch.where(still | (first < 0), length, 0)
