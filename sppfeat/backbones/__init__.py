"""Pretrained networks: the registry, weights, cutting a network at a layer, and the geometry of its feature maps."""

from __future__ import annotations

from sppfeat.backbones.description import Description, network_versions
from sppfeat.backbones.geometry import Geometry
from sppfeat.backbones.network import Network

__all__ = ["Description", "Geometry", "Network", "network_versions"]
