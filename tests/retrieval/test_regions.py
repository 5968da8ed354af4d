"""Regions of a large gallery: the same vectors as by loops, found, kept through changes, and files not trusted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import MakeStore
from reference import bin_edges

from sppfeat import GalleryError, Recipe, open_store
from sppfeat.retrieval import add_to_gallery, create_gallery, open_gallery, remove_from_gallery
from sppfeat.retrieval.alignment import align, cells_of, rectangles
from sppfeat.retrieval.regions import COUNT, region_vectors

CHANNELS, SIDE = 24, 6


@pytest.mark.parametrize(("side", "parts"), [(3, (2, 2)), (4, (3, 2)), (6, (4, 3)), (7, (5, 4))])
def test_regions_are_the_whole_and_its_corners(side: int, parts: tuple[int, int]) -> None:
    bins = np.random.default_rng(side).integers(-127, 128, (5, side, side, 7)).astype(np.int8)
    found = region_vectors(bins)
    squares = [(0, 0, side)]
    for part in parts:
        low = side - part
        squares += [(0, 0, part), (0, low, part), (low, 0, part), (low, low, part)]
    assert found.shape == (5, COUNT, 9 * 7)
    for image in range(5):
        for region, (top, left, size) in enumerate(squares):
            expected = []
            for y1, y2 in bin_edges(size, 3):
                for x1, x2 in bin_edges(size, 3):
                    cell = bins[image, top + y1 : top + y2, left + x1 : left + x2].reshape(-1, 7).max(0).astype(float)
                    expected += (cell / np.linalg.norm(cell)).tolist()
            assert found[image, region] == pytest.approx(expected, abs=1e-5)
    assert (region_vectors(np.zeros((2, side, side, 7), np.int8)) == 0).all()


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sppfeat.retrieval.gallery_files.ALL_ROWS", 200)


def rows(count: int, seed: int = 0) -> np.ndarray:
    """Descriptors of level 6, of images that share parts: each of four quadrants is one of 30."""
    generator = np.random.default_rng(seed)
    quadrants = np.random.default_rng(9).normal(size=(30, 3, 3, CHANNELS))
    chosen = quadrants[generator.integers(0, 30, (count, 2, 2))]
    whole = chosen.transpose(0, 1, 3, 2, 4, 5).reshape(count, -1)
    return whole + 0.2 * generator.normal(size=whole.shape)


def test_the_nearest_regions_hold_the_best_alignments(make_store: MakeStore, tmp_path: Path, large: None) -> None:
    store = make_store(rows(600), recipe=Recipe(levels=(SIDE,)))
    create_gallery(store, tmp_path / "g", keep_bins=True)
    gallery = open_gallery(tmp_path / "g")
    assert gallery.regions is not None and gallery.bins is not None
    found = []
    for query in np.random.default_rng(9).normal(size=(30, 3, 3, CHANNELS))[:10]:
        cells = query.reshape(9, CHANNELS) / np.linalg.norm(query.reshape(9, CHANNELS), axis=1, keepdims=True)
        best = np.argsort(-align(cells, gallery.bins.values[:], rectangles(SIDE)).scores)[:10]
        near = gallery.regions.nearest(cells, 100)
        assert len(near) == 100 and (np.diff(near) > 0).all()
        found.append(np.isin(best, near).mean())
    assert np.mean(found) > 0.8
    assert gallery.regions.nearest(cells, 10**6).tolist() == list(range(600))


def test_regions_follow_the_rows(make_store: MakeStore, tmp_path: Path, large: None) -> None:
    recipe = Recipe(levels=(SIDE,))
    whole = rows(500)
    create_gallery(make_store(whole[:400], "a.h5", recipe=recipe), tmp_path / "g", keep_bins=True)
    before = open_gallery(tmp_path / "g")
    assert before.regions is not None
    names = [f"more{n}.jpg" for n in range(100)]
    add_to_gallery(make_store(whole[400:], "b.h5", names=names, recipe=recipe), tmp_path / "g")
    added = open_gallery(tmp_path / "g")
    assert added.regions is not None and added.bins is not None and [count for count, _ in added.regions.parts] == [500]
    cells = cells_of(added.bins.values[450:451])[0]
    assert 450 in added.regions.nearest(cells, 20)
    gone = list(added.rows.names[:100])
    remove_from_gallery(tmp_path / "g", gone)
    left = open_gallery(tmp_path / "g")
    assert left.regions is not None and left.regions.parts[0][1].ntotal == 400 * COUNT
    assert 350 in left.regions.nearest(cells, 20)
    remove_from_gallery(tmp_path / "g", list(left.rows.names[:250]))
    small = open_gallery(tmp_path / "g")
    assert small.regions is None and len(list((tmp_path / "g").glob("regions-*"))) == 0


def test_added_rows_are_all_looked_at(make_store: MakeStore, tmp_path: Path, large: None) -> None:
    recipe = Recipe(levels=(SIDE,))
    create_gallery(make_store(rows(400), "a.h5", recipe=recipe), tmp_path / "g", keep_bins=True)
    names = [f"more{n}.jpg" for n in range(10)]
    add_to_gallery(make_store(rows(10, 1), "b.h5", names=names, recipe=recipe), tmp_path / "g")
    gallery = open_gallery(tmp_path / "g")
    assert gallery.regions is not None and gallery.bins is not None
    assert [(count, index is None) for count, index in gallery.regions.parts] == [(400, False), (10, True)]
    near = gallery.regions.nearest(cells_of(gallery.bins.values[[7]])[0], 20)
    assert 7 in near and len(near) == 30 and near[20:].tolist() == list(range(400, 410))


def test_a_gallery_that_grows_large_gets_regions(make_store: MakeStore, tmp_path: Path, large: None) -> None:
    recipe = Recipe(levels=(SIDE,))
    create_gallery(make_store(rows(150), "a.h5", recipe=recipe), tmp_path / "g", keep_bins=True)
    assert open_gallery(tmp_path / "g").regions is None
    names = [f"more{n}.jpg" for n in range(150)]
    add_to_gallery(make_store(rows(150, 1), "b.h5", names=names, recipe=recipe), tmp_path / "g")
    assert open_gallery(tmp_path / "g").regions is not None


def test_damaged_regions(make_store: MakeStore, tmp_path: Path, large: None) -> None:
    create_gallery(make_store(rows(250), recipe=Recipe(levels=(SIDE,))), tmp_path / "g", keep_bins=True)
    (file,) = (tmp_path / "g").glob("regions-*.faiss")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(GalleryError, match=rf"{file.name}: is damaged"):
        open_gallery(tmp_path / "g")
    file.unlink()
    with pytest.raises(GalleryError, match=rf"{file.name}: belongs to the gallery, but could not be read"):
        open_gallery(tmp_path / "g")
    assert open_store(tmp_path / "f.h5").recipe.levels == (SIDE,)
