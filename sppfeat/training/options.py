"""How networks are tuned: the options, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from sppfeat.errors import UsageError, unknown_name
from sppfeat.recipe import Recipe, RunOptions

OPTIMIZERS: Final = ("adamw", "sgd")
SCHEDULES: Final = ("cosine", "steps")
# float16 would need its losses scaled.
PRECISIONS: Final = ("float32", "bfloat16")
# Share of the steps in which the learning rate rises from zero.
WARM_UP: Final = 0.05
# Of the schedule `steps`: the rate falls to a tenth after this share of the steps, as Fast R-CNN's does.
_FALLS_AT: Final = 0.75


@dataclass(frozen=True, kw_only=True)
class LearningOptions:
    """How a network is tuned by gradient descent.

    epochs: passes over the images; 0: only heads are fitted, to the network as it is. learning_rate: at its highest,
    of the network; heads learn `head_rate` times as fast. scales: short sides in pixels, one after the other from epoch
    to epoch, as SPP-net was trained (He, Zhang, Ren, Sun 2015, section 3.1): the network and the pyramid stay the same;
    None: the recipe's.
    optimizer: `adamw` or `sgd` (momentum 0.9). schedule: `cosine`, or `steps` (a tenth after three quarters).
    from_layer: the first module that is tuned; None: all. clip: the longest gradient. held_out: share of the images
    that the best epoch is chosen by. checkpoint_minutes: between two checkpoints. seed: of all draws.
    precision: of the arithmetic on a GPU. Raises UsageError, naming the field, for an invalid value.
    """

    scales: tuple[int, ...] | None = None
    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-4
    head_rate: float = 10.0
    optimizer: str = "adamw"
    schedule: str = "cosine"
    weight_decay: float = 0.01
    from_layer: str | None = None
    clip: float = 1.0
    held_out: float = 0.1
    checkpoint_minutes: float = 5.0
    seed: int = 0
    device: str = "auto"
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name, low, high in (("epochs", 0, 10_000), ("batch_size", 1, 4096), ("seed", 0, (1 << 31) - 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise UsageError(f"{name} must be a whole number from {low} to {high}, found {value!r}")
        for name in ("learning_rate", "head_rate", "clip", "checkpoint_minutes"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} must be above 0, found {value!r}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UsageError(f"weight_decay must be at least 0, found {self.weight_decay!r}")
        if not 0 <= self.held_out <= 0.5:
            raise UsageError(f"held_out must be from 0 to 0.5, found {self.held_out!r}")
        for name, valid in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in valid:
                raise UsageError(unknown_name(name, str(getattr(self, name)), valid))
        if self.scales is not None:
            Recipe(scales=self.scales)
            if not all(isinstance(scale, int) for scale in self.scales):
                raise UsageError(f"scales must be in pixels, found {','.join(map(str, self.scales))}")
        RunOptions(device=self.device)

    def described(self) -> str:
        """The options that a reader of a page wants to know, in words."""
        scales = f" at scales {', '.join(map(str, self.scales))}, one per epoch," if self.scales else ""
        return (
            f"tuned from {self.from_layer or 'the first layer'} on{scales} by {self.optimizer}, learning rate "
            f"{self.learning_rate:g}, schedule {self.schedule}"
        )

    def rate(self, progress: float) -> float:
        """The learning rate as a share of the highest one, after a share of the steps from 0 to 1."""
        if progress < WARM_UP:
            return progress / WARM_UP
        if self.schedule == "steps":
            return 1.0 if progress < _FALLS_AT else 0.1
        return (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))) / 2
