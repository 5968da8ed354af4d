"""The page of a tuning run: loss and held-out accuracy by epoch."""

from __future__ import annotations

from pathlib import Path

from sppfeat.report import Origin, write_learning_page
from sppfeat.tuning.result import Tuned


def write_tuning_page(path: Path, done: Tuned, *, command: str = "") -> None:
    """Write one self-contained page. command: what made it.

    See `sppfeat.report.check_page`. Raises ReportError.
    """
    recipe, options = done.recipe, done.options
    levels = ", ".join(map(str, recipe.levels))
    about = (
        f"{done.images} images of {len(done.classes)} classes, {done.held_out} more held out; layer {recipe.layer}, "
        f"levels {levels}; {options.described()}."
    )
    title = f"Tuning {recipe.backbone}"
    write_learning_page(
        path,
        title,
        about,
        "Held-out images right",
        done.history,
        done.best,
        done.diverged,
        origin=Origin("the network before tuning", recipe),
        command=command,
    )
