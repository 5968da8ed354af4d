"""Windows: boxes on pictures, read from files, named, checked, and mapped onto feature maps.

A window is x1, y1, x2, y2: 0-based pixels of the upright original picture, both ends inclusive; fractions are allowed.
"""

from __future__ import annotations

import codecs
import csv
import io
import math
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from sppfeat.backbones.geometry import Geometry
from sppfeat.errors import UsageError, one_line
from sppfeat.files.documents import decode_document

COLUMNS: Final = ("name", "x1", "y1", "x2", "y2")
# The side of the square that a window's area comes closest to at its scale: what ImageNet networks are trained on.
CANONICAL_SIDE: Final = 224
Box = tuple[float, float, float, float]  # x1, y1, x2, y2, inclusive, in pixels of the upright original
_ROW_NAME: Final = re.compile(r"(?P<picture>.+)#(?P<box>-?\d+(?:\.\d+)?(?:,-?\d+(?:\.\d+)?){3})", re.DOTALL | re.ASCII)


class _Window(msgspec.Struct):
    """An entry of a JSON list of windows; further keys are ignored."""

    name: str
    x1: float
    y1: float
    x2: float
    y2: float


def read_windows(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Windows [K, 4] float64 of each picture, by its name, in the order of the file.

    CSV with the columns name,x1,y1,x2,y2, in any order; further ones are ignored. JSON: a list of objects with these
    keys, or an object from name to a list of [x1, y1, x2, y2]. Names are relative to the folder of the pictures, with
    `/`. Raises UsageError that names the line or entry, for anything that is not, and for inverted windows.
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
        raise UsageError(f"{path}: expected a file of windows, found: {error.strerror}") from None
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
        # One by one, because msgspec does not name the key at which it finds something wrong.
        what = f"{path}, {name!r}: expected a list of [x1, y1, x2, y2]"
        for at, box in enumerate(decode_document(bytes(lists), list[Box], what=what, error=UsageError)):
            yield f"{path}, {name!r}, window {at}", name, box


def _checked_name(where: str, name: str) -> str:
    if not name or "\0" in name:
        raise UsageError(f"{where}: expected the name of a picture, found {name!r}")
    if name.startswith("/") or posixpath.normpath(name) != name or name.split("/")[0] == "..":
        raise UsageError(f"{where}: expected a name relative to the folder of the pictures, found {name!r}")
    return name


def _checked_box(where: str, name: str, box: Box) -> Box:
    x1, y1, x2, y2 = box
    if not all(map(math.isfinite, box)):
        raise UsageError(f"{where}: {name!r}: expected finite numbers, found {window_text(box)}")
    if x2 < x1 or y2 < y1:
        raise UsageError(f"{where}: {name!r}: inverted: expected x1 <= x2 and y1 <= y2, found {window_text(box)}")
    return box


def window_text(window: Iterable[float]) -> str:
    """`12,30,200,117.5`, up to a thousandth of a pixel."""
    return ",".join(f"{edge:.3f}".rstrip("0").rstrip(".") for edge in window)


def row_name(picture: str, window: Iterable[float]) -> str:
    """The name of a window's row in a store: `photo.jpg#x1,y1,x2,y2`."""
    return f"{picture}#{window_text(window)}"


def split_row_name(name: str) -> tuple[str, Box | None]:
    """A row's image, and its window where the row is one's; the inverse of `row_name`.

    A window has four finite edges in order, as plain decimal numbers; any other name is that of a whole image.
    """
    match = _ROW_NAME.fullmatch(name)
    if match is None:
        return name, None
    try:
        x1, y1, x2, y2 = (float(edge) for edge in match["box"].split(","))
    except ValueError:
        return name, None
    if not all(map(math.isfinite, (x1, y1, x2, y2))) or x2 < x1 or y2 < y1:
        return name, None
    return match["picture"], (x1, y1, x2, y2)


def outside(windows: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[K] whether windows [K, 4] reach outside a picture of `size`, width and height."""
    width, height = size
    result: np.ndarray = (windows[:, :2] < 0).any(1) | (windows[:, 2] > width - 1) | (windows[:, 3] > height - 1)
    return result


def map_windows(
    windows: np.ndarray,
    size: tuple[int, int],
    input_size: tuple[int, int],
    columns: Geometry,
    rows: Geometry,
) -> np.ndarray:
    """Rois [K, 4] int64 (cells x1, y1, x2, y2, inclusive) of windows [K, 4] on a feature map.

    size: width and height of the upright original. input_size: of the network's input, which the original was resized
    to. columns, rows: the map's geometry along x and y, see `Backbone.geometry`.

    With stride S and offset o of the map, an edge at input pixel x lies at cell floor((x - o) / S) + 1 on the left and
    top, ceil((x - o) / S) - 1 on the right and bottom: the cells whose centres are strictly inside (He et al. 2014,
    section 4 and appendix A, where o is 0). Where no centre is, the roi is the cell nearest the window's middle. Edges
    on the picture's border go to the map's: else a network with o = 0 would lose its first cells, and a window of the
    whole picture would not be described as the picture is.
    """
    windows = np.asarray(windows, np.float64)
    if windows.ndim != 2 or windows.shape[1] != 4:
        raise UsageError(f"windows must be [K, 4], found {list(windows.shape)}")
    first_x, last_x = _map_axis(windows[:, 0], windows[:, 2], size[0], input_size[0], columns)
    first_y, last_y = _map_axis(windows[:, 1], windows[:, 3], size[1], input_size[1], rows)
    return np.stack([first_x, first_y, last_x, last_y], 1)


def _map_axis(
    first: np.ndarray, last: np.ndarray, length: int, input_length: int, axis: Geometry
) -> tuple[np.ndarray, np.ndarray]:
    ratio = input_length / length
    # Resizing keeps the picture's outer edges, which are half a pixel outside the first and the last centre.
    begin, end = ((edge + 0.5) * ratio - 0.5 - axis.offset for edge in (first, last))
    low = np.floor(begin / axis.stride) + 1
    high = np.ceil(end / axis.stride) - 1
    low[first <= 0] = 0
    high[last >= length - 1] = axis.size - 1
    between = low > high
    low[between] = high[between] = np.floor((begin + end)[between] / (2 * axis.stride) + 0.5)
    cells = np.clip(np.stack([low, high]), 0, axis.size - 1).astype(np.int64)
    return cells[0], cells[1]


def nearest_scales(windows: np.ndarray, size: tuple[int, int], input_sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """[K] for each window, which of the input sizes brings its area closest to 224 x 224; the first of equals.

    windows: [K, 4] on an original of `size`. input_sizes: width and height of the resized picture, one a scale.
    """
    area = areas(windows) / (size[0] * size[1])
    scaled = area[:, None] * np.array([[width * height for width, height in input_sizes]], np.float64)
    result: np.ndarray = np.abs(scaled - CANONICAL_SIDE**2).argmin(1)
    return result


def overlaps(windows: np.ndarray, others: np.ndarray, *, crowd: np.ndarray | None = None) -> np.ndarray:
    """[K, G] intersection over union of windows [K, 4] with others [G, 4]; pixels count whole, as in VOC's devkit.

    crowd: [G] bool, others that hold many objects: with these, the part of the window inside them, as COCO has it.
    """
    low = np.maximum(windows[:, None, :2], others[None, :, :2])
    high = np.minimum(windows[:, None, 2:], others[None, :, 2:])
    common = np.clip(high - low + 1, 0, None).prod(2)
    own = areas(windows)[:, None]
    whole = own + areas(others)[None] - common
    result: np.ndarray = common / (whole if crowd is None else np.where(crowd, own, whole))
    return result


def areas(windows: np.ndarray) -> np.ndarray:
    """[K] pixels of windows [K, 4]."""
    result: np.ndarray = (windows[:, 2] - windows[:, 0] + 1) * (windows[:, 3] - windows[:, 1] + 1)
    return result
