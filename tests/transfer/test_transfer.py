"""Transfer evaluation: splits, choice of C, comparison of stores, and what cannot be evaluated."""

from __future__ import annotations

import html
import json
import re
import urllib.parse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sppfeat import (
    Recipe,
    ReportError,
    SppFeatWarning,
    Store,
    StoreError,
    UsageError,
    extract_folder,
    open_store,
)
from sppfeat.images import Fingerprint
from sppfeat.report.pages import check_page
from sppfeat.store.writing import StoreWriter, create_store
from sppfeat.svm.statistics import interval
from sppfeat.transfer.evaluation import evaluate_transfer
from sppfeat.transfer.judging import Verdict
from sppfeat.transfer.knn import knn_scores
from sppfeat.transfer.labels import labels_from_folders, read_labels, read_voc_labels
from sppfeat.transfer.options import TransferOptions
from sppfeat.transfer.page import write_transfer_report
from sppfeat.transfer.splits import folder_task

DIM = 40


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., Store]:
    """A store of `count` rows per class, drawn around a center of each class."""

    def make(
        file: str = "f.h5",
        *,
        classes: int = 4,
        count: int = 12,
        folder: str = "",
        noise: float = 0.6,
        seed: int = 0,
        root: str = "/nowhere",
    ) -> Store:
        generator = np.random.default_rng(seed)
        names = [f"{folder}class{c}/{n:03}.jpg" for c in range(classes) for n in range(count)]
        if folder == "":
            names = sorted(names)
        centers = generator.normal(size=(classes, DIM))
        rows = np.repeat(centers, count, 0) + noise * generator.normal(size=(len(names), DIM))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        path = tmp_path / file
        create_store(path, names, recipe=Recipe(), weights_sha256="0" * 64, dim=DIM, source_root=root)
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
    assert (done.rows, done.left_out, done.std, done.curve) == (48, 0, 0.0, [])
    assert [costs.tolist() for costs in done.costs] == [[1.0] * 4]
    confusion = np.array([[((known[test] == a) & (predicted == b)).sum() for b in expected] for a in expected])
    assert np.array_equal(done.confusion, confusion)
    wrong = {
        name for name, is_wrong in zip(np.array(store.names)[test], predicted != known[test], strict=True) if is_wrong
    }
    assert {mistake.name for mistake in done.mistakes} == wrong
    assert sorted((one.margin for one in done.mistakes), reverse=True) == [one.margin for one in done.mistakes]


def test_folders_named_train_and_test(make_images: Callable[..., Path], tmp_path: Path, tiny: Recipe) -> None:
    for part in ("train", "test"):
        for number, name in enumerate(("a", "b")):
            make_images(3, f"data/{part}/{name}", seed=number)
    extract_folder(tmp_path / "data", tmp_path / "f.h5", tiny)
    (done,) = evaluate_transfer([open_store(tmp_path / "f.h5")], TransferOptions(protocol="split", costs=(1.0,)))
    assert done.value == 100 and done.per_class.keys() == {"a", "b"}  # test images equal training images


def test_random_splits(make_store: Callable[..., Store]) -> None:

    store = make_store(count=9)
    known = np.array([name.split("/")[0] for name in store.names])
    labels = labels_from_folders(store.names)
    options = TransferOptions(per_class=5, max_test=3, trials=4)
    splits = folder_task(store, set(), labels, options).splits
    assert len(splits) == 4
    for train, test in splits:
        assert not set(train) & set(test)
        assert np.unique(known[train], return_counts=True)[1].tolist() == [5] * 4
        assert np.unique(known[test], return_counts=True)[1].tolist() == [3] * 4
    assert any(not np.array_equal(splits[0][0], train) for train, _ in splits[1:])
    again = folder_task(store, set(), labels, options).splits
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(splits, again, strict=True))
    other = folder_task(store, set(), labels, replace(options, seed=1)).splits
    assert any(not np.array_equal(a[0], b[0]) for a, b in zip(splits, other, strict=True))


