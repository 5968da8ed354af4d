"""A network by its recipe: its description at once, if it is cached, and the network itself when needed."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from sppfeat.backbones.description import (
    Description,
    check_backbone,
    keep_description,
    read_description,
    weights_file_of,
)
from sppfeat.backbones.vocabulary import Vocabulary, describe_words, open_vocabulary
from sppfeat.errors import BackboneError, ModelError, one_line
from sppfeat.recipe import SIFT_BOW, Recipe

if TYPE_CHECKING:
    from sppfeat.backbones.backbone import Backbone

_log = logging.getLogger(__name__)


class Network:
    """A network by a recipe of one backbone. Its properties raise BackboneError and UsageError, as `load_backbone`.

    What takes seconds, and only the first time on a machine, is logged before it begins, at level INFO.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._asked = recipe
        # One recipe for each layer; the only one of a recipe that leaves the layer to the backbone.
        self._of_layers = [replace(recipe, layer=layer) for layer in recipe.layers or (None,)]
        self._told = False

    @functools.cached_property
    def descriptions(self) -> tuple[Description, ...]:
        """Each layer of the network as plain data; only the first use on a machine builds the network."""
        if self._asked.backbone == SIFT_BOW:
            return tuple(describe_words(one, self.vocabulary) for one in self._of_layers)
        kept = [read_description(one) for one in self._of_layers]
        found = tuple(one for one in kept if one is not None)
        if len(found) == len(kept):
            return found
        check_backbone(self._asked.backbone)
        self.log_preparing()
        return self.backbone.descriptions

    @property
    def recipe(self) -> Recipe:
        """The recipe that all layers have in common, filled in."""
        return self.descriptions[0].recipe

    def log_preparing(self) -> None:
        """Log that the network is prepared, once: describing and converting it are one wait."""
        if not self._told:
            self._told = True
            _log.info("preparing %s for this processor, once", self._asked.backbone)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The words of backbone sift-bow, which is no network."""
        if self._asked.backbone != SIFT_BOW:
            raise BackboneError(f"backbone {self._asked.backbone}: has no vocabulary: expected {SIFT_BOW}")
        try:
            return open_vocabulary(self._asked.weights)
        except ModelError as error:
            raise BackboneError(f"backbone {SIFT_BOW}: {error}") from None

    @functools.cached_property
    def backbone(self) -> Backbone:
        """The network itself, on the CPU: takes seconds, and imports torch."""
        if self._asked.backbone == SIFT_BOW:
            raise BackboneError(f"backbone {SIFT_BOW}: is no network: expected one, for PyTorch")
        try:
            from sppfeat.backbones.backbone import load_backbone
        except (ImportError, OSError, MemoryError) as error:
            raise BackboneError(f"PyTorch could not be imported: {one_line(error)}") from None
        weights_file = weights_file_of(self._asked)
        built = load_backbone(self._asked)
        for asked, found in zip(self._of_layers, built.descriptions, strict=True):
            keep_description(asked, found, weights_file)
        before = self.__dict__.get("descriptions", built.descriptions)
        for described, found in zip(before, built.descriptions, strict=True):
            if described.weights_sha256 != found.weights_sha256:
                # Downloaded weights are described without their file, which may have been replaced.
                raise BackboneError(
                    f"backbone {self._asked.backbone}: its weights have changed since they were described "
                    f"({described.weights_sha256[:12]} then, {found.weights_sha256[:12]} now): "
                    "run the command again"
                )
        return built
