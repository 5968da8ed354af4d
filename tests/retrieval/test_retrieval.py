"""Retrieval evaluation against a naive loop and scikit-learn; relevance; ground truth, good and bad."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeStore
from PIL import Image
from reference import cosine_ranking, expanded_scores, oxford_precision, precision_at, retrieval_precision

from sppfeat import Recipe, Store, StoreError, UsageError, extract_folder, open_store
from sppfeat.retrieval.evaluation import RetrievalOptions, evaluate_retrieval
from sppfeat.retrieval.ground_truth import GroundTruth, JudgedQuery, read_ground_truth, write_query_windows
from sppfeat.retrieval.whitening import ProjectionOptions
from sppfeat.windows.reading import read_windows


def clustered(count: int, things: int, *, seed: int = 0, dim: int = 12, noise: float = 1.0) -> np.ndarray:
    """Rows of `things` things, in turn."""
    generator = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(things, dim))
    return centers[np.arange(count) % things] + noise * generator.normal(size=(count, dim))


@pytest.fixture
def things(make_store: MakeStore) -> Store:
    """40 images of 8 things, one folder per thing."""
    names = [f"thing{n % 8}/{n:02}.jpg" for n in range(40)]
    return make_store(clustered(40, 8), names=names)


def test_leave_one_out_equals_a_naive_loop_and_scikit_learn(things: Store) -> None:
    from sklearn.metrics import average_precision_score

    done = evaluate_retrieval(things)
    rows = np.array(things.descriptors, np.float64)
    order, cosines = cosine_ranking(rows, rows)
    precisions, first = [], []
    for query, name in enumerate(things.names):
        ranked = [row for row in order[query] if row != query]
        relevant = [things.names[row].split("/")[0] == name.split("/")[0] for row in ranked]
        precisions.append(retrieval_precision(relevant))
        first.append([any(relevant[:k]) for k in (1, 5, 10)])
        scores = [cosines[query][list(order[query]).index(row)] for row in ranked]
        assert average_precision_score(relevant, scores) == pytest.approx(precisions[-1])
        assert done.average_precisions[name] == pytest.approx(100 * precisions[-1])
    assert (
        done.mean_average_precision == pytest.approx(100 * np.mean(precisions))
        and 30 < done.mean_average_precision < 95
    )
    assert list(done.recall.values()) == pytest.approx(100 * np.mean(first, 0)) and done.recall[1] < 100
    assert (done.queries, done.gallery, done.left_out, done.ap) == (40, 40, [], "step")


def test_two_stores_by_a_pattern(make_store: MakeStore) -> None:
    server = make_store(clustered(24, 8), "server.h5", names=[f"obj{n % 8}_{n}.jpg" for n in range(24)])
    # Things in another order than in the gallery, and one that it does not have.
    names = [f"q/obj{n}_t.jpg" for n in (5, 1, 7, 9)]
    client = make_store(clustered(8, 8, seed=1)[[5, 1, 7, 0]], "client.h5", names=names)
    done = evaluate_retrieval(server, client, RetrievalOptions(relevant=r"regex:(obj\d+)_"))
    assert done.left_out == ["q/obj9_t.jpg"] and done.queries == 3
    order, _ = cosine_ranking(client.descriptors, server.descriptors)
    for query, thing in enumerate((5, 1, 7)):
        expected = retrieval_precision([row % 8 == thing for row in order[query]])
        assert done.average_precisions[names[query]] == pytest.approx(100 * expected)


def test_failed_rows_do_not_count(
    make_images: Callable[..., Path], tmp_path: Path, tiny: Recipe, run_sppfeat: Callable[..., Any]
) -> None:
    for number, folder in enumerate(("a", "b", "c")):
        make_images(3, f"data/{folder}", seed=number)
    (tmp_path / "data/a/0001.png").write_bytes(b"no")
    for name in ("0001.png", "0002.png"):
        (tmp_path / "data/c" / name).write_bytes(b"no")
    extract_folder(tmp_path / "data", tmp_path / "f.h5", tiny)
    done = evaluate_retrieval(open_store(tmp_path / "f.h5"))
    assert (done.gallery, done.queries, done.left_out) == (6, 5, ["c/0000.png"])
    assert done.notes == [f"{tmp_path / 'f.h5'}: of 9 rows, 3 failed and are left out"]
    told = run_sppfeat("evaluate", "retrieval", tmp_path / "f.h5").stderr
    assert told == f"note: {done.notes[0]}\n"
    # Two stores are told apart, and of a store that is both, once.
    extract_folder(tmp_path / "data/c", tmp_path / "c.h5", tiny, root=tmp_path / "data")
    both = evaluate_retrieval(open_store(tmp_path / "f.h5"), open_store(tmp_path / "c.h5"))
    assert both.notes == [done.notes[0], f"{tmp_path / 'c.h5'}: of 3 rows, 2 failed and are left out"]
    assert evaluate_retrieval(open_store(tmp_path / "f.h5"), open_store(tmp_path / "f.h5")).notes == done.notes
    (tmp_path / "data/b/0000.png").unlink()
    told = run_sppfeat("evaluate", "retrieval", tmp_path / "f.h5").stderr
    assert told.splitlines()[1:] == [
        f"note: {tmp_path / 'f.h5'}: 1 of 9 images have lost their file; `sppfeat extract --prune` removes their rows"
    ]


def test_ground_truth_with_junk(things: Store, tmp_path: Path) -> None:
    names = things.names
    order, _ = cosine_ranking(things.descriptors, things.descriptors)
    ranked = [names[row] for row in order[0] if row != 0]
    truth = {names[0]: {"relevant": [ranked[1], ranked[4]], "junk": [ranked[0], ranked[2]]}}
    (tmp_path / "gnd.json").write_text(json.dumps(truth))
    done = evaluate_retrieval(things, truth=read_ground_truth(tmp_path / "gnd.json"))
    # Without junk the ranking begins relevant, no, relevant: trapezoids (1 + 1) / 2 and (1/2 + 2/3) / 2.
    assert done.mean_average_precision == pytest.approx(100 * (1 + 7 / 12) / 2)
    assert done.ap == "trapezoid" and done.recall[1] == 100
    stepped = evaluate_retrieval(
        things, None, RetrievalOptions(ap="step"), truth=read_ground_truth(tmp_path / "gnd.json")
    )
    assert stepped.mean_average_precision == pytest.approx(100 * (1 + 2 / 3) / 2)


def test_difficulties_of_revisited_oxford(things: Store, tmp_path: Path) -> None:
    names = things.names
    lists = {"easy": [names[8]], "hard": [names[16], names[24]], "junk": [names[32]]}
    (tmp_path / "gnd.json").write_text(json.dumps({names[0]: lists}))
    # Their own layout, with names that have neither folders nor extensions.
    judged = {"easy": [8], "hard": [16, 24], "junk": [32], "bbx": [0, 0, 9, 9]}
    places = {"imlist": [name[7:9] for name in names], "qimlist": [names[0][7:9]], "gnd": [judged]}
    (tmp_path / "places.json").write_text(json.dumps(places))
    order, _ = cosine_ranking(things.descriptors, things.descriptors)
    for difficulty, relevant, junk in (
        ("easy", {8}, {16, 24, 32, 0}),
        ("medium", {8, 16, 24}, {32, 0}),
        ("hard", {16, 24}, {8, 32, 0}),
    ):
        expected = retrieval_precision([row in relevant for row in order[0] if row not in junk], trapezoid=True)
        for file in ("gnd.json", "places.json"):
            truth = read_ground_truth(tmp_path / file, difficulty=difficulty)
            done = evaluate_retrieval(things, None, RetrievalOptions(whole_queries=True), truth=truth)
            assert done.average_precisions == pytest.approx({names[0]: 100 * expected})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected ground truth in JSON, query -> relevant and junk, found: Input data was truncated"),
        ("[]", "found: Expected `object`, got `array`"),
        ("{}", "found no query"),
        ('{"q": ["a"]}', "found: Expected `object`, got `array`"),
        ('{"q": {"relevant": "a"}}', "found: Expected `array | null`, got `str`"),
        ('{"q": {"good": ["a"]}}', "found: Object contains unknown field `good`"),
        ('{"q": {"junk": ["a"]}}', "query 'q': expected lists relevant and junk, or easy, hard and junk, found none"),
        ('{"q": {"relevant": [], "ok": []}}', "or easy, hard and junk, found relevant, ok"),
        (
            '{"q": {"relevant": []}, "r": {"ok": []}}',
            "expected the same kind of lists for all queries, found ok and relevant",
        ),
        ('{"q": {"ok": [], "bbx": [5, 5, 5, 9]}}', "query 'q': expected a box x1, y1, x2, y2 in pixels, found 5,5,5,9"),
        ('{"imlist": [], "qimlist": ["q"], "gnd": []}', "one query in qimlist per entry of gnd, found 1 and 0"),
        ('{"q": {"easy": ["a"]}}', "expected lists relevant and junk, or easy, hard and junk, found easy"),
        ('{"q": {"relevant": ["a"], "junk": ["a"]}}', "query 'q': 'a' is both relevant and junk"),
        (
            '{"imlist": [], "qimlist": ["q"], "gnd": [{"easy": [4], "hard": [], "junk": []}]}',
            "query 'q': expected indices below 0, found 4",
        ),
        ('{"thing0/99.jpg": {"relevant": []}}', "query 'thing0/99.jpg': unknown image 'thing0/99.jpg': did you mean"),
        (
            '{"thing0/00.jpg": {"relevant": ["thing0/99.jpg"]}}',
            "ground truth of 'thing0/00.jpg': unknown image 'thing0/99.jpg': did you mean",
        ),
        ('{"thing0/00.jpg": {"relevant": ["thing0/00.jpg"]}}', "none of the 1 queries has a relevant image"),
    ],
)
def test_bad_ground_truth(things: Store, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "gnd.json").write_text(content)
    with pytest.raises(UsageError, match=re.escape(message)):
        evaluate_retrieval(things, truth=read_ground_truth(tmp_path / "gnd.json"))


def test_bad_relevance_and_stores(things: Store, make_store: MakeStore) -> None:
    for relevant, message in (
        ("folders", "relevant must be folder or regex:PATTERN"),
        ("regex:(", "not a regular expression"),
        ("regex:thing", "expected one group in parentheses, found 0"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            RetrievalOptions(relevant=relevant)
    with pytest.raises(UsageError, match="expected the pattern in every name, not found in 'thing1/01.jpg'"):
        evaluate_retrieval(things, None, RetrievalOptions(relevant="regex:(thing0)"))
    flat = make_store(clustered(4, 2), "flat.h5")
    with pytest.raises(UsageError, match="expected images in several folders, found 4 in one, such as '0000.jpg'"):
        evaluate_retrieval(flat)
    with pytest.raises(StoreError, match=r"flat.h5: was made with another recipe than .*f.h5 \(weights: f.h5 0000"):
        evaluate_retrieval(things, make_store(clustered(4, 2), "flat.h5", weights="1" * 64))
    with pytest.raises(UsageError, match="unknown average precision 'steps'"):
        RetrievalOptions(ap="steps")


def test_queries_of_one_folder(things: Store, make_store: MakeStore) -> None:
    names = ["thing3/a.jpg", "thing3/b.jpg"]
    queries = make_store(clustered(4, 4, seed=1)[[3, 3]], "q.h5", names=names)
    done = evaluate_retrieval(things, queries)
    order, _ = cosine_ranking(queries.descriptors, things.descriptors)
    for query, name in enumerate(names):
        expected = retrieval_precision([row % 8 == 3 for row in order[query]])
        assert done.average_precisions[name] == pytest.approx(100 * expected)


def test_windows_of_an_image_are_no_neighbors_of_each_other(make_store: MakeStore) -> None:
    """Nor do they count in re-ranking; without that, every window would find its own image first."""
    names = [f"thing{n % 4 // 2}/{n // 4}{n % 2}.jpg#{part},0,9,9" for n in range(12) for part in (0, 1, 2)]
    rows = np.repeat(clustered(12, 4), 3, 0) + 0.1 * clustered(36, 36, seed=5)
    store = make_store(rows, names=names)
    images = [name.split("#")[0] for name in names]
    units = np.array(store.descriptors, np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    for rerank in ("none", "expand"):
        done = evaluate_retrieval(store, None, RetrievalOptions(rerank=rerank, neighborhood=2, alpha=1.0))
        for query, name in enumerate(names):
            others = [row for row in np.argsort(-(units @ units[query])) if images[row] != images[query]]
            if rerank == "expand":
                scores = expanded_scores(units[query], units[others], 2, 1.0)
                others = [others[at] for at in np.argsort(-np.array(scores), kind="stable")]
            expected = retrieval_precision([names[row][:6] == name[:6] for row in others])
            assert done.average_precisions[name] == pytest.approx(100 * expected)


# Boxes as in revisited Oxford: edges between pixels, the last ones exclusive.
BOXES = ([136.5, 34.1, 648.5, 955.7], [0.0, 3.4, 20.5, 9.6], [7.0, 8.0, 9.0, 9.0])


def oxford(make_store: MakeStore) -> tuple[Store, Store, list[str]]:
    """A gallery of 30 images, 3 of them those of the queries, the queries' boxes, and the ranked names."""
    images = [f"place_{n:03}" for n in range(30)]
    gallery = make_store(clustered(30, 6), "g.h5", names=[f"images/{name}.jpg" for name in images])
    windows = ("136,34,647,955", "0,3,19,9", "7,8,8,8")
    names = [f"{image}.jpg#{window}" for image, window in zip(images, windows, strict=False)]
    return gallery, make_store(clustered(3, 6, seed=1), "q.h5", names=names), images


