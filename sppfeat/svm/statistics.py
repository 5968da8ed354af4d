"""How far figures can be trusted: intervals by resampling images, and tests of differences. Plain NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

RESAMPLES: Final = 1000
# Images that are resampled are drawn from this seed, apart from those of the splits.
_SEED: Final = 20140618


def interval(
    measures: Sequence[tuple[np.ndarray, Callable[[np.ndarray], float]]],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """The bootstrap interval of a mean of measures, each of images that are drawn with replacement (Efron 1979).

    measures: for each trial, the stratum of each test image [n], numbers from 0 on, and the measure of a draw, from how
    often each is drawn [n]. As many are drawn from each stratum as it has. Draws for which a measure is not a number do
    not count.
    """
    generator = np.random.default_rng(_SEED)
    values = np.empty((len(measures), resamples))
    for trial, (strata, measure) in enumerate(measures):
        order = np.argsort(strata, kind="stable")
        sizes = np.bincount(strata)
        size, start = np.repeat(sizes, sizes), np.repeat(np.cumsum(sizes) - sizes, sizes)
        for draw in range(resamples):
            drawn = order[start + generator.integers(0, size)]
            values[trial, draw] = measure(np.bincount(drawn, minlength=len(order)))
    means = values.mean(0)
    means = means[np.isfinite(means)]
    if not len(means):
        return math.nan, math.nan
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def corrected_t_test(differences: Sequence[float], train: int, test: int) -> float:
    """The p-value of paired differences [J] of repeated random splits being 0 (Nadeau, Bengio 2003).

    Splits share images, so that the variance of their mean is not that of J independent ones over J, but 1 / J + test /
    train times that of the differences. train, test: images of the parts. NaN for fewer than two splits.
    """
    count = len(differences)
    if count < 2:
        return math.nan
    mean, variance = float(np.mean(differences)), float(np.var(differences, ddof=1))
    if variance == 0:
        return 1.0 if mean == 0 else 0.0
    t = abs(mean) / math.sqrt((1 / count + test / train) * variance)
    return two_sided_t(t, count - 1)


def two_sided_t(t: float, freedom: int) -> float:
    """The probability that Student's t with so many degrees of freedom is farther from 0 than t."""
    # By the substitution t = tan(angle) * sqrt(freedom), the density is cos(angle) ** (freedom - 1).
    factor = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    angle = math.atan2(t, math.sqrt(freedom))
    nodes, weights = np.polynomial.legendre.leggauss(200)
    half = (math.pi / 2 - angle) / 2
    places = angle + half * (nodes + 1)
    return min(1.0, float(2 * factor * half * (weights @ np.cos(places) ** (freedom - 1))))


def mcnemar(right: np.ndarray, other_right: np.ndarray) -> float:
    """The exact p-value of McNemar's test: that two classifiers are right equally often on the same images [N]."""
    only, other_only = int((right & ~other_right).sum()), int((~right & other_right).sum())
    count = only + other_only
    if not count:
        return 1.0
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2)
        for k in range(min(only, other_only) + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def paired_bootstrap(count: int, measure: Callable[[np.ndarray], float], other: Callable[[np.ndarray], float]) -> float:
    """The p-value of two measures of the same images being equal: twice the share of draws on the other side of 0."""
    generator = np.random.default_rng(_SEED)
    differences = np.empty(RESAMPLES)
    for draw in range(RESAMPLES):
        times = np.bincount(generator.integers(0, count, count), minlength=count)
        differences[draw] = measure(times) - other(times)
    differences = differences[np.isfinite(differences)]
    if not len(differences):
        return math.nan
    return min(1.0, 2 * min(float((differences <= 0).mean()), float((differences >= 0).mean())))
