"""Linear SVMs against scikit-learn's LinearSVC, a plain gradient check, and each other."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.svm import LinearSVC

import sppfeat.svm.newton
import sppfeat.svm.primal_space
import sppfeat.svm.rows
import sppfeat.svm.solver
from sppfeat import UsageError
from sppfeat.svm.model import CONVERGED
from sppfeat.svm.solver import LinearSvm, SvmProblem, class_targets, train_linear_svm

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")),
]
BOTH = pytest.mark.parametrize("route", ["gram", "primal"])


def make_rows(
    count: int, dim: int, classes: int, *, seed: int = 0, spread: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Rows that resemble descriptors, non-negative and of length 1, and labels in which every class appears."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    rows = np.abs(random.normal(size=(classes, dim))[labels] + spread * 3 * random.normal(size=(count, dim)))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32), labels


def objectives(
    svm: LinearSvm, rows: np.ndarray, targets: np.ndarray, c: float, positive_weight: float = 1.0
) -> np.ndarray:
    """[K] objective of each class, in double precision, from the definition."""
    weights, biases = svm.weights.astype(np.float64), svm.biases.astype(np.float64)
    values = (weights**2).sum(1) / 2 + biases**2 / 2
    for k in range(len(weights)):
        for row, target in zip(rows.astype(np.float64), targets[:, k], strict=True):
            if target:
                hinge = max(0.0, 1 - target * (weights[k] @ row + biases[k]))
                values[k] += c * (positive_weight if target > 0 else 1) * hinge**2
    return values


def reference(rows: np.ndarray, targets: np.ndarray, c: float, positive_weight: float = 1.0) -> LinearSvm:
    """LinearSVC, one class at a time, run to convergence."""
    weights, biases = [], []
    for target in targets.T:
        weight = {1: positive_weight, -1: 1.0}
        # Its primal solver is exact, but slow for many dimensions.
        dual = rows.shape[1] > max(40, len(rows))
        model = LinearSVC(C=c, class_weight=weight, dual=dual, tol=1e-7, max_iter=100_000)
        model.fit(rows[target != 0].astype(np.float64), target[target != 0])
        weights.append(model.coef_[0])
        biases.append(model.intercept_[0])
    return LinearSvm(
        weights=np.array(weights),
        biases=np.array(biases),
        classes=np.arange(len(weights)),
        costs=np.full(len(weights), c),
        route="reference",
        gaps=np.zeros(len(weights)),
    )


def assert_as_good(
    found: LinearSvm, expected: LinearSvm, rows: np.ndarray, targets: np.ndarray, c: float, positive_weight: float = 1.0
) -> None:
    ours, best = (objectives(svm, rows, targets, c, positive_weight) for svm in (found, expected))
    assert (ours <= best * (1 + 1e-4)).all(), (ours / best - 1).max()
    assert (found.gaps <= 1e-4).all()
    assert found.converged.all()


@BOTH
@pytest.mark.parametrize("c", [0.01, 1.0, 1000.0])
@pytest.mark.parametrize("shape", [(60, 200), (200, 20)], ids=str)
def test_objectives_and_scores_agree_with_scikit_learn(shape: tuple[int, int], c: float, route: str) -> None:
    rows, labels = make_rows(*shape, 4)
    svm = train_linear_svm(rows, labels, c=c, route=route)
    targets, _ = class_targets(labels)
    expected = reference(rows, targets, c)
    assert_as_good(svm, expected, rows, targets, c)
    scores, wanted = svm.scores(rows), rows @ expected.weights.T + expected.biases
    np.testing.assert_allclose(scores, wanted, atol=0.01 * np.abs(wanted).max())
    top = np.sort(wanted, 1)
    clear = top[:, -1] - top[:, -2] > 0.02
    np.testing.assert_array_equal(svm.predict(rows)[clear], wanted.argmax(1)[clear])


def bounds(svm: LinearSvm, rows: np.ndarray, targets: np.ndarray, c: float) -> tuple[np.ndarray, np.ndarray]:
    """[K] objective, and a value that no objective can be below: that of the dual problem at a point made from w."""
    x = np.concatenate([rows.astype(np.float64), np.ones((len(rows), 1))], 1)
    w = np.concatenate([svm.weights, svm.biases[:, None]], 1)
    hinge = np.maximum(0, 1 - targets * (x @ w.T))
    alpha = 2 * c * hinge
    combined = (targets * alpha).T @ x
    primal = (w**2).sum(1) / 2 + c * (hinge**2).sum(0)
    dual = alpha.sum(0) ** 2 / ((alpha**2).sum(0) / (2 * c) + (combined**2).sum(1)) / 2
    return primal, dual


KINDS = ["directions", "classes", "dependent", "repeated"]


def make_kind(kind: str, count: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of mean length 1 and labels of 5 classes: of any direction, resembling descriptors, of little more than 8
    dimensions, or each row twice, perhaps with another label."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 5
    rows = random.normal(size=(count, dim))
    if kind == "classes":
        rows = np.abs(random.normal(size=(5, dim))[labels] + 3 * rows)
    elif kind == "dependent":
        rows = (random.normal(size=(5, 8))[labels] + rows[:, :8]) @ random.normal(size=(8, dim)) + 1e-3 * rows
    elif kind == "repeated":
        rows[count // 2 :] = rows[: count - count // 2]
    return rows / np.linalg.norm(rows, axis=1).mean(), labels


@BOTH
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(60, 200), (120, 120), (300, 40)], ids=str)
def test_every_fit_comes_near_the_minimum(shape: tuple[int, int], kind: str, route: str) -> None:
    """Whatever the rows' length and the cost, from where all rows are support vectors to where none has slack."""
    units, labels = make_kind(kind, *shape)
    targets, _ = class_targets(labels)
    for norm in (1e-3, 1.0, 1e3):
        rows = (norm * units).astype(np.float32)
        problem = SvmProblem(rows, route=route)
        for c in (1e-4, 1.0, 1e4):
            solution = problem.solve(targets, c=c, tolerance=1e-6)
            assert (solution.gaps <= CONVERGED).all(), (norm, c, solution.gaps)
            primal, dual = bounds(problem.svm(solution, np.arange(5)), rows, targets, c)
            np.testing.assert_allclose(primal, solution.objectives, rtol=1e-6)  # the reported value is true
            # A point of the dual problem that is made from w alone is far off before w is the minimum to many digits.
            assert (dual <= primal * (1 + 1e-9)).all()
            loose = (1 - dual / primal > 1e-4) & (c * (norm**2 + 1) < 1e4)
            if loose.any():
                expected = reference(rows, targets[:, loose], c)
                best = objectives(expected, rows, targets[:, loose], c)
                assert (primal[loose] <= best * (1 + 1e-4)).all()


