"""The queries of an evaluation that rank worst, with their first neighbors: what its page shows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from sppfeat.store import UnitRows

HARDEST: Final = 12
FIRST_HITS: Final = 6


@dataclass(frozen=True)
class HardQuery:
    """A query by its row's name, with its average precision in percent, and how many relevant images it has.

    found: rank of the first relevant one, from 1. hits: the names of its first neighbors, and whether each is relevant;
    without junk and the query's own image.
    """

    name: str
    average_precision: float
    relevant: int
    found: int
    hits: list[tuple[str, bool]]


class Hardest:
    """Gathers queries, and keeps the HARDEST with the lowest average precision below 100 %, the lowest first."""

    def __init__(self, rows: UnitRows) -> None:
        self._rows = rows
        self.queries: list[HardQuery] = []

    def add(self, name: str, average_precision: float, order: np.ndarray, ranked: np.ndarray) -> None:
        """order: rows [N] of the gallery by rank; ranked: [N] their targets, above 0 if relevant, 0 if they do not
        count."""
        worst = self.queries[-1].average_precision if len(self.queries) == HARDEST else math.inf
        if not average_precision < min(worst, 100 - 1e-9):
            return
        order, right = order[ranked != 0], ranked[ranked != 0] > 0
        hits = [(self._rows.names[int(row)], bool(good)) for row, good in zip(order, right[:FIRST_HITS], strict=False)]
        self.queries.append(HardQuery(name, average_precision, int(right.sum()), int(right.argmax()) + 1, hits))
        self.queries.sort(key=lambda one: one.average_precision)
        del self.queries[HARDEST:]