def test_c_is_chosen_inside_the_training_rows(make_store: Callable[..., Store]) -> None:
    """The choice of C does not depend on the test rows."""
    from sppfeat.svm.cost_selection import choose_cost
    from sppfeat.svm.solver import SvmProblem

    store = make_store(noise=2.5)
    rows = np.array(store.descriptors)
    known = np.array([name.split("/")[0] for name in store.names])
    train = np.flatnonzero(np.arange(len(store)) % 3 != 0)
    chosen = choose_cost(SvmProblem(rows), known[train], train, TransferOptions())
    rows[::3] = np.random.default_rng(5).normal(size=rows[::3].shape)
    again = choose_cost(SvmProblem(rows), known[train], train, TransferOptions())
    assert np.array_equal(again.costs, chosen.costs) and again.curve == chosen.curve


def test_stores_are_compared_on_the_same_splits(make_store: Callable[..., Store]) -> None:
    good, bad = make_store("good.h5", noise=0.8), make_store("bad.h5", noise=2.5)
    both = evaluate_transfer([good, bad], TransferOptions(trials=3))
    alone = evaluate_transfer([bad], TransferOptions(trials=3))
    assert both[1].trials == alone[0].trials and both[0].value > both[1].value
    assert len(both[0].trials) == 3
    with pytest.raises(
        StoreError, match=r"other\.h5: expected the images of .*good\.h5, found 12 that are in only one of them"
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
    with pytest.raises(StoreError, match=r"f\.h5: 2 of 48 images are still to be described; run extract again"):
        evaluate_transfer([store])


def test_folders_without_classes_are_named(make_store: Callable[..., Store]) -> None:
    store = make_store()
    labels = replace(
        labels_from_folders(store.names),
        classes={name: ("train", "test")[at % 2] for at, name in enumerate(store.names)},
        splits={name: ("train", "test")[at % 2] for at, name in enumerate(store.names)},
    )
    with pytest.raises(UsageError, match="class 'test': has test images, but none to train with"):
        evaluate_transfer([store], TransferOptions(protocol="split"), labels=labels)


def test_too_few_images_are_named_with_counts(make_store: Callable[..., Store]) -> None:
    with pytest.raises(
        UsageError, match=r"expected at least 31 images per class, found fewer in 4 of .*\(class0 12, class1 12"
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
        ("name,label\na,x\na,y\n", "line 3: found a duplicate name ('a')"),
        ("name,label\na,\n", "line 2: found an empty name or label ('a')"),
        (
            "name,label,split\na,x,dev\n",
            "line 2: expected split train, test, val, valid, validation or none, found 'dev'",
        ),
        (
            "name,label\nnowhere.jpg,x\n",
            "none of its 48 names has a label; the store has 'class0/000.jpg', the labels 'nowhere.jpg'",
        ),
        ("name,label\nnowhere.jpg,x\nclass0/000.jpg,x\n", "such as 'nowhere.jpg'; the store has 'class0/000.jpg'"),
        ("name,label\n000.jpg,x\nclass0/000.jpg,x\n", "such as '000.jpg'; did you mean 'class0/000.jpg'?"),
    ],
)
def test_bad_labels(make_store: Callable[..., Store], tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)):
        evaluate_transfer([make_store()], labels=read_labels(path))


def test_labels_files_that_could_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.csv: expected a CSV .* name,label\[,split\], found no such file$"):
        read_labels(tmp_path / "gone.csv")
    (tmp_path / "labels.csv").write_text("name,label\n")
    with pytest.raises(UsageError, match=r"found no such file; did you mean .*/labels\.csv\?$"):
        read_labels(tmp_path / "label.csv")
    with pytest.raises(UsageError, match="could not be read: Is a directory"):
        read_labels(tmp_path)
    (tmp_path / "latin.csv").write_bytes("name,label\na,\xdc\n".encode("latin1"))
    with pytest.raises(UsageError, match=r"latin\.csv: expected a CSV file in UTF-8, found: "):
        read_labels(tmp_path / "latin.csv")


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
    assert "compared to the first" in table and "C = 1, " in table and "solver: gram" in table


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


def write_voc(folder: Path, targets: np.ndarray, parts: list[str]) -> list[str]:
    """VOC lists of classes named after numbers; targets [N, K]. Returns the names of the images."""
    lists = folder / "VOC2007" / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for column, values in enumerate(targets.T):
        for part in ("trainval", "test"):
            rows = [f"{row:06} {value:2}" for row, value in enumerate(values) if parts[row] == part]
            (lists / f"kind{column}_{part}.txt").write_text("\n".join(rows) + "\n")
    for part in ("trainval", "test"):  # a VOC folder has these too, but they name no class
        (lists / f"{part}.txt").write_text("".join(f"{row:06}\n" for row in range(len(parts)) if parts[row] == part))
    return [f"JPEGImages/{row:06}.jpg" for row in range(len(parts))]


