"""Trained linear SVMs as plain arrays, and their scores of descriptors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from sppfeat.engines import resolve_device
from sppfeat.errors import UsageError
from sppfeat.store import Matrix

# The relative gap up to which a class counts as converged: about where liblinear ends at its default tolerance.
CONVERGED: Final = 1e-4
# Descriptors read at a time.
_BLOCK_BYTES: Final = 1 << 26


@dataclass(frozen=True, kw_only=True)
class LinearSvm:
    """Linear scorers of K classes.

    weights: [K, D] float64. biases: [K] float64. classes: [K], in rising order. costs: [K], the C of each class.
    route: `gram` or `primal`, how it was trained. gaps: [K], an upper bound on how far each class's objective is
    above the optimum, relative to it.
    """

    weights: np.ndarray
    biases: np.ndarray
    classes: np.ndarray
    costs: np.ndarray
    route: str
    gaps: np.ndarray

    @property
    def converged(self) -> np.ndarray:
        """[K] whether each class came within a relative gap of `CONVERGED`."""
        result: np.ndarray = self.gaps <= CONVERGED
        return result

    def scores(
        self,
        descriptors: Matrix,
        rows: np.ndarray | None = None,
        *,
        device: str = "cpu",
        names: Sequence[str] | None = None,
    ) -> np.ndarray:
        """[N, K] float32 scores of rows (None: all) of descriptors [., D]; positive means: of that class.

        names: of the descriptors, for error messages. Raises UsageError for rows that are not finite.
        """
        if len(descriptors.shape) != 2 or descriptors.shape[1] != self.weights.shape[1]:
            raise UsageError(f"descriptors must be [N, {self.weights.shape[1]}], found {list(descriptors.shape)}")
        if resolve_device(device) != "cpu":
            return self._scores_on(device, descriptors, rows, names)
        trained = np.isfinite(self.biases)
        weights = self.weights.astype(np.float32).T
        biases = np.where(trained, self.biases, 0).astype(np.float32)
        count = descriptors.shape[0] if rows is None else len(rows)
        found = np.empty((count, len(biases)), np.float32)
        size = max(1, _BLOCK_BYTES // (4 * max(1, descriptors.shape[1])))
        for first in range(0, count, size):
            part = slice(first, min(first + size, count))
            values = np.asarray(descriptors[part if rows is None else rows[part]]).astype(np.float32, copy=False)
            with np.errstate(over="ignore", invalid="ignore"):
                np.matmul(values, weights, out=found[part])
            found[part] += biases
            if not np.isfinite(found[part]).all():
                wrong = first + np.flatnonzero(~np.isfinite(values).all(1))
                require_finite(wrong if rows is None else rows[wrong], names)
        found[:, ~trained] = -np.inf
        return found

    def _scores_on(
        self, device: str, descriptors: Matrix, rows: np.ndarray | None, names: Sequence[str] | None
    ) -> np.ndarray:
        """`scores` on a GPU."""
        from sppfeat.svm.solver import scores_on

        return scores_on(self, device, descriptors, rows, names)

    def predict(self, descriptors: Matrix, *, device: str = "cpu") -> np.ndarray:
        """[N] the class with the highest score; of equal scores the first class."""
        best: np.ndarray = self.classes[self.scores(descriptors, device=device).argmax(1)]
        return best


def require_finite(wrong: Sequence[int] | np.ndarray, names: Sequence[str] | None) -> None:
    """Raise UsageError, naming the first row, if any rows are not finite."""
    if len(wrong):
        first = f"row {int(wrong[0])}" if names is None else names[int(wrong[0])]
        more = f", and {len(wrong) - 1} more row" + "s" * (len(wrong) > 2) if len(wrong) > 1 else ""
        raise UsageError(f"{first}: expected finite numbers in the descriptor, found NaN or infinity{more}")
