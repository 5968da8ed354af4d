"""Some rows, parts and levels of a store's descriptors, read block by block and never copied whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from sppfeat.errors import UsageError, unknown_name
from sppfeat.pyramid import level_weights
from sppfeat.recipe import SIFT_BOW, Part, Recipe
from sppfeat.store.reading import Store


class Matrix(Protocol):
    """Rows [N, D] that are read by index: an array, a memory map, or a view of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any, /) -> np.ndarray: ...


class DescriptorView:
    """Rows of a store, in the order given, reduced to some parts and levels; indexed like an array, by a slice or rows.

    rows: [N], None: all. levels: some of the recipe's, in any order; None: all. only: backbones and layers whose parts
    are taken, see `Recipe.parts`; None: all. A part that loses levels is normalized again, and the reduced descriptor
    equals, up to the store's rounding, that of a recipe with these levels and parts alone: `recipe`, with the weights
    `weights_sha256`.
    Raises UsageError for levels and parts that the store does not have, and for several scales that were fused by mean
    or max after each was normalized over all levels.
    """

    def __init__(
        self,
        store: Store,
        rows: np.ndarray | None = None,
        levels: Sequence[int] | None = None,
        only: Sequence[str] | None = None,
    ) -> None:
        self._descriptors = store.descriptors
        # All rows in order are read in slices, which needs no gathering.
        self._rows = None if rows is not None and np.array_equal(rows, np.arange(len(store))) else rows
        self.recipe, self.weights_sha256 = store.recipe, store.weights_sha256
        self._parts: list[list[tuple[slice, np.float32]]] | None = None
        self._again = levels is not None and tuple(levels) != store.recipe.levels
        dim = store.dim
        if self._again or only is not None:
            parts: Sequence[Part] = store.recipe.parts(store.dim)
            if only is not None:
                parts, self.recipe, self.weights_sha256 = _some_parts(store, parts, only)
            if self._again:
                assert levels is not None
                _check_levels(store, self.recipe, levels)
                self.recipe = dataclasses.replace(self.recipe, levels=tuple(levels))
            places = _places(store.recipe, self.recipe.levels)
            self._parts = [
                [
                    (
                        slice(part.start + a * part.channels, part.start + b * part.channels),
                        _factor(self.recipe, part, store.recipe.levels, level),
                    )
                    for level, (a, b) in zip(self.recipe.levels, places, strict=True)
                ]
                for part in parts
            ]
            dim = self.recipe.bins * sum(part.channels for part in parts)
        self.shape = (len(store) if rows is None else len(rows), dim)

    def __getitem__(self, index: slice | np.ndarray, /) -> np.ndarray:
        """[B, D] rows, in the store's type, or float32 if reduced."""
        block: np.ndarray = self._descriptors[index if self._rows is None else self._rows[index]]
        if self._parts is None:
            return block
        reduced = np.empty((len(block), self.shape[1]), np.float32)
        start = 0
        for places in self._parts:
            end = start + sum(place.stop - place.start for place, _ in places)
            part = reduced[:, start:end]
            levels = [
                block[:, place] if factor == 1 else np.multiply(block[:, place], factor, dtype=np.float32)
                for place, factor in places
            ]
            np.concatenate(levels, 1, out=part, casting="same_kind")
            if self._again and self.recipe.normalize != "none":
                part /= np.maximum(np.sqrt(np.square(part).sum(1, keepdims=True)), 1e-12)  # zeros stay zeros
            start = end
        return reduced


def _factor(recipe: Recipe, part: Part, before: Sequence[int], level: int) -> np.float32:
    """What the values of a level are multiplied by, because its weight depends on the levels beside it; usually 1."""
    if part.backbone != SIFT_BOW or recipe.pooling != "avg":
        return np.float32(1)
    factor = level_weights(recipe.levels)[level] / level_weights(before)[level]
    return np.float32(factor**0.5 if recipe.normalize == "signed-sqrt-l2" else factor)


def _check_levels(store: Store, taken: Recipe, levels: Sequence[int]) -> None:
    held = store.recipe.levels
    if lacking := [level for level in levels if level not in held]:
        raise UsageError(
            f"{store.place}: expected levels among its {','.join(map(str, held))}, found {','.join(map(str, lacking))}"
        )
    scales = max(len(branch.scales) for branch in taken.branches())
    if scales > 1 and store.recipe.fuse != "concat" and store.recipe.normalize != "none":
        raise UsageError(
            f"{store.place}: its {scales} scales were fused by {store.recipe.fuse} over all levels, "
            "which cannot be separated; extract again with these levels"
        )


def _some_parts(store: Store, parts: Sequence[Part], only: Sequence[str]) -> tuple[list[Part], Recipe, str]:
    """The parts of some backbones and layers, with the recipe and the weights of these alone."""
    known = list(dict.fromkeys(name for part in parts for name in (part.backbone, part.layer)))
    for name in only:
        if name not in known:
            raise UsageError(f"{store.place}: " + unknown_name("part", name, known))
    chosen = [part for part in parts if part.backbone in only or part.layer in only]
    if len(chosen) == len(parts):
        return chosen, store.recipe, store.weights_sha256
    branches, hashes = store.recipe.branches(), iter(store.weights_sha256.split("+"))
    texts = store.recipe.backbone.split("+")
    kept, weights = [], []
    for text, branch in zip(texts, branches, strict=True):
        taken = {layer: branch.backbone in only or layer in only for layer in branch.layers}
        weights += [each for is_taken, each in zip(taken.values(), hashes, strict=False) if is_taken]
        if any(taken.values()):
            layer = ",".join(layer for layer, is_taken in taken.items() if is_taken)
            kept.append((text, dataclasses.replace(branch, layer=layer)))
    recipe = kept[0][1]
    if len(kept) > 1:
        recipe = dataclasses.replace(
            store.recipe,
            backbone="+".join(text for text, _ in kept),
            layer="+".join(branch.layer or "" for _, branch in kept),
            weights="+".join(branch.weights for _, branch in kept),
            channels=None,
        )
    channels = tuple(part.channels for part in chosen) if len(kept) > 1 or len(recipe.layers) > 1 else None
    return chosen, dataclasses.replace(recipe, channels=channels), "+".join(weights)


def _places(recipe: Recipe, levels: Sequence[int]) -> list[tuple[int, int]]:
    """The first and one-past-last bins of a pyramid that belong to each of some levels."""
    ends = np.cumsum([level * level for level in recipe.levels])
    place = {level: (int(end) - level * level, int(end)) for level, end in zip(recipe.levels, ends, strict=True)}
    return [place[level] for level in levels]
