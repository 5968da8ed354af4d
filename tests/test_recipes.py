"""Named recipes: what they change, alone, on the command line and in a file of recipes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sppfeat.detection import detection_recipe
from sppfeat.errors import UsageError
from sppfeat.matrix import read_recipes
from sppfeat.recipe import Recipe
from sppfeat.recipes import NAMED, named_recipe
from sppfeat.store import open_store
from sppfeat_cli import main


@pytest.mark.parametrize("name", NAMED)
def test_a_name_stands_for_its_changes(name: str) -> None:
    recipe = named_recipe(name)
    changed = {field: getattr(recipe, field) for field in NAMED[name].changes}
    assert changed == dict(NAMED[name].changes) and recipe == Recipe(**changed)
    assert named_recipe(name, levels=(2, 1), dtype="float32").levels == (2, 1)


def test_detectors_start_from_the_recipe_of_that_name() -> None:
    assert detection_recipe() == named_recipe("detection")
    assert detection_recipe(scales=(224,)).scales == (224,)


def test_names_of_none() -> None:
    with pytest.raises(
        UsageError, match="unknown recipe .transfr.: expected one of fast, retrieval, transfer, detection"
    ):
        named_recipe("transfr")


def test_a_file_of_recipes_may_start_from_names(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text('[a]\nrecipe = "fast"\nlevels = [1]\n[b]\n')
    assert read_recipes(file) == {"a": named_recipe("fast", levels=(1,)), "b": Recipe()}
    file.write_text('[a]\nrecipe = "quick"\n')
    with pytest.raises(UsageError, match=r"r.toml: \[a\]: unknown recipe 'quick'"):
        read_recipes(file)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["sppfeat", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_options_of_the_command_line_come_before_the_recipes(
    make_images: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, store = make_images(3), tmp_path / "f.h5"
    tiny = ("--backbone", "timm:test_resnet", "--weights", "random", "--quiet")
    assert run(monkeypatch, "extract", folder, "-o", store, "--recipe", "fast", "--levels", "2,1", *tiny) == 0
    recipe = open_store(store).recipe
    assert (recipe.scales, recipe.levels, recipe.backbone) == ((160,), (2, 1), "timm:test_resnet")
    # An option that says the default is given, too.
    assert (
        run(monkeypatch, "extract", folder, "-o", store, "--recipe", "fast", "--scales", "224", "--overwrite", *tiny)
        == 0
    )
    assert open_store(store).recipe.scales == (224,)
    assert run(monkeypatch, "extract", folder, "-o", store, "--recipe", "quick", *tiny) == 2
    assert "unknown recipe 'quick'" in capsys.readouterr().err
