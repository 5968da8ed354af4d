"""Parts of photographs are found where they were cut; what only looks alike is none."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

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


@settings(max_examples=60, deadline=None)
@given(
    part=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    whole=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    seed=st.integers(0, 2**32 - 1),
)
def test_noise_of_any_size_is_compared(part: tuple[int, int], whole: tuple[int, int], seed: int) -> None:
    draw = np.random.default_rng(seed)
    one, other = (Image.fromarray(draw.integers(0, 256, size, np.uint8)) for size in (part, whole))
    found = place_part(one, other)
    if found is not None:
        x1, y1, x2, y2 = found.box
        assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 and found.difference <= registration.LARGEST_DIFFERENCE


def test_correlations_equal_those_of_every_place(photo: Image.Image) -> None:
    """The first size tried, the largest that fits, and the smallest; each place compared by itself."""
    part, whole = gray(cut(photo, (0.2, 0.1, 0.6, 0.7)), PART_SIDE), gray(photo, WHOLE_SIDE)
    found = registration._likely(part, whole)
    scale = 64 / max(whole.size)
    width, height = (round(side * scale) for side in whole.size)
    pixels = np.asarray(whole.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    part.thumbnail((64, 64), Image.Resampling.BICUBIC)
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
