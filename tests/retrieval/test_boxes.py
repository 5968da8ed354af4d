"""Evaluating parts: rankings are those of a search, boxes are compared with true ones, and files are not trusted."""

from __future__ import annotations

import csv
import itertools
import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from PIL import Image
from reference import box_overlap

from sppfeat import RunOptions, UsageError, extract_folder, open_store
from sppfeat.retrieval import (
    RetrievalOptions,
    SearchOptions,
    create_gallery,
    evaluate_retrieval,
    open_gallery,
    read_boxes,
    search_images,
)

Run = Callable[..., subprocess.CompletedProcess[str]]
RECIPE = replace(TINY, scales=(128,), levels=(4, 1))
CPU = RunOptions(device="cpu")


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Images of 4 x 3 patches, a part of each in `parts/`, and `truth.csv`; a store of the images, a gallery of it."""
    generator = np.random.default_rng(0)
    (tmp_path / "scenes").mkdir()
    (tmp_path / "parts").mkdir()
    rows = []
    for number in range(10):
        patches = generator.integers(0, 256, (3, 4, 12, 12, 3), dtype=np.uint8)
        image = Image.fromarray(patches.transpose(0, 2, 1, 3, 4).reshape(36, 48, 3))
        image = image.resize((320, 240), Image.Resampling.NEAREST)
        image.save(tmp_path / "scenes" / f"{number:02}.png")
        left, top = generator.integers(0, 160), generator.integers(0, 120)
        part = image.crop((left, top, left + 160, top + 120)).resize((256, 192))
        part.save(tmp_path / "parts" / f"part{number:02}.png")
        rows.append((f"part{number:02}.png", f"{number:02}.png", left, top, left + 159, top + 119))
    with open(tmp_path / "truth.csv", "w", newline="") as file:
        csv.writer(file).writerows([("query", "name", "x1", "y1", "x2", "y2"), *rows])
    extract_folder(tmp_path / "scenes", tmp_path / "s.h5", RECIPE, CPU)
    create_gallery(open_store(tmp_path / "s.h5"), tmp_path / "g", keep_bins=True)
    small = replace(RECIPE, scales=(45, 64), fuse="concat")
    extract_folder(tmp_path / "parts", tmp_path / "p.h5", small, CPU)
    return tmp_path


def test_an_evaluation_is_that_of_a_search(parts: Path) -> None:
    truth = read_boxes(parts / "truth.csv")
    done = evaluate_retrieval(
        open_store(parts / "s.h5"), open_store(parts / "p.h5"), RetrievalOptions(parts=True), truth=truth
    )
    found = search_images(open_gallery(parts / "g"), [parts / "parts"], SearchOptions(k=10, parts=True), CPU)
    overlaps, ranks = [], []
    boxes = {query.image: query.boxes for query in truth.queries}
    for answer in found.answers:
        ((name, box),) = boxes[Path(answer.query).name].items()
        hit = next(one for one in answer.neighbors if one.name == name)
        assert hit.box is not None
        overlaps.append(box_overlap([*hit.box], [*box]))
        ranks.append(hit.rank)
        assert done.average_precisions[Path(answer.query).name] == pytest.approx(100 / hit.rank)
    assert done.overlap == pytest.approx(np.mean(overlaps)) and done.overlap > 0.3
    assert done.located == pytest.approx(100 * np.mean(np.array(overlaps) > 0.5))
    assert done.recall[1] == pytest.approx(100 * np.mean(np.array(ranks) == 1)) and done.ap == "step"


@pytest.mark.parametrize("dim", [None, 4])
def test_reranked_by_bins(parts: Path, dim: int | None) -> None:
    """As a search does, with the queries' own rows left out."""
    store = open_store(parts / "s.h5")
    create_gallery(store, parts / "g", keep_bins=True, bin_dim=dim, overwrite=True)
    with open(parts / "same.csv", "w") as file:
        file.write(
            "query,name,x1,y1,x2,y2\n" + "".join(f"{n},{m},0,0,9,9\n" for n, m in itertools.pairwise(store.names))
        )
    truth = read_boxes(parts / "same.csv")
    done = evaluate_retrieval(store, None, RetrievalOptions(rerank="bins", candidates=4, bin_dim=dim), truth=truth)
    options = SearchOptions(k=4, rerank="bins", candidates=4, exclude_self=True)
    found = search_images(open_gallery(parts / "g"), [parts / "scenes"], options, CPU)
    overlaps = []
    for answer in found.answers[:-1]:
        wanted = store.names[list(store.names).index(Path(answer.query).name) + 1]
        hits = [one for one in answer.neighbors if one.name == wanted]
        overlaps.append(box_overlap([*hits[0].box], [0, 0, 9, 9]) if hits else 0.0)  # type: ignore[misc]
        if hits:
            assert done.average_precisions[Path(answer.query).name] == pytest.approx(100 / hits[0].rank)
    assert done.overlap == pytest.approx(np.mean(overlaps))


