"""Pretrained networks and vocabularies of SIFT: the registry, weights, layers, and the geometry of feature maps."""

from __future__ import annotations

from sppfeat.backbones.description import Description, Layer, network_versions
from sppfeat.backbones.geometry import Geometry
from sppfeat.backbones.network import Network
from sppfeat.backbones.sift import PATCH as SIFT_PATCH
from sppfeat.backbones.sift import dense_sift, grid_size, import_cv2
from sppfeat.backbones.vocabulary import MAX_WORDS, Vocabulary, open_vocabulary, save_vocabulary

__all__ = [
    "Description",
    "Geometry",
    "Layer",
    "MAX_WORDS",
    "Network",
    "SIFT_PATCH",
    "Vocabulary",
    "dense_sift",
    "grid_size",
    "import_cv2",
    "network_versions",
    "open_vocabulary",
    "save_vocabulary",
]