@BOTH
def test_large_costs_on_unit_rows_are_learned(route: str) -> None:
    """More dimensions than rows, C = 1000: separable, and once every class came out as zeros."""
    rows, labels = make_rows(400, 420, 40, spread=2.0)
    svm = train_linear_svm(rows, labels, c=1000.0, route=route)
    assert svm.converged.all()
    assert (svm.predict(rows) == labels).all()
    assert (np.linalg.norm(svm.weights, axis=1) > 1).all()


@BOTH
def test_what_does_not_converge_is_said(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sppfeat.svm.newton, "_MAX_NEWTON", 1)
    rows, labels = make_rows(60, 100, 4)
    svm = train_linear_svm(rows, labels, c=1000.0, route=route)
    assert not svm.converged.any()
    assert (svm.gaps > 1e-4).all()


def test_single_precision_is_left_where_it_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sppfeat.svm.solver, "_DOUBLE_BYTES", 0)
    rows, labels = make_rows(400, 60, 4)
    targets, _ = class_targets(labels)
    for c in (1.0, 1e6):
        svm = train_linear_svm(rows, labels, c=c, route="primal", tolerance=1e-8)
        primal, dual = bounds(svm, rows, targets, c)
        assert svm.converged.all() and (1 - dual / primal < 1e-4).all(), (c, 1 - dual / primal)


def test_training_leaves_the_number_of_threads_as_it_was() -> None:
    """Including that of threads that start later."""
    rows, labels = make_rows(60, 100, 4)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train_linear_svm(rows, labels, c=10.0)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


def test_systems_side_by_side_stay_within_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    workers: list[int] = []

    def pool(count: int, **options: Any) -> ThreadPoolExecutor:
        workers.append(count)
        return ThreadPoolExecutor(count)

    monkeypatch.setattr(sppfeat.svm.newton, "ThreadPoolExecutor", pool)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    rows, labels = make_rows(60, 100, 12)
    train_linear_svm(rows, labels, c=10.0)
    monkeypatch.setattr(sppfeat.svm.newton, "_THREAD_BYTES", 1)
    assert max(workers) > 1
    workers.clear()
    train_linear_svm(rows, labels, c=10.0)
    assert set(workers) == {1}


