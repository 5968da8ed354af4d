"""Gradient descent that resumes where it ended: schedules, checkpoints, the best state so far."""

from __future__ import annotations

from sppfeat.training.ahead import ahead
from sppfeat.training.epoch import Epoch
from sppfeat.training.options import LearningOptions

__all__ = ["Epoch", "LearningOptions", "ahead"]
