"""Crops of photographs, against comparing every image with every other one; and what cannot be looked for."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PHOTOS, MakeStore
from PIL import Image

from sppfeat import Recipe, Store, StoreError, UsageError, extract_folder, open_store
from sppfeat.extraction import Describer
from sppfeat.recipe import RunOptions
from sppfeat.retrieval import crops, find_crops, find_duplicates, write_duplicates_csv, write_duplicates_page
from sppfeat.retrieval.alignment import align, cells_of, rectangles
from sppfeat.retrieval.bins import bin_layout
from sppfeat.store import UnitRows

OPTIONS = RunOptions(device="cpu", num_workers=1)
# Parts of the width and height: left, top, right, bottom.
CROPS = {"a": (0.1, 0.15, 0.85, 0.9), "b": (0.0, 0.2, 0.8, 1.0), "c": (0.25, 0.0, 1.0, 0.7)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The photographs, and crops of some of them; a, b, c: of the first, second, third."""
    folder = tmp_path_factory.mktemp("crops") / "images"
    shutil.copytree(PHOTOS, folder)
    for path, (name, part) in zip(sorted(folder.rglob("*.jpg")), CROPS.items(), strict=False):
        with Image.open(path) as image:
            width, height = image.size
            box = tuple(round(edge * side) for edge, side in zip(part, (width, height) * 2, strict=True))
            image.convert("RGB").crop(box).save(folder / f"{name}.jpg", quality=70)  # type: ignore[arg-type]
    extract_folder(folder, folder.parent / "f.h5", Recipe(), OPTIONS)
    return open_store(folder.parent / "f.h5")


def test_crops_are_found_where_they_are(store: Store) -> None:
    found = find_crops(store, run_options=OPTIONS)
    names = sorted(str(path.relative_to(PHOTOS)) for path in PHOTOS.rglob("*.jpg"))
    assert {crop.part.name: crop.whole.name for crop in found.found} == {
        f"{crop}.jpg": name for crop, name in zip(CROPS, names, strict=False)
    }
    for crop in found.found:
        width, height = crop.whole.size
        x1, y1, x2, y2 = (edge / side for edge, side in zip(crop.box, (width, height) * 2, strict=True))
        left, top, right, bottom = CROPS[crop.part.name[0]]
        inside = max(0, min(x2, right) - max(x1, left)) * max(0, min(y2, bottom) - max(y1, top))
        both = (x2 - x1) * (y2 - y1) + (right - left) * (bottom - top)
        assert inside / (both - inside) > 0.96
        assert crop.whole.score == 1 and 0 < crop.part.score < 1
    assert found.images == len(store) and not found.failed
    assert found.compared and found.notes == []


def test_descriptors_alone_know_less(store: Store) -> None:
    found = find_crops(store, 1.1, run_options=OPTIONS)
    names = {crop.part.name: crop.whole.name for crop in found.found}
    assert not found.compared and names.keys() > {"a.jpg", "b.jpg", "c.jpg"}
    # A scene that looks like another one.
    assert names["places/meadow.jpg"] == "places/fields.jpg"


def test_few_images(store: Store, tmp_path: Path) -> None:
    """Where none can stand out from others, any that is near enough is compared."""
    folder = tmp_path / "images"
    folder.mkdir()
    found = find_crops(store, run_options=OPTIONS).found
    for crop in found[:1]:
        for one in (crop.part, crop.whole):
            shutil.copy(Path(store.source_root, one.name), folder)
    extract_folder(folder, tmp_path / "f.h5", Recipe(), OPTIONS)
    few = open_store(tmp_path / "f.h5")
    (again,) = find_crops(few, run_options=OPTIONS).found
    assert again.part.name == found[0].part.name and again.box == found[0].box
    alone = find_crops(few, 1.1, run_options=OPTIONS)
    assert alone.found == []
    assert alone.notes == ["only 2 images to compare: how far one stands out from 20 others is not known"]