def write_store(path: Path, names: list[str], rows: np.ndarray, recipe: Recipe | None = None) -> Store:
    create_store(path, names, recipe=recipe or Recipe(), weights_sha256="0" * 64, dim=rows.shape[1], source_root="/")
    with StoreWriter(open_store(path)) as writer:
        for row, values in enumerate(rows):
            writer.write(row, values, (10, 10), Fingerprint(1, 1))
    return open_store(path)


@pytest.fixture
def voc(tmp_path: Path) -> tuple[Path, Store, np.ndarray, list[str]]:
    """A VOC folder of 3 classes and a store of its images; some images have several classes, or are difficult."""
    generator = np.random.default_rng(2)
    targets = np.where(generator.random((90, 3)) < 0.35, 1, -1)
    targets[generator.random((90, 3)) < 0.08] = 0
    parts = ["test" if row % 3 == 0 else "trainval" for row in range(90)]
    names = write_voc(tmp_path, targets, parts)
    rows = (targets > 0) @ generator.normal(size=(3, 60)) + 4 * generator.normal(size=(90, 60))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return tmp_path, write_store(tmp_path / "voc.h5", names, rows), targets, parts


def test_voc2007_equals_scikit_learn_class_by_class(voc: tuple[Path, Store, np.ndarray, list[str]]) -> None:
    from sklearn.svm import LinearSVC

    folder, store, targets, parts = voc
    options = TransferOptions(protocol="voc2007", costs=(1.0,), positive_weight=2.0)
    (done,) = evaluate_transfer([store], options, labels=read_voc_labels(folder))
    train, test = (np.array(parts) == part for part in ("trainval", "test"))
    rows = np.array(store.descriptors, np.float64)
    for column in range(3):
        fit, held = (part & (targets[:, column] != 0) for part in (train, test))
        svm = LinearSVC(C=1.0, class_weight={1: 2, -1: 1}, tol=1e-10, max_iter=1_000_000)
        scores = svm.fit(rows[fit], targets[fit, column]).decision_function(rows[held])
        hits = targets[held, column][np.argsort(-scores)] > 0
        precision, recall = hits.cumsum() / np.arange(1, len(hits) + 1), hits.cumsum() / hits.sum()
        expected = np.mean([precision[recall >= tenth / 10 - 1e-12].max(initial=0) for tenth in range(11)])
        assert done.per_class[f"kind{column}"] == pytest.approx(100 * expected)
    assert done.metric == "mAP" and done.value == pytest.approx(np.mean(list(done.per_class.values())))
    assert done.value < 100 and set(done.area_per_class) == set(done.per_class) and done.rows == 90


def test_an_absent_class_is_a_mistake_of_neighbors_with_most_votes(
    voc: tuple[Path, Store, np.ndarray, list[str]],
) -> None:
    folder, store, targets, parts = voc
    options = TransferOptions(protocol="voc2007", classifier="knn", neighbors=5)
    (done,) = evaluate_transfer([store], options, labels=read_voc_labels(folder))
    train, test = (np.flatnonzero(np.array(parts) == part) for part in ("trainval", "test"))
    votes = knn_scores(np.array(store.descriptors), train, test, targets[train], neighbors=5)
    wrong = np.where(targets[test] == -1, votes, 0)
    assert 0 < done.mistaken == (wrong > 0.5).sum() < (wrong > 0).sum()
    assert [one.margin for one in done.mistakes] == sorted(wrong[wrong > 0.5].tolist(), reverse=True)


