"""Resizing: our compiled code and Pillow give the same bytes, those of plain whole numbers."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import line_weights, resize

from sppfeat.images import coefficients, resampling
from sppfeat.images.resampling import PRECISION_BITS, resample

FILTERS = ("bilinear", "bicubic", "lanczos")
sides = st.integers(1, 40)


def noise(width: int, height: int, seed: int = 0, *, extreme: bool = False) -> Image.Image:
    """extreme: black and white alone, for which bicubic and Lanczos overshoot."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 2, (height, width, 3)) * 255 if extreme else random.integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def compiled() -> ModuleType:
    found = resampling._compiled()
    if found is None:
        pytest.skip("the compiled module is not there, or this processor lacks AVX2")
    return found


@pytest.fixture
def pillow_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "_compiled", lambda: None)


@given(width=sides, height=sides, to=st.tuples(sides, sides), extreme=st.booleans(), by=st.sampled_from(FILTERS))
@example(width=21, height=42, to=(26, 37), extreme=False, by="bicubic")  # Pillow 13 resizes its columns first
@example(width=9, height=40, to=(9, 7), extreme=True, by="lanczos")
@example(width=40, height=9, to=(7, 9), extreme=True, by="bicubic")
@settings(max_examples=60, deadline=None)
def test_values_are_those_of_whole_numbers(
    width: int, height: int, to: tuple[int, int], extreme: bool, by: str
) -> None:
    pixels = noise(width, height, width * height, extreme=extreme)
    expected = resize(np.asarray(pixels), to, by)
    np.testing.assert_array_equal(resample(pixels, to, by), expected)
    if pixels.size != to:
        np.testing.assert_array_equal(resampling._by_pillow(pixels, to, by), expected)


@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    to=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    extreme=st.booleans(),
    by=st.sampled_from(FILTERS),
)
@settings(max_examples=200, deadline=None)
def test_compiled_code_gives_what_pillow_gives(
    compiled: ModuleType, width: int, height: int, to: tuple[int, int], extreme: bool, by: str
) -> None:
    pixels = noise(width, height, width + height, extreme=extreme)
    found = resampling._by_processor(compiled, pixels, to, by)
    np.testing.assert_array_equal(found, resampling._by_pillow(pixels, to, by))


@pytest.mark.parametrize(
    "size, to", [((3000, 2), (40, 30)), ((2, 3000), (30, 40)), ((1, 1), (64, 64)), ((900, 7), (1, 1))]
)
def test_extreme_shapes(compiled: ModuleType, size: tuple[int, int], to: tuple[int, int]) -> None:
    pixels = noise(*size)
    for by in FILTERS:
        found = resampling._by_processor(compiled, pixels, to, by)
        np.testing.assert_array_equal(found, resampling._by_pillow(pixels, to, by))


def dense_coefficients(length: int, target: int, by: str) -> np.ndarray:
    """[target, length] the weight of every input."""
    first, weights = coefficients(length, target, by)
    assert first.dtype == weights.dtype == np.int32
    found = np.zeros((target, length + weights.shape[1]), np.int64)
    for at in range(target):
        found[at, first[at] : first[at] + weights.shape[1]] = weights[at]
    assert not found[:, length:].any()
    return found[:, :length]


lengths = st.one_of(st.integers(1, 60), st.integers(61, 900))


@given(length=lengths, target=lengths, by=st.sampled_from(FILTERS))
@example(length=333, target=224, by="bicubic")
@settings(max_examples=200, deadline=None)
def test_coefficients_are_those_of_pillow(length: int, target: int, by: str) -> None:
    """In images of 32 bits coefficients are not rounded, but values are: one of 2^22 shows them rounded."""
    ones = Image.fromarray(np.eye(length, dtype=np.int32) << PRECISION_BITS)
    resized = ones.resize((target, length), resampling._FILTERS[by])
    found = dense_coefficients(length, target, by)
    np.testing.assert_array_equal(found, np.asarray(resized).T)
    # Sums of bytes by these weights fit into 32 bits.
    assert np.abs(found).sum(1).max() * 255 + (1 << (PRECISION_BITS - 1)) < 1 << 31


@pytest.mark.parametrize("by", FILTERS)
def test_coefficients_are_whole_numbers_by_plain_loops(by: str) -> None:
    random = np.random.default_rng(0)
    for length, target in [*np.ndindex(12, 12), *random.integers(12, 200, (40, 2)).tolist()]:
        expected = np.zeros((target + 1, length + 1), np.int64)
        for row, (first, weights) in zip(expected, line_weights(length + 1, target + 1, by), strict=True):
            row[first : first + len(weights)] = weights
        np.testing.assert_array_equal(dense_coefficients(length + 1, target + 1, by), expected)


def test_coefficients_are_shared_and_cannot_be_changed() -> None:
    first, weights = coefficients(30, 20, "bicubic")
    assert coefficients(30, 20, "bicubic")[1] is weights
    for array in (first, weights, *coefficients(20, 20, "lanczos")):
        with pytest.raises(ValueError):
            array[0] = 1


@pytest.fixture
def small_blocks() -> Iterator[None]:
    """Pillow's memory in blocks of 64 kB, so that an image has several."""
    core = Image.core
    before = core.get_block_size()  # type: ignore[attr-defined]
    core.clear_cache()  # type: ignore[attr-defined]
    core.set_block_size(1 << 16)  # type: ignore[attr-defined]
    yield
    core.set_block_size(before)  # type: ignore[attr-defined]


def test_memory_in_several_blocks_is_left_to_pillow(compiled: ModuleType, small_blocks: None) -> None:
    pixels = noise(400, 300)
    pixels = pixels.crop((0, 0, *pixels.size))
    assert resampling._by_processor(compiled, pixels, (100, 90), "bicubic") is None
    expected = resampling._by_pillow(pixels, (100, 90), "bicubic")
    np.testing.assert_array_equal(resample(pixels, (100, 90), "bicubic"), expected)


def test_without_compiled_code_pillow_does_it(pillow_alone: None) -> None:
    pixels = noise(50, 41)
    expected = resize(np.asarray(pixels), (30, 60), "lanczos")
    np.testing.assert_array_equal(resample(pixels, (30, 60), "lanczos"), expected)


def test_code_that_gives_other_values_is_not_used(compiled: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    original = resampling._by_pillow

    def other(*arguments: object) -> np.ndarray:
        found = original(*arguments).copy()  # type: ignore[arg-type]
        found[-1, -1, -1] ^= 1
        return found

    monkeypatch.setattr(resampling, "_by_pillow", other)
    assert resampling._compiled.__wrapped__() is None


def test_memory_that_does_not_fit_is_refused(compiled: ModuleType) -> None:
    pixels = noise(20, 10)
    _, memory = pixels.__arrow_c_array__()
    for size, shape, to, number in (
        ((20, 11), (5, 6, 3), (6, 5), 1),
        ((20, 10), (5, 6, 2), (6, 5), 1),
        ((20, 10), (5, 6, 3), (6, 5), 3),
        ((20, 10), (0, 6, 3), (6, 0), 1),
        ((-20, -10), (5, 6, 3), (6, 5), 1),
    ):
        with pytest.raises(ValueError, match="expected pixels of 4 bytes and room for pixels of 3"):
            compiled.resize(memory, size, np.zeros(shape, np.uint8), to, number)
    with pytest.raises(ValueError):
        compiled.resize(object(), (20, 10), np.zeros((5, 6, 3), np.uint8), (6, 5), 1)
