"""Calibration: the fit of a sigmoid, held-out detections, and probabilities whose truth is known."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sppfeat import SppFeatWarning
from sppfeat.detection import calibration as calibrating
from sppfeat.detection.annotations import Annotation
from sppfeat.detection.calibration import MIN_CORRECT, HeldOut, fit_sigmoid, sigmoid


def reference(scores: np.ndarray, correct: np.ndarray) -> tuple[float, float]:
    """Platt's targets as weights: each score counts as correct with its target, and as wrong with the rest."""
    from sklearn.linear_model import LogisticRegression

    high, low = (correct.sum() + 1) / (correct.sum() + 2), 1 / ((~correct).sum() + 2)
    targets = np.where(correct, high, low)
    model = LogisticRegression(C=1e12, tol=1e-12, max_iter=10_000)
    model.fit(
        np.concatenate([scores, scores])[:, None],
        np.repeat([1, 0], len(scores)),
        np.concatenate([targets, 1 - targets]),
    )
    return float(model.coef_[0, 0]), float(model.intercept_[0])


@pytest.mark.parametrize(
    ("count", "slope", "offset"), [(30, 1.0, 0.0), (400, 3.0, -2.0), (2000, 0.3, -4.0), (5, -1.0, 1.0)]
)
def test_the_fit_is_that_of_logistic_regression(count: int, slope: float, offset: float) -> None:
    generator = np.random.default_rng(count)
    scores = generator.normal(-0.5, 1, count)
    correct = generator.random(count) < 1 / (1 + np.exp(-(slope * scores + offset)))
    found, expected = fit_sigmoid(scores, correct), reference(scores, correct)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_separable_scores_are_fitted_as_by_logistic_regression() -> None:
    """Smoothed targets keep the slope finite."""
    scores = np.concatenate([np.linspace(-2, -0.1, 20), np.linspace(0.1, 1, 6)])
    found = fit_sigmoid(scores, scores > 0)
    np.testing.assert_allclose(found, reference(scores, scores > 0), rtol=1e-4)
    assert 0 < found[0] < 100


@pytest.mark.parametrize("count", [1, 2, 50])
def test_scores_of_one_kind_have_the_rate_that_smoothing_gives(count: int) -> None:
    scores = np.linspace(-1, 1, count)
    for correct, expected in ((False, 1 / (count + 2)), (True, (count + 1) / (count + 2))):
        slope, offset = fit_sigmoid(scores, np.full(count, correct))
        assert abs(slope) < 1e-6
        np.testing.assert_allclose(sigmoid(slope * scores + offset), expected, rtol=1e-6)


def test_equal_scores_have_the_mean_of_the_targets() -> None:
    slope, offset = fit_sigmoid(np.full(8, 0.3), np.arange(8) < 2)
    assert slope == 0 and sigmoid(np.array(offset)) == pytest.approx((2 * 3 / 4 + 6 / 8) / 8)


@pytest.mark.parametrize("unit", [1e-30, 1e-3, 1e6, 1e30])
def test_the_unit_of_scores_does_not_matter(unit: float) -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(size=200)
    correct = generator.random(200) < sigmoid(2 * scores)
    slope, offset = fit_sigmoid(scores, correct)
    np.testing.assert_allclose(fit_sigmoid(unit * scores, correct), (slope / unit, offset), rtol=1e-6)
    far = fit_sigmoid(scores + 1000, correct)
    np.testing.assert_allclose(far, (slope, offset - 1000 * slope), rtol=1e-6)


@given(
    st.integers(1, 30).flatmap(
        lambda count: st.tuples(
            arrays(np.float64, count, elements=st.floats(-1e30, 1e30, allow_subnormal=False)), arrays(np.bool_, count)
        )
    )
)
def test_any_scores_are_fitted(rows: tuple[np.ndarray, np.ndarray]) -> None:
    """Without a warning, and no worse than the best constant."""
    scores, correct = rows
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slope, offset = fit_sigmoid(scores, correct)
        likely = sigmoid(slope * scores.astype(float) + offset)
    assert np.isfinite([slope, offset]).all() and ((likely >= 0) & (likely <= 1)).all()
    positives = correct.sum()
    targets = np.where(correct, (positives + 1) / (positives + 2), 1 / (len(correct) - positives + 2))
    losses = [
        -(targets * np.log(np.clip(p, 1e-300, 1)) + (1 - targets) * np.log(np.clip(1 - p, 1e-300, 1))).sum()
        for p in (likely, np.full(len(likely), targets.mean()))
    ]
    assert losses[0] <= losses[1] * (1 + 1e-6) + 1e-6


def test_the_sigmoid_does_not_overflow() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(sigmoid(np.array([-1e300, 0, 1e300])), [0, 0.5, 1])


def annotation(*boxes: tuple[float, float, float, float], labels: list[str], difficult: list[bool]) -> Annotation:
    none = np.zeros(len(boxes), bool)
    return Annotation(np.array(boxes, float).reshape(-1, 4), labels, np.array(difficult, bool), none, (100, 100))