def test_voc2007_chooses_c_by_class(voc: tuple[Path, Store, np.ndarray, list[str]]) -> None:
    """Each class's C is the best of its own average precision, over folds that hold an equal share of its images."""
    from sklearn.metrics import average_precision_score
    from sklearn.svm import LinearSVC

    from sppfeat.svm.cost_selection import FOLDS, choose_cost_per_class, folds
    from sppfeat.svm.options import SvmOptions
    from sppfeat.svm.solver import SvmProblem

    _, store, targets, parts = voc
    train = np.flatnonzero(np.array(parts) == "trainval")
    costs = (0.01, 1.0, 100.0)
    choice = choose_cost_per_class(SvmProblem(store.descriptors), targets[train], train, SvmOptions(costs=costs))
    rows = np.array(store.descriptors, np.float64)[train]
    values = np.zeros((3, len(costs)))
    for column in range(3):
        wanted = targets[train, column]
        fold = folds(wanted, SvmOptions())
        assert all(abs((wanted[fold == n] == 1).sum() - (wanted == 1).sum() / FOLDS) < 1 for n in range(FOLDS))
        for number in range(FOLDS):
            fit, held = (part & (wanted != 0) for part in (fold != number, fold == number))
            for at, cost in enumerate(costs):
                svm = LinearSVC(C=cost, tol=1e-8, max_iter=1_000_000).fit(rows[fit], wanted[fit])
                values[column, at] += average_precision_score(wanted[held], svm.decision_function(rows[held])) / FOLDS
        best = values[column].max()
        assert values[column, costs.index(choice.costs[column])] >= best - 1e-3
    assert [value for _, value in choice.curve] == pytest.approx(values.mean(0).tolist(), abs=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lists: [path.unlink() for path in lists.glob("kind1_test.txt")], "expected kind1_test.txt beside"),
        (lambda lists: [path.unlink() for path in lists.glob("*_trainval.txt")], "CLASS_trainval.txt, found none"),
        (
            lambda lists: (lists / "kind0_test.txt").write_text("000000 2\n"),
            "kind0_test.txt, line 1: expected an image",
        ),
        (lambda lists: (lists / "kind0_test.txt").write_text(""), "kind0_test.txt: expected one image per line"),
        (lambda lists: (lists / "kind2_test.txt").write_text("000000 1\n"), "expected the images of kind0_test.txt"),
        (lambda lists: (lists / "kind0_test.txt").write_text("000000 1\n" * 2), "line 2: duplicate image '000000'"),
        (
            lambda lists: (lists / "kind0_test.txt").write_bytes(b"\xff\xfe"),
            "kind0_test.txt: expected a text file in UTF-8",
        ),
    ],
)
def test_broken_voc_folders(
    voc: tuple[Path, Store, np.ndarray, list[str]], change: Callable[[Path], object], message: str
) -> None:
    folder = voc[0]
    change(folder / "VOC2007" / "ImageSets" / "Main")
    with pytest.raises(UsageError, match=re.escape(message)):
        read_voc_labels(folder)


def test_voc_images_and_rows_that_do_not_meet(voc: tuple[Path, Store, np.ndarray, list[str]], tmp_path: Path) -> None:
    folder, store, _, _ = voc
    labels, options = read_voc_labels(folder), TransferOptions(protocol="voc2007", costs=(1.0,))
    rows = np.array(store.descriptors)
    some = write_store(tmp_path / "some.h5", store.names[:80], rows[:80])
    with pytest.raises(
        UsageError, match="10 of 90 images of the VOC lists match no row of .*some.h5, such as '000080'"
    ):
        evaluate_transfer([some], options, labels=labels)
    twice = write_store(tmp_path / "twice.h5", [*store.names, "b/000000.jpg"], np.concatenate([rows, rows[:1]]))
    with pytest.raises(UsageError, match="expected one image '000000', found 'JPEGImages/000000.jpg' and"):
        evaluate_transfer([twice], options, labels=labels)
    more = write_store(tmp_path / "more.h5", [*store.names, "else.jpg"], np.concatenate([rows, rows[:1]]))
    assert evaluate_transfer([more], options, labels=labels)[0].left_out == 1
    with pytest.raises(UsageError, match="protocol voc2007: expected the lists of a VOC folder"):
        evaluate_transfer([store], options)
    with pytest.raises(UsageError, match="protocol random: expected no VOC folder"):
        evaluate_transfer([store], labels=labels)
    with pytest.raises(UsageError, match="expected a VOC folder such as VOC2007, .*, found no such folder"):
        read_voc_labels(tmp_path / "nowhere")
    failed = tmp_path / "failed.h5"
    create_store(failed, store.names, recipe=Recipe(), weights_sha256="0" * 64, dim=60, source_root="/")
    with StoreWriter(open_store(failed)) as writer:
        for row in range(len(store.names)):
            writer.fail(row, "damaged")
    with pytest.raises(UsageError, match=r"failed.h5: expected described images, found none: all 90 failed"):
        evaluate_transfer([open_store(failed)], options, labels=labels)


