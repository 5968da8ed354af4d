"""The page of near-duplicates: groups with thumbnails, and images that show a part of another."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Final

from sppfeat.report import Origin, common_folder, shown_row, write_page
from sppfeat.retrieval.crops import Crops
from sppfeat.retrieval.duplicates import Duplicates

# With more thumbnails, a phone could not open the page.
PAGE_GROUPS: Final = 200
PAGE_MEMBERS: Final = 48


def write_duplicates_page(path: Path, found: Duplicates, crops: Crops | None = None, *, command: str = "") -> None:
    """Write the groups, and the crops if any were looked for, with thumbnails to one HTML file. command: what made it.

    Raises ReportError.
    """
    show = functools.partial(shown_row, path, found.root, orientation=found.recipe.orientation)
    groups = [
        {
            "members": [(one, show(one.name)) for one in group[:PAGE_MEMBERS]],
            "count": len(group),
            "lowest": min(one.score for one in group),
        }
        for group in found.groups[:PAGE_GROUPS]
    ]
    best = sorted(crops.found if crops is not None else [], key=lambda one: -one.score)[:PAGE_GROUPS]
    parts = [
        {
            "crop": one,
            "part": show(one.part.name),
            "whole": show(one.whole.name, mark=one.box),
        }
        for one in best
    ]
    names = [one.name for group in found.groups[:PAGE_GROUPS] for one in group[:PAGE_MEMBERS]]
    names += [one.name for crop in best for one in (crop.part, crop.whole)]
    write_page(
        path,
        "duplicates.html",
        {"found": found, "groups": groups, "crops": crops, "parts": parts, "folder": common_folder(names)},
        origins=[Origin(found.store, found.recipe, found.weights_sha256)],
        command=command,
    )
