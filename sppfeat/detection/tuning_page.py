"""The page of a detector that was tuned with its network: loss and held-out mAP by epoch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sppfeat.report import Origin, write_learning_page

if TYPE_CHECKING:
    from sppfeat.detection.tune_detector import TunedDetector


def write_detector_page(path: Path, done: TunedDetector, *, command: str = "") -> None:
    """Write one self-contained page. command: what made it.

    See `sppfeat.report.check_page`. Raises ReportError.
    """
    recipe = done.recipe
    levels, scales = (", ".join(map(str, each)) for each in (recipe.levels, recipe.scales))
    about = (
        f"{sum(done.positives.values())} objects of {len(done.classes)} classes in {done.images} images to learn from "
        f"and {done.held_out} held out; layer {recipe.layer}, levels {levels}, scales {scales}; "
        f"{done.options.described()}."
    )
    title = f"Tuning a detector on {recipe.backbone}"
    write_learning_page(
        path,
        title,
        about,
        "mAP on held-out images",
        done.history,
        done.best,
        done.diverged,
        origin=Origin("the network before tuning", recipe),
        command=command,
    )
