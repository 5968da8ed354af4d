"""Sprite sheets: every tile at its place, a cross for what cannot be read, and no sheet made twice."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sppfeat import ImageError
from sppfeat.errors import ReportError
from sppfeat.images import Item
from sppfeat.serve import sheets
from sppfeat.serve.sheets import build_sheets, sheet_count, sheet_file
from sppfeat.store import Box, item_of

Of = Callable[[int], tuple[Item, Box | None]]
COLORS = [(230, 20, 20), (20, 200, 20), (20, 20, 230), (240, 240, 20), (20, 220, 220), (10, 10, 10), (250, 250, 250)]
SMALL = {"tile": 16, "columns": 2}


def folder_of(folder: Path, count: int, *, suffix: str = "png") -> Of:
    """Images of one color each, by row."""
    folder.mkdir()
    for row in range(count):
        Image.new("RGB", (40 + row, 30), COLORS[row % 7]).save(folder / f"{row}.{suffix}")
    return lambda row: item_of(str(folder), f"{row}.{suffix}")


def tile_at(folder: Path, tile: int, *, side: int = 16, columns: int = 2) -> np.ndarray:
    """[side, side, 3] of a tile, by its number."""
    number, at = divmod(tile, columns**2)
    with Image.open(sheet_file(folder, number)) as sheet:
        assert sheet.format == "JPEG" and sheet.size == (columns * side, columns * side)
        x, y = at % columns * side, at // columns * side
        return np.asarray(sheet.crop((x, y, x + side, y + side))).astype(int)


def is_of(tile: np.ndarray, color: tuple[int, int, int]) -> bool:
    """Whether the middle of a tile has about this color; neighbors show through at the edges of a JPEG's blocks."""
    return bool(np.abs(np.median(tile[4:-4, 4:-4], (0, 1)) - color).max() < 25)


def test_tiles_are_in_order(tmp_path: Path) -> None:
    of = folder_of(tmp_path / "images", 7)
    order = np.array([6, 2, 0, 5, 1, 4, 3], np.uint32)
    progress: list[float] = []
    done = build_sheets(of, order, tmp_path / "out" / "sheets", **SMALL, progress=progress.append)
    assert (done.sheets, done.made, done.unreadable, done.stopped) == (2, 2, 0, False)
    assert progress == sorted(progress) and progress[-1] == 1
    for tile, row in enumerate(order.tolist()):
        assert is_of(tile_at(tmp_path / "out" / "sheets", tile), COLORS[row]), (tile, row)
    assert is_of(tile_at(tmp_path / "out" / "sheets", 7), sheets._GRAY)
    assert sorted(os.listdir(tmp_path / "out" / "sheets")) == ["sheet-0.jpg", "sheet-1.jpg"]
    assert [sheet_count(n) for n in (0, 1, 1024, 1025)] == [0, 1, 1, 2]
    assert build_sheets(of, order[:0], tmp_path / "none").sheets == 0


def test_the_default_is_what_the_page_expects(tmp_path: Path) -> None:
    build_sheets(folder_of(tmp_path / "images", 3), np.arange(3), tmp_path / "out")
    with Image.open(tmp_path / "out" / "sheet-0.jpg") as sheet:
        assert sheet.size == (1536, 1536)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("size", [(64, 20), (1600, 900)])  # the larger one is decoded smaller
