"""Copies of one image are told from images that look alike."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeStore
from PIL import Image, ImageChops, ImageDraw, ImageOps

from sppfeat import find_duplicates
from sppfeat.retrieval.same_images import LARGEST_NEAR, SIDE, blurred, copies, difference


def small(image: Image.Image) -> np.ndarray:
    return blurred(np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS))[None])


def same(one: Image.Image, other: Image.Image) -> bool:
    return bool(copies(small(one), small(other))[0])


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality)
    return Image.open(content)


def middle(image: Image.Image, part: float) -> Image.Image:
    cut = [round(side * (1 - part) / 2) for side in image.size]
    return image.crop((*cut, image.width - cut[0], image.height - cut[1]))


def sign(text: str, ground: str = "white") -> Image.Image:
    """A drawing, with a little of its own below."""
    image = Image.new("RGB", (300, 300), ground)
    pen = ImageDraw.Draw(image)
    pen.regular_polygon((150, 150, 140), 8, fill="red", outline="black")
    pen.rectangle((70, 110, 230, 160), fill="white")
    pen.text((120, 200), text, fill="white", font_size=40)
    return image


@pytest.fixture(params=["animals/cat.jpg", "space/rocket.jpg", "objects/coins.png"])
def photo(request: pytest.FixtureRequest, photos: Path) -> Image.Image:
    with Image.open(photos / request.param) as image:
        return image.convert("RGB")


def test_copies(photo: Image.Image) -> None:
    width, height = photo.size
    for other in (
        photo.resize((width // 2, height // 2), Image.Resampling.NEAREST),
        photo.resize((width // 4, height // 4), Image.Resampling.LANCZOS),
        photo.resize((2 * width, 2 * height), Image.Resampling.BICUBIC),
        recompressed(photo, 20),
        photo.convert("L"),
    ):
        assert same(photo, other) and same(other, photo)


def test_other_images(photo: Image.Image, photos: Path) -> None:
    with Image.open(photos / "people" / "astronaut.jpg") as other:
        assert not same(photo, other)
    assert not same(photo, ImageOps.mirror(photo)) and not same(photo, ImageOps.flip(photo))
    # As of another shot of the scene.
    assert not same(photo, middle(photo, 0.95)) and not same(photo, ImageChops.offset(photo, photo.width // 40, 0))


def test_what_differs_in_one_place() -> None:
    assert same(sign("1"), recompressed(sign("1"), 30))
    assert not same(sign("1"), sign("88")) and not same(sign("1"), sign("1", "gray"))
    assert difference(small(sign("1")), small(sign("88"))).near[0] > 1.5 * LARGEST_NEAR


def window(seed: int) -> Image.Image:
    """What a dark bar has in contrast says nothing about gray text beside it."""
    image = Image.new("RGB", (640, 360), "white")
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, 130, 360), fill="#1c2530")
    for y in range(30, 340, 60):
        pen.text((150, y), ("a note that begins", "and another one, which is longer")[seed], fill="#777", font_size=20)
    return image


def text_page(seed: int) -> Image.Image:
    """A few lines on a page."""
    draw = np.random.default_rng(seed)
    image = Image.new("RGB", (1240, 1754), "white")
    pen = ImageDraw.Draw(image)
    for y in range(150, 1100, 50):
        pen.text((120, y), "".join(draw.choice(list("abcdefgh  "), draw.integers(40, 90))), fill="black", font_size=24)
    return image


def night(seed: int) -> Image.Image:
    """Stars in a dark sky."""
    draw = np.random.default_rng(seed)
    image = Image.new("RGB", (600, 400), "#080810")
    pen = ImageDraw.Draw(image)
    for x, y in draw.integers(0, (600, 400), (60, 2)).tolist():
        pen.ellipse((x, y, x + 4, y + 4), fill="white")
    return image


def dim(seed: int) -> Image.Image:
    """Large spots of nearly one gray."""
    draw = np.random.default_rng(seed)
    spots = Image.fromarray(draw.normal(120, 6, (12, 18)).clip(0, 255).astype(np.uint8))
    return spots.resize((600, 400), Image.Resampling.BICUBIC).convert("RGB")


@pytest.mark.parametrize("make", [window, text_page, night, dim])
def test_what_differs_in_little(make: Callable[[int], Image.Image]) -> None:
    assert same(make(0), recompressed(make(0), 50)) and same(make(0), make(0).resize((300, 200)))
    assert not same(make(0), make(1))


def test_images_of_one_color() -> None:
    white, cream, black = (Image.new("RGB", (60, 40), color) for color in ("white", "#fdfdf8", "black"))
    assert same(white, white) and same(white, cream) and not same(white, black)


def test_cosine_and_pixels_together(make_store: MakeStore, tmp_path: Path, photos: Path) -> None:
    """Cosines of 0.9: a copy, an image that looks alike, one of another shape; and a copy that is too far."""
    (folder := tmp_path / "images").mkdir()
    sign("1").save(folder / "0.png")
    sign("1").resize((150, 150)).save(folder / "1.png")
    sign("88").save(folder / "2.png")
    sign("1").resize((300, 200)).save(folder / "3.png")
    sign("1").save(folder / "4.png")
    rows = np.eye(6)[:5] * 0.1**0.5
    rows[:, 5] = 0.9**0.5
    rows[4] = np.eye(6)[4]
    store = make_store(rows, names=[f"{number}.png" for number in range(5)], root=str(folder))
    column = store.columns["image_size"]
    sizes = np.memmap(store.path, column.dtype, "r+", column.offset, column.shape)
    sizes[:] = [[300, 300], [150, 150], [300, 300], [300, 200], [300, 300]]
    sizes.flush()
    found = find_duplicates(store)
    assert [[one.name for one in group] for group in found.groups] == [["0.png", "1.png"]]
    assert (found.compared, found.pairs, found.notes) == (True, 1, [])
    assert found.groups[0][1].score == pytest.approx(0.9, abs=1e-3)
    plain = find_duplicates(store, 0.85)
    assert not plain.compared and [len(group) for group in plain.groups] == [4]


def test_images_that_cannot_be_read(make_store: MakeStore, tmp_path: Path) -> None:
    """Their descriptors decide alone, and it is told."""
    rows = np.array([[1, 0, 0], [1, 0.2, 0], [0, 0, 1], [0, 0.6, 1]])
    for number in range(4):
        (tmp_path / f"{number:04}.jpg").write_bytes(b"no image")
    found = find_duplicates(make_store(rows, root=str(tmp_path)))
    assert [[one.name for one in group] for group in found.groups] == [["0000.jpg", "0001.jpg"]]
    assert len(found.notes) == 1 and found.notes[0].startswith("4 images could not be read, and must have a cosine sim")


def test_a_name_that_leads_out_is_not_read(make_store: MakeStore, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        sign("1").save(tmp_path / name)
    rows = np.array([[1, 0], [1, 0.5]])
    found = find_duplicates(make_store(rows, names=["../a.png", "../b.png"], root=str(tmp_path / "images")))
    assert found.groups == [] and "leads out of the image folder" in found.notes[0]


def test_stop_signs(shared: Path, tmp_path: Path) -> None:
    """Drawings of stop signs up to a cosine of 0.98 stay apart; half the size and JPEG quality 20 do not matter."""
    from sppfeat import RunOptions, extract_folder, open_store

    (folder := tmp_path / "signs").mkdir()
    files = sorted((shared / "data" / "caltech101-subset").glob("*/stop_sign/*.jpg"))
    assert len(files) == 20
    for file in files:
        with Image.open(file) as image:
            image.convert("RGB").save(folder / f"{file.stem}.png")
            image.convert("RGB").resize((image.width // 2, image.height // 2)).save(folder / f"{file.stem}-half.png")
            image.convert("RGB").save(folder / f"{file.stem}-q20.jpg", quality=20)
    extract_folder(folder, tmp_path / "f.h5", None, RunOptions(device="cpu"))
    groups = find_duplicates(open_store(tmp_path / "f.h5")).groups
    stems = [{one.name[:10] for one in group} for group in groups]
    assert all(len(one) == 1 for one in stems) and sum(map(len, groups)) >= 59


def test_shots_of_one_building(shared: Path, tmp_path: Path) -> None:
    """Three of each of 25 buildings, some of which differ by a step of the photographer: none is a copy."""
    from sppfeat import RunOptions, extract_folder, open_store

    extract_folder(shared / "data" / "kth-buildings" / "server", tmp_path / "f.h5", None, RunOptions(device="cpu"))
    store = open_store(tmp_path / "f.h5")
    assert len(store) == 75 and find_duplicates(store, 0.95).groups and not find_duplicates(store).groups
