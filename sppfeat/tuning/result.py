"""What tuning gives."""

from __future__ import annotations

from dataclasses import dataclass

from sppfeat.recipe import Recipe
from sppfeat.training import Epoch
from sppfeat.tuning.options import TuningOptions


@dataclass(frozen=True)
class Tuned:
    """A run of `tune`.

    file: of the tuned weights, which is written at the end; None until then. recipe: of the network that was tuned.
    classes: names. images: trained on; held_out: images that the best epoch was chosen by. failed: reasons by name.
    history: by epoch, 0 is the untuned network. best: number of the epoch whose weights are kept. diverged: why the
    run ended early, else None. weights_sha256: of the tuned weights.
    """

    file: str | None
    recipe: Recipe
    options: TuningOptions
    classes: list[str]
    images: int
    held_out: int
    failed: dict[str, str]
    history: list[Epoch]
    best: int
    diverged: str | None
    weights_sha256: str | None
    seconds: float
    peak_bytes: int