def test_the_central_square_of_the_upright_image(tmp_path: Path, size: tuple[int, int], orientation: int) -> None:
    """Red on the left of the upright square, blue on the right, green beside it."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 1] = 255
    left = (width - height) // 2
    pixels[:, left : left + height] = (0, 0, 255)
    pixels[:, left : left + height // 2] = (255, 0, 0)
    stored = Image.fromarray(pixels)
    turned = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    if (turn := turned[orientation]) is not None:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "0.jpg", exif=exif, quality=95, subsampling=0)
    build_sheets(lambda row: item_of(str(tmp_path), "0.jpg"), np.arange(1), tmp_path / "out", **SMALL)
    tile = tile_at(tmp_path / "out", 0)
    assert np.abs(tile[4:12, 2:6].mean((0, 1)) - (255, 0, 0)).max() < 40
    assert np.abs(tile[4:12, 10:14].mean((0, 1)) - (0, 0, 255)).max() < 40


def test_a_window_is_shown_alone(tmp_path: Path) -> None:
    pixels = np.full((600, 800, 3), 255, np.uint8)
    pixels[300:500, 100:400] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "0.jpg", quality=95)
    boxes: list[Box] = [(100, 300, 399, 499), (-1e9, -5, 1e9, 1e9), (5000, 5000, 6000, 6000)]
    boxes += [(float("nan"), 0, 5, 5), (9, 9, 3, 3)]
    build_sheets(lambda row: (item_of(str(tmp_path), "0.jpg")[0], boxes[row]), np.arange(5), tmp_path / "out", **SMALL)
    assert is_of(tile_at(tmp_path / "out", 0), (255, 0, 0))
    for row in (1, 2, 3, 4):  # what is not inside is the whole image
        tile = tile_at(tmp_path / "out", row)
        assert np.abs(tile[1:6, 6:10].mean((0, 1)) - 255).max() < 25


def test_what_cannot_be_read_is_a_cross(tmp_path: Path) -> None:
    of = folder_of(tmp_path / "images", 8, suffix="jpg")
    images = tmp_path / "images"
    (images / "0.jpg").unlink()
    (images / "1.jpg").write_bytes((images / "1.jpg").read_bytes()[:200])
    (images / "2.jpg").write_bytes(b"")
    (images / "3.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0")
    (images / "4.jpg").unlink()
    (images / "4.jpg").mkdir()
    Image.new("1", (36_000, 36_000)).save(images / "5.jpg", "PNG")  # unpacks to gigabytes

    def item(row: int) -> tuple[Item, Box | None]:
        if row == 6:
            raise ImageError("its name leads out of its folder")
        return of(row)

    done = build_sheets(item, np.arange(8), tmp_path / "out", **SMALL)
    assert (done.made, done.unreadable) == (2, 7)
    cross = np.asarray(sheets._crossed(16)).astype(int)
    for row in range(7):
        assert np.abs(tile_at(tmp_path / "out", row) - cross).mean() < 12, row
    assert is_of(tile_at(tmp_path / "out", 7), COLORS[0])
    assert len(np.unique(cross.reshape(-1, 3), axis=0)) == 2 and not is_of(cross, COLORS[6])


def test_a_sheet_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    of = folder_of(tmp_path / "images", 12)
    asked: list[int] = []

    def counted(row: int) -> tuple[Item, Box | None]:
        asked.append(row)
        return of(row)

    ended = threading.Event()

    def progress(part: float) -> None:
        if part > 0.5:
            ended.set()

    first = build_sheets(counted, np.arange(12), tmp_path / "out", **SMALL, progress=progress, stop=ended.is_set)
    assert first.stopped and 1 <= first.made < 3
    assert len(os.listdir(tmp_path / "out")) == first.made  # whole ones, and nothing half-written
    before = (tmp_path / "out" / "sheet-0.jpg").stat()
    asked.clear()
    (tmp_path / "out" / "sheet-2.jpg").write_bytes(b"")
    rest = build_sheets(counted, np.arange(12), tmp_path / "out", **SMALL)
    assert (rest.sheets, rest.made, rest.stopped) == (3, 3 - first.made, False)
    assert min(asked) == 4 * first.made
    assert (tmp_path / "out" / "sheet-0.jpg").stat().st_mtime_ns == before.st_mtime_ns
    asked.clear()
    assert build_sheets(counted, np.arange(12), tmp_path / "out", **SMALL).made == 0 and asked == []


def test_where_sheets_cannot_be_written(tmp_path: Path) -> None:
    of = folder_of(tmp_path / "images", 2)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ReportError, match="file/out: could not be created"):
        build_sheets(of, np.arange(2), tmp_path / "file" / "out")
    with pytest.raises(ReportError, match="expected tiles of 1 or more pixels"):
        build_sheets(of, np.arange(2), tmp_path / "out", tile=0)
    (tmp_path / "out" / "sheet-0.jpg").mkdir(parents=True)
    with pytest.raises(ReportError, match="sheet-0.jpg: cannot be written"):
        build_sheets(of, np.arange(2), tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["sheet-0.jpg"]
