"""Sprite sheets: JPEGs of many small tiles in the order of a map, so that a page shows all images with few requests."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

from sppfeat.errors import ImageError, ReportError
from sppfeat.files import appearing, os_reason
from sppfeat.images import Item, decode, decoding, open_image, upright_size
from sppfeat.machine import available_cores
from sppfeat.store import Box

TILE: Final = 48
COLUMNS: Final = 32
_QUALITY: Final = 80
_GRAY: Final = (208, 208, 208)
_CROSS: Final = (150, 150, 150)
# Tiles of an image are made from this many times their pixels, or from the next larger size that its decoder offers.
_DRAFT: Final = 2


@dataclass(frozen=True)
class Sheets:
    """What was done. sheets: how many there are in all. made: by this call. unreadable: images of those made that a
    cross stands for. stopped: whether some are missing because the caller wanted no more."""

    sheets: int
    made: int
    unreadable: int
    stopped: bool


def sheet_count(images: int, columns: int = COLUMNS) -> int:
    """Sheets of columns x columns tiles that so many images need."""
    return -(-images // columns**2)


def sheet_file(folder: Path, number: int) -> Path:
    """Where a sheet is, from 0 on."""
    return folder / f"sheet-{number}.jpg"


def build_sheets(
    items_of_row: Callable[[int], tuple[Item, Box | None]],
    order: np.ndarray,
    folder: str | os.PathLike[str],
    *,
    tile: int = TILE,
    columns: int = COLUMNS,
    progress: Callable[[float], None] = lambda part: None,
    stop: Callable[[], bool] = lambda: False,
) -> Sheets:
    """Write sheets of columns x columns tiles of tile x tile pixels, row by row: tile t shows row order[t].

    A tile is the central square of the upright image, or of the row's window; an image that is missing or cannot be
    read is a gray tile with a cross, as the places after the last tile are gray without. items_of_row: the image of
    a row, and its window in pixels of the upright image; called from several threads; may raise ImageError.
    folder: of this gallery, order and sizes alone: a sheet that is there is not made again. One sheet at a time is in
    memory, beside the images that are being decoded. progress: called with the fraction of the sheets done, 0 to 1.
    stop: asked for every image; once it is true, whole sheets alone are kept. Raises ReportError.
    """
    if tile < 1 or columns < 1:
        raise ReportError(f"expected tiles of 1 or more pixels and 1 or more columns, found {tile} and {columns}")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"{folder}: could not be created: {os_reason(error)}") from None
    each, count = columns**2, sheet_count(len(order), columns)
    missing = [number for number in range(count) if not _is_there(sheet_file(folder, number))]
    total = sum(len(order[number * each : (number + 1) * each]) for number in missing)
    made = unreadable = done = 0

    def shown(row: int) -> Image.Image | None:
        return None if stop() else _tile(items_of_row, row, tile)

    cross = _crossed(tile)
    with ThreadPoolExecutor(available_cores(), thread_name_prefix="sheets") as pool:
        for number in missing:
            sheet = Image.new("RGB", (columns * tile, columns * tile), _GRAY)
            faults = 0
            for at, image in enumerate(pool.map(shown, order[number * each : (number + 1) * each].tolist())):
                faults += image is None
                sheet.paste(image or cross, (at % columns * tile, at // columns * tile))
                done += 1
                progress(done / total)
            if stop():
                return Sheets(count, made, unreadable, True)
            with appearing(sheet_file(folder, number), ReportError) as partial:
                sheet.save(partial, "JPEG", quality=_QUALITY)
            made, unreadable = made + 1, unreadable + faults
    progress(1.0)
    return Sheets(count, made, unreadable, False)


def _is_there(file: Path) -> bool:
    try:
        return file.is_file() and file.stat().st_size > 0
    except OSError:
        return False


def _tile(items_of_row: Callable[[int], tuple[Item, Box | None]], row: int, side: int) -> Image.Image | None:
    """The central square of a row's image, or of its window; None if it cannot be read."""
    try:
        item, window = items_of_row(row)
        image, _ = open_image(item)
        with image:
            whole = image.size
            # Decoding at an eighth of the size is several times faster. Turning changes neither side's scale.
            short = min(whole) if window is None else min(window[2] - window[0], window[3] - window[1]) + 1
            if short > _DRAFT * side:
                needed = [math.ceil(length * _DRAFT * side / short) for length in whole]
                image.draft("RGB", (needed[0], needed[1]))
            shrunk = image.size[0] / whole[0]
            with decoding(image):
                _, turn = upright_size(image, orientation="exif")
                pixels = decode(image, turn, orientation="exif")
                square = _square(window, shrunk, pixels.size)
                return pixels.resize((side, side), Image.Resampling.BICUBIC, box=square, reducing_gap=2.0)
    except (ImageError, OSError, ValueError, MemoryError):  # ValueError: a path that is invalid on this system
        return None


def _square(window: Box | None, shrunk: float, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The central square of an image of this size, or of the part of a window that is inside it."""
    left, top, right, bottom = 0.0, 0.0, float(size[0]), float(size[1])
    if window is not None and all(map(math.isfinite, window)):
        x1, y1, x2, y2 = (
            max(0.0, window[0] * shrunk),
            max(0.0, window[1] * shrunk),
            min(right, (window[2] + 1) * shrunk),
            min(bottom, (window[3] + 1) * shrunk),
        )
        if x1 < x2 and y1 < y2:
            left, top, right, bottom = x1, y1, x2, y2
    side = min(right - left, bottom - top)
    x, y = (left + right - side) / 2, (top + bottom - side) / 2
    return x, y, x + side, y + side


def _crossed(side: int) -> Image.Image:
    """What stands for an image that cannot be read."""
    tile = Image.new("RGB", (side, side), _GRAY)
    draw = ImageDraw.Draw(tile)
    low, high = side // 4, side - 1 - side // 4
    draw.line((low, low, high, high), fill=_CROSS, width=max(1, side // 16))
    draw.line((low, high, high, low), fill=_CROSS, width=max(1, side // 16))
    return tile
