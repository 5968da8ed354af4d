"""Near-duplicates against a naive search of connected groups, on synthetic and on real images."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeStore
from PIL import Image

from sppfeat import Recipe, UsageError, extract_folder, open_store
from sppfeat.retrieval.duplicates import find_duplicates


def naive_groups(rows: np.ndarray, threshold: float) -> set[frozenset[int]]:
    """Spread from every row to all similar ones, one at a time."""
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    similar = units @ units.T >= threshold
    groups, seen = set(), set()
    for start in range(len(rows)):
        group, waiting = set(), [start]
        while waiting:
            row = waiting.pop()
            if row not in group:
                group.add(row)
                waiting += [other for other in range(len(rows)) if similar[row, other]]
        if len(group) > 1 and not group & seen:
            groups.add(frozenset(group))
        seen |= group
    return groups


@pytest.mark.parametrize("threshold", [0.2, 0.55, 0.8, 0.95])
@pytest.mark.parametrize("block", [3, 50, 1000])
def test_groups_equal_a_naive_search(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, threshold: float, block: int
) -> None:
    """Including chains of pairs across blocks: at 0.55 rows are linked through others."""
    monkeypatch.setattr("sppfeat.store.unit_vectors.BLOCK_BYTES", 4 * 6 * block)
    monkeypatch.setattr("sppfeat.retrieval.duplicates.TILE", 7)
    monkeypatch.setattr("sppfeat.retrieval.duplicates.WAITING_PAIRS", block)
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(120, 6))
    rows[40:60] = rows[:20] + 0.2 * generator.normal(size=(20, 6))
    store = make_store(rows)
    parts: list[float] = []
    found = find_duplicates(store, threshold, progress=parts.append)
    stored = np.array(store.descriptors, np.float64)
    expected = naive_groups(stored, threshold)
    assert {frozenset(store.names.index(one.name) for one in group) for group in found.groups} == expected
    assert [len(group) for group in found.groups] == sorted(map(len, expected), reverse=True)
    units = stored / np.linalg.norm(stored, axis=1, keepdims=True)
    assert found.pairs == np.triu(units @ units.T >= threshold, 1).sum()
    for group in found.groups:
        first = units[store.names.index(group[0].name)]
        for one in group:
            assert one.score == pytest.approx(units[store.names.index(one.name)] @ first, abs=1e-5)
    assert parts == sorted(parts) and parts[-1] <= 1


@pytest.mark.parametrize("alike", [True, False])
def test_memory_does_not_grow_with_the_square_of_the_rows(make_store: MakeStore, alike: bool) -> None:
    """Scores of all pairs at once would take 144 MB, and pairs that all match over 1 GB more."""
    rows = np.random.default_rng(0).normal(size=(6000, 4))
    store = make_store(np.ones((6000, 4)) if alike else rows)
    tracemalloc.start()
    try:
        found = find_duplicates(store, 0.999)
        assert tracemalloc.get_traced_memory()[1] < 130e6
    finally:
        tracemalloc.stop()
    assert found.images == 6000 and (not alike or found.pairs == 6000 * 5999 // 2)
    assert not alike or [len(group) for group in found.groups] == [6000]


def test_equal_rows_belong_together_at_1(make_store: MakeStore) -> None:
    rows = np.random.default_rng(1).normal(size=(300, 37))
    rows[250:] = rows[:50]
    found = find_duplicates(make_store(rows), 1.0)
    assert len(found.groups) == 50 and found.spare == 50 and all(len(group) == 2 for group in found.groups)
    for threshold in (0, 1.01, -1, float("nan")):
        with pytest.raises(UsageError, match="threshold must be above 0 and at most 1"):
            find_duplicates(make_store(rows), threshold)


def test_the_largest_image_comes_first(
    tmp_path: Path, make_images: Callable[..., Path], tiny: Recipe, run_sppfeat: Callable[..., Any]
) -> None:
    folder = make_images(4)
    with Image.open(folder / "0002.png") as image:
        image.resize((3 * image.width, 3 * image.height), Image.Resampling.BICUBIC).save(folder / "twice.png")
        image.save(folder / "same <b>.png")
    extract_folder(folder, tmp_path / "f.h5", tiny)
    (group,) = find_duplicates(open_store(tmp_path / "f.h5"), 0.9992).groups  # a random network
    assert group[0].name == "twice.png" and {one.name for one in group[1:]} == {"0002.png", "same <b>.png"}
    assert group[0].score == pytest.approx(1) and group[0].path == str(folder / "twice.png")
    (folder / "twice.png").unlink()
    page = tmp_path / "dups.html"
    done = run_sppfeat("duplicates", tmp_path / "f.h5", "--threshold", "0.9992", "--json", "--html", page)
    document = json.loads(done.stdout)
    assert [one["name"] for one in document["groups"][0]][0] == "twice.png" and document["images"] == 6
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") == 2 and "image not available" in text
    assert "same &lt;b&gt;.png" in text and "<b>.png" not in text
    assert "http" not in text.replace("http-equiv", "")  # nothing from elsewhere
    again = run_sppfeat("duplicates", tmp_path / "f.h5", "--html", page)
    assert again.returncode == 1 and "already exists" in again.stderr