def ranked_names(gallery: Store, queries: Store, images: list[str]) -> list[list[str]]:
    order, _ = cosine_ranking(queries.descriptors, gallery.descriptors)
    return [[images[row] for row in one] for one in order]


def test_revisited_oxford_as_its_authors_evaluate(make_store: MakeStore, tmp_path: Path) -> None:
    """Queries are boxes, their images are in no ranking, and precision is averaged at 1, 5 and 10."""
    gallery, queries, images = oxford(make_store)
    known = images[3:]  # what they search: all but the images of the queries
    gnd = [
        {"easy": [3 + q, 9 + q], "hard": [15 + q, 16, 2], "junk": [21 + q, 25], "bbx": box}
        for q, box in enumerate(BOXES)
    ]
    gnd[2]["easy"] = []
    content = {"imlist": known, "qimlist": images[:3], "gnd": gnd}
    (tmp_path / "gnd.json").write_text(json.dumps(content))
    ranked = ranked_names(gallery, queries, images)
    for difficulty, good, bad in (
        ("easy", ["easy"], ["hard"]),
        ("medium", ["easy", "hard"], []),
        ("hard", ["hard"], ["easy"]),
    ):
        done = evaluate_retrieval(
            gallery, queries, truth=read_ground_truth(tmp_path / "gnd.json", difficulty=difficulty)
        )
        expected = []
        for q, lists in enumerate(gnd):
            positive = {known[at] for kind in good for at in lists[kind]}
            junk = {known[at] for kind in [*bad, "junk"] for at in lists[kind]} | set(images[:3])
            if positive:
                precision = oxford_precision(ranked[q], positive, junk)
                assert done.average_precisions[queries.names[q]] == pytest.approx(100 * precision)
                expected.append([precision_at(ranked[q], positive, junk, k) for k in (1, 5, 10)])
        assert len(expected) == (2 if difficulty == "easy" else 3) == done.queries
        assert list(done.precision.values()) == pytest.approx(100 * np.mean(expected, 0))
    # A store of whole images has no such rows.
    with pytest.raises(
        UsageError, match=r"expected a row for its box, 'images/place_000.jpg#136,34,647,955', found none"
    ):
        evaluate_retrieval(gallery, truth=read_ground_truth(tmp_path / "gnd.json"))
    whole = evaluate_retrieval(
        gallery, None, RetrievalOptions(whole_queries=True), truth=read_ground_truth(tmp_path / "gnd.json")
    )
    assert list(whole.average_precisions) == [f"images/{name}.jpg" for name in images[:3]]


