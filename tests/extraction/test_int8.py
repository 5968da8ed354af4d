"""Networks of whole numbers: calibrated on a user's images, held against float32, kept, and found again."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from sppfeat import BackboneError, MissingExtraError, Recipe, RunOptions, UsageError, extract_folder, open_store
from sppfeat.backbones import Network
from sppfeat.engines import keep_calibrated, load_engine, quantization
from sppfeat.engines.calibrated import read_calibrated
from sppfeat.extraction import Calibration, Describer, ShardOptions, calibrate, calibration
from sppfeat.images import find_images
from sppfeat.progress import Observer

pytest.importorskip("openvino")
pytest.importorskip("nncf")

FLOAT = Recipe(scales=(64,), levels=(2, 1), layer="blocks.3", dtype="float32")
INT8 = replace(FLOAT, precision="int8")
PHOTOS = Path(__file__).parents[2] / "photos"
MakeImages = Callable[..., Path]


class Log(Observer):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def write_images(folder: Path, count: int, seed: int = 0) -> Path:
    """Smooth images, as photographs are, of several sizes."""
    random = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    for number in range(count):
        width, height = random.choice([70, 96, 130], 2)
        small = Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8))
        small.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(folder / f"{number:03}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("calibration") / "images", 30)


@pytest.fixture(scope="module")
def calibrated(folder: Path) -> Recipe:
    """Whether int8 is faster on this machine is not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_speed", lambda *_: 1.5)
        return calibrate(INT8, find_images([folder]).items)


def rows(recipe: Recipe, folder: Path) -> np.ndarray:
    found = sorted(
        Describer(recipe, RunOptions(device="cpu")).describe(find_images([folder]).items),
        key=lambda each: each.position,
    )
    return np.stack([each.row()[0] for each in found])


def test_descriptors_are_close_to_float32_and_not_the_same(calibrated: Recipe, tmp_path: Path) -> None:
    others = write_images(tmp_path / "others", 12, seed=1)
    ours, theirs = rows(calibrated, others), rows(FLOAT, others)
    cosines = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosines.mean() >= calibration.LEAST_COSINE and not np.array_equal(ours, theirs)
    assert Describer(calibrated).load()[0].name == "openvino"


def test_images_unlike_those_of_the_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel that showed little on smooth noise shows more on photographs, and must not be cut off."""
    monkeypatch.setattr(calibration, "_speed", lambda *_: 1.5)
    whole = Recipe(scales=(128,), dtype="float32")
    recipe = calibrate(replace(whole, precision="int8"), find_images([write_images(tmp_path / "images", 30)]).items)
    ours, theirs = rows(recipe, PHOTOS), rows(whole, PHOTOS)
    cosines = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosines.mean() > 0.99 and cosines.min() > 0.98


def test_the_same_images_give_the_same_calibration_at_once(
    calibrated: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_Calibrating", None)  # it would fail
    log = Log()
    assert calibrate(INT8, find_images([folder]).items, observer=log) == calibrated
    (said,) = log.said
    assert said.startswith("int8: calibrated on 25 images; mean cosine to float32 0.99") and "on 5 others" in said
    assert calibrate(calibrated, []) == calibrated and calibrate(FLOAT, []) == FLOAT


def test_a_store_keeps_its_calibration(
    calibrated: Recipe, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New images change what would be drawn, but not the network that the store was made with."""
    images, store = shutil.copytree(folder, tmp_path / "images"), tmp_path / "f.h5"
    for image in images.iterdir():
        shutil.copystat(folder / image.name, image)
    assert extract_folder(images, store, INT8).described == 30
    shards = f"{tmp_path / 'shards'}/"
    assert extract_folder(images, shards, INT8).described == 30
    assert open_store(store).recipe.calibration == calibrated.calibration
    write_images(tmp_path / "more", 2, seed=2)
    for number in range(2):
        shutil.copy(tmp_path / "more" / f"{number:03}.png", images / f"new{number}.png")
    monkeypatch.setattr(calibration, "_Calibrating", None)
    done = extract_folder(images, store, INT8)
    assert (done.described, done.reused) == (2, 30)
    np.testing.assert_array_equal(open_store(store).descriptors, rows(calibrated, images))
    assert extract_folder(images, shards, INT8).described == 2


def test_another_calibration_is_another_recipe(calibrated: Recipe, folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "f.h5"
    extract_folder(folder, store, calibrated)
    with pytest.raises(Exception, match=f"calibration: store {calibrated.calibration}, asked 0123456789abcdef"):
        extract_folder(folder, store, replace(calibrated, calibration="0123456789abcdef"))
    with pytest.raises(Exception, match="precision: store int8, asked float32"):
        extract_folder(folder, store, FLOAT)


def test_a_result_that_is_not_close_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "LEAST_COSINE", 1.0)
    monkeypatch.setattr(calibration, "_speed", lambda *_: 1.5)
    with pytest.raises(UsageError, match=r"a mean cosine to float32 of at least 1.0, found 0\.99\d\d on 5 images: use"):
        calibrate(INT8, find_images([folder]).items)


