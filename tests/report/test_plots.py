"""Curves and histograms: what is drawn is proportional to the numbers."""

from __future__ import annotations

import pytest

from sppfeat.report import plot_counts, plot_line


def test_a_histogram_is_proportional() -> None:
    plot = plot_counts([3, 0, 12], (0, 10, 20, 30), of="queries", unit=" %")
    heights = [height for _, _, _, height, _ in plot.bars]
    assert heights[1] == 0 and heights[2] == pytest.approx(4 * heights[0], abs=0.3) and heights[0] > 10
    bottoms = {round(top + height, 1) for _, top, _, height, _ in plot.bars}
    (zero,) = bottoms
    assert dict((text, at) for at, text in plot.levels)["0"] == zero
    lefts = [left for left, *_ in plot.bars]
    assert lefts == sorted(lefts) and lefts[0] + plot.bars[0][2] < lefts[1]
    assert plot.bars[2][4] == "20 to 30 %: 12 queries" and [text for _, text in plot.ticks] == ["0", "10", "20", "30"]


def test_counts_have_whole_levels() -> None:
    """No level of half a query."""
    for counts in ([0, 1], [0, 0], [1, 2]):
        levels = [float(text) for _, text in plot_counts(counts, (0, 1, 2), of="queries").levels]
        assert levels == [float(round(level)) for level in levels] and len(set(levels)) == len(levels) > 1


def test_a_curve_rises_with_its_values() -> None:
    plot = plot_line([(0, 10.0), (1, 20.0), (3, 15.0)], ticks=[(0, "0"), (3, "3")], unit=" %")
    (x0, y0, _), (x1, y1, text), (x2, y2, _) = plot.points
    assert y1 < y2 < y0 and x2 - x1 == pytest.approx(2 * (x1 - x0), abs=0.2) and text == "20.0 %"
    assert y0 - y1 == pytest.approx(2 * (y0 - y2), abs=0.2) and plot.bars == []
