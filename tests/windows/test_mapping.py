"""Windows: their files, row names, places on feature maps, and descriptors."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import map_edge_pair
from typer.testing import CliRunner

from sppfeat import Describer, Recipe, UsageError, extract_folder, open_store
from sppfeat.backbones.backbone import load_backbone
from sppfeat.backbones.geometry import Geometry
from sppfeat.images import Item
from sppfeat.pyramid.pooling import pool_rois
from sppfeat.store.row_names import row_name, split_row_name
from sppfeat.windows.mapping import map_windows, nearest_scales, outside, part_of_image
from sppfeat.windows.reading import read_windows


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mapping_equals_the_naive_reference(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 400), "length")
    input_length = data.draw(st.one_of(st.just(length), st.integers(16, 500)), "input length")
    size, stride = data.draw(st.integers(1, 20), "size"), data.draw(st.sampled_from([1, 4, 7, 16, 32]), "stride")
    offset = data.draw(st.integers(-32, 32), "offset") / 2
    edges = st.integers(0, 4 * (length - 1)).map(lambda quarter: quarter / 4)
    first, last = sorted((data.draw(edges, "first"), data.draw(edges, "last")))
    axis = Geometry(size, stride, offset, 1)
    expected = map_edge_pair(first, last, length, input_length, size, stride, offset)
    window = np.array([[first, 0, last, 0]])
    assert tuple(map_windows(window, (length, 1), (input_length, 1), axis, axis)[0, ::2]) == expected
    turned = np.array([[0, first, 0, last]])
    assert tuple(map_windows(turned, (1, length), (1, input_length), axis, axis)[0, 1::2]) == expected


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_part_of_the_map_is_mapped_back(data: st.DataObject) -> None:
    """To the window that is pooled from exactly its cells."""
    stride, size = data.draw(st.sampled_from([1, 8, 16, 32]), "stride"), data.draw(st.integers(1, 30), "size")
    offset = data.draw(st.integers(0, 2 * stride - 2), "offset") / 2
    length, input_length = data.draw(st.integers(600, 2000), "length"), stride * size
    axis = Geometry(size, stride, offset, 1)
    first = data.draw(st.integers(0, size - 1), "first")
    last = data.draw(st.integers(first, size - 1), "last")
    part = np.array([first, 0, last + 1, size]) / size
    left, top, right, bottom = part_of_image(part, (input_length, input_length), axis, axis)
    assert (top, bottom) == (0, 1) and left < right
    window = np.array([[left * length, 0, right * length - 1, length - 1]]) + [[0.01, 0, -0.01, 0]]
    window = np.where(part[None] == [[0, 0, 1, 1]], [[0, 0, length - 1, length - 1]], window)
    if offset + stride * (size - 1) < input_length:  # all cells are centered on pixels of the image
        rois = map_windows(window, (length, length), (input_length, input_length), axis, axis)
        assert rois.tolist() == [[first, 0, last, size - 1]]


def test_mapping_follows_the_paper() -> None:
    """Stride 16, offset 0, as in the paper: floor(x / 16) + 1 and ceil(x / 16) - 1 away from the border."""
    axis = Geometry(40, 16, 0.0, 1)
    windows = np.array([[100, 33, 260, 192], [96, 16, 128, 48], [97, 17, 105, 18], [0, 0, 623, 623]])
    rois = map_windows(windows, (624, 624), (624, 624), axis, axis)
    assert rois.tolist() == [[7, 3, 16, 11], [7, 2, 7, 2], [6, 1, 6, 1], [0, 0, 39, 39]]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_window_has_a_cell_and_grows_with_its_window(data: st.DataObject) -> None:
    size = data.draw(st.tuples(st.integers(1, 300), st.integers(1, 300)), "size")
    axes = [Geometry(data.draw(st.integers(1, 30)), 16, data.draw(st.floats(-20, 20)), 1) for _ in range(2)]
    corner = [data.draw(st.floats(0, side - 1)) for side in size]
    other = [data.draw(st.floats(at, side - 1)) for at, side in zip(corner, size, strict=True)]
    x1, y1, x2, y2 = map_windows(np.array([[*corner, *other]]), size, (256, 320), *axes)[0]
    assert 0 <= x1 <= x2 < axes[0].size and 0 <= y1 <= y2 < axes[1].size
    whole = map_windows(np.array([[0, 0, size[0] - 1, size[1] - 1]]), size, (256, 320), *axes)[0]
    assert whole.tolist() == [0, 0, axes[0].size - 1, axes[1].size - 1]


def test_a_mapping_of_other_shapes_is_refused() -> None:
    axis = Geometry(4, 16, 0.0, 1)
    with pytest.raises(UsageError, match=re.escape("windows must be [K, 4], found [4]")):
        map_windows(np.zeros(4), (9, 9), (9, 9), axis, axis)


@pytest.mark.parametrize(
    ("backbone", "layer"),
    [
        ("efficientnet_lite0", "blocks"),
        ("efficientnet_lite0", "blocks.4"),
        ("torchvision:resnet18", None),
        ("torchvision:mobilenet_v2", None),
        ("torchvision:squeezenet1_1", None),
        ("torchvision:vgg11", None),
        ("torchvision:efficientnet_b0", "features.5"),
        ("timm:tf_mobilenetv3_small_minimal_100", None),
    ],
)
def test_a_window_around_an_impulse_pools_that_impulse(backbone: str, layer: str | None) -> None:
    """Lite and `tf_` networks pad asymmetrically, SqueezeNet hardly, the others by half a kernel.

    With weights that only average, an impulse becomes a hump that is highest at the cells nearest to it.
    """
    loaded = load_backbone(Recipe(backbone=backbone, weights="random", layer=layer))
    for name, values in loaded.trunk.named_parameters():
        values.data.fill_(1 / values[0].numel() if values.dim() == 4 else float(name.endswith("gamma")))
    height, width = 224, 256
    rows, columns = loaded.descriptions[0].geometry(height, width)
    stride = rows.stride
    # As many places left of the middle as right, and odd as even: borders cut the humps alike, and rounding cancels.
    steps = [(stride // 8 | 1) * step for step in range(-4, 4)]
    places = [(width // 2 + step, height // 2 - 1 - step) for step in steps]
    images = torch.zeros(len(places), 3, height, width)
    for image, (x, y) in zip(images, places, strict=True):
        image[:, y, x] = 1e6
    with torch.inference_mode():
        maps = loaded.trunk(images)[0].double().sum(1, keepdim=True)
    shifts = []
    for heights, (x, y) in zip(maps, places, strict=True):
        reach = 0.95 * stride  # contains one cell per side, or two
        window = np.array([[x - reach, y - reach, x + reach, y + reach]])
        roi = torch.from_numpy(map_windows(window, (width, height), (width, height), columns, rows))
        assert (roi[0, 2:] - roi[0, :2]).max() <= 1
        assert pool_rois(heights, roi, (1,)).item() == heights.max() > 0
        peak = (heights[0] / heights.max()) ** 8  # far from the borders, which cut the humps
        for at, axis, along in ((x, columns, peak.sum(0)), (y, rows, peak.sum(1))):
            center = float((along * torch.arange(axis.size)).sum() / along.sum())
            shifts.append(center - (at - axis.offset) / axis.stride)
    assert abs(np.mean(shifts)) < 0.1  # half a stride of another offset would be 0.5


def test_nearest_scale() -> None:
    sizes = [(480, 360), (960, 720), (1920, 1440)]
    windows = np.array([[0, 0, 447, 447], [100, 100, 211, 211], [9, 9, 64, 64], [0, 0, 479, 359], [5, 5, 5, 5]])
    # On an image of 960 x 720: 448 halved is 224, 112 doubled is 224; 56 doubled is nearest at the largest scale.
    assert nearest_scales(windows, (960, 720), sizes).tolist() == [0, 2, 2, 0, 2]
    assert nearest_scales(np.array([[0, 0, 223, 223]]), (960, 720), sizes).tolist() == [1]


def test_outside() -> None:
    windows = np.array([[0, 0, 9, 4], [0, 0, 9.1, 4], [-1, 0, 5, 4], [0, 0, 3, 5]])
    assert outside(windows, (10, 5)).tolist() == [False, True, True, True]


@given(
    st.text(min_size=1).filter(lambda name: "\n" not in name),
    st.lists(st.integers(-(10**7), 10**7).map(lambda n: n / 1000), min_size=4, max_size=4),
)
def test_row_names_say_image_and_window(image: str, window: list[float]) -> None:
    window = [min(window[::2]), min(window[1::2]), max(window[::2]), max(window[1::2])]
    assert split_row_name(row_name(image, window)) == (image, tuple(window))


@pytest.mark.parametrize("name", ["a.jpg", "a#b.jpg", "a#1,2,3.jpg", "a.jpg#1,2,3", "a.jpg#1,2,3,b", "#1,2,3,4"])
def test_names_of_images_are_not_windows(name: str) -> None:
    assert split_row_name(name) == (name, None)


def test_files_of_windows(tmp_path: Path) -> None:
    (tmp_path / "w.csv").write_text(
        "label,y1,x1,name,x2,y2\ncat,2,1,a/b.jpg,3,4\ncat,0,0,c.jpg,9,9\nx,5,5,a/b.jpg,6.5,5\n"
    )
    (tmp_path / "list.json").write_text(
        json.dumps(
            [{"name": n, "x1": a, "y1": b, "x2": c, "y2": d} for n, a, b, c, d in (("a/b.jpg", 1, 2, 3, 4),)]
            + [{"name": "c.jpg", "x1": 0, "y1": 0, "x2": 9, "y2": 9}]
            + [{"name": "a/b.jpg", "x1": 5, "y1": 5, "x2": 6.5, "y2": 5}]
        )
    )
    (tmp_path / "object.json").write_text('{"a/b.jpg": [[1, 2, 3, 4], [5, 5, 6.5, 5]], "c.jpg": [[0, 0, 9, 9]]}')
    for name in ("w.csv", "list.json", "object.json"):
        found = read_windows(tmp_path / name)
        assert {key: value.tolist() for key, value in found.items()} == {
            "a/b.jpg": [[1, 2, 3, 4], [5, 5, 6.5, 5]],
            "c.jpg": [[0, 0, 9, 9]],
        }


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("w.csv", "", "expected the columns name,x1,y1,x2,y2, found nothing"),
        ("w.csv", "name,x,y,w,h\n", "expected the columns name,x1,y1,x2,y2, found name,x,y,w,h"),
        ("w.csv", "name,x1,y1,x2,y2\n", "expected windows, found none"),
        (
            "w.csv",
            "name,x1,y1,x2,y2\na,9,1,3,4\n",
            "line 2: 'a': inverted: expected x1 <= x2 and y1 <= y2, found 9,1,3,4",
        ),
        ("w.csv", "name,x1,y1,x2,y2\na,1,9,3,4\n", "inverted"),
        ("w.csv", "name,x1,y1,x2,y2\na,1,2,3\n", "line 2: 'a': expected four numbers"),
        ("w.csv", "name,x1,y1,x2,y2\na,1,2,3,four\n", "line 2: 'a': expected four numbers"),
        ("w.csv", "name,x1,y1,x2,y2\na,1,2,3,nan\n", "line 2: 'a': expected finite numbers, found 1,2,3,nan"),
        ("w.csv", "name,x1,y1,x2,y2\n../a,1,2,3,4\n", "expected a name relative to the image folder"),
        ("w.csv", "name,x1,y1,x2,y2\n/etc/a,1,2,3,4\n", "expected a name relative to the image folder"),
        ("w.csv", "name,x1,y1,x2,y2\n,1,2,3,4\n", "line 2: expected the name of an image, found ''"),
        (
            "w.json",
            "{",
            "w.json: expected a list of objects with name,x1,y1,x2,y2, or an object from name to a list",
        ),
        ("w.json", "[" * 100_000, "w.json: expected a list of objects with name,x1,y1,x2,y2, found: "),
        ("w.json", "3", "expected a list of objects"),
        ("w.json", '{"a": 3}', "'a': expected a list of [x1, y1, x2, y2], found: Expected `array`, got `int`"),
        ("w.json", '[{"name": "a"}]', "name,x1,y1,x2,y2, found: Object missing required field `x1` - at `$[0]`"),
        (
            "w.json",
            '{"a": [], "b": [[1, 2, 3, 4], [1, 2, 3]]}',
            "'b': expected a list of [x1, y1, x2, y2], found: Expected `array` of length 4 - at `$[1]`",
        ),
        ("w.json", '{"a": [[1, 2, 3, true]]}', "'a': expected a list of [x1, y1, x2, y2], found: Expected `float`"),
        ("w.json", '{"a": [[1, 2, 3, null]]}', "Expected `float`, got `null` - at `$[0][3]`"),
        ("w.json", '{"a": [[1, 2, 3, "4"]]}', "Expected `float`, got `str` - at `$[0][3]`"),
        ("w.json", '{"a": [[1, 2, 3, NaN]]}', "to a list of [x1, y1, x2, y2], found: JSON is malformed"),
        ("w.json", '{"a": [[1, 2, 3, 1e999]]}', "'a': expected a list of [x1, y1, x2, y2], found: Number out of range"),
        ("w.json", '{"a": [[9, 2, 3, 4]]}', "'a', window 0: 'a': inverted"),
        ("w.json", '[{"name": "../a", "x1": 1, "y1": 1, "x2": 2, "y2": 2}]', "entry 0: expected a name relative to"),
        ("w.json", '{"a": [7]}', "Expected `array`, got `int` - at `$[0]`"),
        ("w.txt", "", "expected a file of windows, .csv or .json"),
    ],
)
def test_bad_files_of_windows(tmp_path: Path, file: str, text: str, message: str) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)):
        read_windows(tmp_path / file)


def test_a_file_that_is_not_there_and_one_in_another_encoding(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no.csv: expected a file of windows, found: No such file"):
        read_windows(tmp_path / "no.csv")
    (tmp_path / "w.csv").write_bytes("name,x1,y1,x2,y2\nä,1,2,3,4\n".encode("latin-1"))
    with pytest.raises(UsageError, match="expected a readable CSV file"):
        read_windows(tmp_path / "w.csv")


def size_of(path: str) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.mark.parametrize("fuse", ["mean", "max", "concat"])
@pytest.mark.parametrize("backbone", ["timm:test_resnet", "timm:tf_mobilenetv3_small_minimal_100"])
def test_a_window_of_the_whole_image_has_the_images_descriptor(
    make_images: Callable[..., Path], backbone: str, fuse: str
) -> None:
    paths = [str(path) for path in sorted(make_images(4).iterdir())]
    recipe = Recipe(backbone=backbone, weights="random", scales=(64, 96), levels=(2, 1), fuse=fuse, dtype="float32")
    describer = Describer(recipe)
    whole = {done.position: done.row()[0] for done in describer.describe(paths)}
    tasks = []
    for path in paths:
        width, height = size_of(path)
        tasks.append(Item.at(path, np.array([[5, 5, 30, 30], [0, 0, width - 1, height - 1]])))
    for done in describer.describe(tasks):
        assert done.rows is not None and done.rows.shape == (2, describer.dim)
        assert not done.row_errors
        np.testing.assert_array_equal(done.rows[1], whole[done.position])
        assert not np.array_equal(done.rows[0], whole[done.position])


def test_windows_are_pooled_at_their_nearest_scale(make_images: Callable[..., Path], tiny: Recipe) -> None:
    path = str(sorted(make_images(1).iterdir())[0])
    width, height = size_of(path)
    windows = np.array([[0, 0, width - 1, height - 1], [8, 8, 12, 12], [3, 3, 25, 25]], float)
    scales = (128, 224, 448)
    rows = [
        next(iter(Describer(Recipe(**{**vars(tiny), "scales": (s,)})).describe([Item.at(path, windows)]))).rows
        for s in scales
    ]
    describer = Describer(Recipe(**{**vars(tiny), "scales": scales}))
    (done,) = describer.describe([Item.at(path, windows)], scales="nearest")
    sizes = [
        (round(width * s / min(width, height) / 32) * 32, round(height * s / min(width, height) / 32) * 32)
        for s in scales
    ]
    chosen = nearest_scales(windows, (width, height), sizes)
    assert done.rows is not None and len(set(chosen)) == 2
    for at, scale in enumerate(chosen):
        np.testing.assert_array_equal(done.rows[at], rows[scale][at])


def test_no_windows_need_no_pass(make_images: Callable[..., Path], tiny: Recipe) -> None:
    paths = [str(path) for path in sorted(make_images(2).iterdir())]
    describer = Describer(tiny)
    found = list(describer.describe([Item.at(path, np.zeros((0, 4))) for path in paths]))
    assert [done.rows.shape for done in found if done.rows is not None] == [(0, describer.dim)] * 2
    assert describer.times.forward == 0


def test_describing_windows_says_what_is_wrong(make_images: Callable[..., Path], tiny: Recipe, tmp_path: Path) -> None:
    path = str(sorted(make_images(1).iterdir())[0])
    width, height = size_of(path)
    windows = np.array([[0, 0, 9, 9], [0, 0, width, 9], [-1, 0, 4, 4]], float)
    tasks = [Item.at(path, windows), Item.at(tmp_path / "no.png", windows)]
    good, missing = sorted(Describer(tiny).describe(tasks), key=lambda done: done.position)
    assert good.row_errors.keys() == {1, 2} and missing.rows is None and missing.error == "no such file"
    last = f"whose last one is {width - 1},{height - 1}"
    assert good.row_errors[1] == f"reaches outside the image of {width} x {height} pixels, {last}: 0,0,{width},9"
    with pytest.raises(UsageError, match="windows need crop 'none', found 'center'"):
        next(Describer(Recipe(**{**vars(tiny), "crop": "center"})).describe([Item.at(path, windows)]))
    with pytest.raises(UsageError, match="unknown scales 'both'"):
        next(Describer(tiny).describe([Item.at(path, windows)], scales="both"))


def write_windows(path: Path, windows: dict[str, list[list[float]]]) -> Path:
    path.write_text(json.dumps(windows))
    return path


def test_windows_go_to_a_store_and_resume(make_images: Callable[..., Path], tiny: Recipe, tmp_path: Path) -> None:
    folder = make_images(4)
    windows = {f"{n:04}.png": [[0, 0, 20, 20], [5, 6, 40, 30.5], [0, 0, 20, 20]] for n in range(3)}
    windows["0001.png"].append([0, 0, 4000, 20])
    boxes = {name: np.array(each) for name, each in windows.items()}
    store = tmp_path / "w.h5"
    done = extract_folder(folder, store, tiny, windows=boxes)
    assert (done.images, done.described, done.failed, done.repeated, done.without_windows) == (7, 6, 1, 3, 1)
    opened = open_store(store)
    assert opened.names[:2] == ["0000.png#0,0,20,20", "0000.png#5,6,40,30.5"]
    assert opened.errors().keys() == {"0001.png#0,0,4000,20"}
    again = extract_folder(folder, store, tiny, windows=boxes)
    assert (again.described, again.reused, again.failed, again.gone) == (0, 6, 1, 0)
    # Further windows, other windows, a changed image, and one that no longer exists.
    boxes = {"0000.png": np.array([[1, 1, 20, 20]]), **{f"000{n}.png": boxes[f"000{n}.png"] for n in (1, 2)}}
    make_images(1, "other", seed=9)
    (tmp_path / "other" / "0000.png").replace(folder / "0001.png")
    (folder / "0002.png").unlink()
    more = extract_folder(folder, store, tiny, windows=boxes)
    assert (more.described, more.changed, more.reused, more.gone, more.failed) == (3, 2, 0, 2, 1)
    assert len(open_store(store)) == 8
    # Whole images may be stored beside their windows, and compared with them.
    both = extract_folder(folder, store, tiny)
    assert (both.images, both.described, both.gone) == (3, 3, 2)


def test_windows_of_other_images(make_images: Callable[..., Path], tiny: Recipe, tmp_path: Path) -> None:
    folder = make_images(2)
    with pytest.raises(UsageError, match=r"the windows belong to none of the 2 images below .*found 'cat.jpg'"):
        extract_folder(folder, tmp_path / "w.h5", tiny, windows={"cat.jpg": np.array([[0, 0, 3, 3]])})
    some = {"cat.jpg": np.array([[0, 0, 3, 3]]), "0000.png": np.array([[0, 0, 3, 3]])}
    done = extract_folder(folder, tmp_path / "w.h5", tiny, windows=some)
    assert (done.described, done.failed) == (1, 1)
    assert open_store(tmp_path / "w.h5").errors() == {"cat.jpg#0,0,3,3": "its image is not in the sources (cat.jpg)"}


def test_command_line(
    make_images: Callable[..., Path], tmp_path: Path, run_sppfeat: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    from sppfeat_cli.app import build

    folder = make_images(2)
    file = write_windows(
        tmp_path / "w.json", {"0000.png": [[0, 0, 20, 20], [1, 2, 3, 4]], "0001.png": [[0, 0, 900, 9]]}
    )
    options = ["--backbone", "timm:test_resnet", "--weights", "random", "--scales", "64", "--levels", "2,1"]
    done = run_sppfeat("extract", folder, "-o", tmp_path / "w.h5", "--windows", file, *options)
    assert done.returncode == 3 and "3 windows (2 described, 1 failed)" in done.stdout
    assert "failed: 0001.png#0,0,900,9: reaches outside the image" in done.stderr
    broken = tmp_path / "w.csv"
    broken.write_text("name,x1,y1,x2,y2\n0000.png,9,2,3,4\n")
    wrong = CliRunner().invoke(
        build(), ["extract", str(folder), "-o", str(tmp_path / "x.h5"), "--windows", str(broken)]
    )
    assert isinstance(wrong.exception, UsageError) and "w.csv, line 2: '0000.png': inverted" in str(wrong.exception)
    assert not (tmp_path / "x.h5").exists()


@pytest.mark.parametrize(
    "box",
    ["nan,0,1,1", "0,0,1e6,1e6", "0,0,inf,1", "5,0,4,1", "0,0,1", " 1,2,3,4", "1_0,0,20,20", "9" * 400 + ",0,1,1"],
)
def test_names_that_only_look_like_windows_are_those_of_images(box: str) -> None:
    assert split_row_name(f"a.jpg#{box}") == (f"a.jpg#{box}", None)
    assert split_row_name(f"#{box}") == (f"#{box}", None)


@given(st.text(), st.text())
def test_a_window_in_a_name_is_finite_and_ordered(image: str, box: str) -> None:
    name, window = split_row_name(f"{image}#{box}")
    if window is not None:
        assert np.isfinite(window).all() and window[0] <= window[2] and window[1] <= window[3] and name
