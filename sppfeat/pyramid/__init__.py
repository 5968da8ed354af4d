"""Spatial pyramid pooling of whole feature maps and of windows on them."""

from __future__ import annotations

from sppfeat.pyramid.cpu import pool_maps, pool_windows

__all__ = ["pool_maps", "pool_windows"]
