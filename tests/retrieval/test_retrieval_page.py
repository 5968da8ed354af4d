"""The page of a retrieval evaluation, and the hard queries that it shows."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeStore
from PIL import Image
from reference import cosine_ranking

from sppfeat import Store
from sppfeat.retrieval.evaluation import RetrievalOptions, evaluate_retrieval
from sppfeat.retrieval.hard_queries import FIRST_HITS, HARDEST
from sppfeat.retrieval.retrieval_page import BARS_SHOWN, write_retrieval_page

RULE = r"regex:(thing\d)"


@pytest.fixture
def store(make_store: MakeStore, tmp_path: Path) -> Store:
    """40 images of 8 things, the images below `tmp_path`; thing0 is found without a mistake."""
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(8, 12))[np.arange(40) % 8] + 1.6 * rng.normal(size=(40, 12))
    rows[::8] = 20 * np.eye(12)[0] + 0.01 * rng.normal(size=(5, 12))
    names = [f"set/<i>thing{n % 8}-{n:02}.png" for n in range(40)]
    (tmp_path / "set").mkdir()
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return make_store(rows, names=names, root=str(tmp_path))


def test_hard_queries_are_the_worst(store: Store) -> None:
    done = evaluate_retrieval(store, None, RetrievalOptions(relevant=RULE))
    worst = sorted(done.average_precisions.values())
    assert len(done.hardest) == HARDEST and worst[0] < 50
    assert [one.average_precision for one in done.hardest] == worst[:HARDEST]
    rows = np.array(store.descriptors, np.float64)
    order, _ = cosine_ranking(rows, rows)
    names = list(store.names)
    for one in done.hardest:
        query = names.index(one.name)
        ranked = [row for row in order[query] if row != query]
        right = [row % 8 == query % 8 for row in ranked]
        assert one.hits == [(names[row], right[at]) for at, row in enumerate(ranked[:FIRST_HITS])]
        assert (one.relevant, one.found) == (4, right.index(True) + 1)


def test_the_page_of_the_command(store: Store, tmp_path: Path, run_sppfeat: Callable[..., Any]) -> None:
    page = tmp_path / "r.html"
    arguments = ("evaluate", "retrieval", store.path, "--relevant", RULE, "--report", page)
    done = run_sppfeat(*arguments)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    (mean,) = re.findall(r"mAP (\S+) %", done.stdout.splitlines()[0])
    assert f"<b>{mean} %</b><span>mAP</span>" in text and "recall@10" in text
    assert "<code>sppfeat evaluate retrieval " in text and "Recipe of " in text
    values = list(evaluate_retrieval(store, None, RetrievalOptions(relevant=RULE)).average_precisions.values())
    perfect = sum(value == 100 for value in values)
    assert "<i>thing" not in text and f"{perfect} queries at 100 %" in text and perfect >= 5
    # Every hit says in words whether it is right, and links to its file.
    hits = re.findall(
        r'<div class="hit( right)?">.*?<span class="note">\d · ((?:not )?relevant)</span>', text, re.DOTALL
    )
    assert len(hits) == HARDEST * FIRST_HITS and {kind for kind, _ in hits} == {"", " right"}
    assert all((kind == " right") == (said == "relevant") for kind, said in hits)
    assert text.count('href="./set/%3Ci%3Ething') == HARDEST * (FIRST_HITS + 1)
    assert f"{HARDEST} of {40 - perfect} queries below 100 % shown, the worst" in text
    assert f"{BARS_SHOWN} of {40 - perfect} queries below 100 % shown." in text
    counts = [int(count) for count in re.findall(r"<title>\d+ to \d+ %: (\d+) queries</title>", text)]
    assert len(counts) == 10 and sum(counts) == 40 and counts[-1] >= 5
    refused = run_sppfeat(*arguments)
    assert refused.returncode == 1 and "r.html: already exists" in refused.stderr and not refused.stdout


def test_a_page_of_perfect_rankings(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(np.eye(4)[[0, 0, 1, 1]], names=["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"])
    done = evaluate_retrieval(store)
    assert done.hardest == [] and done.mean_average_precision == 100
    write_retrieval_page(tmp_path / "r.html", done)
    text = (tmp_path / "r.html").read_text()
    assert "4 queries at 100 %" in text and "Worst queries" not in text and "worst first" not in text
