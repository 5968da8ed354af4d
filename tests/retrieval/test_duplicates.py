"""Near-duplicates against naive complete linkage, on synthetic and on real images."""

from __future__ import annotations

import csv
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from conftest import MakeMany, MakeStore
from PIL import Image, ImageFilter

from sppfeat import Recipe, ReportError, Store, StoreError, UsageError, extract_folder, open_store
from sppfeat.retrieval import check_duplicates_csv, write_duplicates_csv
from sppfeat.retrieval.duplicates import CSV_COLUMNS, Duplicates, find_duplicates
from sppfeat.retrieval.linkage import complete_linkage
from sppfeat.retrieval.near_rows import near_components
from sppfeat.store import unit_rows


def naive_groups(rows: np.ndarray, threshold: float) -> set[frozenset[int]]:
    """Complete linkage of all pairs, one set of linked rows at a time."""
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    groups, seen = set(), set()
    for start in range(len(rows)):
        linked, waiting = set(), [] if start in seen else [start]
        while waiting:
            row = waiting.pop()
            if row not in linked:
                linked.add(row)
                waiting += np.flatnonzero(units @ units[row] >= threshold).tolist()
        if len(linked) > 1:
            which = sorted(linked)
            for group in reference.complete_linkage(units[which] @ units[which].T, threshold):
                groups.add(frozenset(which[row] for row in group))
        seen |= linked
    return groups


def found_rows(store: Store, found: Duplicates) -> set[frozenset[int]]:
    numbers = {name: row for row, name in enumerate(store.names)}
    return {frozenset(numbers[one.name] for one in group) for group in found.groups}


def check_groups(store: Store, found: Duplicates) -> None:
    """Every pair in a group reaches the threshold, and scores are those with the image kept."""
    numbers = {name: row for row, name in enumerate(store.names)}
    for group in found.groups:
        rows = np.array(store.descriptors[[numbers[one.name] for one in group]], np.float64)
        units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        assert (units @ units.T).min() >= found.threshold - 2e-6
        assert [one.score for one in group] == pytest.approx(list(units @ units[0]), abs=1e-5)


@pytest.mark.parametrize("dim", [2, 6, 40])
@pytest.mark.parametrize("threshold", [0.2, 0.55, 0.8, 0.95])
@pytest.mark.parametrize("block", [3, 50, 1000])
def test_groups_equal_a_naive_search(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, dim: int, threshold: float, block: int
) -> None:
    """Including rows that are linked only through others, in blocks and boxes of any size."""
    monkeypatch.setattr("sppfeat.store.unit_vectors.BLOCK_BYTES", 4 * dim * block)
    monkeypatch.setattr("sppfeat.retrieval.near_rows._BOX", 16)
    monkeypatch.setattr("sppfeat.retrieval.near_rows._PASSING", 48)
    monkeypatch.setattr("sppfeat.retrieval.near_rows._LONG", 8)
    monkeypatch.setattr("sppfeat.retrieval.near_rows._SHORT", (4, 6))
    monkeypatch.setattr("sppfeat.retrieval.near_rows.SAMPLE", 30)
    monkeypatch.setattr("sppfeat.retrieval.near_rows.WAITING_PAIRS", block)
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(100, dim))
    rows[40:60] = rows[:20] + 0.2 * generator.normal(size=(20, dim))
    rows[70:80] = rows[30:40]
    store = make_store(rows)
    parts: list[float] = []
    found = find_duplicates(store, threshold, progress=parts.append)
    stored = np.array(store.descriptors, np.float64)
    expected = naive_groups(stored, threshold)
    assert found_rows(store, found) == expected and not found.notes
    assert [len(group) for group in found.groups] == sorted(map(len, expected), reverse=True)
    units = stored / np.linalg.norm(stored, axis=1, keepdims=True)
    assert found.pairs == np.triu(units @ units.T >= threshold, 1).sum()
    check_groups(store, found)
    assert parts == sorted(parts) and parts[-1] == 1


def test_linkage_equals_a_naive_one_with_and_without_ties() -> None:
    generator = np.random.default_rng(0)
    for trial in range(200):
        count = int(generator.integers(1, 20))
        similar = generator.random((count, count)) if trial % 2 else generator.integers(0, 5, (count, count)) / 4
        similar = np.triu(similar, 1) + np.triu(similar, 1).T
        threshold = float(generator.choice([0.1, 0.3, 0.5, 0.75]))
        groups = complete_linkage(similar, np.triu(similar >= threshold, 1))
        assert {frozenset(group.tolist()) for group in groups} == reference.complete_linkage(similar, threshold)


