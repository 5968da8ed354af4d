"""Networks tuned on a user's own classes, through the pyramid, at several sizes."""

from __future__ import annotations

from sppfeat.tuning.options import TuningOptions
from sppfeat.tuning.page import write_tuning_page
from sppfeat.tuning.result import Tuned

__all__ = ["Tuned", "TuningOptions", "write_tuning_page"]
