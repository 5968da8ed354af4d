"""HTML pages: one self-contained file each, with thumbnails and curves inside, that works offline and on a phone.

The pages' templates are in `templates/`; `base.html` holds their style.
"""

from __future__ import annotations

import base64
import contextlib
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sppfeat._version import __version__
from sppfeat.errors import ImageError, ReportError
from sppfeat.files import appearing, check_new_file, os_reason, unsafe_name
from sppfeat.images import Item, decode, decoding, open_image, upright_size
from sppfeat.store import item_of

_BEGINNING: Final = b"<!doctype html>"
_HEAT_STRENGTH: Final = 190  # of 255: the image below stays visible
THUMBNAIL_SIDE: Final = 240  # twice what a page shows, for high-density screens


def check_page(path: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The path, if a page may be written there; call this before the work that fills it.

    Raises ReportError for a folder that does not exist or is not writable, and for an existing file, unless it
    is a page and `overwrite` is set.
    """
    return check_new_file(path, overwrite=overwrite, error=ReportError, kind="an HTML page", other=_other_than_page)


def _other_than_page(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            return None if file.read(len(_BEGINNING)).lower() == _BEGINNING else "another file"
    except OSError as error:
        raise ReportError(f"{path}: expected an HTML page or a new file, found: {os_reason(error)}") from None


def write_page(path: Path, template: str, values: Mapping[str, Any]) -> None:
    """Fill a template of `templates/` and write the page atomically. Text is escaped.

    Raises ReportError if it cannot be written.
    """
    import jinja2  # only where a page is written

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sppfeat.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(template).render({"version": __version__, **values})
    with appearing(path, ReportError) as partial:
        # A name may hold characters that cannot be encoded; a browser shows the escape.
        partial.write_text(text, "utf-8", errors="backslashreplace")


def thumbnail(
    root: str,
    name: str,
    *,
    side: int = THUMBNAIL_SIDE,
    box: tuple[float, float, float, float] | None = None,
    mark: tuple[float, float, float, float] | None = None,
    heat: Heat | None = None,
) -> str | None:
    """An image as a small JPEG in a `data:` address, for the `src` of an image; None if it is not available.

    root, name: of a row, as a store or a gallery has them; no file outside the root is opened, whatever the name says,
    and a connection is made only if the root itself is a URL. Links below the root are the user's own, and followed.
    side: of the square that it fits into. box: x1, y1, x2, y2
    in pixels of the upright original, inclusive; the window of the row unless given. The part of it inside the image is
    shown, or the whole image where there is none. mark: a part to outline in the whole image instead. heat: laid over
    the part shown, or over the window of the row where the whole image is shown.
    """
    if unsafe_name(name) is not None:
        return None
    try:
        item, window = item_of(root, name)
    except ValueError:  # a path that is invalid on this system
        return None
    if mark and heat is not None and window is not None:
        heat = replace(heat, box=window)
    return item_thumbnail(item, side=side, box=None if mark else box or window, mark=mark, heat=heat)


def item_thumbnail(
    item: Item,
    *,
    side: int = THUMBNAIL_SIDE,
    box: tuple[float, float, float, float] | None = None,
    mark: tuple[float, float, float, float] | None = None,
    heat: Heat | None = None,
) -> str | None:
    """The same of an item that comes from a source, not from a file's names."""
    try:
        shown, size = small_image(item, side, box)
    except (ImageError, OSError, ValueError):  # ValueError: a path that is invalid on this system
        return None
    if heat is not None:
        inside = _part(heat.box, size) if heat.box is not None else None
        factor = shown.width / size[0]
        shown = _heated(shown, heat, [place * factor for place in inside or ()] or [0, 0, *shown.size])
    if mark is not None and (outlined := _part(mark, size)) is not None:
        _outline(shown, [place * shown.width / size[0] for place in outlined])
    return image_address(shown, "JPEG")


def small_image(
    item: Item, side: int, box: tuple[float, float, float, float] | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """The upright image, or the part of a box that is inside it, its longer side at most `side`; and width and height
    of the original. Raises ImageError."""
    image, _ = open_image(item)
    with image, contextlib.ExitStack() as stack:
        if image.format == "PNG":
            stack.enter_context(decoding(image))  # before `upright_size`, which decodes some of them
        size, turn = upright_size(image, orientation="exif")
        part = None if box is None else _part(box, size)
        if part is None:
            # Decoding at an eighth of the size is several times faster, and invisible here.
            image.draft("RGB", (2 * side, 2 * side))
        if image.format != "PNG":
            stack.enter_context(decoding(image))
        shown = decode(image, turn, orientation="exif")
    if part is not None:
        shown = shown.crop(part)
    shown.thumbnail((side, side), Image.Resampling.BICUBIC)
    return shown, size


@dataclass(frozen=True)
class Heat:
    """A grid [n, n] to lay over an image, from nothing at 0 to full color at 1, and numbered points in it.

    points: rows and columns of bins, in the order of their numbers from 1. box: the part of the image that the grid
    covers, in pixels of the upright original, inclusive; None: what is shown.
    """

    grid: np.ndarray
    points: Sequence[tuple[int, int]] = ()
    box: tuple[float, float, float, float] | None = None


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


def _outline(image: Image.Image, corners: list[float]) -> None:
    """Draw a box in two colors, so that it is seen on any image."""
    left, top, right, bottom = map(round, corners)
    draw = ImageDraw.Draw(image)
    for grow, color in ((2, "white"), (1, "#d6006c"), (0, "#d6006c"), (-1, "white")):
        box = left - grow, top - grow, max(left, right - 1) + grow, max(top, bottom - 1) + grow
        if box[0] <= box[2] and box[1] <= box[3]:
            draw.rectangle(box, outline=color)


def _part(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """The pixels of a window inside an image, for `crop`; None where there are none: a name may say anything."""
    if not all(map(math.isfinite, box)):
        return None
    left, top = max(0, round(box[0])), max(0, round(box[1]))
    right, bottom = min(size[0], round(box[2]) + 1), min(size[1], round(box[3]) + 1)
    return (left, top, right, bottom) if left < right and top < bottom else None


def image_address(image: Image.Image, kind: str) -> str:
    """An image in a `data:` address; kind: `JPEG` or `PNG`."""
    content = io.BytesIO()
    image.save(content, kind, quality=82)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


@dataclass(frozen=True)
class Plot:
    """A curve in the units of an SVG image of PLOT_WIDTH x PLOT_HEIGHT; `macros.html` draws it.

    points: x, y and text of each. path: of the line. ticks, levels: place and text along x and along y.
    """

    points: list[tuple[float, float, str]]
    path: str
    ticks: list[tuple[float, str]]
    levels: list[tuple[float, str]]


PLOT_WIDTH: Final = 560
PLOT_HEIGHT: Final = 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 14, 34


def plot_line(points: Sequence[tuple[float, float]], *, ticks: Sequence[tuple[float, str]], unit: str = "") -> Plot:
    """Lay out one curve; points: x and y, by rising x. ticks: x and its text, thinned where they crowd."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    step = _round_step((high - low) / 4 or 1.0)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    high = high if high > low else low + step

    def across(x: float) -> float:
        share = (x - xs[0]) / ((xs[-1] - xs[0]) or 1)
        return round(_LEFT + share * (PLOT_WIDTH - _LEFT - _RIGHT), 1)

    def down(y: float) -> float:
        return round(PLOT_HEIGHT - _BOTTOM - (y - low) / (high - low) * (PLOT_HEIGHT - _TOP - _BOTTOM), 1)

    placed = [(across(x), down(y), f"{y:.1f}{unit}") for x, y in points]
    shown: list[tuple[float, str]] = []
    for x, text in ticks:
        if not shown or across(x) - shown[-1][0] >= 9 * max(len(text), len(shown[-1][1])):
            shown.append((across(x), text))
    count = round((high - low) / step)
    return Plot(
        points=placed,
        path="M" + " L".join(f"{x},{y}" for x, y, _ in placed),
        ticks=shown,
        levels=[(down(low + number * step), f"{low + number * step:g}{unit}") for number in range(count + 1)],
    )


def _round_step(length: float) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(length))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= length * 0.999)