def test_levels_cut_out_equal_descriptors_of_these_levels(
    make_images: Callable[..., Path], tmp_path: Path, tiny: Recipe
) -> None:
    """With every normalization, and with several scales side by side."""
    from sppfeat.store.subset import DescriptorView

    folder = make_images(5)
    for changes in ({}, {"normalize": "signed-sqrt-l2"}, {"normalize": "none", "scales": (64, 96)}):
        recipe = replace(tiny, levels=(3, 2, 1), dtype="float32", fuse="concat", **changes)  # type: ignore[arg-type]
        extract_folder(folder, tmp_path / "all.h5", recipe, overwrite=True)
        extract_folder(folder, tmp_path / "some.h5", replace(recipe, levels=(1, 3)), overwrite=True)
        view = DescriptorView(open_store(tmp_path / "all.h5"), np.array([4, 0, 2]), (1, 3))
        expected = np.array(open_store(tmp_path / "some.h5").descriptors)[[4, 0, 2]]
        assert view.shape == expected.shape and view.recipe == open_store(tmp_path / "some.h5").recipe
        assert np.allclose(view[:], expected, rtol=1e-4, atol=1e-6)
        assert np.array_equal(view[np.array([1, 2])], view[1:3])


def test_levels_that_cannot_be_cut_out(make_images: Callable[..., Path], tmp_path: Path, tiny: Recipe) -> None:
    from sppfeat.store.subset import DescriptorView

    extract_folder(make_images(2), tmp_path / "f.h5", replace(tiny, scales=(64, 96)))
    store = open_store(tmp_path / "f.h5")
    with pytest.raises(UsageError, match="expected levels among its 2,1, found 3"):
        DescriptorView(store, levels=(3, 1))
    with pytest.raises(UsageError, match="its 2 scales were fused by mean"):
        DescriptorView(store, levels=(1,))
    assert DescriptorView(store, levels=(2, 1)).shape == store.descriptors.shape