@pytest.mark.parametrize("side", ["part", "whole"])
def test_an_image_that_cannot_be_read_to_be_compared_is_told(
    store: Store, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was described again a moment ago."""
    crop = next(one for one in find_crops(store, run_options=OPTIONS).found if one.part.name == "b.jpg")
    lost, real = getattr(crop, side).name, crops.gray_image

    def gray_image(rows: UnitRows, at: int, side: int) -> Image.Image | str:
        return "no such file" if rows.names[at] == lost else real(rows, at, side)

    monkeypatch.setattr(crops, "gray_image", gray_image)
    found = find_crops(store, run_options=OPTIONS)
    assert sorted(one.part.name for one in found.found) == ["a.jpg", "c.jpg"] and found.failed == {lost: "no such file"}


def test_copies_of_a_part_are_parts_of_the_whole(tmp_path: Path) -> None:
    """Each is a part of the other, too: one of them is listed as such, or as a part of the whole, and none is lost."""
    folder = tmp_path / "images"
    shutil.copytree(PHOTOS, folder)
    for path in sorted((folder / "animals").glob("*.jpg")):
        with Image.open(path) as image:
            width, height = image.size
            part = image.convert("RGB").crop((width // 10, height // 8, width * 9 // 10, height * 9 // 10))
        for quality in (60, 75, 92):
            part.save(folder / f"{path.stem}-{quality}.jpg", quality=quality)
    extract_folder(folder, tmp_path / "f.h5", Recipe(), OPTIONS)
    found = {crop.part.name: crop.whole.name for crop in find_crops(open_store(tmp_path / "f.h5")).found}
    for path in (folder / "animals").glob("*.jpg"):
        parts = {f"{path.stem}-{quality}.jpg" for quality in (60, 75, 92)}
        assert found.keys() >= parts and f"animals/{path.name}" not in found
        for name in parts:
            while name in found:
                name = found[name]
            assert name == f"animals/{path.name}"


def test_of_nearly_equal_images_the_larger_is_the_whole(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(PHOTOS, folder)
    expected = {}
    for path in sorted((folder / "places").glob("*.jpg")):
        with Image.open(path) as image:
            width, height = image.size
            image.convert("RGB").crop((0, 0, width - width // 60, height - height // 60)).save(folder / path.name)
        expected[path.name] = f"places/{path.name}"
    extract_folder(folder, tmp_path / "f.h5", Recipe(), OPTIONS)
    found = {crop.part.name: crop.whole.name for crop in find_crops(open_store(tmp_path / "f.h5")).found}
    assert expected and found == expected


def test_no_image_is_a_part_of_its_parts() -> None:
    """Pairs in a circle, each with its reverse, and a whole that is second best."""
    box = np.array([0, 0, 1, 1])
    pairs = {(0, 1): 1.3, (1, 2): 1.2, (2, 0): 1.1, (1, 0): 1.0, (2, 1): 1.0, (0, 2): 1.0, (2, 3): 0.95}
    matches = [crops._Match(part, whole, score, box) for (part, whole), score in pairs.items()]
    assert {one.part: one.whole for one in crops._chosen(matches)} == {0: 1, 1: 2, 2: 3}
    # The difference of their pixels, where known, decides of two directions; the score, of several wholes.
    both = [crops._Match(0, 1, 1.5, box, 0.1), crops._Match(1, 0, 1.2, box, 0.05), crops._Match(0, 2, 1.1, box, 0.2)]
    assert {one.part: one.whole for one in crops._chosen(both)} == {1: 0, 0: 2}
    # None is lost to a reverse that is not chosen.
    lost = [crops._Match(0, 1, 1.2, box, 0.1), crops._Match(1, 0, 1.1, box, 0.05), crops._Match(1, 2, 1.3, box, 0.1)]
    assert {one.part: one.whole for one in crops._chosen(lost)} == {1: 2, 0: 1}
    long = [crops._Match(part, part + 1, 2 - part / 5000, box) for part in range(5000)]
    assert len(crops._chosen(long)) == 5000


@pytest.mark.parametrize("orientation", ["exif", "ignore"])
def test_boxes_are_in_the_orientation_of_the_recipe(tmp_path: Path, orientation: str) -> None:
    folder = tmp_path / "images"
    shutil.copytree(PHOTOS, folder)
    with Image.open(folder / "places" / "fields.jpg") as image:
        pixels = image.convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels.save(folder / "places" / "fields.jpg", quality=95, exif=exif)  # stored as before, shown turned
    upright = pixels.rotate(-90, expand=True) if orientation == "exif" else pixels
    upright.crop((30, 40, 200, 190)).save(folder / "part.png")
    extract_folder(folder, tmp_path / "f.h5", Recipe(orientation=orientation), OPTIONS)
    store = open_store(tmp_path / "f.h5")
    (crop,) = find_crops(store, run_options=OPTIONS).found
    assert (crop.part.name, crop.whole.name) == ("part.png", "places/fields.jpg")
    assert crop.box == pytest.approx((30, 40, 199, 189), abs=2)
    write_duplicates_page(tmp_path / "d.html", find_duplicates(store), find_crops(store, run_options=OPTIONS))
    whole, _ = re.findall(r"data:image/jpeg;base64,([^\"']+)", (tmp_path / "d.html").read_text())
    with Image.open(io.BytesIO(base64.b64decode(whole))) as shown:
        assert (shown.height > shown.width) == (orientation == "exif")


def test_scores_equal_comparing_every_image(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a threshold that many pairs reach: the best whole of each, the better of two directions, and no circles."""
    monkeypatch.setattr(crops, "LEAST", 0.0)
    monkeypatch.setattr(crops, "CANDIDATES", len(store))
    smaller = Describer(replace(store.recipe, scales=(159,)), OPTIONS)
    layout = bin_layout(store.recipe, store.dim)
    bins = layout.take(np.asarray(store.descriptors, np.float32))
    scores = np.zeros((len(store), len(store)))
    paths = [Path(store.source_root, name) for name in store.names]
    for done in smaller.describe(paths):
        row, _ = done.row()
        assert row is not None
        others = np.arange(len(store)) != done.position
        of_one = align(cells_of(layout.take(row[None]))[0], bins[others], rectangles(layout.side)).scores.astype(float)
        scores[done.position, others] = of_one + 2 * (of_one - np.median(of_one))
    count = len(store)
    pairs = [(scores[pair], pair) for pair in product(range(count), repeat=2) if scores[pair] >= 0.7]
    expected: dict[tuple[int, int], float] = {}
    whole_of: dict[int, int] = {}
    for preferred in (True, False):
        for score, (part, whole) in sorted(pairs, reverse=True):
            above = [whole]
            while above[-1] in whole_of:
                above.append(whole_of[above[-1]])
            worse = preferred and score < scores[whole, part]
            if part not in whole_of and part not in above and not worse:
                whole_of[part] = whole
                expected[part, whole] = score
    assert len(expected) > 4
    row_of = {name: row for row, name in enumerate(store.names)}
    found = find_crops(store, 0.7, run_options=OPTIONS)
    got = {(row_of[crop.part.name], row_of[crop.whole.name]): crop.score for crop in found.found}
    assert got.keys() == expected.keys()
    assert [got[pair] for pair in expected] == pytest.approx(list(expected.values()), abs=0.02)  # bins of one byte


def test_left_out_names_and_missing_images(store: Store, tmp_path: Path) -> None:
    shutil.copytree(store.source_root, tmp_path / "images")
    extract_folder(tmp_path / "images", tmp_path / "f.h5", Recipe(), OPTIONS)
    (tmp_path / "images" / "b.jpg").unlink()
    found = find_crops(open_store(tmp_path / "f.h5"), without=["a.jpg"], run_options=OPTIONS)
    assert [crop.part.name for crop in found.found] == ["c.jpg"]
    assert found.failed == {"b.jpg": "no such file"} and found.images == len(store) - 1


def test_the_command_and_its_files(store: Store, tmp_path: Path, run_sppfeat: Callable[..., Any]) -> None:
    arguments = [
        "duplicates",
        store.path,
        "--parts",
        "--json",
        "--csv",
        tmp_path / "d.csv",
        "--html",
        tmp_path / "d.html",
    ]
    done = run_sppfeat(*arguments, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)["parts"]
    assert sorted(one["part"] for one in document["found"]) == ["a.jpg", "b.jpg", "c.jpg"]
    with open(tmp_path / "d.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["action"] for line in lines] == ["keep", "part"] * 3
    assert [line["name"] for line in lines[1::2]] == [one["part"] for one in document["found"]]
    text = (tmp_path / "d.html").read_text()
    assert (
        "3 parts of other images" in text
        and "whose pixels are a part" in text
        and text.count("data:image/jpeg;base64,") == 6
    )


def test_no_link_is_a_part_of_its_file(store: Store, tmp_path: Path, run_sppfeat: Callable[..., Any]) -> None:
    shutil.copytree(store.source_root, tmp_path / "images" / "real")
    (tmp_path / "images" / "album").symlink_to(tmp_path / "images" / "real")
    extract_folder(tmp_path / "images", tmp_path / "f.h5", Recipe(), OPTIONS)
    done = run_sppfeat("duplicates", tmp_path / "f.h5", "--parts", "--json", "--device", "cpu")
    document = json.loads(done.stdout)
    assert done.returncode == 0 and document["groups"] == []
    assert sorted(one["part"] for one in document["parts"]["found"]) == ["real/a.jpg", "real/b.jpg", "real/c.jpg"]


def test_no_parts_on_the_page(store: Store, tmp_path: Path) -> None:
    parts = find_crops(store, 9.0, run_options=OPTIONS)
    found = find_duplicates(store, 1.0)
    write_duplicates_page(tmp_path / "d.html", found, parts)
    text = (tmp_path / "d.html").read_text()
    assert "No parts of other images" in text and "scores reach 9" in text
    write_duplicates_csv(tmp_path / "d.csv", found, parts)
    assert (tmp_path / "d.csv").read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(pooling="avg"), "parts need max pooling"),
        (Recipe(scales=(224, 448), fuse="mean"), "parts need one scale"),
        (Recipe(crop="center"), "parts need whole images"),
        (Recipe(levels=(2, 1)), "parts need a level of 3 or more"),
        (Recipe(scales=("native",)), "parts need scales in pixels"),
    ],
)
def test_recipes_without_places_are_refused(make_store: MakeStore, recipe: Recipe, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_crops(make_store(np.ones((3, recipe.bins * 4)), recipe=recipe))


def test_other_networks_and_thresholds_are_refused(make_store: MakeStore) -> None:
    rows = make_store(np.ones((3, Recipe().bins * 320)))
    with pytest.raises(StoreError, match="was made with another network \\(.*weights: store "):
        find_crops(rows, run_options=OPTIONS)
    for threshold in (0, -1, float("nan")):
        with pytest.raises(UsageError, match="part threshold must be above 0"):
            find_crops(rows, threshold)
