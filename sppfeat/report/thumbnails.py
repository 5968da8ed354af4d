"""Small images inside a page: thumbnails of rows and items, with boxes outlined and heat laid over them."""

from __future__ import annotations

import base64
import contextlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sppfeat.errors import ImageError
from sppfeat.files import unsafe_name
from sppfeat.images import Item, decode, decoding, open_image, upright_size
from sppfeat.store import Box, item_of

THUMBNAIL_SIDE: Final = 240  # twice what a page shows, for high-density screens
# Colors of outlines, which also differ for those who see no red or no green.
FOUND_COLOR: Final = "#d6006c"
TRUE_COLOR: Final = "#0092d1"
_HEAT_STRENGTH: Final = 190  # of 255: the image below stays visible


class Mark(NamedTuple):
    """A box to outline, x1, y1, x2, y2 in pixels of the upright original, inclusive."""

    box: Box
    color: str = FOUND_COLOR


@dataclass(frozen=True)
class Heat:
    """A grid [n, n] to lay over an image, from nothing at 0 to full color at 1, and numbered points in it.

    points: rows and columns of bins, in the order of their numbers from 1. box: the part of the image that the grid
    covers, in pixels of the upright original, inclusive; None: what is shown.
    """

    grid: np.ndarray
    points: Sequence[tuple[int, int]] = ()
    box: Box | None = None


def thumbnail(
    root: str,
    name: str,
    *,
    side: int = THUMBNAIL_SIDE,
    mark: Box | None = None,
    heat: Heat | None = None,
    orientation: str = "exif",
) -> str | None:
    """An image as a small JPEG in a `data:` address, for the `src` of an image; None if it is not available.

    root, name: of a row, as a store or a gallery has them; no file outside the root is opened, whatever the name says,
    and a connection is made only if the root itself is a URL. Links below the root are the user's own, and followed.
    side: of the square that it fits into. The part of the row's window inside the image is shown, or the whole image
    where there is none. mark: a box, in pixels of the upright original, inclusive, to outline in the whole image
    instead. heat: laid over the part shown, or over the window of the row where the whole image is shown. orientation:
    of the recipe, which boxes are by.
    """
    found = row_item(root, name)
    if found is None:
        return None
    item, window = found
    if mark and heat is not None and window is not None:
        heat = replace(heat, box=window)
    marks = (Mark(mark),) if mark else ()
    return item_thumbnail(
        item, side=side, box=None if mark else window, marks=marks, heat=heat, orientation=orientation
    )


def row_item(root: str, name: str) -> tuple[Item, Box | None] | None:
    """The image of a row, and the row's window if it has one; None if its name leads out of the root."""
    if unsafe_name(name) is not None:
        return None
    try:
        return item_of(root, name)
    except ValueError:  # a path that is invalid on this system
        return None


def item_thumbnail(
    item: Item,
    *,
    side: int = THUMBNAIL_SIDE,
    box: Box | None = None,
    marks: Sequence[Mark] = (),
    heat: Heat | None = None,
    orientation: str = "exif",
) -> str | None:
    """`thumbnail` of an item that comes from a source, not from the name of a row.

    box: the part shown, in pixels of the upright original, inclusive. marks: outlined in it. orientation: as in
    `thumbnail`.
    """
    try:
        shown, size = small_image(item, side, box, orientation=orientation)
    except (ImageError, OSError, ValueError):  # ValueError: a path that is invalid on this system
        return None
    part = _part(box, size) if box is not None else None
    left, top, right, bottom = part or (0, 0, *size)
    factors = shown.width / (right - left), shown.height / (bottom - top)

    def placed(inside: tuple[int, int, int, int]) -> list[float]:
        return [(edge - (left, top)[at % 2]) * factors[at % 2] for at, edge in enumerate(inside)]

    if heat is not None:
        inside = _part(heat.box, size) if heat.box is not None else None
        shown = _heated(shown, heat, placed(inside) if inside else [0, 0, *shown.size])
    for mark in marks:
        if (outlined := _part(mark.box, size)) is not None:
            _outline(shown, placed(outlined), mark.color)
    return image_address(shown, "JPEG")


def small_image(
    item: Item, side: int, box: Box | None = None, *, orientation: str = "exif"
) -> tuple[Image.Image, tuple[int, int]]:
    """The image, or the part of a box that is inside it, its longer side at most `side`; and width and height of the
    original. orientation: see `Recipe`; the box is in pixels of the image so turned. Raises ImageError."""
    image, _ = open_image(item)
    with image, contextlib.ExitStack() as stack:
        if image.format == "PNG":
            stack.enter_context(decoding(image))  # before `upright_size`, which decodes some of them
        size, turn = upright_size(image, orientation=orientation)
        part = None if box is None else _part(box, size)
        if part is None:
            # Decoding at an eighth of the size is several times faster, and invisible here.
            image.draft("RGB", (2 * side, 2 * side))
        if image.format != "PNG":
            stack.enter_context(decoding(image))
        shown = decode(image, turn, orientation=orientation)
    if part is not None:
        shown = shown.crop(part)
    shown.thumbnail((side, side), Image.Resampling.BICUBIC)
    return shown, size


def image_address(image: Image.Image, kind: str, *, quality: int = 82) -> str:
    """An image in a `data:` address; kind: `JPEG` or `PNG`. quality: of a JPEG."""
    content = io.BytesIO()
    image.save(content, kind, quality=quality)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


def _heated(image: Image.Image, heat: Heat, corners: list[float]) -> Image.Image:
    left, top, right, bottom = map(round, corners)
    width, height = max(1, right - left), max(1, bottom - top)
    levels = np.clip(heat.grid * _HEAT_STRENGTH, 0, 255).astype(np.uint8)
    mask = Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)
    image = image.convert("RGB")
    image.paste(Image.new("RGB", (width, height), "#ff5a00"), (left, top), mask)
    draw = ImageDraw.Draw(image)
    for number, (row, column) in enumerate(heat.points, 1):
        x = left + (column + 0.5) * width / heat.grid.shape[1]
        y = top + (row + 0.5) * height / heat.grid.shape[0]
        draw.ellipse((x - 9, y - 9, x + 9, y + 9), fill="#14213d", outline="white", width=2)
        draw.text((x, y), str(number), fill="white", anchor="mm", font=ImageFont.load_default(12))
    return image


def _outline(image: Image.Image, corners: list[float], color: str) -> None:
    """Draw a box in two colors, so that it is seen on any image."""
    left, top, right, bottom = map(round, corners)
    draw = ImageDraw.Draw(image)
    thick = max(2, round(max(image.size) / THUMBNAIL_SIDE * 2))  # of a large thumbnail, which a page may show smaller
    for grow in range(thick, -2, -1):
        box = left - grow, top - grow, max(left, right - 1) + grow, max(top, bottom - 1) + grow
        if box[0] <= box[2] and box[1] <= box[3]:
            draw.rectangle(box, outline="white" if grow in (thick, -1) else color)


def _part(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """The pixels of a window inside an image, for `crop`; None where there are none: a name may say anything."""
    if not all(map(math.isfinite, box)):
        return None
    left, top = max(0, round(box[0])), max(0, round(box[1]))
    right, bottom = min(size[0], round(box[2]) + 1), min(size[1], round(box[3]) + 1)
    return (left, top, right, bottom) if left < right and top < bottom else None
