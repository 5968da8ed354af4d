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
from reference import cosine_ranking, retrieval_precision

from sppfeat import Recipe, Store, StoreError, UsageError, extract_folder, open_store
from sppfeat.retrieval import RetrievalOptions, evaluate_retrieval, read_ground_truth
from sppfeat.whitening import ProjectionOptions


def clustered(count: int, things: int, *, seed: int = 0, dim: int = 12, noise: float = 1.0) -> np.ndarray:
    """Rows of `things` things, one after another in turn."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(things, dim))
    return centres[np.arange(count) % things] + noise * generator.normal(size=(count, dim))


@pytest.fixture
def things(make_store: MakeStore) -> Store:
    """40 pictures of 8 things, one folder a thing."""
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
    assert (done.queries, done.gallery, done.left_out, done.method) == (40, 40, [], "step")


def test_two_stores_by_a_pattern(make_store: MakeStore) -> None:
    server = make_store(clustered(24, 8), "server.h5", names=[f"obj{n % 8}_{n}.jpg" for n in range(24)])
    # Another order of things than the gallery's, and one that it does not have.
    names = [f"q/obj{n}_t.jpg" for n in (5, 1, 7, 9)]
    client = make_store(clustered(8, 8, seed=1)[[5, 1, 7, 0]], "client.h5", names=names)
    done = evaluate_retrieval(server, client, RetrievalOptions(relevant=r"regex:(obj\d+)_"))
    assert done.left_out == ["q/obj9_t.jpg"] and done.queries == 3
    order, _ = cosine_ranking(client.descriptors, server.descriptors)
    for query, thing in enumerate((5, 1, 7)):
        expected = retrieval_precision([row % 8 == thing for row in order[query]])
        assert done.average_precisions[names[query]] == pytest.approx(100 * expected)


def test_failed_rows_do_not_count(make_images: Callable[..., Path], tmp_path: Path, tiny: Recipe) -> None:
    for number, folder in enumerate(("a", "b", "c")):
        make_images(3, f"data/{folder}", seed=number)
    (tmp_path / "data/a/0001.png").write_bytes(b"no")
    for name in ("0001.png", "0002.png"):
        (tmp_path / "data/c" / name).write_bytes(b"no")
    extract_folder(tmp_path / "data", tmp_path / "f.h5", tiny)
    done = evaluate_retrieval(open_store(tmp_path / "f.h5"))
    assert (done.gallery, done.queries, done.left_out) == (6, 5, ["c/0000.png"])


def test_ground_truth_with_junk(things: Store, tmp_path: Path) -> None:
    names = things.names
    order, _ = cosine_ranking(things.descriptors, things.descriptors)
    ranked = [names[row] for row in order[0] if row != 0]
    truth = {names[0]: {"relevant": [ranked[1], ranked[4]], "junk": [ranked[0], ranked[2]]}}
    (tmp_path / "gnd.json").write_text(json.dumps(truth))
    done = evaluate_retrieval(things, truth=read_ground_truth(tmp_path / "gnd.json"))
    # Without junk the ranking begins relevant, no, relevant: trapezoids (1 + 1) / 2 and (1/2 + 2/3) / 2.
    assert done.mean_average_precision == pytest.approx(100 * (1 + 7 / 12) / 2)
    assert done.method == "trapezoid" and done.recall[1] == 100
    stepped = evaluate_retrieval(
        things, None, RetrievalOptions(method="step"), truth=read_ground_truth(tmp_path / "gnd.json")
    )
    assert stepped.mean_average_precision == pytest.approx(100 * (1 + 2 / 3) / 2)


def test_difficulties_of_revisited_oxford(things: Store, tmp_path: Path) -> None:
    names = things.names
    lists = {"easy": [names[8]], "hard": [names[16], names[24]], "junk": [names[32]]}
    (tmp_path / "gnd.json").write_text(json.dumps({names[0]: lists}))
    # Their own layout, with names that have neither folders nor endings.
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
            done = evaluate_retrieval(things, truth=truth)
            assert done.average_precisions == pytest.approx({names[0]: 100 * expected})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected ground truth in JSON, found: Expecting value"),
        ("[]", "expected a JSON object, query -> relevant and junk"),
        ('{"q": ["a"]}', "query 'q': expected lists relevant and junk, or easy, hard and junk, found list"),
        ('{"q": {"relevant": "a"}}', "query 'q': expected relevant to be a list of names, found 'a'"),
        ('{"q": {"good": ["a"]}}', "query 'q': expected lists relevant and junk, or easy, hard and junk, found good"),
        ('{"q": {"easy": ["a"]}}', "expected lists relevant and junk, or easy, hard and junk, found easy"),
        ('{"q": {"relevant": ["a"], "junk": ["a"]}}', "query 'q': 'a' is relevant and junk"),
        ('{"imlist": [], "qimlist": ["q"], "gnd": [{"easy": [4], "hard": [], "junk": []}]}', "IndexError"),
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
    with pytest.raises(StoreError, match=r"flat.h5: was made by another recipe than .*f.h5 \(weights: 0000"):
        evaluate_retrieval(things, make_store(clustered(4, 2), "flat.h5", weights="1" * 64))
    with pytest.raises(UsageError, match="unknown method 'steps'"):
        RetrievalOptions(method="steps")


def test_projection_and_expansion(things: Store) -> None:
    plain = evaluate_retrieval(things)
    rotated = evaluate_retrieval(things, None, RetrievalOptions(projection=ProjectionOptions(dims=11)))
    assert rotated.projection is not None and rotated.dim == 11 and 0.5 < rotated.projection.kept < 1
    assert rotated.mean_average_precision != plain.mean_average_precision
    expanded = evaluate_retrieval(things, None, RetrievalOptions(expand=2, alpha=1.0))
    units = np.array(things.descriptors, np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    for query, name in enumerate(things.names):
        others = [row for row in np.argsort(-(units @ units[query])) if row != query]
        together = units[query] + sum((units[row] @ units[query]) * units[row] for row in others[:2])
        ranked = [row for row in np.argsort(-(units @ together)) if row != query]
        expected = retrieval_precision([row % 8 == query % 8 for row in ranked])
        assert expanded.average_precisions[name] == pytest.approx(100 * expected)


def test_command_line(things: Store, tmp_path: Path, run_sppfeat: Callable[..., Any]) -> None:
    done = run_sppfeat("evaluate", "retrieval", things.path, "--json", "--whiten", "--project", "8")
    document = json.loads(done.stdout)
    assert {"queries", "gallery", "mAP", "recall@1", "recall@5", "recall@10"} <= document.keys()
    assert document["dim"] == 8 and 0 < document["mAP"] <= 100 and len(document["per_query"]) == 40
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
