"""The page of a matrix: one table, the best of each column marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sppfeat.matrix.running import Cell
from sppfeat.recipe import Recipe
from sppfeat.report import Origin, write_page


def write_matrix_page(path: Path, cells: Sequence[Cell], recipes: Mapping[str, Recipe], *, command: str = "") -> None:
    """Write one self-contained page. recipes: by the names that cells have. command: what made it.

    See `sppfeat.report.check_page`. Raises ReportError.
    """
    data = list(dict.fromkeys((cell.data, cell.metric) for cell in cells))
    of = {(cell.recipe, cell.data): cell for cell in cells}
    best = {name: max(cell.value for cell in cells if cell.data == name) for name, _ in data}
    rows = []
    for recipe in dict.fromkeys(cell.recipe for cell in cells):
        mine = [of.get((recipe, name)) for name, _ in data]
        known = [cell for cell in mine if cell is not None]
        spent = sum(cell.seconds for cell in known)
        speed = sum(cell.described for cell in known) / spent if spent else None
        rows.append({"recipe": recipe, "values": known[0].values, "cells": mine, "speed": speed})
    origins = [Origin(name, recipe) for name, recipe in recipes.items()]
    write_page(path, "matrix.html", {"data": data, "rows": rows, "best": best}, origins=origins, command=command)
