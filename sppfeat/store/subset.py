"""Some rows and levels of a store's descriptors, read block by block and never copied whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from sppfeat.errors import UsageError
from sppfeat.recipe import Recipe
from sppfeat.store.reading import Store


class Matrix(Protocol):
    """Rows [N, D] that are read by index: an array, a memory map, or a view of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any, /) -> np.ndarray: ...


class DescriptorView:
    """Rows of a store, in the order given, reduced to some of its levels; indexed like an array, by a slice or rows.

    rows: [N], None: all. levels: some of the recipe's, in any order; None: all. A reduced descriptor is normalised
    again, and equals, up to the store's rounding, the descriptor of a recipe with these levels alone: `recipe`.
    Raises UsageError for levels that the store does not have, and for several scales that were fused by mean or max
    after each was normalised over all levels.
    """

    def __init__(self, store: Store, rows: np.ndarray | None = None, levels: Sequence[int] | None = None) -> None:
        self._descriptors = store.descriptors
        # All rows in order are read in slices, which needs no gathering.
        self._rows = None if rows is not None and np.array_equal(rows, np.arange(len(store))) else rows
        self._bins: list[slice] | None = None
        self.recipe = store.recipe
        if levels is not None and tuple(levels) != store.recipe.levels:
            self.recipe = _sliced_recipe(store, levels)
            self._bins = _places(store.recipe, self.recipe.levels)
            self._parts = len(store.recipe.scales) if store.recipe.fuse == "concat" else 1
            self._channels = store.dim // (self._parts * store.recipe.bins)
        dim = store.dim if self._bins is None else self._parts * self._channels * self.recipe.bins
        self.shape = (len(store) if rows is None else len(rows), dim)

    def __getitem__(self, index: slice | np.ndarray, /) -> np.ndarray:
        """[B, D] rows, in the store's type, or float32 if reduced."""
        block: np.ndarray = self._descriptors[index if self._rows is None else self._rows[index]]
        if self._bins is None:
            return block
        bins = block.reshape(len(block), self._parts, -1, self._channels)
        cut = np.concatenate([bins[:, :, place] for place in self._bins], 2, dtype=np.float32)
        if self.recipe.normalize != "none":
            length = np.sqrt(np.square(cut).sum((2, 3), keepdims=True))
            cut /= np.maximum(length, 1e-12)  # zeros stay zeros
        return cut.reshape(len(block), -1)


def _sliced_recipe(store: Store, levels: Sequence[int]) -> Recipe:
    held = store.recipe.levels
    if lacking := [level for level in levels if level not in held]:
        raise UsageError(
            f"{store.place}: expected levels among its {','.join(map(str, held))}, found {','.join(map(str, lacking))}"
        )
    if len(store.recipe.scales) > 1 and store.recipe.fuse != "concat" and store.recipe.normalize != "none":
        raise UsageError(
            f"{store.place}: its {len(store.recipe.scales)} scales were fused by {store.recipe.fuse} over all levels, "
            "which cannot be separated; extract again with these levels"
        )
    return dataclasses.replace(store.recipe, levels=tuple(levels))


def _places(recipe: Recipe, levels: Sequence[int]) -> list[slice]:
    """The slices of a pyramid's bins that belong to some levels."""
    ends = np.cumsum([level * level for level in recipe.levels])
    place = {level: slice(int(end) - level * level, int(end)) for level, end in zip(recipe.levels, ends, strict=True)}
    return [place[level] for level in levels]
