"""Parts: the best rectangle equals the one found by trying all, boxes are in pixels, and files are not trusted."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import TINY, MakeStore
from PIL import Image
from reference import best_rectangle, box_overlap

from sppfeat import GalleryError, Recipe, RunOptions, StoreError, UsageError, extract_folder, open_store
from sppfeat.retrieval import (
    ProjectionOptions,
    SearchOptions,
    add_to_gallery,
    create_gallery,
    open_gallery,
    remove_from_gallery,
)
from sppfeat.retrieval.alignment import CELLS, NEAR, SHARPNESS, align, cells_of, locate, rectangles
from sppfeat.retrieval.bins import bin_layout, learn_from, part_recipe, whole_side
from sppfeat.retrieval.channels import learn_channels, to_bytes
from sppfeat.retrieval.hits_page import write_hits_page
from sppfeat.retrieval.parts import in_pixels, require_bins
from sppfeat.retrieval.search import search_images, search_store
from sppfeat.store import unit_rows

Run = Callable[..., subprocess.CompletedProcess[str]]
PARTS = replace(TINY, scales=(128,), levels=(4, 1))


def overlap_of(one: list[float], other: list[float]) -> float:
    """Of boxes whose ends are exclusive."""
    return box_overlap([*one[:2], one[2] - 1, one[3] - 1], [*other[:2], other[2] - 1, other[3] - 1])


def test_two_places_that_look_the_same_are_not_averaged() -> None:
    generator = np.random.default_rng(0)
    bins = generator.normal(size=(1, 6, 6, 64)).astype(np.float32)
    part = generator.normal(size=(3, 3, 64))
    bins[0, :3, :3] = bins[0, 3:, 3:] = part
    query = cells_of(np.repeat(np.repeat(part, 2, 0), 2, 1)[None].astype(np.float32))[0]
    (box,) = locate(query, bins, rectangles(6))
    assert box * 6 == pytest.approx([0, 0, 3, 3], abs=0.3)


@pytest.mark.parametrize("side", [3, 4, 5, 6, 7])
def test_the_best_rectangle_is_that_of_a_naive_loop(side: int) -> None:
    generator = np.random.default_rng(side)
    bins = generator.normal(size=(5, side, side, 6)).astype(np.float32)
    bins[1] = 0  # an image without any response
    query = cells_of(generator.normal(size=(3, side, side, 6)).astype(np.float32)).mean(0)
    found = align(query, bins, rectangles(side))
    places_found = locate(query, bins, rectangles(side))
    for at in range(len(bins)):
        best, boxes, scores = best_rectangle(query, bins[at])
        assert found.scores[at] == pytest.approx(best, abs=1e-5)
        assert scores[found.rectangles[at]] == pytest.approx(best, abs=1e-5)
        weights = np.array([math.exp(SHARPNESS * (score - best)) for score in scores])
        places = [[overlap_of(box, one) >= NEAR for box in boxes] for one in boxes]
        masses = [weights[one] * float(weights @ np.array(near)) for one, near in enumerate(places)]
        weights = weights * places[int(np.argmax(masses))]
        box = np.dot(weights, boxes) / sum(weights) / side
        assert places_found[at] == pytest.approx(box, abs=1e-4)
    assert found.rectangles[1] == 0  # of equal scores the first


@pytest.mark.parametrize("side", [3, 4, 6, 7])
@pytest.mark.parametrize("power", [0.0, 0.4])
def test_whitened_cells_of_large_rectangles(side: int, power: float) -> None:
    generator = np.random.default_rng(side)
    bins = generator.normal(size=(9, side, side, 8)).astype(np.float32)
    bins[1] = 0
    whitening = learn_channels(bins, least=whole_side(side)).whitening
    shapes = rectangles(side, whole_side(side), power)
    query = cells_of(generator.normal(size=(2, side, side, 8)).astype(np.float32), whitening).mean(0)
    found = align(query, bins, shapes, whitening)
    for at in range(len(bins)):
        best, boxes, scores = best_rectangle(
            query, bins[at], least=whole_side(side), power=power, mean=whitening.mean, matrix=whitening.matrix
        )
        assert len(scores) == len(shapes.cells) and np.array(boxes) == pytest.approx(shapes.boxes * side)
        assert found.scores[at] == pytest.approx(best, abs=1e-5)
        assert scores[found.rectangles[at]] == pytest.approx(best, abs=1e-5)


def test_the_cells_of_a_whole_image_are_its_coarser_level() -> None:
    bins = np.random.default_rng(0).normal(size=(2, 6, 6, 4)).astype(np.float32)
    coarser = bins.reshape(2, 3, 2, 3, 2, 4).max((2, 4)).reshape(2, 9, 4)
    expected = coarser / np.linalg.norm(coarser, axis=2, keepdims=True)
    assert cells_of(bins) == pytest.approx(expected, abs=1e-6)


def test_an_image_is_found_in_itself_and_a_part_where_it_is() -> None:
    generator = np.random.default_rng(1)
    bins = generator.normal(size=(20, 6, 6, 64)).astype(np.float32)
    for at in (0, 7, 19):
        query = cells_of(bins[at : at + 1])[0]
        found = align(query, bins, rectangles(6))
        assert found.scores.argmax() == at and found.scores[at] == pytest.approx(1, abs=1e-5)
        assert locate(query, bins, rectangles(6))[at] == pytest.approx([0, 0, 1, 1], abs=0.02)
    # Bins 2 to 4 across and 1 to 3 down: three by three cells, each of one bin.
    part = bins[7, 1:4, 2:5].reshape(9, -1)
    query = part / np.linalg.norm(part, axis=1, keepdims=True)
    found = align(query, bins, rectangles(6))
    assert found.scores.argmax() == 7 and found.scores[7] == pytest.approx(1, abs=1e-5)
    assert locate(query, bins, rectangles(6))[7] == pytest.approx(np.array([2, 1, 5, 4]) / 6, abs=0.01)


def test_a_factor_of_each_image_changes_nothing() -> None:
    """So bytes, each image with a range of its own, are compared as the values are."""
    generator = np.random.default_rng(2)
    bins = generator.normal(size=(30, 6, 6, 32)).astype(np.float32)
    query = cells_of(bins[3:4])[0]
    shapes = rectangles(6)
    plain, scaled = align(query, bins, shapes), align(query, bins * generator.uniform(0.1, 9, (30, 1, 1, 1)), shapes)
    assert scaled.scores == pytest.approx(plain.scores, abs=1e-5)
    rounded = align(query, to_bytes(bins), shapes)
    assert rounded.scores == pytest.approx(plain.scores, abs=0.02)
    assert rounded.scores.argmax() == plain.scores.argmax()


def test_every_rectangle_is_there_once() -> None:
    shapes = rectangles(6)
    assert len(shapes.boxes) == len({tuple(box) for box in shapes.boxes.tolist()}) == 441
    assert shapes.boxes[shapes.whole].tolist() == [0, 0, 1, 1] and shapes.cells.shape == (441, CELLS * CELLS)
    large = rectangles(6, 4)
    sides = (large.boxes[:, 2:] - large.boxes[:, :2]) * 6
    assert len(large.boxes) == 36 and sides.min() > 3.9 and large.boxes[large.whole].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("part", "whole", "expected"),
    [
        ((0, 0, 1, 1), (0, 0, 99, 49), (0, 0, 99, 49)),
        ((0.25, 0.5, 0.5, 1), (0, 0, 99, 49), (25, 25, 49, 49)),
        ((0.5, 0.5, 0.5, 0.5), (0, 0, 9, 9), (5, 5, 5, 5)),
        ((0.999, 0.999, 1, 1), (0, 0, 0, 0), (0, 0, 0, 0)),
        ((0, 0, 0.5, 0.5), (10, 20, 29, 39), (10, 20, 19, 29)),
    ],
)
def test_boxes_are_in_pixels(part: tuple[float, ...], whole: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert in_pixels(np.array(part), whole) == expected  # type: ignore[arg-type]


class TestLayout:
    def test_the_finest_level(self) -> None:
        layout = bin_layout(Recipe(levels=(3, 6, 1)), 46 * 5)
        assert (layout.side, layout.channels, layout.start) == (6, 5, 9 * 5)
        rows = np.arange(2 * 46 * 5).reshape(2, -1)
        assert layout.take(rows)[1, 2, 3].tolist() == rows[1, (9 + 2 * 6 + 3) * 5 :][:5].tolist()

    @pytest.mark.parametrize(
        ("recipe", "fault"),
        [
            (Recipe(pooling="avg"), "parts need max pooling.*found pooling 'avg'"),
            (Recipe(scales=(224, 320)), "parts need one scale.*found 2 scales fused by 'mean'"),
            (Recipe(crop="center"), "parts need whole images, found crop 'center'"),
            (Recipe(levels=(2, 1)), "parts need a level of 3 or more, found levels 2,1"),
        ],
    )
    def test_recipes_that_cannot_be_localized(
        self, recipe: Recipe, fault: str, make_store: MakeStore, tmp_path: Path
    ) -> None:
        with pytest.raises(UsageError, match=fault):
            bin_layout(recipe, recipe.bins * 4)
        store = make_store(np.ones((3, recipe.bins * 4)), recipe=recipe)
        with pytest.raises(UsageError, match=fault):
            create_gallery(store, tmp_path / "g", keep_bins=True)
        assert not (tmp_path / "g").exists()

    def test_how_parts_are_described(self) -> None:
        found = part_recipe(Recipe(scales=(448,)), (0.35, 0.5))
        assert (found.scales, found.fuse) == ((157, 224), "concat")
        assert part_recipe(Recipe(scales=(64,)), (0.35, 0.5)).scales == (32,)
        with pytest.raises(UsageError, match="parts need scales in pixels, found 'native'"):
            part_recipe(Recipe(scales=("native",)), (0.5,))


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Twelve images, each of 4 x 3 patches of its own colors and textures."""
    generator = np.random.default_rng(0)
    (folder := tmp_path / "scenes").mkdir()
    for number in range(12):
        patches = generator.integers(0, 256, (3, 4, 12, 12, 3), dtype=np.uint8)
        image = patches.transpose(0, 2, 1, 3, 4).reshape(36, 48, 3)
        Image.fromarray(image).resize((320, 240), Image.Resampling.NEAREST).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture
