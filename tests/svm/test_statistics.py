"""Intervals and tests of differences, held against SciPy and against what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sppfeat.svm.statistics import corrected_t_test, interval, mcnemar, paired_bootstrap, two_sided_t


@pytest.mark.parametrize("freedom", [1, 2, 3, 9, 30, 99, 999])
@pytest.mark.parametrize("t", [0.0, 0.1, 1.0, 2.5, 8.0, 40.0])
def test_probabilities_of_students_t(t: float, freedom: int) -> None:
    assert two_sided_t(t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), rel=1e-6, abs=1e-14)


def test_the_corrected_test() -> None:
    differences = [0.4, 1.1, -0.2, 0.9, 0.5]
    mean, variance = np.mean(differences), np.var(differences, ddof=1)
    t = mean / math.sqrt((1 / 5 + 50 / 30) * variance)
    assert corrected_t_test(differences, 30, 50) == pytest.approx(2 * stats.t.sf(t, 4))
    assert corrected_t_test(differences, 30, 50) > stats.ttest_1samp(differences, 0).pvalue
    assert math.isnan(corrected_t_test([1.0], 3, 3)) and corrected_t_test([0.0, 0.0], 3, 3) == 1
    assert corrected_t_test([1.0, 1.0], 3, 3) == 0


def test_mcnemar_is_the_exact_binomial_test() -> None:
    generator = np.random.default_rng(0)
    for count in (5, 60, 2000):
        right, other = generator.random(count) < 0.8, generator.random(count) < 0.75
        only, others = int((right & ~other).sum()), int((~right & other).sum())
        expected = stats.binomtest(only, only + others).pvalue
        assert mcnemar(right, other) == pytest.approx(expected)
    assert mcnemar(right, right) == 1


def test_an_interval_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        right = generator.random(120) < 0.7
        low, high = interval(
            [(np.zeros(120, int), lambda times, right=right: float(times @ right / 120))], resamples=200
        )
        covered += low <= 0.7 <= high
    assert 0.88 <= covered / 200 <= 0.99
    low, high = interval([(np.zeros(4, int), lambda times: math.nan)], resamples=10)
    assert math.isnan(low) and math.isnan(high)


def test_images_are_drawn_within_their_strata() -> None:
    strata, seen = np.array([2, 0, 1, 2, 0, 2]), []

    def measure(times: np.ndarray) -> float:
        seen.append(times)
        return float(times[0])

    low, high = interval([(strata, measure)], resamples=300)
    for stratum in range(3):
        totals = {int(times[strata == stratum].sum()) for times in seen}
        assert totals == {int((strata == stratum).sum())}
    assert {int(times[2]) for times in seen} == {1} and {int(times[0]) for times in seen} == {0, 1, 2, 3}
    assert abs(np.mean([times[0] for times in seen]) - 1) < 0.2 and (low, high) == (0, 3)


def test_the_paired_bootstrap() -> None:
    generator = np.random.default_rng(2)
    good, bad = generator.random(300) < 0.9, generator.random(300) < 0.7
    measure, other = (lambda times, of=of: float(times @ of / 300) for of in (good, bad))
    assert paired_bootstrap(300, measure, other) < 0.01 and paired_bootstrap(300, measure, measure) == 1
