"""What bins add to a score adds up to it, comes from where the maxima are, and is drawn on the page."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY

from sppfeat import RunOptions, UsageError, extract_folder, open_store
from sppfeat.retrieval import SearchOptions, create_gallery, open_gallery, search_images, search_store, write_hits_page
from sppfeat.retrieval.alignment import align, cells_of, rectangles
from sppfeat.retrieval.bins import whole_side
from sppfeat.retrieval.channels import learn_channels, to_bytes
from sppfeat.retrieval.explanation import explain
from sppfeat.retrieval.hits_page import PAGE_HITS

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("side", [3, 4, 6, 7])
@pytest.mark.parametrize("scales", [1, 2])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_bins_add_up_to_the_score(side: int, scales: int, signed: bool, whole: bool) -> None:
    """Also of whole images, which are compared by whitened cells and weighted."""
    generator = np.random.default_rng(side)
    query = generator.normal(size=(scales, side, side, 12)).astype(np.float32)
    images = generator.normal(size=(8, side, side, 12)).astype(np.float32)
    if not signed:
        query, images = np.maximum(query, 0), np.maximum(images, 0)
    images = to_bytes(images)
    images[3] = 0  # an image without any response
    whitening = learn_channels(images, least=whole_side(side)).whitening if whole else None
    shapes = rectangles(side, whole_side(side), 0.4) if whole else rectangles(side)
    found = align(cells_of(query, whitening).mean(0), images, shapes, whitening)
    for at, image in enumerate(images):
        why = explain(query, image, shapes, int(found.rectangles[at]), whitening)
        assert why.query.sum() == pytest.approx(found.scores[at], abs=1e-5)
        assert why.image.sum() == pytest.approx(found.scores[at], abs=1e-5)
        assert [one.score for one in why.links] == sorted((one.score for one in why.links), reverse=True)
        assert len({one.query for one in why.links}) == len({one.image for one in why.links}) == len(why.links) <= 5
    if not whole:
        assert explain(query, images[3], shapes, 0).links == []


def test_the_bins_that_match_are_linked() -> None:
    """A single strong bin of each: all of the score is theirs."""
    query, image = np.zeros((1, 6, 6, 4), np.float32), np.zeros((6, 6, 4), np.float32)
    query[0, 1, 4, 2] = image[2, 5, 2] = 1
    found = align(cells_of(query)[0], image[None], rectangles(6))
    why = explain(query, image, rectangles(6), int(found.rectangles[0]))
    assert (why.links[0].query, why.links[0].image, len(why.links)) == ((1, 4), (2, 5), 1)
    assert why.query[1, 4] == why.image[2, 5] == pytest.approx(found.scores[0])


@pytest.fixture
def gallery(photos: Path, tmp_path: Path) -> Path:
    extract_folder(photos, tmp_path / "f.h5", replace(TINY, scales=(96,), levels=(4, 1)), RunOptions(device="cpu"))
    create_gallery(open_store(tmp_path / "f.h5"), tmp_path / "g", keep_bins=True)
    return tmp_path / "g"


def test_a_search_explains_its_scores(gallery: Path, photos: Path, tmp_path: Path, run_sppfeat: Run) -> None:
    image = sorted(photos.rglob("*.jpg"))[0]
    for flags in (["--parts"], ["--rerank", "bins"], ["--parts", "--box", "20,20,90,80"]):
        page = tmp_path / "hits.html"
        done = run_sppfeat(
            "search", gallery, image, *flags, "--explain", "-k", "3", "--json", "--html", page, "--overwrite"
        )
        for one in json.loads(done.stdout)["results"][0]["neighbors"]:
            assert np.sum(one["explanation"]["image"]) == pytest.approx(one["score"], abs=1e-5)
            assert np.sum(one["explanation"]["query"]) == pytest.approx(one["score"], abs=1e-5)
            assert np.shape(one["explanation"]["query"]) == (4, 4)
        text = page.read_text()
        assert text.count("data:image/jpeg") == 7 and "Color shows what each bin adds" in text
    stored = search_store(
        open_gallery(gallery), open_store(tmp_path / "f.h5"), SearchOptions(k=2, rerank="bins", explain=True)
    )
    assert all(one.explanation is not None for answer in stored.answers for one in answer.neighbors)
    text_alone = run_sppfeat("search", gallery, image, "--parts", "--explain")
    assert text_alone.stderr == "note: --explain is shown by --html and --json, found neither\n"
    done = run_sppfeat("search", gallery, image, "--explain")
    assert done.returncode == 2 and "explain: expected parts or rerank bins" in done.stderr
    with pytest.raises(UsageError, match="explain: expected parts or rerank bins, .* found rerank 'diffuse'"):
        SearchOptions(rerank="diffuse", explain=True)


def test_a_page_of_many_hits_is_bounded(gallery: Path, photos: Path, tmp_path: Path) -> None:
    done = search_images(open_gallery(gallery), [sorted(photos.rglob("*.jpg"))[0]], SearchOptions(k=5))
    (answer,) = done.answers
    many = replace(answer, neighbors=[replace(answer.neighbors[0], rank=rank) for rank in range(1, 1501)])
    write_hits_page(tmp_path / "hits.html", open_gallery(gallery), replace(done, answers=[many, answer]))
    text = (tmp_path / "hits.html").read_text()
    assert text.count('class="hit"') == PAGE_HITS and "1,000 of 1,500 neighbors shown" in text
    assert "0 of 5 neighbors shown" in text
