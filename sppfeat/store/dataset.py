"""A store as a dataset of PyTorch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from sppfeat.errors import StoreError
from sppfeat.images import absolute
from sppfeat.store.blocks import DescribedRows
from sppfeat.store.reading import Status, open_store


class StoreDataset(Dataset[tuple[torch.Tensor, str]]):
    """The described rows of a finished store, in its order: pairs of a descriptor [D] and a name.

    Values are read from the file when they are asked for, a batch at once. A worker process of a DataLoader opens the
    file itself. levels, dtype: see `DescribedRows`.
    Raises what `open_store` and `DescribedRows` raise, and StoreError in a worker if the store was replaced meanwhile.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, levels: Sequence[int] | None = None, dtype: str | None = None
    ) -> None:
        self._about = (absolute(path), levels, dtype)
        self._rows = DescribedRows(open_store(path), levels, dtype)
        self._made_with = (self._rows.store.recipe_hash, len(self._rows.store), self._rows.count)
        done = np.asarray(self._rows.store.status[:]) == Status.DONE
        self._places = np.flatnonzero(done) if self._rows.failed else None  # row numbers, where some were left out

    @property
    def dim(self) -> int:
        """Length of a descriptor."""
        return self._rows.dim

    def __len__(self) -> int:
        return self._rows.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, str]]:
        """Several at once, as a DataLoader asks for a batch."""
        wanted = np.asarray(indices, np.int64)
        if len(wanted) and not (-len(self) <= wanted.min() and wanted.max() < len(self)):
            raise IndexError(f"expected indices below {len(self)}, found {indices}")
        wanted = np.where(wanted < 0, wanted + len(self), wanted)
        rows = wanted if self._places is None else self._places[wanted]
        values = torch.from_numpy(np.array(self._rows.values(rows)))
        names = self._rows.store.names
        return [(value, names[row : row + 1][0]) for value, row in zip(values, rows.tolist(), strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_rows"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        path, levels, dtype = self._about
        self._rows = DescribedRows(open_store(path), levels, dtype)
        if self._made_with != (self._rows.store.recipe_hash, len(self._rows.store), self._rows.count):
            raise StoreError(f"{path}: was replaced or extended after this dataset was made; make it again")
