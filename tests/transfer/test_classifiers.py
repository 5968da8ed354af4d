"""The nearest neighbors and logistic regression, held against plain forms and scikit-learn, and what is told."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeStore
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import knn_votes

from sppfeat import SppFeatWarning, UsageError
from sppfeat.svm import logistic
from sppfeat.svm.cost_selection import folds
from sppfeat.svm.logistic import LogisticProblem, choose_regularization
from sppfeat.svm.options import SvmOptions
from sppfeat.transfer import TransferOptions, knn
from sppfeat.transfer.evaluation import evaluate_transfer
from sppfeat.transfer.knn import knn_scores
from sppfeat.transfer.labels import Labels


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_votes_equal_the_naive_reference(data: st.DataObject) -> None:
    count, tests, dim = (data.draw(st.integers(1, most), name) for name, most in (("n", 40), ("m", 12), ("d", 8)))
    generator = np.random.default_rng(data.draw(st.integers(0, 1000), "seed"))
    rows = generator.normal(size=(count + tests, dim)).astype(np.float32)
    rows[count::3] = 0  # similar to none: the first vote
    targets = np.where(generator.random((count, 3)) < 0.4, 1, -1)
    k, temperature = data.draw(st.integers(1, 50), "k"), data.draw(st.sampled_from([0.001, 0.07, 1.0, 100.0]), "t")
    train, test = np.arange(count), np.arange(count, count + tests)
    expected = knn_votes(rows[train], rows[test], targets, k, temperature)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "_TESTED", data.draw(st.sampled_from([1, 3, 1024]), "tested"))
        patch.setattr(knn, "_BLOCK_BYTES", data.draw(st.sampled_from([1, 100, 1 << 20]), "block"))
        found = knn_scores(rows, train, test, targets, neighbors=k, temperature=temperature)
    assert found == pytest.approx(expected, abs=2e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 1000))
def test_of_equally_similar_rows_the_first_vote(count: int, k: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 4, (5, count)).astype(np.float32)
    expected = np.argsort(-values, axis=1, kind="stable")[:, :k]
    assert knn._largest(values, k).tolist() == expected.tolist()


def test_knn_equals_scikit_learn() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    generator = np.random.default_rng(0)
    rows, labels = generator.normal(size=(400, 30)).astype(np.float32), generator.integers(0, 7, 400)
    rows += 2 * generator.normal(size=(7, 30)).astype(np.float32)[labels]
    train, test = np.arange(300), np.arange(300, 400)
    targets = np.where(labels[train, None] == np.arange(7), 1, -1)
    found = knn_scores(rows, train, test, targets, neighbors=20, temperature=0.07)
    other = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = other.fit(rows[train], labels[train]).predict_proba(rows[test])
    assert found == pytest.approx(expected, abs=1e-4)


def objective(weights: np.ndarray, biases: np.ndarray, rows: np.ndarray, labels: np.ndarray, c: float) -> float:
    scores = rows @ weights.T + biases
    most = scores.max(1)
    logs = np.log(np.exp(scores - most[:, None]).sum(1)) + most - scores[np.arange(len(labels)), labels]
    return float((weights**2).sum() / 2 + c * logs.sum())


@pytest.mark.parametrize("length", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("c", [1e-3, 1.0, 100.0, 1e4])
@pytest.mark.parametrize(("count", "dim", "classes"), [(60, 200, 5), (300, 20, 4), (90, 91, 2), (40, 300, 20)])
def test_regression_reaches_the_minimum(count: int, dim: int, classes: int, c: float, length: float) -> None:
    """The objective is that of scikit-learn or lower, and the gap bounds how far it is from the minimum."""
    from sklearn.linear_model import LogisticRegression

    generator = np.random.default_rng(count)
    labels = np.append(np.arange(classes), generator.integers(0, classes, count - classes))
    rows = generator.normal(size=(count, dim)) + 0.5 * generator.normal(size=(classes, dim))[labels]
    rows = (length * rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    problem = LogisticProblem(rows, np.arange(count))
    solution = problem.solve(labels, classes, c=c)
    weights, biases = problem.weights(solution)
    exact = rows.astype(np.float64)
    ours = objective(weights, biases, exact, labels, c)
    assert solution.objective == pytest.approx(ours, rel=2e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Of two classes, scikit-learn fits one vector; ours are half of it and its opposite, and half its penalty.
        other = LogisticRegression(C=c * (2 if classes == 2 else 1), tol=1e-10, max_iter=5000).fit(exact, labels)
    coefficients, intercept = other.coef_, other.intercept_
    if classes == 2:
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercept = np.concatenate([-intercept, intercept]) / 2
    least = objective(coefficients, intercept, exact, labels, c)
    assert ours <= least * (1 + 1e-4) and solution.gap <= 1e-4
    assert ours - least <= 1.01 * solution.gap * ours + 1e-7 * ours
    scores = exact @ weights.T + biases
    assert problem.scores(solution) == pytest.approx(scores, abs=2e-3 * max(1, np.abs(scores).max()))


def test_regression_on_equal_and_empty_rows() -> None:
    rows = np.zeros((12, 40), np.float32)
    rows[4:, 0] = 1
    labels = np.arange(12) % 3
    problem = LogisticProblem(rows, np.arange(12))
    solution = problem.solve(labels, 3, c=10.0)
    assert solution.gap <= 1e-4 and np.isfinite(problem.weights(solution)[0]).all()


@pytest.mark.parametrize("dim", [2, 5])
def test_rows_that_are_not_finite_are_named(dim: int) -> None:
    rows = np.zeros((5, dim), np.float32)
    rows[1, 0], rows[2, 1], rows[4] = np.nan, np.inf, (np.inf, -np.inf, *[0] * (dim - 2))
    with pytest.raises(UsageError, match="^row 2: expected finite numbers .*, and 1 more row$"):
        LogisticProblem(rows, np.array([0, 2, 3, 4]))
    with pytest.raises(UsageError, match="^b: expected finite numbers .*, and 2 more rows$"):
        LogisticProblem(rows, np.arange(5), names=list("abcde"))


@pytest.mark.parametrize("c", [1.0, 1e4])
@pytest.mark.parametrize("length", [1.0, 30.0])
def test_the_gap_is_that_of_the_rows_themselves(c: float, length: float) -> None:
    """Equal rows of different classes, which nothing may tell apart, coordinates with a ridge least of all."""
    generator = np.random.default_rng(5)
    rows = generator.normal(size=(20, 100))
    rows = np.repeat(length * rows / np.linalg.norm(rows, axis=1, keepdims=True), 3, 0).astype(np.float32)
    labels = np.arange(60) % 3
    problem = LogisticProblem(rows, np.arange(60))
    solution = problem.solve(labels, 3, c=c)
    weights, biases = problem.weights(solution)
    ours = objective(weights, biases, rows.astype(float), labels, c)
    assert problem.route == "gram" and solution.objective == pytest.approx(ours, rel=1e-9)
    least = c * 60 * np.log(3)  # all weights 0
    assert ours - least <= solution.gap * ours + 1e-9 * ours and solution.gap <= 1e-4


def test_a_fit_that_is_given_up_is_told(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic, "_STEPS", 1)
    options = TransferOptions(classifier="logistic", costs=(100.0,), trials=2, shots=(3,))
    with pytest.warns(SppFeatWarning) as told:
        (done,) = evaluate_transfer([three_kinds(make_store)], options)
    assert not done.convergence.largest_gap <= 1e-4 and not done.shots[0].gap <= 1e-4
    texts = [str(one.message) for one in told]
    assert "2 of 2 fits did not converge" in texts[0] and "class 'all classes'" in texts[0]
    assert texts[1].startswith("with 3 training images per class: 2 of 2 fits did not converge")


def test_c_is_chosen_inside(make_store: MakeStore) -> None:
    generator = np.random.default_rng(3)
    labels = np.repeat(np.arange(4), 15)
    rows = (generator.normal(size=(4, 50))[labels] + 2 * generator.normal(size=(60, 50))).astype(np.float32)
    problem = LogisticProblem(rows, np.arange(60))
    options = SvmOptions(costs=(0.001, 0.1, 10.0))
    found = choose_regularization(problem, labels, 4, options)
    fold = folds(labels, options)
    values = []
    for cost in options.costs:
        right = []
        for number in range(3):
            alone = LogisticProblem(rows, np.flatnonzero(fold != number))
            weights, biases = alone.weights(alone.solve(labels[fold != number], 4, c=cost))
            predicted = (rows[fold == number] @ weights.T + biases).argmax(1)
            right.append(np.mean([(predicted == k)[labels[fold == number] == k].mean() for k in range(4)]))
        values.append(np.mean(right))
    assert [value for _, value in found.curve] == pytest.approx(values)
    assert found.cost == options.costs[int(np.argmax(values))] and found.gap <= 1e-4


def test_unshuffled_folds_are_those_of_scikit_learn() -> None:
    from sklearn.model_selection import StratifiedKFold

    for seed in range(20):
        kinds = np.random.default_rng(seed).choice([-1, 1, 3], 37, p=[0.6, 0.3, 0.1])
        kinds[:9] = [-1, 1, 3] * 3
        expected = np.empty(37, int)
        for number, (_, held) in enumerate(StratifiedKFold(3).split(kinds, kinds)):
            expected[held] = number
        assert folds(kinds, SvmOptions(shuffle=False)).tolist() == expected.tolist()


def three_kinds(make_store: MakeStore, file: str = "f.h5", *, noise: float = 0.6, count: int = 20, seed: int = 0):  # type: ignore[no-untyped-def]
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(7), count)
    rows = np.random.default_rng(9).normal(size=(7, 24))[labels] + noise * generator.normal(size=(len(labels), 24))
    names = [f"k{label}/{at:03}.jpg" for at, label in enumerate(labels)]
    return make_store(rows / np.linalg.norm(rows, axis=1, keepdims=True), file, names=names)


@pytest.mark.parametrize("classifier", ["svm", "knn", "logistic"])
def test_each_classifier_and_its_figures(make_store: MakeStore, classifier: str) -> None:
    store = three_kinds(make_store, noise=2.0)
    options = TransferOptions(classifier=classifier, trials=3, costs=(1.0, 10.0), shots=(1, 2, 5), seed=4)
    (done,) = evaluate_transfer([store], options)
    assert 30 < done.value < 99 and done.value <= done.top5 and done.top1 < done.top5 <= 100
    assert done.top1 == pytest.approx(100 * np.trace(done.confusion) / done.confusion.sum())
    low, high = done.interval
    assert low < done.value < high and high - low < 20
    assert [few.count for few in done.shots] == [1, 2, 5] and all(len(few.trials) == 3 for few in done.shots)
    assert done.shots[0].value < done.shots[2].value < done.value + 3
    assert done.shots[0].costs == ([] if classifier == "knn" else [1.0])
    assert evaluate_transfer([store], options)[0].shots == done.shots
    assert all(len(costs) == (0 if classifier == "knn" else 7) for costs in done.costs)


def test_shots_of_a_fixed_split(make_store: MakeStore) -> None:
    store = three_kinds(make_store, noise=2.0)
    parts = {name: "test" if at % 3 == 0 else "train" for at, name in enumerate(store.names)}
    labels = Labels({name: name.split("/")[0] for name in store.names}, parts)
    options = TransferOptions(protocol="split", classifier="knn", shots=(4,), trials=5)
    (done,) = evaluate_transfer([store], options, labels=labels)
    assert len(done.trials) == 1 and len(done.shots[0].trials) == 5 and len(set(done.shots[0].trials)) > 1
    with pytest.raises(UsageError, match=r"shots 15: class 'k0' has 1\d training images; expected at least 15"):
        evaluate_transfer([store], TransferOptions(protocol="split", classifier="knn", shots=(15,)), labels=labels)


def test_stores_are_compared_by_the_right_test(make_store: MakeStore) -> None:
    good, bad = three_kinds(make_store, "good.h5", noise=1.0), three_kinds(make_store, "bad.h5", noise=4.0, seed=1)
    same = three_kinds(make_store, "same.h5", noise=1.0)
    first, second, third = evaluate_transfer([good, bad, same], TransferOptions(classifier="knn", trials=8))
    assert first.comparison is None and second.comparison is not None and third.comparison is not None
    assert second.comparison.test == "corrected t-test" and second.comparison.p < 0.01
    assert second.comparison.difference == pytest.approx(second.value - first.value)
    assert third.comparison.p == 1 and third.comparison.difference == 0
    parts = {name: "test" if at % 2 else "train" for at, name in enumerate(good.names)}
    labels = Labels({name: name.split("/")[0] for name in good.names}, parts)
    found = evaluate_transfer([good, bad, same], TransferOptions(protocol="split", classifier="knn"), labels=labels)
    told = [one.comparison for one in found[1:]]
    assert [one and one.test for one in told] == ["McNemar", "McNemar"]
    assert told[0] is not None and told[0].p < 0.01 and told[1] is not None and told[1].p == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classifier": "forest"}, "classifier"),
        ({"classifier": "knn", "positive_weight": 2.0}, "positive_weight: expected classifier svm, found knn"),
        ({"classifier": "logistic", "protocol": "voc2007"}, "expected one class per image, found protocol voc2007"),
        ({"classifier": "knn", "device": "cuda"}, "classifier knn: expected device auto or cpu, found cuda"),
        ({"neighbors": 0}, "neighbors must be from 1"),
        ({"temperature": 0.0}, "temperature must be from"),
        ({"shots": (0,)}, "shots must be different numbers above 0"),
        ({"shots": (2, 2)}, "shots must be different numbers above 0"),
        ({"shots": (2,), "protocol": "voc2007"}, "shots: expected one class per image"),
        ({"trials": 2, "protocol": "split"}, "trials does not apply to protocol split"),
    ],
)
def test_options_that_do_not_go_together(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TransferOptions(**change)  # type: ignore[arg-type]


def test_from_the_command_line(make_store: MakeStore, tmp_path: Path, run_sppfeat) -> None:  # type: ignore[no-untyped-def]
    three_kinds(make_store, "a.h5", noise=1.5)
    three_kinds(make_store, "b.h5", noise=2.5)
    for classifier, told in (("knn", "classifier: knn, 20 neighbors"), ("logistic", "classifier: logistic, solver: ")):
        done = run_sppfeat(
            *("evaluate", "transfer", tmp_path / "a.h5", tmp_path / "b.h5", "--classifier", classifier),
            *("--shots", "1,3", "--c", "1", "--report", tmp_path / f"{classifier}.html"),
        )
        assert (done.returncode, done.stderr) == (0, f"wrote {tmp_path / classifier}.html\n"), done.stderr
        assert told in done.stdout and "1 image per class: " in done.stdout and "top-5 " in done.stdout
        assert "corrected t-test)" in done.stdout
        page = (tmp_path / f"{classifier}.html").read_text()
        assert "Few training images" in page and "95 % interval" in page
    done = run_sppfeat("evaluate", "transfer", tmp_path / "a.h5", "--classifier", "knn", "--shots", "1", "--json")
    assert '"C": [\n    null' in done.stdout and '"interval"' in done.stdout and done.returncode == 0
    done = run_sppfeat("evaluate", "transfer", tmp_path / "a.h5", "--shots", "11")
    assert done.returncode == 2 and "class 'k0' has 10 training images; expected at least 11" in done.stderr
