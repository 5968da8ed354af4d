"""Spatial pyramid pooling of whole feature maps and of windows on them."""

from __future__ import annotations

from sppfeat.pyramid.cpu import pool_maps, pool_windows
from sppfeat.pyramid.words import level_weights, pool_word_windows, pool_words

__all__ = ["level_weights", "pool_maps", "pool_windows", "pool_word_windows", "pool_words"]
