"""Recipe and RunOptions: what is valid, what a recipe's identity is, and its JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sppfeat.errors import UsageError
from sppfeat.recipe import (
    CROPS,
    DTYPES,
    FUSIONS,
    INTERPOLATIONS,
    MAX_LEVEL,
    MAX_SCALE,
    MIN_SCALE,
    NATIVE,
    NORMALIZATIONS,
    ORIENTATIONS,
    POOLINGS,
    PRECISIONS,
    RECIPE_VERSION,
    Recipe,
    RunOptions,
)

# Without what joins several of them.
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="+,@"), min_size=1, max_size=20)
per_channel = st.tuples(*[st.floats(-10, 10)] * 3)
pixels = st.integers(MIN_SCALE, MAX_SCALE)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    crop = draw(st.sampled_from(CROPS))
    draft = draw(st.booleans())
    # A crop and a draft are sizes in pixels, which `native` has none of.
    scale = pixels if draft or crop == "center" else pixels | st.just(NATIVE)
    return Recipe(
        backbone=draw(names),
        weights=draw(names),
        layer=draw(st.none() | names),
        scales=tuple(draw(st.lists(scale, min_size=1, max_size=4, unique=True))),
        levels=tuple(draw(st.lists(st.integers(1, MAX_LEVEL), min_size=1, max_size=5, unique=True))),
        pooling=draw(st.sampled_from(POOLINGS)),
        gem_p=draw(st.floats(1, 50)),
        fuse=draw(st.sampled_from(FUSIONS)),
        normalize=draw(st.sampled_from(NORMALIZATIONS)),
        precision=draw(st.sampled_from(PRECISIONS)),
        dtype=draw(st.sampled_from(DTYPES)),
        crop=crop,
        size_multiple=draw(st.integers(1, 512)),
        min_side=draw(st.integers(1, MAX_SCALE)),
        max_aspect=draw(st.floats(1, 1e6)),
        max_pixels=draw(st.integers(1, 1 << 40)),
        mean=draw(st.none() | per_channel),
        std=draw(st.none() | st.tuples(*[st.floats(1e-3, 10)] * 3)),
        interpolation=draw(st.none() | st.sampled_from(INTERPOLATIONS)),
        orientation=draw(st.sampled_from(ORIENTATIONS)),
        jpeg_draft=draft,
    )


@settings(max_examples=100, deadline=None)
@given(recipes())
def test_json_gives_the_same_recipe_back(recipe: Recipe) -> None:
    read = Recipe.from_json(recipe.to_json())
    assert read == recipe
    assert read.to_json() == recipe.to_json()
    assert read.identity("w") == recipe.identity("w")
    assert read.differences(recipe, ("one", "other")) == []


def test_json_is_one_object_with_every_field_and_the_version() -> None:
    document = json.loads(Recipe().to_json())
    assert list(document) == sorted(document)
    fields = {field.name for field in dataclasses.fields(Recipe)}
    absent = {"channels", "calibration"}
    assert set(document) == {"recipe_version", *fields} - absent, "of one part, which older versions read"
    several = Recipe(channels=(3, 4), precision="int8", calibration="0123456789abcdef")
    assert set(json.loads(several.to_json())) == {"recipe_version", *fields}
    assert document["recipe_version"] == RECIPE_VERSION


def test_weights_may_have_a_name_that_is_not_utf_8() -> None:
    recipe = Recipe(weights="w\udcff.pth")
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_fields_that_json_leaves_out_have_their_defaults() -> None:
    assert Recipe.from_json('{"recipe_version": 1, "levels": [2, 1]}') == Recipe(levels=(2, 1))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"recipe_version": 1, "poolling": "max"}', "recipe: unknown key 'poolling': did you mean pooling"),
        ('{"recipe_version": 2, "of_the_future": 1}', "version 2 is newer than this sppfeat reads (1): update sppfeat"),
        ("{}", "expected a recipe_version from 1 to 1, found: Object missing required field `recipe_version`"),
        ('{"recipe_version": 0}', "expected a recipe_version from 1 to 1, found 0"),
        ('{"recipe_version": true}', "expected a recipe_version from 1 to 1, found: Expected `int`, got `bool`"),
        ('{"recipe_version": "1"}', "expected a recipe_version from 1 to 1, found: Expected `int`, got `str`"),
        ("[1]", "recipe: expected a JSON object, found: Expected `object`, got `array`"),
        ("{nonsense", "recipe: expected a JSON object, found: Expecting property name"),
        ("", "recipe: expected a JSON object, found: Expecting value"),
        ('{"recipe_version": 1, "levels": [0]}', "levels must be"),
        (
            '{"recipe_version": 1, "scales": [[224]]}',
            "valid values, found: Expected `int | str`, got `array` - at `$.scales[0]`",
        ),
        (
            '{"recipe_version": 1, "pooling": ["max"]}',
            "valid values, found: Expected `str`, got `array`",
        ),
        ('{"recipe_version": 1, "gem_p": NaN}', "gem_p must be"),
        ('{"recipe_version": 1, "backbone": null}', "Expected `str`, got `null` - at `$.backbone`"),
    ],
)
def test_json_that_is_not_a_recipe(text: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.from_json(text)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


BAD: dict[str, list[Any]] = {
    "backbone": ["", None, 5],
    "weights": ["", None, 5],
    "layer": ["", 5],
    "scales": [(), (MIN_SCALE - 1,), (MAX_SCALE + 1,), (224, 224), ("225",), (224.0,), (True,), "nativ", None],
    "levels": [(), (0,), (-1,), (MAX_LEVEL + 1,), (2, 2), (1.0,), (True,), "6,3", None],
    "pooling": ["", "mx", None, ("max",)],
    "gem_p": [0.5, 101, math.nan, math.inf, True, "3", None],
    "fuse": ["sum"],
    "normalize": ["l1"],
    "precision": ["float64"],
    "calibration": ["", "0123456789abcdef", 5],
    "dtype": ["bfloat16"],
    "crop": ["middle"],
    "size_multiple": [0, 513, 1.0, True, None],
    "min_side": [0, MAX_SCALE + 1, 8.0],
    "max_aspect": [0.9, 2e6, math.nan, math.inf, "20"],
    "max_pixels": [0, 1 << 41, 1e6],
    "mean": [(), (0.5,), (0.5, 0.5, math.nan), (0.5, 0.5, True), 0.5, "rgb"],
    "std": [(1, 1), (1, 1, 0), (1, 1, -1), (1, 1, math.inf)],
    "interpolation": ["nearest"],
    "orientation": ["upright"],
    "jpeg_draft": [1, None, "yes"],
    "channels": [(0,), (1.0,), ("3",)],
}


def test_every_field_has_bad_values_below() -> None:
    assert set(BAD) == {field.name for field in dataclasses.fields(Recipe)}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_a_bad_value_is_rejected_by_the_name_of_its_field(field: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe(**{field: value})
    assert str(caught.value).removeprefix("unknown ").startswith(f"{field} ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["crop", "jpeg_draft"])
def test_native_scale_goes_with_neither_crop_nor_draft(field: str) -> None:
    with pytest.raises(UsageError, match=f"{field}.* found 'native'"):
        Recipe(scales=(224, NATIVE), **{field: {"crop": "center", "jpeg_draft": True}[field]})


def test_unknown_choices_name_the_valid_ones() -> None:
    with pytest.raises(UsageError, match="unknown pooling 'mx': expected one of max, avg, gem"):
        Recipe(pooling="mx")


def test_lists_and_single_values_become_tuples() -> None:
    recipe = Recipe(scales=224, levels=[2, 1], mean=[0, 0, 0])  # type: ignore[arg-type]
    assert (recipe.scales, recipe.levels, recipe.mean) == ((224,), (2, 1), (0.0, 0.0, 0.0))
    hash(recipe)


# One other valid value for every field.
OTHER: dict[str, Any] = {
    "backbone": "efficientnet_lite1",
    "weights": "random",
    "layer": "blocks.3",
    "scales": (224, 320),
    "levels": (1, 2, 3, 6),
    "pooling": "avg",
    "gem_p": 4.0,
    "fuse": "max",
    "normalize": "none",
    "precision": "bfloat16",
    "calibration": "0123456789abcdef",
    "dtype": "float32",
    "crop": "center",
    "size_multiple": 16,
    "min_side": 9,
    "max_aspect": 19.0,
    "max_pixels": 4_000_001,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bilinear",
    "orientation": "ignore",
    "jpeg_draft": True,
    "channels": (320,),
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Recipe)])
def test_every_field_but_the_path_of_the_weights_is_part_of_the_identity(field: str) -> None:
    """Weights count by content: a renamed file gives the same descriptors. The channels of parts follow from them."""
    plain = Recipe(precision="int8") if field == "calibration" else Recipe()
    other = dataclasses.replace(plain, **{field: OTHER[field]})
    same = field in ("weights", "channels")
    assert (plain.identity("abc") == other.identity("abc")) is same
    assert (plain.differences(other, ("one", "other")) == []) is same
    if not same:
        (difference,) = plain.differences(other, ("one", "other"))
        assert difference.startswith(f"{field}: one ") and ", other " in difference


def test_other_weights_are_another_identity() -> None:
    assert Recipe(weights="a.pth").identity("abc") == Recipe(weights="b.safetensors").identity("abc")
    assert Recipe(weights="a.pth").identity("abc") != Recipe(weights="a.pth").identity("abd")


def test_difference_says_both_values() -> None:
    store, asked = Recipe(), Recipe(scales=(224, 320), weights="a.pth")
    assert store.differences(asked, ("store", "asked")) == ["scales: store 224, asked 224,320"]
    assert store.differences(asked, ("store", "asked"), weights=("1" * 64, "2" * 64), dims=(8, 16)) == [
        "scales: store 224, asked 224,320",
        "weights: store 111111111111, asked 222222222222",
        "dimensions: store 8, asked 16",
    ]
    assert store.differences(Recipe(weights="a.pth"), ("a", "b"), weights=("1", "1"), dims=(8, 8)) == []


def test_recipe_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().pooling = "avg"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("scales", "fuse", "dim", "expected"),
    [((224,), "mean", 150, [(None, 0, 150)]), ((224, 320), "concat", 300, [(224, 0, 150), (320, 150, 300)])],
)
def test_parts_of_one_layer(
    scales: tuple[int, ...], fuse: str, dim: int, expected: list[tuple[int | None, int, int]]
) -> None:
    recipe = Recipe(scales=scales, fuse=fuse, layer="blocks")
    assert recipe.bins == 50
    parts = recipe.parts(dim)
    assert [(part.scale, part.start, part.end) for part in parts] == expected
    assert {(part.backbone, part.layer, part.channels) for part in parts} == {("efficientnet_lite0", "blocks", 3)}


def test_branches_and_parts_of_several() -> None:
    recipe = Recipe(
        backbone="efficientnet_lite0@64,96+timm:resnet18",
        weights="pretrained+r.pth",
        layer="blocks.4,blocks+layer4",
        scales=(128,),
        levels=(2, 1),
        fuse="concat",
        channels=(3, 4, 3, 4, 5),
    )
    first, second = recipe.branches()
    assert (first.backbone, first.weights, first.layers, first.scales, first.channels) == (
        "efficientnet_lite0",
        "pretrained",
        ("blocks.4", "blocks"),
        (64, 96),
        None,
    )
    assert (second.backbone, second.weights, second.layers, second.scales) == (
        "timm:resnet18",
        "r.pth",
        ("layer4",),
        (128,),
    )
    assert (first.levels, first.fuse) == ((2, 1), "concat")
    parts = recipe.parts(5 * 19)
    assert [(part.layer, part.scale, part.channels, part.start, part.end) for part in parts] == [
        ("blocks.4", 64, 3, 0, 15),
        ("blocks", 64, 4, 15, 35),
        ("blocks.4", 96, 3, 35, 50),
        ("blocks", 96, 4, 50, 70),
        ("layer4", 128, 5, 70, 95),
    ]
    assert Recipe.from_json(recipe.to_json()) == recipe
    with pytest.raises(UsageError, match="expected 5 parts of 96 values, found channels 3,4,3,4,5"):
        recipe.parts(96)


def test_one_value_stands_for_all_backbones() -> None:
    recipe = Recipe(backbone="a+b@native", weights="random", layer="x,y")
    assert [(one.weights, one.layers, one.scales) for one in recipe.branches()] == [
        ("random", ("x", "y"), (224,)),
        ("random", ("x", "y"), ("native",)),
    ]
    (alone,) = Recipe(backbone="a@320").branches()
    assert (alone.backbone, alone.scales) == ("a", (320,))
    # What says nothing is not part of the identity.
    assert Recipe(backbone="a@320+b@256").scales == (320,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer": "x,y,x"}, "layer: expected different names, found x twice"),
        ({"layer": "x,"}, "layer must be names, found 'x,'"),
        ({"backbone": "a+b", "layer": "x+y+z"}, "layer: expected one, or one for each of 2 backbones, found 3: x.y.z"),
        (
            {"backbone": "a+b+c", "weights": "1+2"},
            "weights: expected one, or one for each of 3 backbones, found 2: 1.2",
        ),
        ({"backbone": "a+a"}, "backbone: expected different ones, found a twice, with the same layers"),
        ({"backbone": "a+"}, "backbone must be a name, found ''"),
        ({"backbone": "a@5+b"}, "scales must be .*, found '5'"),
        ({"backbone": "a@x"}, "scales must be .*, found 'x'"),
        ({"backbone": "a@native+b", "crop": "center"}, "crop 'center' needs a scale in pixels, found 'native'"),
        ({"channels": (0,)}, "channels must be a whole number from 1"),
        ({"backbone": "a+b", "jpeg_draft": True}, "jpeg_draft needs one backbone"),
        ({"backbone": "a@320+b@256", "scales": (128,)}, "scales: expected none beside backbones that have their own"),
    ],
)
def test_bad_sources_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe(**fields)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:15", "cuda:0,3"])
def test_devices(device: str) -> None:
    assert RunOptions(device=device, batch_size=1, num_workers=1024).device == device


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device": "gpu"}, "device must be auto, cpu, cuda, cuda:N or cuda:N,M,..., found 'gpu'"),
        ({"device": "cuda:"}, "device must be"),
        ({"device": "cuda:-1"}, "device must be"),
        ({"device": "cpu\n"}, "device must be"),
        ({"device": 0}, "device must be"),
        ({"device": "cuda:0,"}, "device must be"),
        ({"device": "cuda:0,1,0"}, "device must name different GPUs"),
        ({"engine": "tensorrt"}, "unknown engine 'tensorrt': expected one of auto, torch, openvino"),
        ({"device": None}, "device must be"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1 to 4096, found 0"),
        ({"batch_size": 4097}, "batch_size must be"),
        ({"batch_size": 2.0}, "batch_size must be"),
        ({"batch_size": True}, "batch_size must be"),
        ({"num_workers": 0}, "num_workers must be a whole number from 1 to 1024, found 0"),
        ({"num_workers": 1025}, "num_workers must be"),
    ],
    ids=str,
)
def test_bad_run_options(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        RunOptions(**options)
    assert reason in str(caught.value)