def test_command_line(parts: Path, run_sppfeat: Run) -> None:
    given = ("evaluate", "retrieval", "--gallery", parts / "s.h5", "--queries", parts / "p.h5", "--parts")
    done = run_sppfeat(*given, "--boxes", parts / "truth.csv", "--json")
    document = json.loads(done.stdout)
    assert {"mAP", "recall@1", "IoU>0.5", "mean_iou"} <= document.keys() and document["queries"] == 10
    assert "mean IoU of the boxes found 0." in run_sppfeat(*given, "--boxes", parts / "truth.csv").stdout
    wrong = run_sppfeat(*given[:4], "--queries", parts / "s.h5", "--parts", "--boxes", parts / "truth.csv")
    assert wrong.returncode == 2 and "with --scales 45,64 --fuse concat" in wrong.stderr
    wrong = run_sppfeat(*given[:-1])
    assert wrong.returncode == 1 and "made with another recipe" in wrong.stderr
    wrong = run_sppfeat("evaluate", "retrieval", parts / "s.h5", "--parts")
    assert wrong.returncode == 2 and "parts: expected queries of their own" in wrong.stderr
    wrong = run_sppfeat(*given, "--boxes", parts / "truth.csv", "--ground-truth", "gnd.json")
    assert wrong.returncode == 2 and "expected --ground-truth or --boxes, found both" in wrong.stderr
    with pytest.raises(UsageError, match="boxes: expected parts or rerank bins"):
        evaluate_retrieval(open_store(parts / "s.h5"), truth=read_boxes(parts / "truth.csv"))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "expected the columns query,name,x1,y1,x2,y2, found nothing"),
        ("query,x1\n", "expected the columns query,name,x1,y1,x2,y2, found query,x1"),
        ("query,name,x1,y1,x2,y2\n", "expected boxes, found none"),
        ("query,name,x1,y1,x2,y2\na,b,5,0,4,9\n", "line 2: 'a': expected x1,y1,x2,y2 in pixels .* found 5,0,4,9"),
        ("query,name,x1,y1,x2,y2\na,b,0,0,nan,9\n", "line 2: 'a': expected x1,y1,x2,y2"),
        ("query,name,x1,y1,x2,y2\na,b,0,0\n", "line 2: 'a': expected x1,y1,x2,y2"),
        ("query,name,x1,y1,x2,y2\na,b,0,0,9,9\na,b,0,0,9,9\n", "line 3: 'a': expected one box in 'b', found two"),
    ],
)
def test_bad_boxes(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "truth.csv").write_text(text)
    with pytest.raises(UsageError, match=f"truth.csv.*{fault}"):
        read_boxes(tmp_path / "truth.csv")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "truth.csv").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "truth.csv", tmp_path / "missing.csv"):
        with pytest.raises(UsageError, match="expected boxes in CSV, found"):
            read_boxes(path)
