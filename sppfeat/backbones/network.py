"""A network by its recipe: its description at once, if it is cached, and the network itself when needed."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from sppfeat.backbones.description import Description, keep_description, read_description
from sppfeat.recipe import Recipe

if TYPE_CHECKING:
    from sppfeat.backbones.backbone import Backbone


class Network:
    """A network by its recipe. Its properties raise BackboneError and UsageError, as `load_backbone` does."""

    def __init__(self, recipe: Recipe) -> None:
        self._asked = recipe

    @functools.cached_property
    def description(self) -> Description:
        """The network as plain data; only the first use on a machine builds the network."""
        return read_description(self._asked) or self.backbone.description

    @functools.cached_property
    def backbone(self) -> Backbone:
        """The network itself, on the CPU: takes seconds, and imports torch."""
        from sppfeat.backbones.backbone import load_backbone

        built = load_backbone(self._asked)
        keep_description(self._asked, built.description)
        return built
