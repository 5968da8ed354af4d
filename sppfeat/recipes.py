"""Recipes by name: the best that were measured for each use, see benchmarks/results/accuracy.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from sppfeat.errors import UsageError, unknown_name
from sppfeat.recipe import Recipe


@dataclass(frozen=True)
class NamedRecipe:
    """changes: fields that differ from the default recipe. use: what the recipe is for."""

    changes: Mapping[str, Any]
    use: str


NAMED: Final[Mapping[str, NamedRecipe]] = MappingProxyType(
    {
        "fast": NamedRecipe({"scales": (160,), "levels": (3, 2, 1)}, "twice as fast, a quarter of the length"),
        "retrieval": NamedRecipe(
            {"backbone": "efficientnet_lite2", "scales": (288,)}, "search, also by a part of an image"
        ),
        "transfer": NamedRecipe(
            {"backbone": "efficientnet_lite0@320+efficientnet_lite1@256+efficientnet_lite2@288"},
            "classification at its best, by three networks",
        ),
        # Scored as pooled: there is nothing to normalize. See benchmarks/results/detection.md.
        "detection": NamedRecipe(
            {
                "scales": (480,),
                "levels": (3, 2, 1),
                "normalize": "none",
                "dtype": "float32",
                "max_pixels": 16_000_000,
            },
            "windows, and the default of detectors",
        ),
    }
)


def named_recipe(name: str, **changes: Any) -> Recipe:
    """The recipe of that name; changes: fields to replace. Raises UsageError for an unknown name or invalid values."""
    if name not in NAMED:
        raise UsageError(unknown_name("recipe", name, list(NAMED)))
    return Recipe(**{**NAMED[name].changes, **changes})
