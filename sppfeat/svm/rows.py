"""Rows that SVMs are trained on, read block by block in the requested precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import torch

from sppfeat.store import Matrix

# Rows are converted to floating point in blocks of this size: larger ones exceed the cache, and the allocator returns
# them to the system every time, which takes as long as the products (0.65 s against 0.35 s at 64 MB).
_BLOCK_BYTES: Final = 1 << 24
# A matrix up to this size is converted once, and kept.
_KEPT_BYTES: Final = 1 << 27


class Rows:
    """Some rows of a matrix, as blocks [B, D]; a constant is appended in every product."""

    def __init__(
        self,
        descriptors: Matrix,
        rows: np.ndarray | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        constant: float = 1.0,
    ) -> None:
        self.descriptors = descriptors
        self.device = device
        self.dtype = dtype
        self.constant = constant
        self._rows = rows
        self._kept: list[tuple[slice, torch.Tensor]] = []

    def __len__(self) -> int:
        return int(self.descriptors.shape[0]) if self._rows is None else len(self._rows)

    @property
    def dim(self) -> int:
        return int(self.descriptors.shape[1])

    def only(self, rows: np.ndarray) -> Rows:
        """The rows at these positions among these."""
        return self._like(rows if self._rows is None else self._rows[rows], self.dtype)

    def to(self, dtype: torch.dtype) -> Rows:
        """The same rows in another precision."""
        return self if dtype == self.dtype else self._like(self._rows, dtype)

    def _like(self, rows: np.ndarray | None, dtype: torch.dtype) -> Rows:
        return Rows(self.descriptors, rows, self.device, dtype, self.constant)

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """The rows in order, converted to floating point on every read unless they are few."""
        if self._kept:
            yield from self._kept
            return
        row_bytes = self.dtype.itemsize * self.dim
        size, keep = max(1, _BLOCK_BYTES // row_bytes), row_bytes * len(self) <= _KEPT_BYTES
        turned = []
        for first in range(0, len(self), size):
            place = slice(first, min(first + size, len(self)))
            values = self.descriptors[place if self._rows is None else self._rows[place]]
            block = (place, to_tensor(values, self.device, self.dtype))
            if keep:
                turned.append(block)
            yield block
        self._kept = turned

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, D + 1] the rows at rising positions, with the constant."""
        taken = torch.empty((len(rows), self.dim + 1), dtype=self.dtype, device=self.device)
        taken[:, -1] = self.constant
        if self._kept:
            done = 0
            for place, block in self._kept:
                some = rows[(rows >= place.start) & (rows < place.stop)] - place.start
                taken[done : done + len(some), :-1] = block[some]
                done += len(some)
            return taken
        positions = rows.cpu().numpy()
        values = self.descriptors[positions if self._rows is None else self._rows[positions]]
        taken[:, :-1] = to_tensor(values, self.device, self.dtype)
        return taken

    def gram(self) -> torch.Tensor:
        """[N, N] inner products of the rows."""
        gram = torch.empty((len(self), len(self)), device=self.device, dtype=self.dtype)
        for place, block in self.blocks():
            for other, others in self.blocks():
                if other.start > place.start:
                    break
                products = (block @ others.T).add_(self.constant**2)
                gram[place, other] = products
                gram[other, place] = products.T
        return gram

    def squares(self) -> torch.Tensor:
        """[N] float64 square length of each row, with the constant."""
        squares = torch.full((len(self),), self.constant**2, dtype=torch.float64, device=self.device)
        for place, block in self.blocks():
            squares[place] += block.double().square().sum(1)
        return squares

    def margins(self, weights: torch.Tensor) -> torch.Tensor:
        """[K, N] products of weights [K, D + 1] with the rows."""
        margins = weights.new_empty((len(weights), len(self)))
        for place, block in self.blocks():
            margins[:, place] = self.block_margins(weights, block)
        return margins

    def weigh(self, factors: torch.Tensor) -> torch.Tensor:
        """[K, D + 1] sums of the rows, weighted by factors [K, N]."""
        total = factors.new_zeros((len(factors), self.dim + 1))
        for place, block in self.blocks():
            self.add_weighted(total, factors[:, place], block)
        return total

    def block_margins(self, weights: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """[K, B] products of weights [K, D + 1] with a block [B, D] and its constant."""
        return torch.addmm(self.constant * weights[:, -1:], weights[:, :-1], block.T)

    def add_weighted(self, total: torch.Tensor, factors: torch.Tensor, block: torch.Tensor) -> None:
        """Add the rows of a block [B, D] and their constant, weighted by factors [K, B], to the sums [K, D + 1]."""
        total[:, :-1].addmm_(factors, block)
        total[:, -1] += self.constant * factors.sum(1)


def to_tensor(values: np.ndarray, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.array(values)).to(device).to(dtype)
