"""Rows in the store's type."""

from __future__ import annotations

import numpy as np
import pytest

from sppfeat.extraction import values


@pytest.fixture(params=["compiled", "numpy"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(values, "_compiled", lambda: None)
    elif values._compiled() is None:
        pytest.skip("_half was not compiled, or the processor lacks F16C")
    return str(request.param)


def test_every_exponent_is_rounded_as_numpy_rounds(how: str) -> None:
    """All signs, exponents and leading bits, with the last bits around each tie; infinities and NaNs are among them."""
    leading = np.arange(1 << 16, dtype=np.uint32) << 16
    found = (leading[:, None] | np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0xFFFF], np.uint32)).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = found.astype(np.float16)
    stored = values.as_stored(found, "float16")
    assert stored.shape == expected.shape and stored.dtype == np.float16
    # What a NaN carries is no value.
    same = (stored.view(np.uint16) == expected.view(np.uint16)) | (np.isnan(stored) & np.isnan(expected))
    assert same.all(), found[~same][:5]


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 23])
def test_lengths_that_are_no_whole_vectors(how: str, count: int) -> None:
    row = np.linspace(-3, 70_000, 2 * count, dtype=np.float32)[::2]  # not contiguous
    with np.errstate(over="ignore"):
        assert np.array_equal(values.as_stored(row, "float16"), row.astype(np.float16))


def test_a_row_beyond_the_range_of_float16_has_its_reason(how: str) -> None:
    rows = values.to_stored(np.array([[1.0, 65_519.0], [2.0, 65_520.0], [np.nan, 1.0]], np.float32), "float16")
    assert isinstance(rows[0], np.ndarray) and rows[0].tolist() == [1.0, 65_504.0]
    assert rows[1] == "the descriptor is not finite as float16 (largest value 6.55e+04)"
    assert isinstance(rows[2], str) and "nan" in rows[2]


def test_float32_stays_as_it_is() -> None:
    row = np.array([[0.1, 1e30]], np.float32)
    assert values.as_stored(row, "float32") is row
