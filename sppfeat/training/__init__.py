"""Gradient descent that survives anything: schedules, checkpoints, the best state so far."""

from __future__ import annotations

from sppfeat.training.options import LearningOptions

__all__ = ["LearningOptions"]
