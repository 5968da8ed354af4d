"""The page of a retrieval evaluation: its figures, how the queries' average precisions spread, and the worst queries
with their first neighbors."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from sppfeat.report import Origin, common_folder, plot_counts, shown_row, write_page
from sppfeat.retrieval.evaluation import Retrieval, percent

BARS_SHOWN: Final = 24
_EDGES: Final = tuple(range(0, 101, 10))  # of average precisions, in percent


def write_retrieval_page(path: Path, done: Retrieval, *, command: str = "") -> None:
    """Write one self-contained page. command: what made it.

    See `sppfeat.report.check_page`. Raises ReportError.
    """
    values = sorted(done.average_precisions.items(), key=lambda one: one[1])
    below = [one for one in values if one[1] < 100 - 1e-9]
    counts, _ = np.histogram([value for _, value in values], _EDGES)
    turned = done.recipe.orientation
    hard = [
        {
            "query": one,
            "image": shown_row(path, done.queries_root, one.name, orientation=turned),
            "hits": [(shown_row(path, done.gallery_root, name, orientation=turned), right) for name, right in one.hits],
        }
        for one in done.hardest
    ]
    write_page(
        path,
        "retrieval.html",
        {
            "done": done,
            "figures": percent(done),
            "spread": plot_counts(counts.tolist(), _EDGES, of="queries", unit=" %"),
            "bars": below[:BARS_SHOWN],
            "below_all": len(below),
            "perfect": [name for name, _ in values[len(below) :]],
            "hard": hard,
            "asked_folder": common_folder(done.average_precisions),
            "folder": common_folder(name for one in done.hardest for name, _ in one.hits),
        },
        origins=[Origin(done.store, done.recipe, done.weights_sha256)],
        command=command,
    )
