"""Parts of photographs are found where they were cut; what only looks alike is none."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps

from sppfeat.retrieval import registration
from sppfeat.retrieval.registration import PART_SIDE, WHOLE_SIDE, Placed, place_part

Edges = tuple[float, float, float, float]


def gray(image: Image.Image, side: int) -> Image.Image:
    shown = image.convert("L")
    shown.thumbnail((side, side), Image.Resampling.BICUBIC)
    return shown


def placed(part: Image.Image, whole: Image.Image) -> Placed | None:
    return place_part(gray(part, PART_SIDE), gray(whole, WHOLE_SIDE))


def cut(image: Image.Image, edges: Edges) -> Image.Image:
    """Edges: x1, y1, x2, y2 from 0 to 1."""
    return image.crop(tuple(round(edge * side) for edge, side in zip(edges, image.size * 2, strict=True)))  # type: ignore[arg-type]


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality)
    return Image.open(content)


def resized(image: Image.Image, factor: float, stretch: float = 1.0) -> Image.Image:
    size = round(image.width * factor * stretch), round(image.height * factor)
    return image.resize(size, Image.Resampling.LANCZOS)


@pytest.fixture(params=["animals/cat.jpg", "space/rocket.jpg", "places/forest.webp", "objects/coins.png"])
def photo(request: pytest.FixtureRequest, photos: Path) -> Image.Image:
    with Image.open(photos / request.param) as image:
        return image.convert("RGB")


@pytest.mark.parametrize(
    "edges", [(0.1, 0.15, 0.85, 0.9), (0, 0.2, 0.8, 1), (0.3, 0.3, 0.7, 0.75), (0.03, 0.03, 0.97, 0.97), (0, 0, 1, 1)]
)
def test_parts_are_where_they_were_cut(photo: Image.Image, edges: Edges) -> None:
    part = cut(photo, edges)
    expected = [round(edge * side) / side for edge, side in zip(edges, photo.size * 2, strict=True)]
    for changed in (
        part,
        recompressed(part, 30),
        resized(part, 0.5),
        resized(part, 1.7),
        resized(part, 1, 1.03),
        part.convert("L"),
    ):
        found = placed(changed, photo)
        assert found is not None
        assert found.box.tolist() == pytest.approx(expected, abs=0.008)


def test_what_was_changed_otherwise_is_no_part(photo: Image.Image) -> None:
    part = cut(photo, (0.1, 0.15, 0.85, 0.9))
    for changed in (
        ImageOps.mirror(part),
        part.transpose(Image.Transpose.ROTATE_90),
        part.rotate(15),
        ImageOps.invert(part),
        part.point(lambda value: value // 2),
    ):
        assert placed(changed, photo) is None
    assert placed(photo, part) is None  # the whole is no part of its part
    covered = part.copy()
    covered.paste("red", (20, 20, 20 + part.width // 4, 20 + part.height // 4))
    assert placed(covered, photo) is None


def test_no_photograph_is_a_part_of_another_one_of_its_class(photos: Path) -> None:
    files = sorted(path for path in photos.rglob("*") if path.suffix in {".jpg", ".png", ".webp"})
    parts, wholes = [], []
    for file in files:
        with Image.open(file) as image:
            parts.append(gray(image.convert("RGB"), PART_SIDE))
            wholes.append(gray(image.convert("RGB"), WHOLE_SIDE))
    assert len(files) == 36
    found = [
        (files[one].name, files[other].name)
        for one, part in enumerate(parts)
        for other, whole in enumerate(wholes)
        if one != other and files[one].parent == files[other].parent and place_part(part, whole) is not None
    ]
    assert found == []


@pytest.mark.parametrize("size", [(200, 150), (1, 1), (1, 300), (300, 1), (7, 9)])
def test_images_without_contrast_are_no_parts(photo: Image.Image, size: tuple[int, int]) -> None:
    flat = Image.new("L", size, 255)
    noise = np.random.default_rng(0).integers(250, 256, size[::-1], np.uint8)
    for one in (flat, Image.fromarray(noise)):
        assert placed(one, photo) is None and placed(one, flat) is None
    assert placed(photo, flat) is None


def test_what_fits_in_many_places_is_no_part(photo: Image.Image) -> None:
    """A dim part, a gradient, and stripes, each cut from the very image that it is compared with."""
    dim = photo.convert("L").point(lambda value: 120 + value // 25)
    rows, columns = np.mgrid[:300, :400]
    sky = Image.fromarray((90 + rows / 3 + columns / 8).astype(np.uint8))
    stripes = Image.fromarray((128 + 100 * np.sin(columns / 9)).astype(np.uint8))
    for whole in (dim, sky, stripes):
        assert placed(cut(whole, (0.1, 0.1, 0.8, 0.7)), whole) is None


def screen(seed: int) -> Image.Image:
    """A window of a program with dark bars, and gray text of its own."""
    draw = np.random.default_rng(seed)
    image = Image.new("RGB", (1280, 720), "white")
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, 260, 720), fill="#1c2530")
    pen.rectangle((0, 0, 1280, 60), fill="#0b1016")
    for y in range(90, 700, 50):
        letters = draw.choice(list("abcdefghijklmno    "), draw.integers(20, 90))
        pen.text((290, y), "".join(letters), fill="#777", font_size=18)
    return image


def page(seed: int, lines: int) -> Image.Image:
    """A page with a few lines of words, shown as bars."""
    draw = np.random.default_rng(seed)
    image = Image.new("RGB", (1240, 1754), "white")
    pen = ImageDraw.Draw(image)
    for line in range(lines):
        x = 120
        while (width := int(draw.integers(30, 160))) + x < 1120:
            pen.rectangle((x, 150 + 50 * line, x + width, 172 + 50 * line), fill="black")
            x += width + 20
    return image


@pytest.mark.parametrize("make", [screen, lambda seed: page(seed, 4), lambda seed: page(seed, 12)])
def test_images_with_other_text_are_no_parts(make: Callable[[int], Image.Image]) -> None:
    images = [make(seed) for seed in range(5)]
    edges = (0.05, 0.03, 0.94, 0.97)
    for one in images:
        found = [placed(each, other) is not None for other in images for each in (one, cut(one, edges))]
        assert found == [other is one for other in images for _ in range(2)]


@pytest.mark.parametrize("ratio", [1, 6, 12, 20])
@pytest.mark.parametrize("turned", [False, True])
def test_panoramas(photos: Path, ratio: int, turned: bool) -> None:
    names = ["animals/cat.jpg", "space/rocket.jpg", "places/fields.jpg", "people/astronaut.jpg"]
    images = [ImageOps.fit(Image.open(photos / name).convert("RGB"), (240, 160)) for name in names]
    whole = Image.new("RGB", (160 * ratio, 160))
    for place in range(ratio):
        whole.paste(images[place % 4], (160 * place, 0))
    if turned:
        whole = whole.transpose(Image.Transpose.TRANSPOSE)
    edges = (0.2, 0.1, 0.9, 0.95)
    found = placed(cut(whole, edges), whole)
    assert found is not None and found.box.tolist() == pytest.approx(edges, abs=0.02)


@settings(max_examples=60, deadline=None)
@given(
    part=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    whole=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    seed=st.integers(0, 2**32 - 1),
)
def test_noise_of_any_size_is_no_part(part: tuple[int, int], whole: tuple[int, int], seed: int) -> None:
    draw = np.random.default_rng(seed)
    one, other = (Image.fromarray(draw.integers(0, 256, size, np.uint8)) for size in (part, whole))
    assert place_part(one, other) is None


def test_correlations_equal_those_of_every_place(photo: Image.Image) -> None:
    """The first size tried, the largest that fits, and the smallest; each place compared by itself."""
    part, whole = gray(cut(photo, (0.2, 0.1, 0.6, 0.7)), PART_SIDE), gray(photo, WHOLE_SIDE)
    found = registration._likely(part, whole)
    width, height = (round(side * 64 / max(whole.size)) for side in whole.size)
    pixels = np.asarray(whole.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    factor = min(width / part.width, height / part.height)
    part.thumbnail((round(part.width * factor), round(part.height * factor)), Image.Resampling.BICUBIC)
    for correlation, box in found[:3] + found[-1:]:
        x1, y1, x2, y2 = (round(edge * side) for edge, side in zip(box, (width, height) * 2, strict=True))
        w, h = x2 - x1, y2 - y1
        template = np.asarray(part.resize((w, h), Image.Resampling.BICUBIC), np.float64)
        expected = {
            (x, y): np.corrcoef(template.ravel(), pixels[y : y + h, x : x + w].ravel())[0, 1]
            for y in range(height - h + 1)
            for x in range(width - w + 1)
        }
        assert correlation == pytest.approx(max(expected.values()), abs=1e-6)
        assert expected[x1, y1] == pytest.approx(correlation, abs=1e-6)