def test_twenty_thousand_rows_have_the_groups_of_brute_force(make_many: MakeMany) -> None:
    """Copies of 2,000 rows, some of which are linked through others; the rest are near nothing or each other."""
    generator = np.random.default_rng(3)
    weights = np.arange(1, 33) ** -0.5
    rows = generator.normal(size=(20_000, 32)) * weights
    rows[10_000:12_000] = rows[:2_000] + 0.25 * generator.normal(size=(2_000, 32)) * weights
    rows[12_000:13_000] = rows[:1_000] + 0.25 * generator.normal(size=(1_000, 32)) * weights
    rows[13_000:13_500] = rows[:500]
    store = make_many(rows)
    stored = np.array(store.descriptors, np.float64)
    expected = naive_groups(stored, 0.95)
    assert len(expected) > 1_500 and max(map(len, expected)) >= 4
    found = find_duplicates(store, 0.95)
    assert found_rows(store, found) == expected
    check_groups(store, found)


@pytest.mark.parametrize("threshold", [0.3, 0.8, 0.9])
def test_too_many_linked_rows_still_reach_the_threshold(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, threshold: float
) -> None:
    """One row after the other joins the first group that it reaches throughout; held against plain loops."""
    monkeypatch.setattr("sppfeat.retrieval.linkage.LINKAGE_ROWS", 30)
    monkeypatch.setattr("sppfeat.retrieval.linkage._BLOCK", 7)
    rows = np.random.default_rng(2).normal(size=(150, 3))
    store = make_store(np.concatenate([rows, rows[:20]]))
    found = find_duplicates(store, threshold)
    check_groups(store, found)
    assert any("too many for complete linkage" in note for note in found.notes)
    stored = np.array(store.descriptors, np.float64)
    units = stored / np.linalg.norm(stored, axis=1, keepdims=True)
    near = units @ units.T >= threshold - 1e-6
    assert found.pairs == np.triu(near, 1).sum()
    if threshold == 0.3:  # all rows are linked: at 0.9, smaller sets have complete linkage
        groups: list[list[int]] = []
        for row in range(150):
            into = next((group for group in groups if near[row, group].all()), None)
            groups.append([row]) if into is None else into.append(row)
        assert found_rows(store, found) == {
            whole for one in groups if len(whole := frozenset(one + [150 + row for row in one if row < 20])) > 1
        }


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
    page = tmp_path / "dups.html"
    done = run_sppfeat("duplicates", tmp_path / "f.h5", "--threshold", "0.9992", "--json", "--html", page)
    document = json.loads(done.stdout)
    assert [one["name"] for one in document["groups"][0]][0] == "twice.png" and document["images"] == 6
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") == 3
    assert "same &lt;b&gt;.png" in text and "<b>.png" not in text
    assert "http" not in text.replace("http-equiv", "")  # nothing from elsewhere
    again = run_sppfeat("duplicates", tmp_path / "f.h5", "--html", page)
    assert again.returncode == 1 and "already exists" in again.stderr


def test_zeros_single_rows_and_damaged_ones(make_store: MakeStore) -> None:
    assert find_duplicates(make_store(np.ones((1, 5)))).groups == []
    zeros = find_duplicates(make_store(np.zeros((7, 5)), "zeros.h5"))
    assert zeros.groups == [] and zeros.pairs == 0  # they have no direction
    rows = np.ones((5, 5))
    rows[1] = np.nan
    with pytest.raises(StoreError, match="expected finite"):
        find_duplicates(make_store(rows, "nan.h5"))
    with pytest.raises(UsageError, match="unknown keep 'best': expected one of largest, sharpest, oldest"):
        find_duplicates(make_store(rows, "keep.h5"), keep="best")
    with pytest.raises(UsageError, match="keep oldest: expected files with modification times, found images of s3://"):
        find_duplicates(make_store(rows, "url.h5", root="s3://bucket/x"), keep="oldest")


