"""Sizes, limits, resizing and batching, against plain arithmetic and torchvision's transforms."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from sppfeat.errors import ImageError
from sppfeat.images import fingerprint_of
from sppfeat.images import resizing as preprocess
from sppfeat.images.batching import FULL_BATCH_PIXELS, ShapeBatcher
from sppfeat.images.resizing import prepare_image, scaled_size
from sppfeat.recipe import Recipe

PHOTOS = Path(__file__).parents[2] / "photos"
FREE = {"min_side": 1, "max_aspect": 1e6, "max_pixels": 1 << 40}

sides = st.integers(1, 20000)
scales = st.integers(16, 4096)


def save(path: Path, width: int, height: int, **options) -> str:
    """An image whose every pixel differs from its neighbors."""
    y, x = np.mgrid[:height, :width]
    Image.fromarray(np.stack([x % 256, y % 256, (x + y) % 256], axis=-1).astype(np.uint8)).save(path, **options)
    return str(path)


# ---------------------------------------------------------------- sizes


@given(width=sides, height=sides, scale=scales, multiple=st.integers(1, 512))
def test_each_side_is_the_exact_one_rounded_to_the_multiple(width, height, scale, multiple):
    recipe = Recipe(size_multiple=multiple, **FREE)
    found = scaled_size((width, height), scale, recipe)
    for side, original in zip(found, (width, height), strict=True):
        exact = Fraction(original * scale, min(width, height))
        assert side % multiple == 0
        assert side >= multiple
        assert side == multiple or abs(side - exact) <= Fraction(multiple, 2)
    assert min(found) == max(multiple, round(Fraction(scale, multiple)) * multiple)


@given(width=sides, height=sides, scale=scales)
def test_a_multiple_of_one_is_exact(width, height, scale):
    found = scaled_size((width, height), scale, Recipe(size_multiple=1, **FREE))
    assert min(found) == scale
    assert found == tuple(round(Fraction(side * scale, min(width, height))) for side in (width, height))


@given(width=sides, height=sides, scale=scales, limit=st.integers(1, 10**7))
def test_never_more_pixels_than_allowed(width, height, scale, limit):
    recipe = Recipe(min_side=1, max_aspect=1e6, max_pixels=limit)
    for at in (scale, "native"):
        try:
            found = scaled_size((width, height), at, recipe)
        except ImageError as error:
            assert f"more than {limit} (max_pixels)" in str(error)  # noqa: PT017
        else:
            assert found[0] * found[1] <= limit


@given(width=sides, height=sides, scale=scales)
def test_turning_the_image_turns_its_size(width, height, scale):
    for recipe in (Recipe(**FREE), Recipe(crop="center", **FREE)):
        assert scaled_size((width, height), scale, recipe) == scaled_size((height, width), scale, recipe)[::-1]


def test_a_few_sizes_by_hand():
    assert scaled_size((500, 375), 224, Recipe()) == (288, 224)  # 298.67 lies nearer to 288 than to 320
    assert scaled_size((375, 500), 448, Recipe()) == (448, 608)
    assert scaled_size((500, 375), 224, Recipe(size_multiple=1)) == (299, 224)
    assert scaled_size((100, 100), 16, Recipe()) == (32, 32)  # never less than the multiple
    assert scaled_size((37, 1003), "native", Recipe(max_aspect=30)) == (37, 1003)


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (451, 300), (100, 99), (224, 224), (3, 50), (1000, 333)])
def test_center_crop_sizes_are_torchvisions(size):
    resized = transforms.Resize(256)(Image.new("L", size))
    assert scaled_size(size, 224, Recipe(crop="center", min_side=1)) == resized.size


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("size", "scale", "limits", "reason"),
    [
        ((1, 1), 224, {}, "1 x 1 pixels: expected a short side of at least 8 (min_side)"),
        ((7, 90), "native", {}, "7 x 90 pixels: expected a short side of at least 8 (min_side)"),
        ((20000, 50), 224, {}, "20000 x 50 pixels: aspect ratio 400 exceeds 20 (max_aspect)"),
        ((50, 1001), 224, {}, "50 x 1001 pixels: aspect ratio 20.02 exceeds 20 (max_aspect)"),
        ((5000, 900), "native", {}, "5000 x 900 pixels at scale native: more than 4000000 (max_pixels)"),
        ((900, 90), 4096, {}, "40960 x 4096 pixels at scale 4096: more than 4000000 (max_pixels)"),
        ((100, 100), 224, {"max_pixels": 50175}, "224 x 224 pixels at scale 224: more than 50175 (max_pixels)"),
        ((31, 100), "native", {}, "31 x 100 pixels: the backbone needs at least 32 per side at native scale"),
    ],
)
def test_limits_name_the_numbers(size, scale, limits, reason):
    with pytest.raises(ImageError) as raised:
        scaled_size(size, scale, Recipe(**limits), minimum=32)
    assert str(raised.value) == reason


def test_limits_themselves_are_allowed():
    assert scaled_size((8, 160), 224, Recipe()) == (224, 4480)
    assert scaled_size((2000, 2000), "native", Recipe()) == (2000, 2000)
    assert scaled_size((32, 32), "native", Recipe(), minimum=32) == (32, 32)
    # A small image is enlarged at a scale in pixels: the backbone's minimum matters only where nothing is resized.
    assert scaled_size((20, 20), 224, Recipe(), minimum=32) == (224, 224)


def test_limits_hold_for_files(tmp_path):
    for size in ((1, 1), (20000, 50)):
        Image.new("L", size).save(tmp_path / "x.png")
        with pytest.raises(ImageError, match=f"^{size[0]} x {size[1]} pixels"):
            prepare_image(str(tmp_path / "x.png"), Recipe())


# ---------------------------------------------------------------- resizing


def test_every_scale_is_resized_from_the_original(tmp_path):
    path = save(tmp_path / "x.png", 300, 200)
    with Image.open(path) as image:
        expected = [np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for size in ((96, 64), (320, 224))]
    prepared = prepare_image(path, Recipe(scales=(64, 224)))
    assert prepared.size == (300, 200)
    assert prepared.fingerprint == fingerprint_of(path)
    for found, wanted in zip(prepared.inputs, expected, strict=True):
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", ["bicubic", "bilinear", "lanczos"])
def test_interpolation_is_the_recipes(tmp_path, name):
    path = save(tmp_path / "x.png", 300, 200)
    with Image.open(path) as image:
        expected = np.asarray(image.resize((96, 64), getattr(Image.Resampling, name.upper())))
    np.testing.assert_array_equal(prepare_image(path, Recipe(scales=(64,), interpolation=name)).inputs[0], expected)


def test_native_pixels_are_those_of_the_file(tmp_path):
    path = save(tmp_path / "x.png", 301, 203)
    with Image.open(path) as image:
        np.testing.assert_array_equal(prepare_image(path, Recipe(scales=("native",))).inputs[0], np.asarray(image))


def test_a_turned_image_is_scaled_by_its_upright_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "x.png", 300, 200, exif=exif)
    upright, stored = (prepare_image(path, Recipe(scales=(64,), orientation=o)) for o in ("exif", "ignore"))
    assert (upright.size, upright.inputs[0].shape) == ((200, 300), (96, 64, 3))
    assert (stored.size, stored.inputs[0].shape) == ((300, 200), (64, 96, 3))


@pytest.mark.parametrize("photo", ["animals/cat.jpg", "people/astronaut.jpg", "places/forest.webp", "space/hubble.jpg"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_center_crop_equals_torchvisions_transform(photo, interpolation):
    reference = transforms.Compose(
        [transforms.Resize(256, transforms.InterpolationMode(interpolation)), transforms.CenterCrop(224)]
    )
    with Image.open(PHOTOS / photo) as image:
        expected = np.asarray(reference(image.convert("RGB")))
    found = prepare_image(str(PHOTOS / photo), Recipe(crop="center", interpolation=interpolation)).inputs[0]
    np.testing.assert_array_equal(found, expected)


# ---------------------------------------------------------------- draft


@pytest.mark.parametrize("size", [(1600, 1200), (1000, 480), (451, 300), (449, 448), (448, 448), (447, 900), (97, 61)])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("wanted", [(56,), (224,), (64, 224)])
def test_jpeg_draft_only_shrinks_and_never_below_the_target(tmp_path, monkeypatch, size, orientation, wanted):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "x.jpg", *size, exif=exif)
    decoded: list[tuple[int, int]] = []

    def spy(image, turn, *, orientation):
        pixels = original(image, turn, orientation=orientation)
        decoded.append(pixels.size)
        return pixels

    original = preprocess.decode
    monkeypatch.setattr(preprocess, "decode", spy)
    drafted, whole = (prepare_image(path, Recipe(scales=wanted, jpeg_draft=draft)) for draft in (True, False))
    upright = size if orientation == 1 else size[::-1]
    # The size reported is the original's, and the inputs have the sizes that they have without draft.
    assert drafted.size == whole.size == upright
    assert [i.shape for i in drafted.inputs] == [i.shape for i in whole.inputs]
    assert decoded[1] == upright
    largest = [max(i.shape[axis] for i in drafted.inputs) for axis in (1, 0)]
    for side, full, target in zip(decoded[0], upright, largest, strict=True):
        assert min(full, target) <= side <= full
    # Where the decoder could halve at least, it did.
    if all(full >= 2 * target for full, target in zip(upright, largest, strict=True)):
        assert decoded[0][0] <= (upright[0] + 1) // 2


def test_jpeg_draft_stays_close_and_leaves_other_formats_alone(tmp_path):
    photo = str(PHOTOS / "space/hubble.jpg")
    drafted, whole = (prepare_image(photo, Recipe(jpeg_draft=draft)).inputs[0].astype(int) for draft in (True, False))
    assert 0 < np.abs(drafted - whole).mean() < 4
    path = save(tmp_path / "x.png", 1600, 1200)
    drafted, whole = (prepare_image(path, Recipe(jpeg_draft=draft)).inputs[0] for draft in (True, False))
    np.testing.assert_array_equal(drafted, whole)


# ---------------------------------------------------------------- batches

# From small ones to one that alone exceeds what any batch is planned for.
SHAPES = [(64, 64, 3), (64, 96, 3), (448, 448, 3), (448, 608, 3), (900, 900, 3), (4000, 4000, 3)]
arrivals = st.lists(st.sampled_from(SHAPES), max_size=80)


def run(shapes: list[tuple[int, int, int]], batch_size: int, patience: int):
    """(how many inputs had come, keys, shape) of each batch; None for those left to the end."""
    batcher: ShapeBatcher[int] = ShapeBatcher(batch_size, patience=patience)
    out: list[tuple[int | None, list[int]]] = []
    for key, shape in enumerate(shapes):
        # A view of one byte: no memory, whatever the shape.
        for batch in batcher.add(key, np.broadcast_to(np.uint8(0), shape)):
            assert len({pixels.shape for _, pixels in batch}) == 1
            out.append((key, [k for k, _ in batch]))
    for batch in batcher.flush():
        assert len({pixels.shape for _, pixels in batch}) == 1
        out.append((None, [k for k, _ in batch]))
    assert list(batcher.flush()) == []
    return out


def most(shape: tuple[int, int, int], batch_size: int) -> int:
    return max(1, min(batch_size, batch_size * FULL_BATCH_PIXELS // (shape[0] * shape[1])))


@given(shapes=arrivals, batch_size=st.integers(1, 8), patience=st.integers(1, 30))
def test_every_input_comes_out_once_in_bounded_batches_in_time(shapes, batch_size, patience):
    batches = run(shapes, batch_size, patience)
    keys = [key for _, batch in batches for key in batch]
    assert sorted(keys) == list(range(len(shapes)))
    by_shape = defaultdict(list)
    for now, batch in batches:
        shape = shapes[batch[0]]
        assert all(shapes[key] == shape for key in batch)
        assert len(batch) <= most(shape, batch_size)
        assert now is None or all(now - key <= patience for key in batch)
        assert now is not None or all(len(shapes) - 1 - key < patience for key in batch)
        by_shape[shape] += batch
    # Within a shape, first come, first served.
    assert all(keys == sorted(keys) for keys in by_shape.values())
    assert batches == run(shapes, batch_size, patience)


@given(shapes=arrivals, batch_size=st.integers(1, 8))
@settings(max_examples=50)
def test_with_time_enough_only_the_last_batch_of_a_shape_is_not_full(shapes, batch_size):
    sizes = defaultdict(list)
    for _, batch in run(shapes, batch_size, patience=10**6):
        sizes[shapes[batch[0]]].append(len(batch))
    for shape, found in sizes.items():
        assert all(count == most(shape, batch_size) for count in found[:-1])


def test_batches_keep_each_key_with_its_pixels():
    batcher: ShapeBatcher[str] = ShapeBatcher(2, patience=10)
    inputs = {name: np.full((8, 8 + 8 * (at % 2), 3), at, np.uint8) for at, name in enumerate("abcd")}
    out = [pair for name, pixels in inputs.items() for batch in batcher.add(name, pixels) for pair in batch]
    assert [name for name, _ in out] == ["a", "c", "b", "d"]
    assert all(pixels is inputs[name] for name, pixels in out)
