"""The page of a tuning run: loss and held-out accuracy by epoch."""

from __future__ import annotations

from pathlib import Path

from sppfeat.report import plot_line, write_page
from sppfeat.tuning.result import Tuned


def write_tuning_page(path: Path, done: Tuned) -> None:
    """Write one self-contained page. See `sppfeat.report.check_page`. Raises ReportError, MissingExtraError."""
    ticks = [(float(one.number), str(one.number)) for one in done.history]
    ticks = ticks[:: max(1, len(ticks) // 10)]
    losses = [(float(one.number), one.loss) for one in done.history if one.loss is not None]
    values = [(float(one.number), one.held_out) for one in done.history if one.held_out is not None]
    write_page(
        path,
        "tuning.html",
        {
            "done": done,
            "loss": plot_line(losses, ticks=[tick for tick in ticks if tick[0] > 0], unit="") if losses else None,
            "held_out": plot_line(values, ticks=ticks, unit=" %") if values else None,
        },
    )
