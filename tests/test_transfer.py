"""Transfer evaluation: splits, choice of C, comparison of stores, and what cannot be evaluated."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sppfeat import Recipe, Store, StoreError, UsageError, extract_folder, open_store
from sppfeat.images import Fingerprint
from sppfeat.store import StoreWriter, create_store
from sppfeat.transfer import TransferOptions, evaluate_transfer, read_labels

DIM = 40


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., Store]:
    """A store of `count` rows a class, drawn around a centre of each class."""

    def make(
        file: str = "f.h5", *, classes: int = 4, count: int = 12, folder: str = "", noise: float = 0.6, seed: int = 0
    ) -> Store:
        generator = np.random.default_rng(seed)
        names = [f"{folder}class{c}/{n:03}.jpg" for c in range(classes) for n in range(count)]
        if folder == "":
            names = sorted(names)
        centres = generator.normal(size=(classes, DIM))
        rows = np.repeat(centres, count, 0) + noise * generator.normal(size=(len(names), DIM))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        path = tmp_path / file
        create_store(path, names, recipe=Recipe(), weights_sha256="0" * 64, dim=DIM, source_root="/")
        with StoreWriter(open_store(path)) as writer:
            for row, values in enumerate(rows):
                writer.write(row, values.astype(np.float16), (10, 10), Fingerprint(1, 1))
        return open_store(path)

    return make


def with_split(store: Store, tmp_path: Path) -> Path:
    """A labels file that puts every third row into the test part."""
    path = tmp_path / "labels.csv"
    lines = [f"{n},{n.split('/')[0]},{'test' if i % 3 == 0 else 'train'}" for i, n in enumerate(store.names)]
    path.write_text("name,label,split\n" + "\n".join(lines) + "\n")
    return path


def test_a_given_split_equals_scikit_learn(make_store: Callable[..., Store], tmp_path: Path) -> None:
    from sklearn.svm import LinearSVC

    store = make_store(noise=2.5)
    labels = read_labels(with_split(store, tmp_path))
    (done,) = evaluate_transfer([store], TransferOptions(protocol="split", costs=(1.0,)), labels=labels)
    known = np.array([name.split("/")[0] for name in store.names])
    test = np.arange(len(store)) % 3 == 0
    rows = np.array(store.descriptors, np.float64)
    predicted = LinearSVC(C=1.0, tol=1e-8, max_iter=100_000).fit(rows[~test], known[~test]).predict(rows[test])
    expected = {name: 100 * (predicted == known[test])[known[test] == name].mean() for name in np.unique(known)}
    assert done.per_class == pytest.approx(expected)
    assert done.value == pytest.approx(np.mean(list(expected.values()))) and done.value < 100
    assert (done.rows, done.left_out, done.costs, done.std) == (48, 0, [1.0], 0.0)


def test_folders_named_train_and_test(make_images: Callable[..., Path], tmp_path: Path, tiny: Recipe) -> None:
    for part in ("train", "test"):
        for number, name in enumerate(("a", "b")):
            make_images(3, f"data/{part}/{name}", seed=number)
    extract_folder(tmp_path / "data", tmp_path / "f.h5", tiny)
    (done,) = evaluate_transfer([open_store(tmp_path / "f.h5")], TransferOptions(protocol="split", costs=(1.0,)))
    assert done.value == 100 and done.per_class.keys() == {"a", "b"}  # test pictures equal training pictures


def test_random_splits(make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
    from sppfeat import transfer

    store = make_store(count=9)
    known = np.array([name.split("/")[0] for name in store.names])
    labels = transfer.labels_from_folders(store.names)
    options = TransferOptions(per_class=5, max_test=3, trials=4)
    splits = transfer._splits(store.names, known, labels, options)
    assert len(splits) == 4
    for train, test in splits:
        assert not set(train) & set(test)
        assert np.unique(known[train], return_counts=True)[1].tolist() == [5] * 4
        assert np.unique(known[test], return_counts=True)[1].tolist() == [3] * 4
    assert any(not np.array_equal(splits[0][0], train) for train, _ in splits[1:])
    again = transfer._splits(store.names, known, labels, options)
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(splits, again, strict=True))
    other = transfer._splits(store.names, known, labels, replace(options, seed=1))
    assert any(not np.array_equal(a[0], b[0]) for a, b in zip(splits, other, strict=True))


def test_c_is_chosen_inside_the_training_rows(make_store: Callable[..., Store]) -> None:
    """Whatever the test rows hold, the choice of C stays."""
    from sppfeat.svm import SvmProblem
    from sppfeat.transfer import _choose_cost

    store = make_store(noise=2.5)
    rows = np.array(store.descriptors)
    known = np.array([name.split("/")[0] for name in store.names])
    train = np.flatnonzero(np.arange(len(store)) % 3 != 0)
    chosen = _choose_cost(SvmProblem(rows), known, train, TransferOptions())
    rows[::3] = np.random.default_rng(5).normal(size=rows[::3].shape)
    assert _choose_cost(SvmProblem(rows), known, train, TransferOptions()) == chosen


def test_stores_are_compared_on_the_same_splits(make_store: Callable[..., Store]) -> None:
    good, bad = make_store("good.h5", noise=0.8), make_store("bad.h5", noise=2.5)
    both = evaluate_transfer([good, bad], TransferOptions(trials=3))
    alone = evaluate_transfer([bad], TransferOptions(trials=3))
    assert both[1].accuracies == alone[0].accuracies and both[0].value > both[1].value
    assert len(both[0].accuracies) == 3
    with pytest.raises(
        StoreError, match=r"other\.h5: expected the images of .*good\.h5, found 12 that are in one only"
    ):
        evaluate_transfer([good, make_store("other.h5", classes=3)])


def test_failed_rows_are_left_out_in_every_store(make_store: Callable[..., Store]) -> None:
    stores = [make_store("a.h5"), make_store("b.h5", seed=1)]
    with StoreWriter(stores[1]) as writer:
        writer.fail(3, "broken")
    for done in evaluate_transfer(stores, TransferOptions(trials=1)):
        assert (done.rows, done.left_out) == (47, 1)


def test_pending_rows_are_refused(make_store: Callable[..., Store]) -> None:
    store = make_store()
    with StoreWriter(store) as writer:
        writer.reset([0, 1])
    with pytest.raises(StoreError, match=r"f\.h5: 2 of 48 images are still to be described; run its extract again"):
        evaluate_transfer([store])


def test_too_few_images_are_named_with_counts(make_store: Callable[..., Store]) -> None:
    with pytest.raises(
        UsageError, match=r"expected at least 31 images a class, found 4 classes .*\(class0 12, class1 12"
    ):
        evaluate_transfer([make_store()], TransferOptions(protocol="caltech101"))
    with pytest.raises(UsageError, match="at least two classes, found 1: class0"):
        evaluate_transfer([make_store("one.h5", classes=1)])
    with pytest.raises(UsageError, match="protocol split: .*found no train"):
        evaluate_transfer([make_store("s.h5")], TransferOptions(protocol="split"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,class\n", "expected the columns name,label[,split], found file,class"),
        ("", "expected the columns name,label[,split], found nothing"),
        ("name,label\na,x\na,y\n", "line 3: found a name that stands twice ('a')"),
        ("name,label\na,\n", "line 2: found an empty name or label ('a')"),
        ("name,label,split\na,x,val\n", "line 2: expected split train or test, found 'val'"),
        ("name,label\nnowhere.jpg,x\n", "none of its 48 names has a label"),
        ("name,label\nnowhere.jpg,x\nclass0/000.jpg,x\n", "1 labels match no row of"),
    ],
)
def test_bad_labels(make_store: Callable[..., Store], tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)):
        evaluate_transfer([make_store()], labels=read_labels(path))


@pytest.mark.parametrize("change", [{"protocol": "caltech"}, {"costs": ()}, {"costs": (0.0,)}, {"trials": 0}])
def test_bad_options(change: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(change)).replace("costs", "c")):
        TransferOptions(**change)  # type: ignore[arg-type]


def test_command_line(make_store: Callable[..., Store], run_sppfeat: Callable[..., object]) -> None:
    stores = [str(make_store(name, seed=seed).path) for seed, name in enumerate(("a.h5", "b.h5"))]
    one = run_sppfeat("evaluate", "transfer", stores[0], "--trials", "2", "--json")
    document = json.loads(one.stdout)  # type: ignore[attr-defined]
    assert {"protocol", "metric", "value", "std", "trials", "C", "per_class"} <= document.keys()
    assert document["metric"] == "mean_per_class_accuracy" and len(document["trials"]) == 2
    table = run_sppfeat("evaluate", "transfer", *stores, "--trials", "2", "--c", "1").stdout  # type: ignore[attr-defined]
    assert "against the first" in table and "C = 1)" in table and "solver: primal" in table


def test_real_data_equals_scikit_learn(shared: Path, tmp_path: Path) -> None:
    from sklearn.svm import LinearSVC

    data = shared / "data" / "caltech101-subset"
    classes = sorted(path.name for path in (data / "train").iterdir())[:8]
    sources = [data / part / name for part in ("train", "test") for name in classes]
    extract_folder(sources, tmp_path / "f.h5", Recipe(levels=(2, 1)), root=str(data))
    store = open_store(tmp_path / "f.h5")
    (done,) = evaluate_transfer([store], TransferOptions(protocol="split", costs=(1.0,)))
    train = np.array([name.startswith("train/") for name in store.names])
    known = np.array([name.split("/")[1] for name in store.names])
    rows = np.array(store.descriptors, np.float64)
    predicted = LinearSVC(C=1.0, tol=1e-8, max_iter=100_000).fit(rows[train], known[train]).predict(rows[~train])
    right = predicted == known[~train]
    assert done.value == pytest.approx(100 * np.mean([right[known[~train] == name].mean() for name in classes]))
