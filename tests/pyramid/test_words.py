"""Pooling of maps of words against the one-hot map, pooled by plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from sppfeat.pyramid import level_weights, pool_maps, pool_word_windows, pool_words, words

LEVELS = st.lists(st.integers(1, 6), min_size=1, max_size=4, unique=True)
SIDES = st.integers(1, 9)


def grid(height: int, width: int, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, count, (height, width), np.int32)


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, st.integers(1, 5), LEVELS, st.sampled_from(["avg", "max"]), st.integers(0, 1 << 20))
def test_pooling_is_that_of_the_one_hot_map(
    height: int, width: int, count: int, levels: list[int], pooling: str, seed: int
) -> None:
    maps = np.stack([grid(height, width, count, seed + at) for at in range(2)])
    expected = np.stack([reference.pool_words(one, count, levels, pooling) for one in maps])
    found = pool_words(maps, count, levels, pooling)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, st.integers(1, 5), LEVELS, st.sampled_from(["avg", "max"]), st.integers(0, 1 << 20))
def test_windows_are_pooled_as_maps_of_their_own(
    height: int, width: int, count: int, levels: list[int], pooling: str, seed: int
) -> None:
    word_map = grid(height, width, count, seed)
    corners = np.random.default_rng(seed).integers(0, [width, height] * 2, (5, 4))
    rois = np.concatenate([np.minimum(corners[:, :2], corners[:, 2:]), np.maximum(corners[:, :2], corners[:, 2:])], 1)
    expected = [
        reference.pool_words(word_map[y1 : y2 + 1, x1 : x2 + 1], count, levels, pooling) for x1, y1, x2, y2 in rois
    ]
    found = pool_word_windows(word_map, rois, count, levels, pooling)
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-6, atol=1e-9)


def test_no_windows_give_no_rows() -> None:
    assert pool_word_windows(grid(3, 4, 5, 0), np.zeros((0, 4), np.int64), 5, (2, 1), "avg").shape == (0, 25)


def test_many_words_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    word_map, rois = grid(8, 7, 40, 1), np.array([[0, 0, 6, 7], [2, 1, 3, 5]])
    whole = pool_word_windows(word_map, rois, 40, (3, 1), "avg")
    monkeypatch.setattr(words, "_TABLE_BYTES", 4 * 9 * 8 * 7)
    np.testing.assert_array_equal(pool_word_windows(word_map, rois, 40, (3, 1), "avg"), whole)


def test_bins_are_those_of_maps_of_channels() -> None:
    """Without weights, maxima are what networks' maps give."""
    maps = np.stack([grid(11, 6, 7, seed) for seed in range(3)])
    hot = np.stack([reference.one_hot(one, 7).transpose(1, 2, 0) for one in maps]).astype(np.float32)
    np.testing.assert_array_equal(pool_words(maps, 7, (4, 2, 1), "max"), pool_maps(hot, (4, 2, 1), "max", 3.0))


def test_weights_are_the_papers() -> None:
    """Lazebnik, Schmid, Ponce 2006: for L = 2, 1/4, 1/4 and 1/2 from the coarsest level to the finest."""
    assert level_weights((4, 2, 1)) == {1: 0.25, 2: 0.25, 4: 0.5}
    assert level_weights((1, 8, 4, 2)) == {1: 0.125, 2: 0.125, 4: 0.25, 8: 0.5}
    assert level_weights((1,)) == {1: 1} and level_weights((3, 6)) == {3: 0.5, 6: 0.5}
    for levels in ((4, 2, 1), (5,), (1, 2, 3, 4, 5)):
        assert sum(level_weights(levels).values()) == 1
        assert [level_weights(levels)[n] for n in levels] == reference.level_weights(levels)


def test_the_kernel_of_the_rows_is_the_pyramid_match_with_square_roots() -> None:
    """Of rows under a signed square root, the product is the sum over levels of weight x similarity of the bins."""
    first, second = (grid(8, 8, 4, seed) for seed in (1, 2))
    a, b = (np.sqrt(pool_words(one[None], 4, (4, 2, 1), "avg")[0].astype(np.float64)) for one in (first, second))
    expected = 0.0
    for level, weight in ((1, 0.25), (2, 0.25), (4, 0.5)):
        size = 8 // level
        for y in range(level):
            for x in range(level):
                part = np.s_[y * size : (y + 1) * size, x * size : (x + 1) * size]
                # Shares of the whole image's cells, as the paper's histograms.
                shares = [np.bincount(one[part].ravel(), minlength=4) / 64 for one in (first, second)]
                expected += weight * np.sqrt(shares[0] * shares[1]).sum()
    assert a @ b == pytest.approx(expected, rel=1e-6)
    assert a @ a == pytest.approx(1) and b @ b == pytest.approx(1)