def test_the_image_to_keep(tmp_path: Path, make_images: Callable[..., Path], tiny: Recipe) -> None:
    """One that is larger, one that is sharp, one that is old; and one that could not be read again."""
    folder = tmp_path / "images"
    folder.mkdir()
    with Image.open(make_images(1, "one") / "0000.png") as image:
        sharp = image.resize((640, 640), Image.Resampling.NEAREST)
    sharp.save(folder / "sharp.png")
    blurred = sharp.filter(ImageFilter.GaussianBlur(1))
    blurred.resize((800, 800), Image.Resampling.BICUBIC).save(folder / "large.png")
    blurred.save(folder / "old.png")
    sharp.save(folder / "broken.png")
    os.utime(folder / "old.png", (1e9, 1e9))
    extract_folder(folder, tmp_path / "f.h5", tiny)
    before = (folder / "broken.png").stat()
    (folder / "broken.png").write_bytes(b"no image".ljust(before.st_size))
    os.utime(folder / "broken.png", ns=(before.st_mtime_ns, before.st_mtime_ns))
    store = open_store(tmp_path / "f.h5")
    kept = {}
    for keep in ("largest", "sharpest", "oldest"):
        found = find_duplicates(store, 0.9, keep=keep)
        (group,) = found.groups
        kept[keep] = group[0].name
        assert len(group) == 4 and group[0].score == pytest.approx(1)
        assert bool(found.notes) == (keep == "sharpest") == bool(found.unreadable)
        if keep == "sharpest":
            assert group[-1].name == "broken.png" and found.unreadable["broken.png"].startswith("not an image")
            assert found.notes[0].startswith("1 image could not be read") and "broken.png" in found.notes[0]
    assert kept == {"largest": "large.png", "sharpest": "sharp.png", "oldest": "old.png"}


def test_no_image_outside_the_folder_is_read(make_store: MakeStore, tmp_path: Path) -> None:
    """Whatever a store of unknown origin names."""
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.jpg")
    (tmp_path / "in").mkdir()
    names = ["../secret.jpg", str(tmp_path / "secret.jpg"), "gone.jpg"]
    store = make_store(np.ones((3, 4)), names=names, root=str(tmp_path / "in"))
    found = find_duplicates(store, keep="sharpest")
    assert found.unreadable == {
        names[0]: "its name leads out of the image folder",
        names[1]: "its name is absolute",
    }
    assert [one.name for one in found.groups[0]] == names[:2] and found.images == 2


@pytest.mark.parametrize("threshold", [None, 0.999999])  # of a random network
def test_no_file_is_removed_for_itself_for_one_that_is_gone_or_for_one_that_changed(
    threshold: float | None, tmp_path: Path, make_images: Callable[..., Path], tiny: Recipe
) -> None:
    real = make_images(4, "images/zz")
    folder = real.parent
    (folder / "album").symlink_to(real)
    (folder / "1fav.png").symlink_to(real / "0000.png")
    os.link(real / "0001.png", folder / "hard.png")
    for number in (2, 3):
        shutil.copy(real / f"000{number}.png", folder / f"copy{number}.png")
        shutil.copy(real / f"000{number}.png", folder / f"again{number}.png")
    extract_folder(folder, tmp_path / "f.h5", tiny)
    store = open_store(tmp_path / "f.h5")
    found = find_duplicates(store, threshold)
    # Of each file one path is left, which is no link.
    assert sorted(sorted(one.name for one in group) for group in found.groups) == [
        [f"again{number}.png", f"copy{number}.png", f"zz/000{number}.png"] for number in (2, 3)
    ]
    assert found.not_compared == {} and found.images == 8
    assert sorted(found.left_out) == ["1fav.png", *(f"album/000{number}.png" for number in range(4)), "zz/0001.png"]
    assert found.notes == ["paths left out, since they lead to files that other paths name: 6"]
    # What is gone, or is another image by now, neither stays in place of others nor is removed for them.
    (folder / "again2.png").unlink()
    shutil.copy(real / "0000.png", folder / "copy3.png")
    found = find_duplicates(store, threshold)
    assert sorted(sorted(one.name for one in group) for group in found.groups) == [
        ["again3.png", "zz/0003.png"],
        ["copy2.png", "zz/0002.png"],
    ]
    assert found.not_compared == {"copy3.png": "changed since it was described"}
    told = "left out of the groups: 1 image whose file is gone, 1 changed since it was described (copy3.png)"
    assert f"{told}; `sppfeat extract --prune` brings the store up to date" in found.notes


