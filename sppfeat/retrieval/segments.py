"""A gallery's rows in two parts: the base, and the rows added since, few enough to write them all at every addition.

Added rows are kept as they are and compared exactly. Once they would take more than 1 / JOIN_PART of the base's bytes,
they join the base, and all files are written again: so a row is written again about JOIN_PART times at most as the
gallery grows, and additions take little memory beside the base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sppfeat.retrieval.flat import search_index

JOIN_PART: Final = 8


@dataclass(frozen=True)
class JoinedIndex:
    """Two FAISS indexes of inner products, searched as one. Its first rows are those of `base`; `added` is exact."""

    base: Any
    added: Any

    @property
    def ntotal(self) -> int:
        """Number of rows."""
        return int(self.base.ntotal + self.added.ntotal)

    @property
    def d(self) -> int:
        """Length of a row."""
        return int(self.base.d)

    def search(self, units: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores [Q, k] float32, falling, and rows [Q, k] int64, as FAISS returns them; missing ones are row -1, last.

        Of equal scores, those of the base come first.
        """
        scores, rows = search_index(self.base, units, min(k, self.base.ntotal))
        scores[rows < 0] = -np.inf
        more, at = search_index(self.added, units, min(k, self.added.ntotal))
        scores, rows = np.hstack([scores, more]), np.hstack([rows, at + self.base.ntotal])
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


@dataclass(frozen=True)
class JoinedValues:
    """Two arrays of rows, [N, ...] and [M, ...], indexed as one by a slice or whole numbers."""

    base: np.ndarray
    added: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """[N + M, ...]."""
        return len(self.base) + len(self.added), *self.base.shape[1:]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray | list[int]) -> np.ndarray:
        """[n, ...] at positions [n]."""
        at = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows, np.int64)
        at = np.where(at < 0, at + len(self), at)
        if at.size and not 0 <= at.min() <= at.max() < len(self):
            raise IndexError(f"expected positions of {len(self)} rows, found {at.min()} to {at.max()}")
        late = at >= len(self.base)
        found = np.empty((*at.shape, *self.base.shape[1:]), self.base.dtype)
        found[~late] = self.base[at[~late]]
        found[late] = self.added[at[late] - len(self.base)]
        return found
