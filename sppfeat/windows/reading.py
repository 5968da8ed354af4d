"""Windows read from files, and checked."""

from __future__ import annotations

import codecs
import csv
import io
import math
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from sppfeat.errors import UsageError, one_line
from sppfeat.files import decode_document, os_reason
from sppfeat.store import Box, window_text

COLUMNS: Final = ("name", "x1", "y1", "x2", "y2")


class _Window(msgspec.Struct):
    """An entry of a JSON list of windows; further keys are ignored."""

    name: str
    x1: float
    y1: float
    x2: float
    y2: float


def read_windows(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Windows [K, 4] float64 by image name, in the order of the file.

    CSV with the columns name,x1,y1,x2,y2, in any order; other columns are ignored. JSON: a list of objects with these
    keys, or an object from name to a list of [x1, y1, x2, y2]. Names are relative to the image folder, with `/`.
    Raises UsageError that names the line or entry for anything else, and for inverted windows.
    """
    path = os.fspath(path)
    kind = os.path.splitext(path)[1].lower()
    if kind not in (".csv", ".json"):
        raise UsageError(f"{path}: expected a file of windows, .csv or .json")
    found: dict[str, list[Box]] = {}
    try:
        content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
        for where, name, box in _csv_entries(path, content) if kind == ".csv" else _json_entries(path, content):
            found.setdefault(_checked_name(where, name), []).append(_checked_box(where, name, box))
    except OSError as error:
        raise UsageError(f"{path}: expected a file of windows, found: {os_reason(error)}") from None
    except (ValueError, csv.Error) as error:
        raise UsageError(f"{path}: expected a readable CSV file, found: {one_line(error)}") from None
    if not found:
        raise UsageError(f"{path}: expected windows, found none")
    return {name: np.array(boxes, np.float64) for name, boxes in found.items()}


def _csv_entries(path: str, content: bytes) -> Iterator[tuple[str, str, Box]]:
    rows = csv.DictReader(io.TextIOWrapper(io.BytesIO(content), "utf-8", newline=""))
    if not set(COLUMNS) <= set(rows.fieldnames or ()):
        found = ",".join(rows.fieldnames or ()) or "nothing"
        raise UsageError(f"{path}: expected the columns {','.join(COLUMNS)}, found {found}")
    for row in rows:
        where, name, box = f"{path}, line {rows.line_num}", row["name"], [row[column] for column in COLUMNS[1:]]
        try:
            x1, y1, x2, y2 = (float(edge) for edge in box)
        except (TypeError, ValueError):
            raise UsageError(f"{where}: {name!r}: expected four numbers x1,y1,x2,y2, found {str(box)[:100]}") from None
        yield where, name, (x1, y1, x2, y2)


def _json_entries(path: str, content: bytes) -> Iterator[tuple[str, str, Box]]:
    expected = f"expected a list of objects with {','.join(COLUMNS)}"
    if content.lstrip().startswith(b"["):
        listed = decode_document(content, list[_Window], what=f"{path}: {expected}", error=UsageError)
        for at, one in enumerate(listed):
            yield f"{path}, entry {at}", one.name, (one.x1, one.y1, one.x2, one.y2)
        return
    what = f"{path}: {expected}, or an object from name to a list of [x1, y1, x2, y2]"
    for name, lists in decode_document(content, dict[str, msgspec.Raw], what=what, error=UsageError).items():
        # One by one, because msgspec does not name the key of an error.
        what = f"{path}, {name!r}: expected a list of [x1, y1, x2, y2]"
        for at, box in enumerate(decode_document(bytes(lists), list[Box], what=what, error=UsageError)):
            yield f"{path}, {name!r}, window {at}", name, box


def _checked_name(where: str, name: str) -> str:
    if not name or "\0" in name:
        raise UsageError(f"{where}: expected the name of an image, found {name!r}")
    if name.startswith("/") or posixpath.normpath(name) != name or name.split("/")[0] == "..":
        raise UsageError(f"{where}: expected a name relative to the image folder, found {name!r}")
    return name


def _checked_box(where: str, name: str, box: Box) -> Box:
    x1, y1, x2, y2 = box
    if not all(map(math.isfinite, box)):
        raise UsageError(f"{where}: {name!r}: expected finite numbers, found {window_text(box)}")
    if x2 < x1 or y2 < y1:
        raise UsageError(f"{where}: {name!r}: inverted: expected x1 <= x2 and y1 <= y2, found {window_text(box)}")
    return box
