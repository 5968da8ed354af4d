"""How a network is tuned on classes: the options, checked."""

from __future__ import annotations

from dataclasses import dataclass

from sppfeat.errors import UsageError
from sppfeat.recipe import Recipe
from sppfeat.training import LearningOptions


@dataclass(frozen=True, kw_only=True)
class TuningOptions(LearningOptions):
    """How a network is tuned on classes; see `LearningOptions`.

    scales: short sides, one after the other from epoch to epoch, as SPP-net was trained (He, Zhang, Ren, Sun 2015,
    section 3.1); the network and the pyramid stay the same. The head starts from logistic regression on the
    descriptors of the untuned network. Raises UsageError, naming the field, for an invalid value.
    """

    scales: tuple[int, ...] = (192, 224, 256)

    def __post_init__(self) -> None:
        super().__post_init__()
        Recipe(scales=self.scales)
        if not self.epochs:
            raise UsageError("epochs must be from 1, found 0: it is the network that is tuned")
        if not all(isinstance(scale, int) for scale in self.scales):
            raise UsageError(f"scales must be in pixels, found {','.join(map(str, self.scales))}")

    @property
    def test_scale(self) -> int:
        """The scale that held-out images are seen at: the middle one."""
        return sorted(self.scales)[len(self.scales) // 2]

    def scale_of(self, epoch: int) -> int:
        """The scale of an epoch, from 1."""
        return self.scales[(epoch - 1) % len(self.scales)]
