"""Engines that compute feature maps, PyTorch, OpenVINO or SIFT, on the devices of this machine."""

from __future__ import annotations

from sppfeat.engines.calibrated import is_calibrated, keep_calibrated
from sppfeat.engines.devices import resolve_device
from sppfeat.engines.engine import (
    Engine,
    ImageRefusedError,
    ResizingEngine,
    StoringEngine,
    choose_engine,
    engine_device,
    engine_of,
    load_engine,
    resizes_images,
    stores_rows,
)

__all__ = [
    "Engine",
    "ImageRefusedError",
    "ResizingEngine",
    "StoringEngine",
    "choose_engine",
    "engine_device",
    "engine_of",
    "is_calibrated",
    "keep_calibrated",
    "load_engine",
    "resizes_images",
    "resolve_device",
    "stores_rows",
]