@pytest.mark.parametrize("weight", [0.3, 2.0, 30.0])
def test_weighted_positives_by_the_system_of_all_rows(weight: float) -> None:
    """If nearly all rows are active and positive ones have another weight, the remaining matrix is indefinite."""
    rows, labels = make_rows(300, 200, 12)
    targets, _ = class_targets(labels)
    for c in (0.01, 0.3):
        svm = train_linear_svm(rows, labels, c=c, positive_weight=weight, route="gram")
        assert_as_good(svm, reference(rows, targets, c, weight), rows, targets, c, weight)


@BOTH
def test_chunks_of_classes_change_nothing(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = make_rows(60, 100, 7)
    whole = train_linear_svm(rows, labels, c=3.0, route=route)
    monkeypatch.setattr(sppfeat.svm.solver, "_CHUNK_BYTES", 1)
    parts = train_linear_svm(rows, labels, c=3.0, route=route)
    np.testing.assert_allclose(parts.scores(rows), whole.scores(rows), atol=1e-3)


def test_memory_does_not_grow_with_rows_times_classes() -> None:
    """300 classes of 100,000 rows are 120 MB in single precision; targets, in bytes, 30 MB."""
    script = """
import numpy as np
from memory import peak_kb
from sppfeat.svm import solver as svm
svm._CHUNK_BYTES = 1 << 26
random = np.random.default_rng(0)
labels = np.arange(100_000) % 300
rows = (random.normal(size=(300, 4))[labels] + random.normal(size=(100_000, 4))).astype(np.float32)
svm.train_linear_svm(rows[:5000], labels[:5000], c=1.0)
before = peak_kb()
found = svm.train_linear_svm(rows, labels, c=1e-4, tolerance=1e-2)
print(found.route, (peak_kb() - before) // 1000)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    route, megabytes = done.stdout.split()
    assert route == "primal"
    assert int(megabytes) < 250


def test_some_rows_alone_are_a_problem() -> None:
    """Only their Gram matrix is computed; row numbers refer to them."""
    rows, labels = make_rows(90, 100, 3)
    some = np.arange(0, 90, 2)
    problem = SvmProblem(rows, some)
    targets, classes = class_targets(labels[some])
    found = problem.svm(problem.solve(targets, c=1.0), classes)
    alone = train_linear_svm(rows[some], labels[some], c=1.0)
    np.testing.assert_allclose(found.weights, alone.weights, atol=1e-6)
    np.testing.assert_allclose(found.scores(rows, some), alone.scores(rows[some]), atol=1e-5)
    assert problem._gram is not None and problem._gram.shape == (45, 45)
    rows[41] = np.nan
    with pytest.raises(UsageError, match=r"^n41: "):
        found.scores(rows, np.array([40, 41]), names=[f"n{i}" for i in range(90)])
    with pytest.raises(UsageError, match=r"^n41: "):
        SvmProblem(rows, np.array([40, 41]), names=[f"n{i}" for i in range(90)])


@BOTH
def test_positive_weight_is_liblinears_class_weight(route: str) -> None:
    rows, labels = make_rows(60, 200, 3)
    targets, _ = class_targets(labels)
    svm = train_linear_svm(rows, labels, c=0.5, positive_weight=5, route=route)
    assert_as_good(svm, reference(rows, targets, 0.5, 5), rows, targets, 0.5, 5)


@BOTH
def test_rows_with_target_zero_are_left_out(route: str) -> None:
    rows, _ = make_rows(60, 200, 3)
    targets = np.random.default_rng(1).integers(-1, 2, (60, 5))
    svm = train_linear_svm(rows, targets, c=2, route=route)
    assert svm.classes.tolist() == [0, 1, 2, 3, 4]
    assert_as_good(svm, reference(rows, targets, 2), rows, targets, 2)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(4, 40),
    dim=st.integers(1, 40),
    c=st.sampled_from([0.01, 0.3, 10.0]),
    seed=st.integers(0, 1000),
    half=st.booleans(),
    block_bytes=st.sampled_from([1, 700, 1 << 26]),
)
def test_routes_agree_at_the_minimum(count: int, dim: int, c: float, seed: int, half: bool, block_bytes: int) -> None:
    random = np.random.default_rng(seed)
    rows = random.normal(size=(count, dim)).astype(np.float16 if half else np.float32)
    rows[random.integers(count)] = rows[0]  # a duplicate, perhaps of another class
    rows[:, random.integers(dim)] = 0.5  # a constant column
    targets = random.choice([-1, -1, 0, 1], size=(count, 3))
    targets[:2] = [[1], [-1]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sppfeat.svm.rows, "_BLOCK_BYTES", block_bytes)
        gram, primal = (train_linear_svm(rows, targets, c=c, route=route) for route in ("gram", "primal"))
    assert (gram.route, primal.route) == ("gram", "primal")
    values = [objectives(svm, rows, targets, c) for svm in (gram, primal)]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-4)
    best = objectives(reference(rows, targets, c), rows, targets, c)
    assert (values[0] <= best * (1 + 1e-4)).all()


@BOTH
def test_rows_that_cancel_leave_no_rounding_behind(route: str) -> None:
    """As many equal rows for a class as against it: a step that changes no margin was once followed 2^60 times."""
    rows = np.full((22, 1), 0.5, np.float32)
    targets = np.tile([[1], [-1]], (11, 1))
    svm = train_linear_svm(rows, targets, c=0.01, route=route)
    assert svm.converged.all()
    np.testing.assert_allclose(objectives(svm, rows, targets, 0.01), 0.22, rtol=1e-6)


@BOTH
def test_folds_and_warm_starts_share_one_problem(route: str) -> None:
    rows, labels = make_rows(60, 100, 4)
    targets, classes = class_targets(labels)
    problem = SvmProblem(rows, route=route)
    train, test = np.arange(60)[::-1][:40], np.arange(20)
    start = None
    for c in (0.01, 0.1, 1.0):
        start = problem.solve(targets[train], train, c=c, start=start)
    alone = train_linear_svm(rows[train], labels[train], c=1.0, route=route)
    np.testing.assert_allclose(start.gaps, 0, atol=1e-5)
    np.testing.assert_allclose(problem.scores(start, test), alone.scores(rows[test]), atol=2e-2)
    np.testing.assert_allclose(problem.svm(start, classes).scores(rows), problem.scores(start), atol=1e-5)
    assert problem.solve(targets[train], train, c=1.0, start=start).products == 2  # margins, and nothing else to do
    longer = problem.solve(targets, c=1.0, start=start)
    cold = problem.solve(targets, c=1.0)
    np.testing.assert_allclose(longer.objectives, cold.objectives, rtol=1e-4)
    with pytest.raises(UsageError, match="start must be a solution of 3 classes, found one of 4"):
        problem.solve(targets[test][:, :3], test, c=1.0, start=start)


@BOTH
def test_weights_of_fewer_rows_are_a_start(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same minimum; the primal route, which is iterative, reads the rows fewer times."""
    monkeypatch.setattr(sppfeat.svm.primal_space, "_USUAL_CONJUGATE", 0)
    monkeypatch.setattr(sppfeat.svm.primal_space, "_SAMPLE_ROWS", 40)
    rows, labels = make_rows(300, 30, 4)
    targets, _ = class_targets(labels)
    few = train_linear_svm(rows[:250], labels[:250], c=1.0, route=route)
    problem = SvmProblem(rows, route=route)
    alone = problem.solve(targets, c=1.0)
    begun = problem.solve(targets, c=1.0, start=(few.weights, few.biases))
    np.testing.assert_allclose(begun.objectives, alone.objectives, rtol=1e-4)
    assert begun.products < alone.products if route == "primal" else begun.products == alone.products
    with pytest.raises(UsageError, match=r"start must be weights \[4, 30\] and biases, found \[4, 29\]"):
        problem.solve(targets, c=1.0, start=(few.weights[:, :29], few.biases))


@BOTH
def test_a_class_without_a_row_in_a_fold_never_wins(route: str) -> None:
    rows, labels = make_rows(30, 50, 3)
    targets, classes = class_targets(labels)
    problem = SvmProblem(rows, route=route)
    fold = np.flatnonzero(labels != 1)
    solution = problem.solve(targets[fold], fold, c=1.0)
    assert solution.solved.tolist() == [True, False, True]
    assert (problem.scores(solution)[:, 1] == -np.inf).all()
    svm = problem.svm(solution, classes)
    assert svm.biases[1] == -np.inf
    assert 1 not in svm.predict(rows)


@BOTH
def test_a_class_with_one_row_is_learned(route: str) -> None:
    rows, _ = make_rows(20, 50, 2)
    labels = np.array(["rare", *["common"] * 19])
    svm = train_linear_svm(rows, labels, c=100.0, route=route)
    assert svm.predict(rows).tolist() == labels.tolist()


@BOTH
def test_two_classes_mirror_each_other(route: str) -> None:
    rows, labels = make_rows(20, 50, 2)
    svm = train_linear_svm(rows, labels, c=1.0, route=route)
    np.testing.assert_allclose(svm.weights[0], -svm.weights[1], atol=1e-2)


def test_of_equal_scores_the_first_class_wins() -> None:
    svm = LinearSvm(
        weights=np.zeros((3, 2), np.float32),
        biases=np.array([0, 1, 1], np.float32),
        classes=np.array(["a", "b", "c"]),
        costs=np.ones(3),
        route="gram",
        gaps=np.zeros(3),
    )
    assert svm.predict(np.ones((2, 2))).tolist() == ["b", "b"]


def test_the_route_depends_on_shape_and_memory() -> None:
    rows, _ = make_rows(20, 50, 2)
    assert SvmProblem(rows).route == "gram"
    assert SvmProblem(rows, gram_bytes=8 * 20 * 20 - 1).route == "primal"
    assert SvmProblem(rows.T).route == "primal"


@pytest.mark.parametrize("device", DEVICES)
@BOTH
def test_a_memory_map_is_read_in_blocks(
    tmp_path: Path, route: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, labels = make_rows(50, 64, 3)
    rows.astype(np.float16).tofile(tmp_path / "rows")
    mapped = np.memmap(tmp_path / "rows", np.float16, "r", shape=rows.shape)
    monkeypatch.setattr(sppfeat.svm.rows, "_BLOCK_BYTES", 7 * 64 * (8 if route == "gram" else 4))
    sizes: list[int] = []
    tensor = sppfeat.svm.rows.to_tensor
    monkeypatch.setattr(
        sppfeat.svm.rows, "to_tensor", lambda rows, *kind: (sizes.append(len(rows)), tensor(rows, *kind))[1]
    )
    svm = train_linear_svm(mapped, labels, c=1.0, route=route, device=device)
    targets, _ = class_targets(labels)
    assert max(sizes) == 7
    assert_as_good(svm, reference(mapped, targets, 1.0), mapped, targets, 1.0)


@BOTH
def test_rows_that_are_not_finite_are_named(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sppfeat.svm.rows, "_BLOCK_BYTES", 1)
    rows, labels = make_rows(20, 50, 2)
    rows[13, 7], rows[17, 0] = np.nan, np.inf
    with pytest.raises(UsageError, match="^row 13: .* found NaN or infinity, and 1 more row$"):
        train_linear_svm(rows, labels, c=1.0, route=route)
    with pytest.raises(UsageError, match="^n13.jpg: expected"):
        SvmProblem(rows, route=route, names=[f"n{i}.jpg" for i in range(20)])


def test_what_cannot_be_is_refused() -> None:
    rows, labels = make_rows(20, 50, 2)
    for message, arguments in {
        r"c must be a number above 0, found 0": dict(c=0),
        r"c must be a number above 0, found nan": dict(c=float("nan")),
        r"positive_weight must be a number above 0, found -1": dict(c=1, positive_weight=-1),
        r"unknown route 'dual'": dict(c=1, route="dual"),
    }.items():
        with pytest.raises(UsageError, match=message):
            train_linear_svm(rows, labels, **arguments)  # type: ignore[arg-type]
    for message, given_labels in {
        r"at least two classes, found 1: \['a'\]": ["a"] * 20,
        r"one row per descriptor \(20\), found 19": labels[:19],
        r"of \+1, -1 and 0": np.full((20, 1), 2),
        r"class 1: expected at least one positive row": np.array([[1, -1], [-1, -1]] * 10),
        r"class 0: expected at least one negative row": np.ones((20, 1)),
        r"labels must be \[N\]": np.zeros((2, 2, 2)),
    }.items():
        with pytest.raises(UsageError, match=message):
            train_linear_svm(rows, given_labels, c=1.0)
    for given_rows in (np.array([0, 20]), np.array([-1]), np.zeros(20, bool), np.zeros((1, 1), int)):
        with pytest.raises(UsageError, match="rows must be numbers .* from 0 to 19"):
            SvmProblem(rows).solve(np.ones((len(given_rows), 1)), given_rows, c=1.0)
    with pytest.raises(UsageError, match=r"descriptors must be \[N, D\]"):
        train_linear_svm(rows[0], labels, c=1.0)
    with pytest.raises(UsageError, match=r"descriptors must be \[N, 50\], found \[20, 49\]"):
        train_linear_svm(rows, labels, c=1.0).scores(rows[:, :49])
