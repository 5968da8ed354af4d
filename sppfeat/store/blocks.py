"""The described rows of a store in blocks, with their names: for export, and for programs that read a store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from sppfeat.errors import StoreError, UsageError, unknown_name
from sppfeat.recipe import DTYPES
from sppfeat.store.reading import Status, Store, require_complete
from sppfeat.store.subset import DescriptorView
from sppfeat.store.unit_vectors import block_rows

# Short descriptors are few bytes; their names are not.
MOST_ROWS: Final = 1 << 16


class Block(NamedTuple):
    """Some described rows: names [n], values [n, D], and image_size [n, 2], width and height of the upright image."""

    names: list[str]
    values: np.ndarray
    image_size: np.ndarray


class DescribedRows:
    """The described rows of a finished store, in its order, at some of its levels and in a type.

    levels: None: all; see `DescriptorView`. dtype: `float16` or `float32`; None: the store's own. Failed rows are left
    out. recipe: of the values. count: the number of rows. failed: of those left out. dim: length of a descriptor.
    block_rows: at most so many are in a block.
    Raises UsageError for unknown levels or an unknown type, and StoreError for a store with pending rows or without a
    described one.
    """

    def __init__(self, store: Store, levels: Sequence[int] | None = None, dtype: str | None = None) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise UsageError(unknown_name("dtype", dtype, DTYPES))
        self._view = DescriptorView(store, levels=levels)
        require_complete(store)
        self.store = store
        self.recipe = self._view.recipe
        self.dtype = np.dtype(dtype or store.recipe.dtype)
        self.dim = self._view.shape[1]
        counts = store.counts()
        self.count, self.failed = counts["done"], counts["failed"]
        self.block_rows = min(MOST_ROWS, block_rows(max(self.dim, store.dim)))
        if not self.count:
            raise StoreError(f"{store.place}: expected described images, found {len(store)}, all of them failed")

    def values(self, index: slice | np.ndarray) -> np.ndarray:
        """[n, D] the values of rows of the store. Raises StoreError if one is too large for the type."""
        found = self._view[index]
        if found.dtype == self.dtype:
            return found
        with np.errstate(over="ignore"):
            values = found.astype(self.dtype)
        if values.itemsize < found.itemsize and not np.isfinite(values).all():
            raise StoreError(
                f"{self.store.place}: expected values that are finite as {self.dtype}, found "
                f"{float(np.abs(found[~np.isfinite(values)]).max()):.3g}; choose float32"
            )
        return values

    def blocks(self) -> Iterator[Block]:
        """Every described row, in blocks whose memory does not depend on the number of rows."""
        for start in range(0, len(self.store), self.block_rows):
            part = slice(start, min(start + self.block_rows, len(self.store)))
            done = np.asarray(self.store.status[part]) == Status.DONE
            names, values, sizes = self.store.names[part], self.values(part), np.asarray(self.store.image_size[part])
            if not done.all():
                names = [name for name, keep in zip(names, done, strict=True) if keep]
                values, sizes = values[done], sizes[done]
            if len(names):
                yield Block(list(names), values, sizes)


def iter_blocks(store: Store, *, levels: Sequence[int] | None = None, dtype: str | None = None) -> Iterator[Block]:
    """The described rows of a finished store, block by block; see `DescribedRows`."""
    return DescribedRows(store, levels, dtype).blocks()


def to_numpy(
    store: Store, *, levels: Sequence[int] | None = None, dtype: str | None = None
) -> tuple[list[str], np.ndarray]:
    """The names [N] and the values [N, D] of a finished store's described rows, in memory; see `DescribedRows`."""
    rows = DescribedRows(store, levels, dtype)
    names: list[str] = []
    values = np.empty((rows.count, rows.dim), rows.dtype)
    for block in rows.blocks():
        values[len(names) : len(names) + len(block.names)] = block.values
        names += block.names
    return names, values