def test_the_csv_is_read_back(make_store: MakeStore, tmp_path: Path) -> None:
    """With commas, quotes, line breaks and bytes that are not UTF-8 in names and folders."""
    folder = tmp_path / os.fsdecode(b"f\xff")
    folder.mkdir()
    names = ["a,b.jpg", 'q"uote.jpg', "line\nbreak.jpg", "byte\\xfe.jpg", "alone.jpg"]
    for file in ("a,b.jpg", 'q"uote.jpg', "line\nbreak.jpg", os.fsdecode(b"byte\xfe.jpg")):
        (folder / file).write_bytes(b"x")
    store = make_store(np.eye(5)[[0, 0, 1, 1, 2]], names=names, root=str(folder))
    found = find_duplicates(store)
    path = check_duplicates_csv(tmp_path / "d.csv", overwrite=False)
    write_duplicates_csv(path, found)
    with open(path, encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    assert tuple(header) == CSV_COLUMNS
    start = f"{tmp_path}/f\\xff/"
    tail = ["1.000000", "10", "10", "1"]
    assert lines == [
        ["1", "keep", "a,b.jpg", f"{start}a,b.jpg", *tail],
        ["1", "remove", 'q"uote.jpg', f'{start}q"uote.jpg', *tail],
        ["2", "keep", "line\nbreak.jpg", f"{start}line\nbreak.jpg", *tail],
        ["2", "remove", "byte\\xfe.jpg", f"{start}byte\\xfe.jpg", *tail],
    ]
    with pytest.raises(ReportError, match="already exists"):
        check_duplicates_csv(path, overwrite=False)
    assert check_duplicates_csv(path, overwrite=True) == path
    (tmp_path / "other.csv").write_text("name,label\n")
    with pytest.raises(ReportError, match="expected a CSV file of duplicates or a new file, found another file"):
        check_duplicates_csv(tmp_path / "other.csv", overwrite=True)


def test_the_command_writes_the_csv(make_store: MakeStore, tmp_path: Path, run_sppfeat: Callable[..., Any]) -> None:
    store = make_store(np.ones((3, 4)))
    done = run_sppfeat("duplicates", store.path, "--csv", tmp_path / "d.csv", "--keep", "sharpest", "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 0 and document["keep"] == "sharpest" and len(document["unreadable"]) == 3
    assert done.stderr.startswith("note: 3 images could not be read and come last")
    assert (tmp_path / "d.csv").read_text().count("remove") == 2
    wrong = run_sppfeat("duplicates", store.path, "--csv", tmp_path / "none" / "d.csv")
    assert wrong.returncode == 1 and "does not exist" in wrong.stderr


def test_images_that_cannot_be_compared_are_told(
    make_images: Callable[..., Path], tmp_path: Path, tiny: Recipe, run_sppfeat: Callable[..., Any]
) -> None:
    folder = make_images(2)
    Image.open(folder / "0000.png").resize((100, 80)).save(folder / "copy.png")
    store = tmp_path / "f.h5"
    extract_folder(folder, store, tiny)
    assert run_sppfeat("duplicates", store).returncode == 0
    folder.rename(tmp_path / "moved")
    done = run_sppfeat("duplicates", store, "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 3 and document["not_compared"]
    assert f"note: the folder of its images, {folder}, is not there; if it was moved, `sppfeat extract" in done.stderr
    assert run_sppfeat("duplicates", store, "--threshold", "0.9").returncode == 0  # by descriptors alone


@pytest.mark.parametrize(("count", "dim"), [(2, 1), (40, 3), (700, 64), (1500, 300), (1100, 1200)])
@pytest.mark.parametrize("kind", ["even", "decaying", "few directions"])
@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99])
def test_no_pair_is_lost(make_many: MakeMany, count: int, dim: int, kind: str, threshold: float) -> None:
    """Rows that short vectors tell apart well, badly, or not at all; with pairs on both sides of the threshold."""
    generator = np.random.default_rng(count)
    rows = generator.normal(size=(count, dim))
    if kind == "decaying":
        rows *= np.arange(1, dim + 1) ** -0.8
    if kind == "few directions":
        rows = rows[:, :5] @ generator.normal(size=(min(5, dim), dim))
    copies = max(1, count // 4)
    rows[-copies:] = rows[:copies] + generator.normal(size=(copies, dim)) * np.abs(rows[:copies]) * generator.uniform(
        0, 1, (copies, 1)
    )
    store = make_many(rows)
    units = np.array(store.descriptors, np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    similar = np.triu(units @ units.T, 1)
    lowest = np.arange(count)
    for one, other in np.argwhere(similar >= threshold - 1e-6):
        lowest[lowest == lowest[other]] = lowest[one]
    expected = {frozenset(np.flatnonzero(lowest == row).tolist()) for row in set(lowest.tolist())}
    found = near_components(unit_rows(store), np.arange(count), threshold)
    assert {frozenset(group.tolist()) for group in found} == {group for group in expected if len(group) > 1}