def test_oxford5k_as_its_authors_evaluate(make_store: MakeStore, tmp_path: Path) -> None:
    """The query's own image is ranked, and counts as good where the files say so."""
    gallery, queries, images = oxford(make_store)
    ranked = ranked_names(gallery, queries, images)
    lists = []
    for q, box in enumerate(BOXES):
        lists.append({"good": [images[q], images[6 + q]], "ok": [images[12 + q]], "junk": [images[18 + q], images[25]]})
        (tmp_path / f"place_{q}_query.txt").write_text(f"oxc1_{images[q]} {' '.join(map(str, box))}\n")
        for kind, names in lists[q].items():
            (tmp_path / f"place_{q}_{kind}.txt").write_text("".join(f"{name}\n" for name in names))
    done = evaluate_retrieval(gallery, queries, truth=read_ground_truth(tmp_path))
    for q, name in enumerate(queries.names):
        expected = oxford_precision(ranked[q], {*lists[q]["good"], *lists[q]["ok"]}, set(lists[q]["junk"]))
        assert done.average_precisions[name] == pytest.approx(100 * expected)
    assert done.precision == {} and done.queries == 3
    # Whole queries: their own rows are not excluded either, and come first.
    alone = evaluate_retrieval(gallery, None, RetrievalOptions(whole_queries=True), truth=read_ground_truth(tmp_path))
    assert alone.recall[1] == 100
    (tmp_path / "place_1_query.txt").write_text("oxc1_place_001 1 2 3\n")
    with pytest.raises(UsageError, match="place_1_query.txt: expected one line, an image and x1 y1 x2 y2"):
        read_ground_truth(tmp_path)
    (tmp_path / "place_1_query.txt").write_text("oxc1_place_001 1 2 3 4\n")
    (tmp_path / "place_1_ok.txt").unlink()
    with pytest.raises(UsageError, match="place_1_ok.txt: expected a list of images, found: "):
        read_ground_truth(tmp_path)
    with pytest.raises(UsageError, match="expected ground truth, files such as NAME_query.txt, found none"):
        read_ground_truth(tmp_path.parent)


