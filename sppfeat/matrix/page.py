"""The page of a matrix: one table, the best of each column marked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sppfeat.matrix.running import Cell
from sppfeat.report import write_page


def write_matrix_page(path: Path, cells: Sequence[Cell]) -> None:
    """Write one self-contained page. See `sppfeat.report.check_page`. Raises ReportError."""
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
    write_page(path, "matrix.html", {"data": data, "rows": rows, "best": best})
