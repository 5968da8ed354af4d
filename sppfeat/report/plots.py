"""Curves and bars, laid out for `macros.html` to draw as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

PLOT_WIDTH: Final = 560
PLOT_HEIGHT: Final = 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 30, 34


@dataclass(frozen=True)
class Plot:
    """A curve in the units of an SVG image of PLOT_WIDTH x PLOT_HEIGHT.

    points: x, y and text of each. path: of the line; "" without one. bars: x, y, width, height and text of each.
    ticks, levels: place and text along x and along y.
    """

    points: list[tuple[float, float, str]]
    path: str
    bars: list[tuple[float, float, float, float, str]]
    ticks: list[tuple[float, str]]
    levels: list[tuple[float, str]]


def plot_line(points: Sequence[tuple[float, float]], *, ticks: Sequence[tuple[float, str]], unit: str = "") -> Plot:
    """Lay out one curve; points: x and y, by rising x. ticks: x and its text, thinned where they crowd."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high, step = _range(min(ys), max(ys))

    def across(x: float) -> float:
        share = (x - xs[0]) / ((xs[-1] - xs[0]) or 1)
        return round(_LEFT + share * (PLOT_WIDTH - _LEFT - _RIGHT), 1)

    placed = [(across(x), _down(y, low, high), f"{y:.1f}{unit}") for x, y in points]
    shown: list[tuple[float, str]] = []
    for x, text in ticks:
        if not shown or across(x) - shown[-1][0] >= 9 * max(len(text), len(shown[-1][1])):
            shown.append((across(x), text))
    path = "M" + " L".join(f"{x},{y}" for x, y, _ in placed)
    return Plot(placed, path, [], shown, _levels(low, high, step))


def plot_counts(counts: Sequence[int], edges: Sequence[float], *, of: str, unit: str = "") -> Plot:
    """Lay out a histogram: counts of what `of` names, between edges, one more than there are counts."""
    low, high, step = _range(0, max(1, max(counts)))
    step = max(step, 1.0)
    width = (PLOT_WIDTH - _LEFT - _RIGHT) / len(counts)
    bars = []
    for at, count in enumerate(counts):
        top = _down(count, low, high)
        text = f"{edges[at]:g} to {edges[at + 1]:g}{unit}: {count:,} {of}"
        bars.append(
            (round(_LEFT + at * width + 1, 1), top, round(width - 2, 1), round(_down(0, low, high) - top, 1), text)
        )
    ticks = [(round(_LEFT + at * width, 1), f"{edge:g}") for at, edge in enumerate(edges)]
    return Plot([], "", bars, ticks, _levels(low, high, step))


def _range(low: float, high: float) -> tuple[float, float, float]:
    """Round ends of an axis, and the step of its levels."""
    step = _round_step((high - low) / 4 or 1.0)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    return low, high if high > low else low + step, step


def _down(y: float, low: float, high: float) -> float:
    return round(PLOT_HEIGHT - _BOTTOM - (y - low) / (high - low) * (PLOT_HEIGHT - _TOP - _BOTTOM), 1)


def _levels(low: float, high: float, step: float) -> list[tuple[float, str]]:
    return [
        (_down(low + number * step, low, high), f"{low + number * step:g}")
        for number in range(round((high - low) / step) + 1)
    ]


def _round_step(length: float) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(length))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= length * 0.999)
