"""How close trained SVMs are to the optimum, as data and in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sppfeat.svm.model import CONVERGED


class Unconverged(NamedTuple):
    """An SVM that did not converge: its trial, counted from 0, its class, and its relative duality gap."""

    trial: int
    label: str
    gap: float


@dataclass(frozen=True)
class Convergence:
    """The relative duality gaps of SVMs; an SVM with a gap above `CONVERGED` did not converge.

    classes: [K]. gaps: [T, K] of the SVMs that are used, one row per trial. choice_gap: the largest of those that C was
    chosen with; 0 where C was given, or is no longer known. fits: what they are called.
    """

    classes: list[str]
    gaps: np.ndarray
    choice_gap: float = 0.0
    fits: str = "SVMs"

    @property
    def not_converged(self) -> list[Unconverged]:
        """The SVMs in use that did not converge."""
        return [
            Unconverged(int(trial), self.classes[at], float(self.gaps[trial, at]))
            for trial, at in np.argwhere(~(self.gaps <= CONVERGED))
        ]

    @property
    def largest_gap(self) -> float:
        """The largest gap of the SVMs in use."""
        return float(self.gaps.max(initial=0))

    def warnings(self) -> list[str]:
        """One line per warning; empty if all SVMs converged."""
        lines = []
        if wrong := self.not_converged:
            worst = max(wrong, key=lambda one: one.gap)
            lines.append(
                f"{len(wrong)} of {self.gaps.size} {self.fits} did not converge (largest relative gap {worst.gap:.2g}, "
                f"class {worst.label!r}): their scores are not exact; a smaller C or normalized descriptors converge "
                "faster"
            )
        if not self.choice_gap <= CONVERGED:
            lines.append(
                f"{self.fits} of the cross-validation did not converge (largest relative gap {self.choice_gap:.2g}): "
                "another C might be better"
            )
        return lines