def test_rows_left_out_are_never_copied(make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a row failed, the largest block that is read stays a block, not the matrix."""
    from sppfeat.store.subset import DescriptorView
    from sppfeat.svm import model
    from sppfeat.svm import rows as svm_rows

    store = make_store()
    with StoreWriter(store) as writer:
        writer.fail(3, "broken")
    monkeypatch.setattr(svm_rows, "_BLOCK_BYTES", 8 * DIM * 5)
    monkeypatch.setattr(model, "_BLOCK_BYTES", 4 * DIM * 5)
    read: list[int] = []
    plain = DescriptorView.__getitem__

    def counted(self: DescriptorView, index: slice | np.ndarray) -> np.ndarray:
        block = plain(self, index)
        read.append(len(block))
        return block

    monkeypatch.setattr(DescriptorView, "__getitem__", counted)
    evaluate_transfer([open_store(store.path)], TransferOptions(trials=1))
    assert 5 in read and max(read) <= 10  # rows of double and of single precision


@pytest.fixture
def one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver that stops long before it converges."""
    monkeypatch.setattr("sppfeat.svm.newton._MAX_NEWTON", 1)


def test_a_trial_takes_the_products_of_its_own_rows_alone(
    make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sppfeat.svm.rows import Rows

    sizes: list[int] = []
    plain = Rows.gram

    def counted(self: Rows) -> torch.Tensor:
        sizes.append(len(self))
        return plain(self)

    monkeypatch.setattr(Rows, "gram", counted)
    evaluate_transfer([make_store()], TransferOptions(per_class=3, trials=2))
    assert sizes == [12, 12]


def test_svms_that_do_not_converge_are_told(make_store: Callable[..., Store], tmp_path: Path, one_step: None) -> None:
    """In data, as a warning, in the document and on the page, those of the choice of C included."""
    from sppfeat_cli.evaluate import _document

    store = make_store(noise=2.5)
    with pytest.warns(SppFeatWarning) as caught:
        (done,) = evaluate_transfer([store], TransferOptions(trials=2, costs=(1.0, 10.0)))
    found = done.convergence
    assert found.gaps.shape == (2, 4) and 0 < len(found.not_converged) <= 8 and found.largest_gap > 1e-4
    worst = max(found.not_converged, key=lambda one: one.gap)
    assert worst.gap == found.largest_gap == found.gaps[worst.trial, int(worst.label[-1])]
    first, second = (str(one.message) for one in caught)
    assert re.search(
        rf"f\.h5: {len(found.not_converged)} of 8 SVMs did not converge \(.*, class '{worst.label}'\)", first
    )
    assert "SVMs of the cross-validation did not converge" in second and found.choice_gap > 1e-4
    document = _document(done, None, None)
    assert document["converged"] is False and document["largest_gap"] == found.largest_gap
    assert {"trial": worst.trial, "class": worst.label, "gap": worst.gap} in document["not_converged"]
    write_transfer_report(tmp_path / "r.html", [done])
    assert " of 8 SVMs did not converge" in (tmp_path / "r.html").read_text()


def test_svms_that_converge_are_told(make_store: Callable[..., Store]) -> None:
    from sppfeat_cli.evaluate import _document

    (done,) = evaluate_transfer([make_store(noise=2.5)], TransferOptions(trials=2))
    document = _document(done, None, None)
    assert document["converged"] is True and document["not_converged"] == []
    assert 0 <= document["largest_gap"] <= 1e-4 and done.convergence.choice_gap <= 1e-4


def test_a_class_without_a_test_image(
    make_store: Callable[..., Store], tmp_path: Path, run_sppfeat: Callable[..., object]
) -> None:
    """It is in no mean, null in JSON, last in every list, and reported; images of no part are counted."""
    from sppfeat_cli.evaluate import _document

    store = make_store(noise=2.5)
    part = {"class0": "train", "class1": "val"}  # class1 has training images, too
    lines = [
        f"{name},{label},{part.get(label, 'test') if at % 3 == 0 else 'train' if at % 3 == 1 else ''}"
        for at, name in enumerate(store.names)
        for label in [name.split("/")[0]]
    ]
    labels = tmp_path / "labels.csv"
    labels.write_text("name,label,split\n" + "\n".join(lines) + "\n")
    words = ("evaluate", "transfer", store.path, "--protocol", "split", "--c", "1", "--labels", labels)
    (done,) = evaluate_transfer([store], TransferOptions(protocol="split", costs=(1.0,)), labels=read_labels(labels))
    assert done.untested == ["class0", "class1"]
    assert done.value == pytest.approx(np.mean([done.per_class["class2"], done.per_class["class3"]]))
    assert (done.train, done.test, done.rows, done.left_out) == (20, 8, 28, 20)
    assert done.left_out_by_reason == {"of part val": 4, "in neither part": 16} and done.test_part == "test"
    assert _document(done, str(labels), None)["per_class"]["class0"] is None
    shown = run_sppfeat(*words, "--report", tmp_path / "r.html")
    assert (shown.returncode, shown.stderr) == (0, f"wrote {tmp_path / 'r.html'}\n")  # type: ignore[attr-defined]
    lines = shown.stdout.splitlines()  # type: ignore[attr-defined]
    assert "28 images: 20 for training and 8 for testing; 20 skipped (16 in neither part, 4 of part val)" in lines[1]
    assert "class0" not in lines[2] and lines[3] == "no test images, excluded from the mean: class0, class1 (2 classes)"
    text = (tmp_path / "r.html").read_text()
    assert text.count("no test image") == 2 and "nan" not in text
    assert text.index('title="class3"') < text.index('title="class0"')


def test_validation_images_are_tested_where_there_is_no_test(make_store: Callable[..., Store]) -> None:
    store = make_store()
    labels = labels_from_folders(store.names)
    parts = {name: ("train", "valid", "validation")[at % 3] for at, name in enumerate(store.names)}
    options = TransferOptions(protocol="split", costs=(1.0,))
    (done,) = evaluate_transfer([store], options, labels=replace(labels, splits=parts))
    assert (done.test_part, done.train, done.test, done.left_out_by_reason) == (
        "valid",
        16,
        16,
        {"of part validation": 16},
    )
    with pytest.raises(UsageError, match="found no test, val, valid or validation"):
        evaluate_transfer([store], options, labels=replace(labels, splits=dict.fromkeys(parts, "train")))
    assert labels_from_folders(["val/a/1.jpg"]).splits == {"val/a/1.jpg": "val"}


def test_one_image_a_class_needs_one_c(
    make_store: Callable[..., Store], tmp_path: Path, run_sppfeat: Callable[..., object]
) -> None:
    words = ("evaluate", "transfer", make_store().path, "--per-class", "1", "--trials", "1")
    refused = run_sppfeat(*words, "--report", tmp_path / "r.html")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1  # type: ignore[attr-defined]
    assert "C cannot be chosen by cross-validation" in refused.stderr  # type: ignore[attr-defined]
    done = run_sppfeat(*words, "--c", "1", "--report", tmp_path / "r.html")
    assert (done.returncode, done.stderr) == (0, f"wrote {tmp_path / 'r.html'}\n")  # type: ignore[attr-defined]
    assert (tmp_path / "r.html").is_file()


def test_the_document_repeats_the_evaluation(
    make_store: Callable[..., Store], run_sppfeat: Callable[..., object]
) -> None:
    store = make_store(noise=2.5)
    shown = run_sppfeat(  # type: ignore[attr-defined]
        "evaluate", "transfer", store.path, "--trials", "2", "--seed", "3", "--c", "0.1,1", "--per-class", "4", "--json"
    ).stdout
    document = json.loads(shown)
    assert Recipe(**document["recipe"]) == store.recipe and document["weights_sha256"] == store.weights_sha256
    assert document["seed"] == 3 and document["options"]["labels"] is document["options"]["voc"] is None
    fields = {key: value for key, value in document["options"].items() if key not in ("labels", "voc")}
    (again,) = evaluate_transfer([store], TransferOptions(**fields | {"costs": tuple(fields["costs"])}))
    assert again.trials == pytest.approx(document["trials"]) and document["train"] == 16


def test_images_that_are_gone_are_told(make_store: Callable[..., Store], run_sppfeat: Callable[..., object]) -> None:
    store = make_store(root="/")
    words = ("evaluate", "transfer", store.path, "--trials", "1", "--c", "1")
    done = run_sppfeat(*words)
    told = f"note: {store.path}: 48 of 48 images have lost their file; `sppfeat extract --prune` removes their rows\n"
    assert (done.returncode, done.stderr) == (0, told)  # type: ignore[attr-defined]


def test_results_come_before_the_page(
    make_store: Callable[..., Store],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from sppfeat_cli.app import build

    def full(path: Path, done: object, *, command: str) -> None:
        raise ReportError(f"{path}: cannot be written: the disk is full")

    monkeypatch.setattr("sppfeat.transfer.page.write_transfer_report", full)
    page = str(tmp_path / "r.html")
    words = ["evaluate", "transfer", str(make_store().path), "--trials", "1", "--json", "--report", page]
    with pytest.raises(SystemExit, match="1"):
        build()(words)
    out, err = capsys.readouterr()
    assert json.loads(out)["trials"] and err == f"sppfeat: {page}: cannot be written: the disk is full\n"


def test_a_class_whose_images_all_failed(make_store: Callable[..., Store]) -> None:
    store = make_store(classes=3)
    with StoreWriter(store) as writer:
        for row in range(12):
            writer.fail(row, "broken")
    with pytest.warns(SppFeatWarning, match=r"f\.h5: 1 of 3 classes skipped, because all .* failed: 'class0'"):
        (done,) = evaluate_transfer([store], TransferOptions(trials=1))
    assert list(done.per_class) == ["class1", "class2"] and done.left_out_by_reason == {"failed": 12}
    with StoreWriter(store) as writer:
        for row in range(12, 36):
            writer.fail(row, "broken")
    with pytest.raises(UsageError, match="expected described images with a label, found none: all 36 failed"):
        evaluate_transfer([store])


def test_page(make_images: Callable[..., Path], tmp_path: Path, tiny: Recipe) -> None:
    """One file, with thumbnails inside and names escaped, that loads nothing from elsewhere."""
    for seed, name in enumerate(("<b>", "b", "c")):
        make_images(6, f"data/{name}", seed=seed)
    extract_folder(tmp_path / "data", tmp_path / "f.h5", tiny)
    done = evaluate_transfer([open_store(tmp_path / "f.h5")] * 2, TransferOptions(trials=2))
    page = check_page(tmp_path / "r.html", overwrite=False)
    write_transfer_report(page, done)
    text = page.read_text()
    assert "&lt;b&gt;" in text and "<b>/" not in text and "data:image/jpeg;base64," in text
    assert not re.findall(r"src=[\"'](?!data:)", text) and "http" not in text
    links = [urllib.parse.unquote(html.unescape(link)) for link in re.findall(r'href="([^"]*)"', text)]
    assert links and all(link.startswith("./data/") and (tmp_path / link).is_file() for link in links)
    for name in {mistake.name for one in done for mistake in one.mistakes[:5]}:
        assert html.escape(name) in text
    with pytest.raises(ReportError, match="already exists"):
        check_page(page, overwrite=False)
    assert check_page(page, overwrite=True) == page
    with pytest.raises(ReportError, match="it is left as it is"):
        check_page(next((tmp_path / "data").glob("*/*.png")), overwrite=True)
    with pytest.raises(ReportError, match="its folder .* does not exist"):
        check_page(tmp_path / "nowhere" / "r.html", overwrite=False)


def test_page_by_command_line(
    make_store: Callable[..., Store], tmp_path: Path, run_sppfeat: Callable[..., object]
) -> None:
    """Without the images, and with a given C."""
    store, page = make_store(noise=2.5).path, tmp_path / "r.html"
    done = run_sppfeat("evaluate", "transfer", store, "--c", "1", "--trials", "2", "--report", page)
    assert done.returncode == 0 and "image not available" in page.read_text()  # type: ignore[attr-defined]


def test_voc_real_data(shared: Path, tmp_path: Path) -> None:
    """The lists of a real VOC folder: the right number of images and classes, and C chosen within them."""
    labels = read_voc_labels(shared / "data" / "voc2007-subset")
    assert len(labels.classes) == 20 and {"train", "person"} <= set(labels.classes)
    assert sum(part == "train" for part in labels.splits.values()) == 400 and len(labels.splits) == 600
    assert {int(value) for row in labels.targets.values() for value in row} == {-1, 0, 1}


def test_the_interval_of_few_images_holds_the_value() -> None:
    """Nearly every draw of all images would lack a class of one test image; those within classes have it."""
    labels = np.array([*range(6), 6, 6, 6, 6])
    right = np.array([True, True, False, False, False, False, True, True, True, False])
    per_class = np.array([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.75])
    verdict = Verdict(
        value=100 * per_class.mean(),
        per_class=per_class,
        area_per_class=np.zeros(0),
        top1=50.0,
        top5=100.0,
        confusion=np.zeros((7, 7), int),
        mistakes=[],
        mistaken=int((~right).sum()),
        right=right,
        labels=labels,
        scores=np.zeros((10, 7)),
    )
    low, high = interval([(verdict.strata, verdict.resampled)] * 5)
    assert low < verdict.value < high < 100 * 3 / 7 + 1e-9


def test_stores_side_by_side_on_the_page(make_store: Callable[..., Store], tmp_path: Path) -> None:
    """A bar with its interval for each, and the classes that differ from the first store's; those at 100 % at once."""
    stores = [make_store("good.h5", noise=0.3), make_store("bad.h5", noise=2.5)]
    good, bad = evaluate_transfer(stores, TransferOptions(trials=2, costs=(1.0,), per_class=4))
    write_transfer_report(tmp_path / "r.html", [good, bad], command="sppfeat evaluate transfer good.h5 bad.h5")
    text = (tmp_path / "r.html").read_text()
    for one in (good, bad):
        low, high = one.interval
        assert f'<i style="width: {one.value:.2f}%"></i>' in text
        assert f'class="interval" style="left: {low:.2f}%; width: {high - low:.2f}%"' in text
    differences = {name: value - good.per_class[name] for name, value in bad.per_class.items()}
    differing = sorted(value for value in differences.values() if value)
    shown = re.findall(r'<i class="(worse|better)" style="width: ([\d.]+)%"></i></span><b>([+-]\d+)</b>', text)
    assert [int(number) for _, _, number in shown] == [round(value) for value in differing] and differing[0] < -5
    assert all((kind == "worse") == (number[0] == "-") for kind, _, number in shown)
    assert max(float(width) for _, width, _ in shown) == 50
    perfect = [name for name, value in good.per_class.items() if value == 100]
    assert len(perfect) > 1 and f"{len(perfect)} classes at 100 %</summary>" in text
    assert f"{min(24, len(bad.mistakes))} of {bad.mistaken} mistakes in 2 trials shown" in text
    assert bad.mistaken == bad.confusion.sum() - np.trace(bad.confusion) > 24
    assert "<code>sppfeat evaluate transfer good.h5 bad.h5</code>" in text and text.count("<summary>Recipe of ") == 2
