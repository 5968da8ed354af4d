"""The page of a network that was tuned: loss and held-out quality by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sppfeat.report.pages import Origin, write_page
from sppfeat.report.plots import plot_line
from sppfeat.training import Epoch


def write_learning_page(
    path: Path,
    title: str,
    about: str,
    measure: str,
    history: Sequence[Epoch],
    best: int,
    diverged: str | None,
    *,
    origin: Origin,
    command: str = "",
) -> None:
    """Write one self-contained page. measure: what `Epoch.held_out` is. about: a sentence on images and options.

    best: number of the epoch that was kept. diverged: why the run ended early, else None. origin, command: see
    `write_page`. See `check_page`. Raises ReportError.
    """
    ticks = [(float(one.number), str(one.number)) for one in history]
    ticks = ticks[:: max(1, len(ticks) // 10)]
    losses = [(float(one.number), one.loss) for one in history if one.loss is not None]
    values = [(float(one.number), one.held_out) for one in history if one.held_out is not None]
    write_page(
        path,
        "learning.html",
        {
            "title": title,
            "about": about,
            "measure": measure,
            "history": history,
            "best": best,
            "diverged": diverged,
            "loss": plot_line(losses, ticks=[tick for tick in ticks if tick[0] > 0]) if losses else None,
            "held_out": plot_line(values, ticks=ticks, unit=" %") if values else None,
        },
        origins=[origin],
        command=command,
    )
