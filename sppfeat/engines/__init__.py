"""Engines that compute feature maps, PyTorch, OpenVINO or SIFT, on the devices of this machine."""

from __future__ import annotations

from sppfeat.engines.devices import resolve_device
from sppfeat.engines.engine import (
    Engine,
    ImageRefusedError,
    choose_engine,
    engine_device,
    engine_of,
    load_engine,
)

__all__ = [
    "Engine",
    "ImageRefusedError",
    "choose_engine",
    "engine_device",
    "engine_of",
    "load_engine",
    "resolve_device",
]
