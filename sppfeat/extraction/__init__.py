"""From a source of images to a store: the plan, the pipeline, and the processes that fill rows."""

from __future__ import annotations

from sppfeat.extraction.calibration import Calibration, calibrate, calibrated_as
from sppfeat.extraction.pipeline import Described, Describer
from sppfeat.extraction.run import Extraction, extract_folder
from sppfeat.extraction.sharded import ShardOptions

__all__ = [
    "Calibration",
    "Described",
    "Describer",
    "Extraction",
    "ShardOptions",
    "calibrate",
    "calibrated_as",
    "extract_folder",
]
