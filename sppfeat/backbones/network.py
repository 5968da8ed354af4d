"""A network by its recipe: its description at once, where one is kept, and the network itself when needed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from sppfeat.backbones.description import Description, keep_description, read_description
from sppfeat.recipe import Recipe

if TYPE_CHECKING:
    from sppfeat.backbones.backbone import Backbone


class Network:
    """A network by its recipe. Raises BackboneError and UsageError, as `load_backbone` does, when it is looked at.

    note: is told, at most once, what a wait of seconds is that a machine has the first time alone.
    """

    def __init__(self, recipe: Recipe, note: Callable[[str], None] | None = None) -> None:
        self._asked = recipe
        self._note = note

    @functools.cached_property
    def description(self) -> Description:
        """The network as plain data; building it is only needed the first time on a machine."""
        if (kept := read_description(self._asked)) is not None:
            return kept
        self.note_preparing()
        return self.backbone.description

    def note_preparing(self) -> None:
        """Say that what follows prepares the network, unless that was said: describing and converting are one wait."""
        if self._note is not None:
            note, self._note = self._note, None
            note(f"preparing {self._asked.backbone} for this processor, once")

    @functools.cached_property
    def backbone(self) -> Backbone:
        """The network itself, on the CPU: takes seconds, and imports torch."""
        from sppfeat.backbones.backbone import load_backbone

        built = load_backbone(self._asked)
        keep_description(self._asked, built.description)
        return built