def test_held_out_detections_are_correct_once_per_object_of_their_class() -> None:
    one = annotation((0, 0, 19, 19), (50, 50, 69, 69), labels=["cat", "dog"], difficult=[False, True])
    boxes = np.array([[0, 0, 19, 19], [0, 0, 18, 19], [0, 0, 19, 19], [50, 50, 69, 69], [80, 80, 90, 90]], float)
    labels, scores = np.array([0, 0, 1, 1, 0]), np.array([0.5, 0.7, 0.2, 0.1, -0.3])
    held = HeldOut()
    held.add(7, one, ["cat", "dog"], labels, scores, boxes)
    held.add(3, annotation(labels=[], difficult=[]), ["cat", "dog"], labels[:1], scores[:1], boxes[:1])
    # The better of two on the cat, not the exact one; a cat is no dog; the difficult dog is left out.
    expected = [[3, 0, 0.5, 0], [7, 0, 0.7, 1], [7, 0, 0.5, 0], [7, 0, -0.3, 0], [7, 1, 0.2, 0]]
    np.testing.assert_array_equal(held.state(), expected)
    other = HeldOut()
    other.restore(held.state())
    np.testing.assert_array_equal(other.state(), expected)
    with pytest.raises(ValueError, match="held-out detections are of another kind"):
        other.restore(np.zeros((2, 3)))


def held_out(labels: np.ndarray, scores: np.ndarray, correct: np.ndarray) -> HeldOut:
    held = HeldOut()
    held.restore(np.stack([np.zeros(len(labels)), labels, scores, correct], 1).astype(float))
    return held


def test_probabilities_are_true() -> None:
    """On other detections than those fitted, of three classes whose probabilities are known."""
    generator = np.random.default_rng(0)
    truth = np.array([[2.0, -1.0], [5.0, 0.5], [0.8, -2.0]])

    def sample(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        labels, scores = generator.integers(0, 3, count), generator.normal(-0.3, 0.6, count)
        return labels, scores, generator.random(count) < sigmoid(truth[labels, 0] * scores + truth[labels, 1])

    calibration = held_out(*sample(6000)).calibration(["a", "b", "c"])
    assert calibration is not None and calibration.shape == (3, 2)
    labels, scores, correct = sample(60_000)
    likely = sigmoid(calibration[labels, 0] * scores + calibration[labels, 1])
    for label in range(3):
        mine = labels == label
        bins = np.minimum((10 * likely[mine]).astype(int), 9)
        # The expected calibration error: the distance of mean probability and share of correct ones, over ten bins.
        error = sum(abs(likely[mine][bins == n].sum() - correct[mine][bins == n].sum()) for n in range(10)) / len(bins)
        assert error < 0.02
    assert np.abs(likely - sigmoid(truth[labels, 0] * scores + truth[labels, 1])).max() < 0.1


def test_classes_with_few_correct_detections_share_a_sigmoid() -> None:
    generator = np.random.default_rng(0)
    labels, scores = generator.integers(0, 4, 4000), generator.normal(size=4000)
    correct = generator.random(4000) < sigmoid(3 * scores)
    correct[labels == 1] = False
    rare = np.flatnonzero(correct & (labels == 2))
    correct[rare[MIN_CORRECT - 1 :]] = False
    correct[labels == 3] = scores[labels == 3] < -1  # a class whose scores mislead
    together = fit_sigmoid(scores, correct)
    found = held_out(labels, scores, correct).calibration(list("abcde"))
    assert found is not None and (found[:, 0] > 0).all()
    np.testing.assert_array_equal(found[0], fit_sigmoid(scores[labels == 0], correct[labels == 0]))
    for label in (1, 2, 3, 4):  # 4 has no detection at all
        np.testing.assert_array_equal(found[label], together)


def test_without_correct_detections_there_is_no_calibration() -> None:
    scores = np.linspace(-1, 1, 20)
    assert HeldOut().calibration(["a", "b"]) is None
    assert held_out(np.zeros(20), scores, np.zeros(20, bool)).calibration(["a"]) is None
    assert held_out(np.zeros(20), scores, scores < 0).calibration(["a"]) is None


def test_a_fit_that_does_not_converge_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    labels, scores = generator.integers(0, 2, 400), generator.normal(size=400)
    held = held_out(labels, scores, generator.random(400) < sigmoid(3 * scores))
    exact = held.calibration(["cat", "dog"])
    monkeypatch.setattr(calibrating, "_MAX_STEPS", 1)
    with pytest.warns(SppFeatWarning) as told:
        found = held.calibration(["cat", "dog"])
    assert [str(one.message) for one in told] == [
        f"{of}: the fit of probabilities to scores did not converge in 1 steps; they are not exact"
        for of in ("all classes", "class 'cat'", "class 'dog'")
    ]
    assert found is not None and exact is not None and not np.allclose(found, exact, rtol=1e-3)
