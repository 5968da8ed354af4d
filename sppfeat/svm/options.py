"""How SVMs are trained: the options, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from sppfeat.errors import UsageError
from sppfeat.recipe import RunOptions

# vissl: the costs of VISSL's VOC 2007 benchmark (facebookresearch/vissl, eval_resnet_8gpu_transfer_voc07_svm.yaml).
# decades: one of these per decade: on L2-normalized descriptors the result changes little within a decade, and it takes
# half the time.
COST_GRIDS: Final = {
    "decades": (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0),
    "vissl": (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0),
}


@dataclass(frozen=True, kw_only=True)
class SvmOptions:
    """How SVMs are trained on a store.

    costs: one C, or a grid to choose from by 3-fold cross-validation. positive_weight: of a class's own rows
    relative to the rest. levels: of the stored pyramid, only: backbones and layers whose parts are used, None: all (see
    `sppfeat.store.subset`). seed: of all draws.
    shuffle: whether folds are drawn, or each takes the next images of a class in their order.
    Raises UsageError, naming the field, for an invalid value.
    """

    costs: tuple[float, ...] = COST_GRIDS["decades"]
    positive_weight: float = 1.0
    levels: tuple[int, ...] | None = None
    only: tuple[str, ...] | None = None
    seed: int = 0
    device: str = "cpu"
    shuffle: bool = True

    def __post_init__(self) -> None:
        for name, values in (("c", self.costs), ("positive_weight", (self.positive_weight,))):
            if not values or not all(np.isfinite(value) and value > 0 for value in values):
                raise UsageError(f"{name} must be above 0, found {','.join(map(str, values))}")
        if self.levels is not None and (not self.levels or len(set(self.levels)) != len(self.levels)):
            raise UsageError(f"levels must be different, found {','.join(map(str, self.levels)) or 'none'}")
        if self.only is not None and not (self.only and all(self.only)):
            raise UsageError(f"only must be names of backbones or layers, found {','.join(self.only) or 'none'!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise UsageError(f"seed must be a whole number from 0, found {self.seed!r}")
        RunOptions(device=self.device)