@pytest.mark.parametrize(
    ("cosines", "tried", "kept"),
    [
        ([0.995], 1, 0),
        ([0.98, 0.992], 2, 1),
        ([0.98, 0.97], 2, 0),
        ([np.nan, 0.98], 2, 1),
        ([0.98, np.nan], 2, 0),
    ],
)
def test_the_first_ranges_that_are_close_are_taken_else_the_closest(
    cosines: list[float], tried: int, kept: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def quantized(self: Any, chosen: Any, samples: Any, ranges: str) -> str:
        asked.append(ranges)
        return f"{len(asked)}" * 16

    monkeypatch.setattr(calibration._Calibrating, "_quantized", quantized)
    monkeypatch.setattr(calibration, "_cosine", lambda *_: cosines[len(asked) - 1])
    monkeypatch.setattr(calibration, "_speed", lambda *_: 1.5)
    items = find_images([folder]).items
    plain = Describer(FLOAT, RunOptions(device="cpu"))
    monkeypatch.setattr(calibration, "Describer", lambda _, options: Describer(FLOAT, options))
    made = calibration._Calibrating(INT8, plain, items, RunOptions(device="cpu"), lambda: False).run()
    assert asked == list(quantization.RANGES[:tried])
    assert made.fingerprints == f"{kept + 1}" * 16 and made.cosine == pytest.approx(cosines[kept])


@pytest.mark.parametrize("has", [[], ["avx512_vnni"]])
def test_weights_keep_7_bits_where_sums_of_products_must_fit_into_16(
    has: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nncf = pytest.importorskip("nncf")
    asked: list[Any] = []

    def quantize(*_: Any, advanced_parameters: Any, ignored_scope: Any, **__: Any) -> None:
        asked.append((advanced_parameters.overflow_fix, len(ignored_scope.names)))
        raise RuntimeError("stopped here")

    monkeypatch.setattr(nncf, "quantize", quantize)
    monkeypatch.setattr(quantization, "integer_instructions", lambda: has)
    with pytest.raises(BackboneError, match="stopped here"):
        calibrate(replace(INT8, pooling="avg"), find_images([folder]).items)
    assert asked == [(nncf.OverflowFix.FIRST_LAYER, 2) if has else (nncf.OverflowFix.ENABLE, 24 // 6)]


def test_a_result_that_is_no_faster_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Calibration("0" * 16, 300, 60, 0.995, 0.8)
    monkeypatch.setattr(calibration, "integer_instructions", list)
    with pytest.raises(UsageError, match=r"found 0.80 times its speed on this processor, which has no instructions"):
        slow.check()
    monkeypatch.setattr(calibration, "integer_instructions", lambda: ["avx512_vnni"])
    with pytest.raises(UsageError, match="which has avx512_vnni: use float32"):
        slow.check()
    with pytest.raises(UsageError, match="found nan on"):
        msgspec.structs.replace(slow, cosine=float("nan")).check()
    Calibration("0" * 16, 300, 60, 0.995, 1.8).check()


def test_speed_is_measured(calibrated: Recipe, folder: Path) -> None:
    """The same network against itself is as fast as itself."""
    plain = Describer(FLOAT, RunOptions(device="cpu"))
    items = find_images([folder]).items[:8]
    assert 0.5 < calibration._speed(plain.load(), plain.load(), FLOAT, items) < 2


def test_too_few_images(make_images: MakeImages) -> None:
    folder = make_images(12)
    next(iter(folder.iterdir())).write_bytes(b"no image")
    with pytest.raises(UsageError, match="expected at least 12 readable images to calibrate on, found 11"):
        calibrate(INT8, find_images([folder]).items)


def test_a_network_that_is_lost(calibrated: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BackboneError, match=f"the network of calibration {calibrated.calibration} in the cache, found"):
        load_engine(Network(calibrated))
    entry = tmp_path / "sppfeat" / "calibrated" / f"{calibrated.calibration}.network"
    entry.parent.mkdir(parents=True)
    entry.write_bytes(b"damaged")
    with pytest.raises(BackboneError, match="copy it from where the store was made, or describe the images again"):
        load_engine(Network(calibrated))
    with pytest.raises(BackboneError, match="expected a calibration, found none: `sppfeat extract` makes one"):
        load_engine(Network(INT8))


def test_a_network_under_another_name_is_not_taken(calibrated: Recipe) -> None:
    """As when the wrong file of a cache is copied."""
    from sppfeat.files import cache_folder

    folder, other = cache_folder() / "calibrated", "0123456789abcdef"
    shutil.copy(folder / f"{calibrated.calibration}.network", folder / f"{other}.network")
    message = f"{other}.network: expected the network of that calibration, found that of {calibrated.calibration}"
    with pytest.raises(BackboneError, match=message):
        load_engine(Network(replace(calibrated, calibration=other)))
    (folder / f"{other}.network").unlink()


def test_parts_need_one_calibration(calibrated: Recipe, folder: Path, tmp_path: Path) -> None:
    part = ShardOptions(part=(1, 2))
    with pytest.raises(UsageError, match="parts that are calibrated by themselves do not fit together: expected --cal"):
        extract_folder(folder, tmp_path / "p1", INT8, shards=part)
    assert not (tmp_path / "p1").exists()
    both = [extract_folder(folder, tmp_path / f"p{at}", calibrated, shards=ShardOptions(part=(at, 2))) for at in (1, 2)]
    assert sum(done.described for done in both) == 30


def test_a_cache_that_cannot_be_written(calibrated: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = read_calibrated(Network(calibrated).descriptions)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BackboneError, match="precision int8: its network cannot be kept: .* cannot be written"):
        keep_calibrated(network)


def test_a_processor_that_gives_other_values(calibrated: Recipe) -> None:
    """What the network gave where it was calibrated is kept with it."""
    network = read_calibrated(Network(calibrated).descriptions)
    sample = network.kept_samples[0]
    cells = sample.cells[0].array().copy()
    cells *= 1.2
    other = type(sample)(sample.image, [type(sample.image).of(cells)])
    changed = type(network)(network.structure, network.constants, [other])
    fingerprint = keep_calibrated(changed)
    with pytest.raises(BackboneError, match=r"values that differ from those when it was calibrated by"):
        load_engine(Network(replace(calibrated, calibration=fingerprint)))


@pytest.mark.parametrize(
    "options, message",
    [
        (RunOptions(engine="torch"), "precision int8 is computed by OpenVINO: expected --engine auto or openvino"),
        (RunOptions(device="cuda"), "cuda"),
    ],
)
def test_where_it_does_not_run(folder: Path, tmp_path: Path, options: RunOptions, message: str) -> None:
    with pytest.raises(Exception, match=message):
        extract_folder(folder, tmp_path / "f.h5", INT8, options)
    assert not (tmp_path / "f.h5").exists()


def test_without_nncf(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nncf", None)
    with pytest.raises(MissingExtraError, match=r"precision int8 needs nncf.*sppfeat\[int8\]"):
        calibrate(replace(INT8, layer="blocks.2"), find_images([folder]).items)


def test_stopping(folder: Path) -> None:
    asked = iter(range(1000))
    with pytest.raises(KeyboardInterrupt):
        calibrate(replace(INT8, layer="blocks.1"), find_images([folder]).items, stop=lambda: next(asked) > 40)


def test_several_backbones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_speed", lambda *_: 1.5)
    both = replace(INT8, backbone="efficientnet_lite0@64+efficientnet_lite1@64", layer="blocks.2+blocks.2")
    found = calibrate(both, find_images([folder]).items)
    assert found.calibration is not None
    first, second = found.calibration.split("+")
    assert [one.calibration for one in found.branches()] == [first, second] and first != second
    ours, theirs = rows(found, folder), rows(replace(both, precision="float32"), folder)
    cosines = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert 0.98 < cosines.mean() < 1


def test_recipes_without_a_calibration_keep_their_identity() -> None:
    assert "calibration" not in json.loads(Recipe().to_json())
    assert Recipe.from_json(Recipe().to_json()) == Recipe()
    one = replace(INT8, calibration="0123456789abcdef")
    assert Recipe.from_json(one.to_json()) == one
    assert one.identity("w") != replace(INT8, calibration="0123456789abcde0").identity("w")
    for wrong in ("", "xyz", "0123456789ABCDEF", "0123456789abcdef+"):
        with pytest.raises(UsageError, match="calibration must be a fingerprint of 16 digits"):
            replace(INT8, calibration=wrong)
    with pytest.raises(UsageError, match="calibration must be none with precision float32, found"):
        replace(FLOAT, calibration="0123456789abcdef")


def test_command_line(
    folder: Path, calibrated: Recipe, tmp_path: Path, run_sppfeat: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    store = tmp_path / "f.h5"
    small = ("--scales", "64", "--levels", "2,1", "--layer", "blocks.3", "--dtype", "float32")
    done = run_sppfeat("extract", str(folder), "-o", str(store), *small, "--precision", "int8")
    assert done.returncode == 0, done.stderr
    assert "int8: calibrated on 25 images; mean cosine to float32 0.99" in done.stderr
    shown = run_sppfeat("inspect", str(store)).stdout
    assert f"calibration    {calibrated.calibration}" in shown
    other = run_sppfeat(
        "extract", str(folder), "-o", str(tmp_path / "g.h5"), *small,
        "--precision", "int8", "--calibration-of", str(store), "--json",
    )  # fmt: skip
    assert json.loads(other.stdout)["described"] == 30
    assert open_store(tmp_path / "g.h5").recipe.calibration == calibrated.calibration
    wrong = run_sppfeat("extract", str(folder), "-o", str(tmp_path / "h.h5"), "--calibration-of", str(store))
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "sppfeat: calibration: expected precision int8 of the recipe, found float32\n",
    )
    wrong = run_sppfeat(
        "extract", str(folder), "-o", str(tmp_path / "h.h5"), "--precision", "int8", "--engine", "torch"
    )
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
