"""How a network is tuned on classes: the options, checked."""

from __future__ import annotations

from dataclasses import dataclass

from sppfeat.errors import UsageError
from sppfeat.training import LearningOptions


@dataclass(frozen=True, kw_only=True)
class TuningOptions(LearningOptions):
    """How a network is tuned on classes; see `LearningOptions`.

    The head starts from logistic regression on the descriptors of the untuned network. Raises UsageError, naming the
    field, for an invalid value.
    """

    scales: tuple[int, ...] = (192, 224, 256)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.epochs:
            raise UsageError("epochs must be at least 1, found 0: without any, the network is not tuned")

    @property
    def test_scale(self) -> int:
        """The scale that held-out images are seen at: the middle one."""
        return sorted(self.scales)[len(self.scales) // 2]

    def scale_of(self, epoch: int) -> int:
        """The scale of an epoch, from 1."""
        return self.scales[(epoch - 1) % len(self.scales)]
