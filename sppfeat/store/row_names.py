"""Names of a store's rows: of an image, or of a window on one.

A window is x1, y1, x2, y2: 0-based pixels of the upright original image, both ends inclusive; fractions are allowed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Final

from sppfeat.images import Item

Box = tuple[float, float, float, float]  # x1, y1, x2, y2, inclusive, in pixels of the upright original
_ROW_NAME: Final = re.compile(r"(?P<image>.+)#(?P<box>-?\d+(?:\.\d+)?(?:,-?\d+(?:\.\d+)?){3})", re.DOTALL | re.ASCII)


def window_text(window: Iterable[float]) -> str:
    """A window as text, such as `12,30,200,117.5`, to a thousandth of a pixel."""
    return ",".join(f"{edge:.3f}".rstrip("0").rstrip(".") for edge in window)


def row_name(image: str, window: Iterable[float]) -> str:
    """The name of a window's row in a store: `photo.jpg#x1,y1,x2,y2`."""
    return f"{image}#{window_text(window)}"


def row_names(item: Item) -> list[str]:
    """The names of an item's rows: its own, or one per window."""
    return [item.name] if item.windows is None else [row_name(item.name, window) for window in item.windows]


def split_row_name(name: str) -> tuple[str, Box | None]:
    """A row's image, and its window if the row has one; the inverse of `row_name`.

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
    return match["image"], (x1, y1, x2, y2)
