"""The layers of a network by name, however it is cut."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sppfeat.backbones.description import Layer
from sppfeat.errors import UsageError, unknown_name


class NamedLayers(ABC):
    """A network in evaluation mode that can be cut at its layers."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def layers(self) -> list[Layer]:
        """Every layer with a feature map of more than one cell, in the order of the computation."""

    @abstractmethod
    def default_layer(self) -> str:
        """The layer that is pooled if none is named. Raises BackboneError if there is none."""

    @abstractmethod
    def weights_of(self, layers: Sequence[str]) -> dict[str, torch.Tensor]:
        """The weights that these layers depend on, by name."""

    @abstractmethod
    def modules_of(self, layers: Sequence[str]) -> list[str]:
        """The modules that these layers depend on, by name, in the order in which they begin to compute."""

    @abstractmethod
    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Replace the weights of these names."""

    @abstractmethod
    def cut(self, layers: Sequence[str]) -> nn.Module:
        """A module whose output is the list of these layers' feature maps, without what comes after them."""

    def layer(self, name: str) -> Layer:
        """The layer of that name. Raises UsageError with the nearest names if there is none."""
        layers = self.layers()
        for layer in layers:
            if layer.name == name:
                return layer
        raise UsageError(f"backbone {self.name}: " + unknown_name("layer", name, [layer.name for layer in layers]))


def without_values(network: nn.Module) -> nn.Module:
    """A copy whose tensors are shapes without values: running it takes no arithmetic and no memory."""
    empty: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in network.parameters()}
    empty |= {id(b): b.to("meta") for b in network.buffers()}
    return copy.deepcopy(network, empty)