def gallery(scenes: Path, tmp_path: Path) -> Path:
    extract_folder(scenes, tmp_path / "s.h5", PARTS, RunOptions(device="cpu"))
    create_gallery(open_store(tmp_path / "s.h5"), tmp_path / "g", keep_bins=True)
    return tmp_path / "g"


def test_a_part_is_found_and_located(photos: Path, tmp_path: Path) -> None:
    extract_folder(photos, tmp_path / "p.h5", Recipe(scales=(448,)), RunOptions(device="cpu"))
    create_gallery(open_store(tmp_path / "p.h5"), tmp_path / "p", keep_bins=True)
    opened, overlaps = open_gallery(tmp_path / "p"), []
    for name in list(opened.rows.names)[:6]:
        image = Image.open(photos / name).convert("RGB")
        width, height = image.size
        box = (width // 3, height // 4, width // 3 + width // 2, height // 4 + height // 2)
        image.crop(box).resize((300, 300 * (height // 2) // (width // 2))).save(tmp_path / "part.jpg", quality=70)
        done = search_images(opened, [tmp_path / "part.jpg"], SearchOptions(k=3, parts=True))
        first = done.answers[0].neighbors[0]
        assert first.name == name and done.located and first.box is not None
        assert [one.rank for one in done.answers[0].neighbors] == [1, 2, 3]
        overlaps.append(box_overlap([*first.box], [box[0], box[1], box[2] - 1, box[3] - 1]))
    # One of them repeats itself: there a part is found in another place.
    assert np.median(overlaps) > 0.6 and sum(overlap > 0.4 for overlap in overlaps) >= 5, overlaps
    write_hits_page(tmp_path / "hits.html", opened, done)
    page = (tmp_path / "hits.html").read_text()
    assert "data:image/jpeg" in page and "the outline is where the query was found" in page


def test_reranking_by_bins(gallery: Path, scenes: Path, tmp_path: Path) -> None:
    opened = open_gallery(gallery)
    done = search_images(opened, [scenes], SearchOptions(k=12, rerank="bins"))
    for answer in done.answers:
        first, second = answer.neighbors[:2]
        assert (
            first.name == Path(answer.query).name
            and first.score == pytest.approx(1, abs=0.05)
            and first.box is not None
        )
        assert second.score < first.score and len(answer.neighbors) == 12
    stored = search_store(opened, open_store(tmp_path / "s.h5"), SearchOptions(k=12, rerank="bins"))
    for of_image, of_row in zip(done.answers, stored.answers, strict=True):
        assert [one.name for one in of_image.neighbors] == [one.name for one in of_row.neighbors]
    few = search_images(opened, [scenes / "03.png"], SearchOptions(k=12, rerank="bins", candidates=4))
    assert len(few.answers[0].neighbors) == 12  # as many as are asked for
    own = search_images(opened, [scenes / "03.png"], SearchOptions(k=12, rerank="bins", exclude_self=True))
    assert len(own.answers[0].neighbors) == 11 and "03.png" not in [one.name for one in own.answers[0].neighbors]
    parts = search_images(opened, [scenes / "03.png"], SearchOptions(k=12, parts=True, exclude_self=True))
    assert len(parts.answers[0].neighbors) == 11


def test_a_box_of_the_query_and_windows_of_the_gallery(gallery: Path, scenes: Path, tmp_path: Path) -> None:
    opened = open_gallery(gallery)
    done = search_images(opened, [scenes / "05.png"], SearchOptions(k=1, parts=True), box=(80, 80, 239, 199))
    assert done.answers[0].neighbors[0].name == "05.png"
    tiny = search_images(opened, [scenes / "05.png"], SearchOptions(k=1, parts=True), box=(7, 7, 7, 7))
    assert tiny.answers[0].error is None and tiny.answers[0].neighbors[0].box is not None
    windows = {"05.png": np.array([[80, 80, 239, 199]]), "06.png": np.array([[0, 0, 99, 99]])}
    extract_folder(scenes, tmp_path / "w.h5", PARTS, RunOptions(device="cpu"), windows=windows)
    create_gallery(open_store(tmp_path / "w.h5"), tmp_path / "w", keep_bins=True)
    found = search_images(open_gallery(tmp_path / "w"), [scenes / "05.png"], SearchOptions(k=2, rerank="bins"))
    for one in found.answers[0].neighbors:
        assert one.box is not None
        left, top, right, bottom = windows[one.name.partition("#")[0]][0]
        assert left <= one.box[0] <= one.box[2] <= right and top <= one.box[1] <= one.box[3] <= bottom


def test_bins_follow_the_rows(gallery: Path, scenes: Path, tmp_path: Path) -> None:
    before = open_gallery(gallery)
    (more := tmp_path / "more").mkdir()
    Image.new("RGB", (200, 100), "red").save(more / "red.png")
    extract_folder(more, tmp_path / "m.h5", PARTS, RunOptions(device="cpu"))
    remove_from_gallery(gallery, ["03.png", "07.png"])
    add_to_gallery(open_store(tmp_path / "m.h5"), gallery)
    after = open_gallery(gallery)
    assert before.bins is not None and after.bins is not None
    keep = [row for row in range(12) if row not in (3, 7)]
    np.testing.assert_array_equal(after.bins.values[:10], before.bins.values[keep])
    assert after.bins.image_size[10].tolist() == [200, 100] and len(after.bins.values) == len(after) == 11
    assert len(list(gallery.glob("bins-*.h5"))) == 2  # of the base, and of the image added beside it
    remove_from_gallery(gallery, ["00.png"])
    joined = open_gallery(gallery)
    assert joined.bins is not None and len(list(gallery.glob("bins-*.h5"))) == 1
    np.testing.assert_array_equal(joined.bins.values, after.bins.values[1:])


def test_a_query_that_cannot_be_described(gallery: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    for options in (SearchOptions(parts=True), SearchOptions(rerank="bins")):
        done = search_images(open_gallery(gallery), [tmp_path / "broken.png"], options)
        assert done.failed == 1 and done.answers[0].neighbors == []


def test_a_gallery_without_bins(gallery: Path, scenes: Path, tmp_path: Path, run_sppfeat: Run) -> None:
    create_gallery(open_store(tmp_path / "s.h5"), tmp_path / "plain")
    for flags in (["--parts"], ["--rerank", "bins"]):
        done = run_sppfeat("search", tmp_path / "plain", scenes / "03.png", *flags)
        assert done.returncode == 1 and done.stderr.startswith(f"sppfeat: {tmp_path}/plain: keeps no bins, which parts")
        assert "--keep-bins" in done.stderr and done.stderr.count("\n") == 1
    done = run_sppfeat("search", gallery, scenes / "03.png", "--rerank", "bins", "--json", "-k", "2")
    neighbor = json.loads(done.stdout)["results"][0]["neighbors"][0]
    assert neighbor["name"] == "03.png" and len(neighbor["box"]) == 4
    text = run_sppfeat("search", gallery, scenes / "03.png", "--rerank", "bins", "-k", "1").stdout
    assert text.endswith(f"03.png  at {','.join(map(str, neighbor['box']))}\n"), text
    done = run_sppfeat("search", gallery, tmp_path / "s.h5", "--parts")
    assert done.returncode == 2 and "parts: expected images as queries" in done.stderr
    assert run_sppfeat("index", tmp_path / "s.h5", "-o", gallery, "--keep-bins", "--overwrite").returncode == 0


@pytest.mark.parametrize("dim", [3, 1000])
def test_bins_of_few_values(dim: int, gallery: Path, scenes: Path, tmp_path: Path, run_sppfeat: Run) -> None:
    """Kept as principal components, they are searched, changed and evaluated as whole ones are."""
    done = run_sppfeat(
        "index", tmp_path / "s.h5", "-o", tmp_path / "few", "--keep-bins", "--bin-dim", str(dim), "--json"
    )
    whole = open_gallery(gallery).bins
    assert whole is not None
    side, channels = whole.values.shape[1], whole.values.shape[3]
    kept = min(dim, channels)
    told = json.loads(done.stdout)["bins"]
    assert told == {"dim": kept, "whitened": min(64, channels), "bytes": side * side * kept}
    assert f"bins: {kept} values each" in run_sppfeat("inspect", tmp_path / "few").stdout
    few = open_gallery(tmp_path / "few").bins
    assert few is not None and few.values.shape == (12, side, side, kept)
    taken, exact = few.take(np.arange(12)), whole.take(np.arange(12))
    assert taken.shape == exact.shape
    cosines = np.einsum("nijc,nijc->n", taken.astype(float), exact.astype(float))
    cosines /= np.linalg.norm(taken.reshape(12, -1), axis=1) * np.linalg.norm(
        exact.astype(float).reshape(12, -1), axis=1
    )
    assert cosines.min() > (0.8 if dim == 3 else 0.9999)
    for options in (SearchOptions(k=3, rerank="bins"), SearchOptions(k=3, parts=True)):
        found, wanted = (search_images(open_gallery(path), [scenes], options) for path in (tmp_path / "few", gallery))
        for one, other in zip(found.answers, wanted.answers, strict=True):
            assert one.neighbors[0].name == Path(one.query).name or options.parts
            assert dim == 3 or one.neighbors == other.neighbors
    (more := tmp_path / "more").mkdir()
    Image.new("RGB", (200, 100), "red").save(more / "red.png")
    extract_folder(more, tmp_path / "m.h5", PARTS, RunOptions(device="cpu"))
    add_to_gallery(open_store(tmp_path / "m.h5"), tmp_path / "few")
    remove_from_gallery(tmp_path / "few", ["00.png", "01.png"])
    after = open_gallery(tmp_path / "few")
    assert after.bins is not None
    np.testing.assert_array_equal(after.bins.values[:10], few.values[2:])
    (answer,) = search_images(after, [more / "red.png"], SearchOptions(k=1, parts=True)).answers
    assert answer.neighbors[0].name == "red.png"


def test_values_of_bins_that_cannot_be(gallery: Path, tmp_path: Path, run_sppfeat: Run) -> None:
    for flags, fault in (
        (["--keep-bins", "--bin-dim", "0"], "bin-dim must be at least 1 value, found 0"),
        (["--bin-dim", "4"], "bin-dim: expected keep_bins too"),
    ):
        done = run_sppfeat("index", tmp_path / "s.h5", "-o", tmp_path / "x", *flags)
        assert done.returncode == 2 and fault in done.stderr and not (tmp_path / "x").exists()
    done = run_sppfeat("index", tmp_path / "s.h5", "--add-to", gallery, "--bin-dim", "4")
    assert done.returncode == 2 and "--bin-dim: applies only when a gallery is built" in done.stderr
    for flags, fault in (
        (["--bin-dim", "4"], "bin-dim: expected parts or rerank bins"),
        (["--rerank", "bins", "--bin-dim", "0"], "bin-dim must be at least 1 value"),
    ):
        done = run_sppfeat("evaluate", "retrieval", tmp_path / "s.h5", "--relevant", r"regex:(\d)", *flags)
        assert done.returncode == 2 and fault in done.stderr


def test_a_gallery_that_grows_learns_its_whitening_again(make_store: MakeStore, tmp_path: Path) -> None:
    """Built from one image and grown, it is whitened as if it had been built of all; components stay."""
    recipe = Recipe(levels=(3, 1), scales=(64,))
    rows = np.abs(np.random.default_rng(0).normal(size=(40, 10 * 6)))
    first = make_store(rows[:1], "a.h5", names=["a.jpg"], recipe=recipe)
    rest = make_store(rows[1:], "b.h5", names=[f"b{n}.jpg" for n in range(39)], recipe=recipe)
    every = make_store(rows, "c.h5", names=[f"c{n}.jpg" for n in range(40)], recipe=recipe)
    for dim in (None, 3):
        create_gallery(first, tmp_path / "grown", keep_bins=True, bin_dim=dim, overwrite=True)
        before = open_gallery(tmp_path / "grown").bins
        add_to_gallery(rest, tmp_path / "grown")
        create_gallery(every, tmp_path / "whole", keep_bins=True, overwrite=True)
        grown, whole = open_gallery(tmp_path / "grown").bins, open_gallery(tmp_path / "whole").bins
        assert before is not None and grown is not None and whole is not None
        assert not np.allclose(grown.channels.whitening.mean, before.channels.whitening.mean, atol=0.01)
        if dim is None:
            assert grown.channels.whitening.mean == pytest.approx(whole.channels.whitening.mean, abs=0.01)
        else:
            np.testing.assert_array_equal(grown.channels.components, before.channels.components)


def test_notes_of_components(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(np.abs(np.random.default_rng(0).normal(size=(5, 10 * 6))), recipe=Recipe(levels=(3, 1)))
    few = create_gallery(store, tmp_path / "few", keep_bins=True, bin_dim=2).notes
    assert any("bins of 2 values may rank below the plain search" in note for note in few)
    assert any("learned from 5 images and stay as they are" in note for note in few)
    many = create_gallery(store, tmp_path / "many", keep_bins=True, bin_dim=50).notes
    assert many == ["bin_dim is 50, but a bin has 6 channels: they are kept as they are"]


def test_levels_with_too_many_rectangles() -> None:
    assert bin_layout(Recipe(levels=(8,)), 64 * 3).side == 8
    with pytest.raises(UsageError, match="parts need levels up to 8, found 9: their rectangles would be too many"):
        bin_layout(Recipe(levels=(9, 1)), 82 * 3)


@pytest.mark.parametrize("size", [0, -5, 2**31 - 1])
def test_sizes_of_images_are_not_trusted(gallery: Path, size: int) -> None:
    (file,) = gallery.glob("bins-*.h5")
    with h5py.File(file, "r+") as content:
        content["image_size"][3] = size
    with pytest.raises(GalleryError, match=rf"{file.name}: expected widths and heights in pixels"):
        open_gallery(gallery)


@pytest.mark.parametrize(("field", "value"), [("dim", 10**9), ("dim", 1), ("bytes", 7), ("whitened", 10**9)])
def test_facts_about_bins_are_not_trusted(gallery: Path, field: str, value: int) -> None:
    document = json.loads((gallery / "gallery.json").read_text())
    document["bins"][field] = value
    if (field, value) == ("dim", 1):
        document["bins"]["bytes"] = document["bins"]["bytes"] // open_gallery(gallery).bins.channels.dim  # type: ignore[union-attr]
    (gallery / "gallery.json").write_text(json.dumps(document))
    with pytest.raises(GalleryError) as caught:
        open_gallery(gallery)
    assert "\n" not in str(caught.value) and "KeyError" not in str(caught.value)


def test_bins_that_another_process_replaces_while_they_are_opened(
    gallery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removed between header and values: the newer gallery is opened instead."""
    (more := tmp_path / "more").mkdir()
    Image.new("RGB", (200, 100), "red").save(more / "red.png")
    extract_folder(more, tmp_path / "m.h5", PARTS, RunOptions(device="cpu"))
    honest, turns = np.memmap, []

    def mapped(*given: object, **named: object) -> object:
        if not turns:
            turns.append(1)
            monkeypatch.setattr("sppfeat.retrieval.bins.np.memmap", honest)
            remove_from_gallery(gallery, ["00.png"])
        return honest(*given, **named)  # type: ignore[call-overload]

    monkeypatch.setattr("sppfeat.retrieval.bins.np.memmap", mapped)
    assert len(open_gallery(gallery)) == 11 and turns


def test_scores_below_zero_are_not_raised_by_weights() -> None:
    """A small rectangle must not win because its weight brings a poor score nearer to 0."""
    bins = np.random.default_rng(0).normal(size=(30, 6, 6, 8)).astype(np.float32)
    query = -cells_of(bins[:1])[0]
    plain, weighted = rectangles(6, 5), rectangles(6, 5, 0.4)
    found = align(query, bins[:1], weighted)
    assert found.scores[0] < 0 and align(query, bins[:1], plain).scores[0] >= found.scores[0]


def test_k_is_bounded_where_images_are_compared_with_each_other() -> None:
    with pytest.raises(UsageError, match="k must be at most 5000 neighbors for rerank expand, found 6000"):
        SearchOptions(rerank="expand", k=6000)
    assert SearchOptions(rerank="bins", k=6000).k == 6000


def test_the_command_that_keeps_bins(make_store: MakeStore, tmp_path: Path) -> None:
    """Of all stores, with the projection, and quoted."""
    rows = np.abs(np.random.default_rng(0).normal(size=(30, 10 * 6)))
    recipe = Recipe(levels=(3, 1))
    place = tmp_path / "my gallery"
    first = make_store(rows, "a b.h5", recipe=recipe)
    second = make_store(rows[:2] + 1, "c.h5", names=["x.jpg", "y.jpg"], recipe=recipe)
    create_gallery(first, place, projection=ProjectionOptions(dims=7, whiten=True))
    add_to_gallery(second, place)
    with pytest.raises(GalleryError) as caught:
        require_bins(open_gallery(place))
    assert (
        f"sppfeat index '{first.place}' -o '{place}' --project 7 --whiten --keep-bins --overwrite && "
        f"sppfeat index {second.place} --add-to '{place}'"
    ) in str(caught.value)


def test_a_store_with_values_that_are_not_finite_is_named(make_store: MakeStore) -> None:
    rows = np.abs(np.random.default_rng(0).normal(size=(5, 10 * 6)))
    rows[3, 7] = np.inf
    store = make_store(rows, recipe=Recipe(levels=(3, 1)))
    with pytest.raises(StoreError, match=rf"{store.path}: expected finite descriptors; `sppfeat inspect --verify`"):
        learn_from(bin_layout(store.recipe, store.dim), unit_rows(store))


def test_damaged_channels(gallery: Path) -> None:
    (file,) = gallery.glob("channels-*.npz")
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.write_bytes(whole)
    with pytest.raises(GalleryError, match=rf"{file.name}: is damaged"):
        open_gallery(gallery)
    file.unlink()
    with pytest.raises(GalleryError, match=rf"{file.name}: belongs to the gallery"):
        open_gallery(gallery)
    document = json.loads((gallery / "gallery.json").read_text())
    del document["bins"]
    (gallery / "gallery.json").write_text(json.dumps(document))
    with pytest.raises(GalleryError, match="found bins without their files, or the other way round"):
        open_gallery(gallery)


def test_damaged_bins(gallery: Path, run_sppfeat: Run) -> None:
    (file,) = gallery.glob("bins-*.h5")
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(GalleryError, match=rf"{file.name}: expected {len(whole)} bytes, found"):
        open_gallery(gallery)
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    file.write_bytes(changed)
    open_gallery(gallery)
    done = run_sppfeat("inspect", gallery, "--verify")
    assert done.returncode == 1 and f"{file.name}: is damaged" in done.stderr
    with h5py.File(file, "r+") as content:
        del content["values"]
        content["values"] = np.zeros((1, 4, 4, 3), np.int8)
    file.write_bytes(file.read_bytes().ljust(len(whole), b"\0")[: len(whole)])
    with pytest.raises(GalleryError, match=rf"{file.name}: "):
        open_gallery(gallery)
