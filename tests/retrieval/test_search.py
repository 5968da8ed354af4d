"""Search: exact answers equal sorting by hand, ties keep the order of rows, names stay with their rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeStore
from reference import cosine_ranking

from sppfeat import GalleryError, Recipe, UsageError, extract_folder, open_store
from sppfeat.retrieval.changes import create_gallery
from sppfeat.retrieval.faiss_index import IndexOptions
from sppfeat.retrieval.gallery import Gallery, open_gallery
from sppfeat.retrieval.queries import rows_of_image
from sppfeat.retrieval.search import SearchOptions, search_descriptors, search_images, search_store


@pytest.fixture
def gallery_of(make_store: MakeStore, tmp_path: Path) -> Callable[..., Gallery]:
    """A gallery of rows [N, D]."""

    def make(rows: np.ndarray, factory: str | None = None) -> Gallery:
        create_gallery(make_store(rows), tmp_path / "g", IndexOptions(factory=factory), overwrite=True)
        return open_gallery(tmp_path / "g")

    return make


def few_values(count: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    """Rows with many equal ones and many equal scores, which float32 computes exactly."""
    generator = np.random.default_rng(seed)
    signs = generator.choice([-1.0, 1.0], (count, dim))
    return signs[generator.integers(0, count // 3 + 1, count)]


@pytest.mark.parametrize("count", [1, 2, 7, 60, 500])
def test_ties_keep_the_order_of_rows(gallery_of: Callable[..., Gallery], count: int) -> None:
    rows = few_values(count)
    gallery = gallery_of(rows)
    for queries in (1, 30):  # FAISS computes 20 and more at once differently
        asked = few_values(queries, seed=1)
        expected, by_hand = cosine_ranking(asked, rows)
        for k in (1, 3, 10, 1000):
            found, scores = search_descriptors(gallery, asked, SearchOptions(k=k))
            assert found.tolist() == expected[:, :k].tolist()
            assert scores == pytest.approx(by_hand[:, :k], abs=1e-6)


def test_exact_search_equals_sorting_by_hand(gallery_of: Callable[..., Gallery]) -> None:
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(400, 30)) * generator.uniform(0.1, 50, (400, 1))  # not of length 1
    gallery = gallery_of(rows)
    asked = generator.normal(size=(50, 30)) * 7
    found, scores = search_descriptors(gallery, asked, SearchOptions(k=400))
    expected, by_hand = cosine_ranking(asked, np.float16(rows))
    assert scores == pytest.approx(by_hand, abs=1e-6) and (np.diff(scores, axis=1) <= 0).all()
    # Modulo ties: where the order differs, the scores are the same in float32.
    other = found != expected
    assert other.mean() < 0.01
    assert np.take_along_axis(by_hand, np.argsort(expected, 1), 1)[np.nonzero(other)[0], found[other]] == pytest.approx(
        by_hand[other], abs=1e-6
    )


def test_names_are_those_of_their_rows(make_images: Callable[..., Path], tmp_path: Path, tiny: Recipe) -> None:
    """Every image of a folder, with a failed one among them, finds itself by name and path."""
    folder = make_images(12)
    (folder / "0005.png").write_bytes(b"")
    extract_folder(folder, tmp_path / "f.h5", tiny)
    create_gallery(open_store(tmp_path / "f.h5"), tmp_path / "g")
    gallery = open_gallery(tmp_path / "g")
    assert len(gallery) == 11
    names = gallery.rows.names
    (folder / "phone.heic").write_bytes(b"x")
    by_images, by_store = search_images(gallery, [folder]), search_store(gallery, open_store(tmp_path / "f.h5"))
    assert by_images.notes == ["1 file left out, of kinds that are not read: 1 .heic; convert them to JPEG or PNG"]
    for result, queries in ((by_images, [str(folder / name) for name in names]), (by_store, names)):
        good = [answer for answer in result.answers if answer.error is None]
        assert [answer.query for answer in good] == queries
        for answer, name in zip(good, names, strict=True):
            first = answer.neighbors[0]
            assert (first.name, first.rank, first.path) == (name, 1, str(folder / name))
            assert first.score == pytest.approx(1, abs=1e-3)
    result = search_images(gallery, [folder])
    assert [(a.query, a.error) for a in result.answers if a.error] == [
        (str(folder / "0005.png"), "empty file (0 bytes)")
    ]
    assert result.failed == 1
    alone = search_images(gallery, [folder], SearchOptions(k=3, exclude_self=True))
    for answer in alone.answers:
        assert answer.query not in [one.path for one in answer.neighbors]
        assert answer.error or [one.rank for one in answer.neighbors] == [1, 2, 3]


def test_a_gallery_is_no_folder_of_queries(make_store: MakeStore, tmp_path: Path) -> None:
    create_gallery(make_store(np.eye(4, dtype=np.float32)), tmp_path / "g")
    with pytest.raises(UsageError, match=r"g: expected images, found a gallery"):
        search_images(open_gallery(tmp_path / "g"), [tmp_path / "g"])


def test_images_that_have_lost_their_file_are_told(
    make_images: Callable[..., Path], tmp_path: Path, tiny: Recipe
) -> None:
    folder = make_images(4)
    extract_folder(folder, tmp_path / "f.h5", tiny)
    create_gallery(open_store(tmp_path / "f.h5"), tmp_path / "g")
    gallery = open_gallery(tmp_path / "g")
    query = [str(folder / "0000.png")]
    assert not search_images(gallery, query, SearchOptions(k=4)).notes
    (folder / "0002.png").unlink()
    found = search_images(gallery, query, SearchOptions(k=4))
    assert len(found.answers[0].neighbors) == 4
    assert found.notes == [
        "images found that have lost their file: 1, such as '0002.png'; `sppfeat index --remove` takes a list of names"
    ]
    shutil.move(folder / "0000.png", tmp_path / "query.png")
    shutil.rmtree(folder)
    found = search_images(gallery, [tmp_path / "query.png"], SearchOptions(k=4))
    assert found.notes == [f"the folder of images found, {folder}, is not there"]


def test_k_is_at_most_the_gallery(gallery_of: Callable[..., Gallery], tmp_path: Path) -> None:
    gallery = gallery_of(few_values(5))
    store = open_store(gallery.about.sources[0].store)
    result = search_store(gallery, store, SearchOptions(k=9))
    assert result.notes == ["k is 9, but the gallery has 5 images: all are returned"]
    assert [len(answer.neighbors) for answer in result.answers] == [5] * 5
    without = search_store(gallery, store, SearchOptions(k=9, exclude_self=True))
    assert [len(answer.neighbors) for answer in without.answers] == [4] * 5


@pytest.mark.parametrize("rerank", ["none", "expand", "diffuse"])
def test_own_windows_are_excluded(make_store: MakeStore, tmp_path: Path, rerank: str) -> None:
    """All of the query's image, whichever row is the query, and no other image's."""
    names = [f"{n // 3}.jpg#{n % 3},0,9,9" if n < 12 else f"{n}.jpg" for n in range(15)]
    store = make_store(np.repeat(np.eye(5, 8), 3, 0) + 0.1 * few_values(15), names=names, root=str(tmp_path))
    create_gallery(store, tmp_path / "g")
    result = search_store(open_gallery(tmp_path / "g"), store, SearchOptions(k=15, exclude_self=True, rerank=rerank))
    images = [name.split("#")[0] for name in names]
    for image, answer in zip(images, result.answers, strict=True):
        found = [one.name for one in answer.neighbors]
        assert sorted(found) == sorted(name for name, of in zip(names, images, strict=True) if of != image)


def test_rows_of_an_image_by_their_names(make_store: MakeStore, tmp_path: Path) -> None:
    names = ["1.jpg", "1.jpg#0,0,9,9", "1.jpg#5,5,9,9", "1.jpg.png", "11.jpg", "1.jpg#draft", "2/1.jpg"]
    create_gallery(make_store(few_values(7), names=names), tmp_path / "g")
    gallery = open_gallery(tmp_path / "g")
    found = [rows_of_image(gallery, row).tolist() for row in range(7)]
    assert found == [[0, 1, 2], [0, 1, 2], [0, 1, 2], [3], [4], [5], [6]]


def test_another_recipe_is_refused(make_store: MakeStore, gallery_of: Callable[..., Gallery]) -> None:
    gallery = gallery_of(few_values(5))
    other = make_store(few_values(5), "other.h5", recipe=Recipe(levels=(3, 1)))
    with pytest.raises(
        GalleryError,
        match=r"other.h5 \(levels: gallery 6,3,2,1, store 3,1\); search by the images",
    ):
        search_store(gallery, other)
    other = make_store(few_values(5), "other.h5", weights="1" * 64)
    with pytest.raises(GalleryError, match="weights: gallery 000000000000, store 111111111111"):
        search_store(gallery, other)
    other = make_store(few_values(5, 4), "other.h5")
    with pytest.raises(GalleryError, match="dimensions: gallery 8, store 4"):
        search_store(gallery, other)


def test_bad_descriptors(gallery_of: Callable[..., Gallery]) -> None:
    gallery = gallery_of(few_values(5))
    with pytest.raises(UsageError, match=r"descriptors must be \[Q, 8\], found \[2, 3\]"):
        search_descriptors(gallery, np.zeros((2, 3)))
    with pytest.raises(UsageError, match="expected finite values, found 1 rows"):
        search_descriptors(gallery, np.array([[np.nan] * 8, [1] * 8]))
    with pytest.raises(UsageError, match="k must be at least 1 neighbor, found 0"):
        SearchOptions(k=0)
