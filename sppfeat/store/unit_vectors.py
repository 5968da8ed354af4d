"""The described rows of a store as vectors of length 1, so that an inner product is a cosine; read block by block."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from sppfeat.errors import StoreError, UsageError
from sppfeat.images import Item, is_there, item_at, name_to_path
from sppfeat.machine import available_memory
from sppfeat.store.reading import Status, Store, require_complete
from sppfeat.store.row_names import Box, split_row_name

# Of float32 values in a block: large enough for matrix products at full speed, small compared with everything else.
BLOCK_BYTES: Final = 1 << 25
# The part of this process's memory for rows that are read again and again; scores and sorting need the rest.
KEPT_PART: Final = 0.4


class Projection(Protocol):
    """What makes vectors shorter: whitening, see `sppfeat.retrieval`."""

    @property
    def dim(self) -> int:
        """Length of a projected vector."""

    def apply(self, units: np.ndarray) -> np.ndarray:
        """[N, dim] float32 unit vectors of units [N, D]."""


@dataclass(frozen=True)
class UnitRows:
    """The described rows of a store, in its order: normalized, and if there is a projection, projected and normalized.

    Only names and row numbers are kept in memory, also of a folder; values are read from the file on demand.
    rows: [N] their rows in the store. names: [N]. dim: length of a vector, after projection. kept: [N, dim] float32,
    only after `in_memory`.
    """

    store: Store
    rows: np.ndarray
    names: list[str]
    projection: Projection | None = None
    kept: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def dim(self) -> int:
        """Length of a vector, after projection."""
        return self.store.dim if self.projection is None else self.projection.dim

    def take(self, which: slice | np.ndarray) -> np.ndarray:
        """[n, dim] float32, for positions among these rows. Reads the full descriptors at once: for many projected
        rows use `gather`. Raises StoreError for values that are not finite.
        """
        if self.kept is not None:
            return np.array(self.kept[which])
        rows = self.rows[which]
        # A slice of the file is read in one go; gathering a list of rows takes twice the time.
        contiguous = len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all()
        values = self.store.descriptors[rows[0] : rows[-1] + 1] if contiguous else self.store.descriptors[rows]
        try:
            units = to_units(values)
        except UsageError as error:
            raise StoreError(f"{self.store.place}: {error}; `sppfeat inspect --verify` names the rows") from None
        return units if self.projection is None else self.projection.apply(units)

    def blocks(self, which: np.ndarray | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Every row, or those at the ascending positions `which`, in blocks: first position, and [n, dim] float32."""
        count = len(self) if which is None else len(which)
        size = block_rows(max(self.dim, self.store.dim))
        for start in range(0, count, size):
            part = slice(start, min(start + size, count))
            yield start, self.take(part if which is None else which[part])

    def gather(self, which: np.ndarray) -> np.ndarray:
        """[n, dim] float32, for ascending positions; read and projected block by block."""
        values = np.empty((len(which), self.dim), np.float32)
        for start, block in self.blocks(which):
            values[start : start + len(block)] = block
        return values

    def in_memory(self) -> UnitRows:
        """These rows, read and projected once; or unchanged, if they need more than KEPT_PART of the memory."""
        if self.kept is not None or 4 * len(self) * self.dim > KEPT_PART * available_memory():
            return self
        return dataclasses.replace(self, kept=self.gather(np.arange(len(self))))

    def sample(self, count: int, seed: int) -> np.ndarray:
        """Ascending positions of `count` random rows, or of all if there are fewer."""
        if count >= len(self):
            return np.arange(len(self))
        return np.sort(np.random.default_rng(seed).choice(len(self), count, replace=False))

    def only(self, keep: np.ndarray) -> UnitRows:
        """The rows at these positions."""
        names = [self.names[at] for at in keep]
        kept = None if self.kept is None else self.kept[keep]
        return UnitRows(self.store, self.rows[keep], names, self.projection, kept)


def unit_rows(store: Store, projection: Projection | None = None) -> UnitRows:
    """The described rows of a finished store. Failed rows are left out.

    Raises StoreError for a store with pending rows, and for one without a described row.
    """
    require_complete(store)
    if not store.counts()["done"]:
        raise StoreError(f"{store.place}: expected described images, found {len(store)}, all of them failed")
    rows = np.flatnonzero(store.status == Status.DONE)
    names = list(store.names) if len(rows) == len(store) else [store.names[row] for row in rows.tolist()]
    return UnitRows(store, rows, names, projection)


def to_units(values: np.ndarray) -> np.ndarray:
    """A new array [N, D] float32 of the rows [N, D], each divided by its length; rows of zeros stay zeros.

    Raises UsageError for values that are not finite.
    """
    units = values.astype(np.float32)
    return normalize_rows(units)


def normalize_rows(rows: np.ndarray) -> np.ndarray:
    """The same as `to_units`, in place, for float32 rows."""
    with np.errstate(over="ignore"):
        squares = np.einsum("nd,nd->n", rows, rows)
    odd = np.flatnonzero(~((squares > 1e-30) & (squares < 1e30)))
    if len(odd):
        # Squares that overflow or underflow float32: scale the largest value of such a row to 1 first.
        largest = np.abs(rows[odd]).max(1, initial=0)
        if not np.isfinite(largest).all():
            raise UsageError(f"expected finite values, found {int((~np.isfinite(largest)).sum())} rows with others")
        largest[largest == 0] = 1
        rows[odd] /= largest[:, None]
        squares[odd] = np.einsum("nd,nd->n", rows[odd], rows[odd])
        squares[squares == 0] = 1
    rows /= np.sqrt(squares)[:, None]
    return rows


def block_rows(dim: int) -> int:
    """The number of float32 rows of length `dim` in a block."""
    return max(1, BLOCK_BYTES // (4 * dim))


def item_of(root: str, name: str) -> tuple[Item, Box | None]:
    """The image that a row was made from, to be opened, and its window if the row has one; see `item_at`."""
    image, window = split_row_name(name)
    if window is None or is_there(root, name):  # an image may be named like a window
        return item_at(root, name), None
    return item_at(root, image), window


def image_of(root: str, name: str) -> tuple[str, Box | None]:
    """Where the image is that a row was made from, and its window if the row has one; no archive is opened."""
    path = name_to_path(root, name)
    image, window = split_row_name(name)
    if window is None or os.path.lexists(path):  # an image may be named like a window
        return path, None
    return name_to_path(root, image), window


def check_same_recipe(first: Store, second: Store) -> None:
    """Raise StoreError, with the fields that differ, unless the descriptors of two stores are comparable."""
    if first.recipe_hash == second.recipe_hash and first.dim == second.dim:
        return
    names = short_names(first.place, second.place)
    weights, dims = (first.weights_sha256, second.weights_sha256), (first.dim, second.dim)
    found = "; ".join(first.recipe.differences(second.recipe, names, weights=weights, dims=dims)) or "recipe_hash"
    raise StoreError(f"{second.place}: was made with another recipe than {first.place} ({found})")


def short_names(first: str, second: str) -> tuple[str, str]:
    """The last parts of two places, or the places themselves where these are the same."""
    one, other = (os.path.basename(place.rstrip("/")) for place in (first, second))
    return (one, other) if one != other else (first, second)
