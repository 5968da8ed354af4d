"""A matrix of recipes and data sets: what is read, what is described once, and what is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sppfeat import Recipe, UsageError, open_store
from sppfeat.matrix import Cell, evaluate_matrix, read_data, read_recipes, table
from sppfeat.retrieval import RetrievalOptions, evaluate_retrieval
from sppfeat.transfer import TransferOptions
from sppfeat.transfer.evaluation import evaluate_transfer

RECIPES = """
[small]
backbone = "timm:test_resnet"
weights = "random"
scales = [64]
levels = [2, 1]

[smaller]
backbone = "timm:test_resnet"
weights = "random"
scales = [32]
levels = [1]
"""


@pytest.fixture
def work(make_images: Callable[..., Path], tmp_path: Path) -> Path:
    """Recipes, a folder of classes with parts, and a gallery with queries."""
    for at, part in enumerate(("train", "test")):
        for of, kind in enumerate(("left", "right")):
            make_images(4, f"classes/{part}/{kind}", seed=10 * at + of)
    for folder in ("gallery", "queries"):
        make_images(5, f"places/{folder}", seed=3)
    for number, path in enumerate(sorted((tmp_path / "places/queries").iterdir())):
        path.rename(path.with_name(f"q{number}_{path.name}"))
    (tmp_path / "recipes.toml").write_text(RECIPES)
    (tmp_path / "data.toml").write_text(
        '[places]\ngallery = "places/gallery"\nqueries = "places/queries"\nrelevant = \'regex:(\\d+)\\.\'\n'
        '[near]\npath = "classes"\nclassifier = "knn"\nneighbors = 3\n'
    )
    return tmp_path


def test_each_cell_is_what_its_evaluation_says(work: Path) -> None:
    recipes = read_recipes(work / "recipes.toml")
    assert recipes["small"] == Recipe(backbone="timm:test_resnet", weights="random", scales=(64,), levels=(2, 1))
    data = read_data([work / "classes", work / "data.toml"])
    assert [one.name for one in data] == ["classes", "places", "near"]
    assert data[0].options == TransferOptions(protocol="split")
    told: list[Cell] = []
    cells = evaluate_matrix(recipes, data, work / "out", done=told.append)
    assert cells == told and [(cell.data, cell.recipe) for cell in cells] == [
        (name, recipe) for name in ("classes", "places", "near") for recipe in ("small", "smaller")
    ]
    first, places, near = cells[0], cells[2], cells[4]
    (expected,) = evaluate_transfer([open_store(work / "out/small/classes/images.h5")], data[0].options)
    assert (first.value, first.metric, first.low) == (expected.value, "accuracy, svm", expected.interval[0])
    stores = [open_store(work / f"out/small/places/{part}.h5") for part in ("gallery", "queries")]
    searched = evaluate_retrieval(*stores, RetrievalOptions(relevant=r"regex:(\d+)\."))
    assert places.value == searched.mean_average_precision and places.images == 10 and near.metric == "accuracy, knn"
    text = table(cells).splitlines()
    assert (
        text[0]
        == "| recipe | values | classes (accuracy, svm) | places (retrieval mAP) | near (accuracy, knn) | images/s |"
    )
    assert len(text) == 4 and text[2].startswith(f"| small | {first.values:,} | {first.value:.2f} [")


def test_what_is_done_is_kept(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sppfeat.matrix import running

    recipes, data = read_recipes(work / "recipes.toml"), read_data([work / "classes"])
    cells = evaluate_matrix(recipes, data, work / "out")
    evaluated: list[str] = []
    really = running._evaluated

    def counted(data_set, stores):  # type: ignore[no-untyped-def]
        evaluated.append(next(iter(stores.values())).place)
        return really(data_set, stores)

    monkeypatch.setattr(running, "_evaluated", counted)
    assert evaluate_matrix(recipes, data, work / "out") == cells and evaluated == []
    # A damaged result is made again, and so is one of other images; the others stay.
    (work / "out/small/classes/result.json").write_text("{")
    assert evaluate_matrix(recipes, data, work / "out") == [
        Cell(**{**json_of(cells[0]), "described": 0, "seconds": 0.0}),
        cells[1],
    ]
    assert len(evaluated) == 1
    # Evaluated by other options, descriptors are still told with the speed at which they were made.
    (work / "knn.toml").write_text('[classes]\npath = "classes"\nclassifier = "knn"\nneighbors = 3\n')
    other = evaluate_matrix(recipes, read_data([work / "knn.toml"]), work / "out")
    assert [cell.metric for cell in other] == ["accuracy, knn"] * 2 and cells[1].described == 16
    assert (other[1].described, other[1].seconds) == (cells[1].described, cells[1].seconds)
    evaluated.clear()
    shutil.copy(next((work / "classes/test/left").iterdir()), work / "classes/test/left/new.png")
    again = evaluate_matrix(recipes, data, work / "out")
    assert [cell.images for cell in again] == [17, 17] and [cell.described for cell in again] == [1, 1]
    assert len(evaluated) == 2


def json_of(cell: Cell) -> dict[str, object]:
    return {name: getattr(cell, name) for name in Cell.__struct_fields__}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]\nscale = 224", r"recipes.toml: \[a\]: unknown key 'scale'"),
        ("[a]\nlevels = [0]", r"recipes.toml: \[a\]: levels must be"),
        ("[a]\nbackbone = 3", r"\[a\]: backbone must be a name"),
        ("x = 1", r"expected tables \[NAME\]"),
        ('["../a"]\nscales = [32]', r"expected tables \[NAME\]"),
        ("", r"expected tables \[NAME\], found none"),
        ("[a", "expected a TOML file, found"),
    ],
)
def test_recipes_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipes.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_recipes(tmp_path / "recipes.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[a]\npath = "nowhere"', r"\[a\]: expected a folder, found none"),
        ('[a]\ngallery = "g"', r"\[a\]: expected gallery and queries, found no queries"),
        ('[a]\nprotocol = "split"', r"\[a\]: expected path, found no path"),
        ('[a]\npath = "g"\nclasifier = "knn"', r"\[a\]: unknown key 'clasifier': did you mean classifier"),
        ('[a]\npath = "g"\nclassifier = "forest"', r"\[a\]: .*classifier"),
        ('[a]\npath = "g"\nneighbors = "x"', r"\[a\]: neighbors must be"),
        ('[g]\npath = "g"\n', "data sets of different names, found 'g' twice"),
    ],
)
def test_data_sets_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "g").mkdir()
    (tmp_path / "data.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_data([tmp_path / "g", tmp_path / "data.toml"])


def test_from_the_command_line(work: Path, run_sppfeat) -> None:  # type: ignore[no-untyped-def]
    (work / "classes/test/left/broken.png").write_bytes(b"\x89PNG")
    given = ("evaluate", "all", "recipes.toml", "classes", "data.toml", "-o", "out", "--device", "cpu")
    done = run_sppfeat(*given, "--report", "r.html", cwd=work)
    assert done.returncode == 3 and "small, classes: images" in done.stderr and "broken.png" in done.stderr
    assert done.stdout.count("\n") == 4 and "| smaller | " in done.stdout
    page = (work / "r.html").read_text()
    assert page.count("<td>small") == 2 and "1 images failed" in page
    again = run_sppfeat(*given, "--json", "--quiet", cwd=work)
    results = json.loads(again.stdout)["results"]
    assert again.returncode == 3 and again.stderr == "" and len(results) == 6 and results[0]["failed"] == 1
    assert results[0]["value"] == pytest.approx(float(done.stdout.splitlines()[2].split("|")[3].split()[0]), abs=0.01)
    wrong = run_sppfeat("evaluate", "all", "none.toml", "classes", "-o", "out", cwd=work)
    assert wrong.returncode == 2 and wrong.stderr.startswith("sppfeat: none.toml: could not be read")