def test_windows_of_queries_are_what_their_authors_crop(tmp_path: Path, run_sppfeat: Callable[..., Any]) -> None:
    content = {f"place{n}": {"easy": [], "hard": [], "bbx": box} for n, box in enumerate(BOXES)}
    (tmp_path / "gnd.json").write_text(json.dumps(content))
    arguments = (
        "evaluate",
        "retrieval",
        "--ground-truth",
        tmp_path / "gnd.json",
        "--write-windows",
        tmp_path / "q.csv",
    )
    done = run_sppfeat(*arguments)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'q.csv'}: 3 windows\n"), done.stderr
    across, down = np.meshgrid(np.arange(1024), np.arange(1024))
    image = Image.fromarray((1024 * down + across).astype(np.int32))
    for n, (name, windows) in enumerate(read_windows(tmp_path / "q.csv").items()):
        assert name == f"place{n}.jpg"
        crop = np.array(image.crop(tuple(BOXES[n])))  # type: ignore[arg-type]
        assert windows.tolist() == [[crop[0, 0] % 1024, crop[0, 0] // 1024, crop[-1, -1] % 1024, crop[-1, -1] // 1024]]
    with pytest.raises(UsageError, match=r"q.csv: cannot be written: File exists"):
        write_query_windows(read_ground_truth(tmp_path / "gnd.json"), tmp_path / "q.csv")


def test_projection(things: Store) -> None:
    plain = evaluate_retrieval(things)
    rotated = evaluate_retrieval(things, None, RetrievalOptions(projection=ProjectionOptions(dims=11)))
    assert rotated.projection is not None and rotated.dim == 11 and 0.5 < rotated.projection.kept < 1
    assert rotated.mean_average_precision != plain.mean_average_precision


def test_command_line(things: Store, tmp_path: Path, run_sppfeat: Callable[..., Any]) -> None:
    done = run_sppfeat("evaluate", "retrieval", things.path, "--json", "--whiten", "--project", "8")
    document = json.loads(done.stdout)
    assert {"queries", "gallery", "mAP", "recall@1", "recall@5", "recall@10"} <= document.keys()
    assert document["dim"] == 8 and 0 < document["mAP"] <= 100 and len(document["per_query"]) == 40
    low, high = document["interval"]
    assert 0 < low < document["mAP"] < high < 100
    # What it takes to repeat it, and that the whitening was learned from the evaluated rows.
    assert document["recipe"]["levels"] == [6, 3, 2, 1] and document["seed"] == 0
    assert document["options"]["projection"]["dims"] == 8 and document["options"]["relevant"] == "folder"
    assert document["options"]["store"] == str(things.path) == document["projection"]["learned_from"]
    assert document["projection"]["learned_from_evaluated_rows"] is True
    text = run_sppfeat("evaluate", "retrieval", things.path, "--whiten", "--project", "8").stdout
    assert f"whitening learned from 40 rows of {things.path}, which are also evaluated" in text
    wrong = run_sppfeat("evaluate", "retrieval", things.path, "--queries", things.path)
    assert wrong.returncode == 2 and "expected STORE, or --gallery STORE --queries STORE" in wrong.stderr


def test_real_buildings_equal_scikit_learn(shared: Path, tmp_path: Path) -> None:
    from sklearn.metrics import average_precision_score

    recipe = Recipe(levels=(2, 1), scales=(96,))
    stores = []
    for part in ("server", "client"):
        extract_folder(shared / "data" / "kth-buildings" / part, tmp_path / f"{part}.h5", recipe)
        stores.append(open_store(tmp_path / f"{part}.h5"))
    server, client = stores
    done = evaluate_retrieval(server, client, RetrievalOptions(relevant=r"regex:(obj\d+)_"))
    order, cosines = cosine_ranking(client.descriptors, server.descriptors)
    things = [name.split("_")[0] for name in server.names]
    for query, name in enumerate(client.names):
        relevant = [things[row] == name.split("_")[0] for row in order[query]]
        assert done.average_precisions[name] == pytest.approx(100 * retrieval_precision(relevant))
        assert done.average_precisions[name] == pytest.approx(100 * average_precision_score(relevant, cosines[query]))
    assert (done.queries, done.gallery) == (25, 75) and done.mean_average_precision > 70


def test_what_is_in_no_ranking_is_no_neighbor_either(make_store: MakeStore) -> None:
    """Re-ranking uses neither the query's own image nor images that are only queries; two stores, no boxes."""
    rows = np.eye(6)[[0, 1, 2, 3]] + 0.01
    rows[0] = [1, 0, 0.9, 0, 0, 0]  # the query's own image, near a wrong one
    rows[1] = [1, 0.2, 0, 0, 0, 0]  # what is relevant
    rows[2] = [0.4, 0, 1, 0, 0, 0]
    names = ["q.jpg", "right.jpg", "wrong.jpg", "other.jpg"]
    gallery = make_store(rows, names=names)
    queries = make_store(np.array([[1, 0, 0.5, 0, 0, 0]]), "q.h5", names=["q.jpg"])
    truth = GroundTruth([JudgedQuery("q.jpg", frozenset({"right.jpg"}), frozenset())])
    alone = make_store(rows[1:], "alone.h5", names=names[1:])
    for rerank in ("none", "expand", "reciprocal", "diffuse"):
        options = RetrievalOptions(rerank=rerank, neighborhood=2)
        without = evaluate_retrieval(alone, queries, options, truth=truth)
        found = evaluate_retrieval(gallery, queries, options, truth=truth)
        assert found.mean_average_precision == without.mean_average_precision, rerank
