"""Metrics against plain loops written from the definitions, and scikit-learn."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from sppfeat import UsageError
from sppfeat.svm.metrics import (
    AP_METHODS,
    accuracy_per_class,
    average_precision,
    average_precisions,
    mean_over_classes,
    ranked_average_precision,
    recall_at,
)


def naive_average_precision(ranked: list[int], total: int, method: str) -> float:
    """Rank by rank in exact fractions, junk skipped; after the VOC devkits and Oxford's compute_ap."""
    curve: list[tuple[Fraction, Fraction]] = []  # recall, precision after every rank
    found = 0
    for rank, target in enumerate((target for target in ranked if target), 1):
        found += target > 0
        curve.append((Fraction(found, total), Fraction(found, rank)))
    if method == "11-point":
        tenths = [max((p for r, p in curve if r >= Fraction(t, 10)), default=Fraction(0)) for t in range(11)]
        return float(sum(tenths) / 11)
    area = Fraction(0)
    recall, precision = Fraction(0), Fraction(1)
    for at, (next_recall, next_precision) in enumerate(curve):
        height = {
            "step": next_precision,
            "area": max(p for _, p in curve[at:]),
            "trapezoid": (precision + next_precision) / 2,
        }[method]
        area += (next_recall - recall) * height
        recall, precision = next_recall, next_precision
    return float(area)


rankings = st.lists(st.sampled_from([-1, -1, 0, 1]), min_size=1, max_size=40).filter(lambda ranked: 1 in ranked)


@settings(max_examples=200, deadline=None)
@given(rankings, st.integers(0, 5), st.sampled_from(AP_METHODS))
def test_rankings_agree_with_plain_loops(ranked: list[int], missing: int, method: str) -> None:
    total = ranked.count(1) + missing
    found = ranked_average_precision(np.array(ranked), relevant=total, method=method)
    assert found == pytest.approx(naive_average_precision(ranked, total, method), abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(rankings, st.data())
def test_step_agrees_with_scikit_learn_with_ties_and_junk(targets: list[int], data: st.DataObject) -> None:
    scores = data.draw(st.lists(st.integers(0, 8), min_size=len(targets), max_size=len(targets)))
    counted = np.array(targets) != 0
    expected = average_precision_score(np.array(targets)[counted] > 0, np.array(scores)[counted])
    assert average_precision(np.array(targets), np.array(scores)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("method", ["area", "11-point", "trapezoid"])
def test_equal_scores_keep_the_order_of_the_rows(method: str) -> None:
    targets, scores = np.array([-1, 1, 1, -1]), np.array([0.0, 0.0, 1.0, 1.0])
    expected = naive_average_precision([1, -1, -1, 1], 2, method)
    assert average_precision(targets, scores, method=method) == pytest.approx(expected)


def test_eleven_points_of_a_worked_example() -> None:
    # Recalls 1/2 and 1 with precisions 1 and 2/3: six recalls up to 0.5, five above.
    assert ranked_average_precision(np.array([1, -1, 1]), method="11-point") == pytest.approx((6 + 5 * 2 / 3) / 11)


def test_scores_may_be_infinite_but_not_nan() -> None:
    assert average_precision(np.array([1, -1]), np.array([0.0, -np.inf])) == 1
    with pytest.raises(UsageError, match="NaN in row 1"):
        average_precision(np.array([1, -1]), np.array([0.0, np.nan]))


def test_classes_without_rows_are_left_out_of_means() -> None:
    targets, scores = np.array([[1, -1], [-1, 0]]), np.array([[0.5, 0.1], [0.7, 0.2]])
    found = average_precisions(targets, scores)
    np.testing.assert_array_equal(found, [0.5, np.nan])
    assert mean_over_classes(found) == 0.5
    with pytest.raises(UsageError, match="at least one class"):
        mean_over_classes(np.array([np.nan]))


def test_accuracy_of_each_class() -> None:
    labels, predicted = np.array(["a", "a", "b", "b"]), np.array(["a", "b", "b", "c"])
    np.testing.assert_array_equal(accuracy_per_class(labels, predicted, np.array(["a", "b", "c"])), [0.5, 0.5, np.nan])
    with pytest.raises(UsageError, match=r"\[4\] and \[3\]"):
        accuracy_per_class(labels, predicted[:3], np.array(["a"]))


def test_recall_skips_junk() -> None:
    assert [recall_at(np.array([0, -1, 0, 1]), k) for k in (1, 2, 10)] == [0, 1, 1]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown method 'ap'"):
        ranked_average_precision(np.array([1]), method="ap")
    with pytest.raises(UsageError, match="at least the 2 in the ranking, found 1"):
        ranked_average_precision(np.array([1, 1]), relevant=1)
    with pytest.raises(UsageError, match=r"\[2\] and \[3\]"):
        average_precision(np.zeros(2), np.zeros(3))
