"""Engines that resize: the same descriptors from decoded pixels. The GPU is faked: its kernel has tests of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

from sppfeat import Recipe, RunOptions, SppFeatWarning
from sppfeat.backbones.network import Network
from sppfeat.engines import ResizingEngine, load_engine, resizes_images
from sppfeat.extraction import branch
from sppfeat.extraction.pipeline import Describer
from sppfeat.images import ShapeBatcher, Unresized, decode_image, prepare_image, resizing

ON_CPU = RunOptions(engine="torch", device="cpu", batch_size=3)


class Kernel:
    """Stands in for the GPU's; `calls` are the sizes that it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.broken = False

    def resize_into(
        self,
        into: torch.Tensor,
        pixels: torch.Tensor,
        size: tuple[int, int],
        interpolation: str,
        table: torch.Tensor,
        corner: tuple[int, int],
    ) -> None:
        self.calls.append(size)
        if self.broken:
            raise RuntimeError("PTX was compiled with an unsupported toolchain\nmore")
        assert into.permute(1, 2, 0).is_contiguous() and pixels.is_contiguous()
        shape = (*into.shape[1:], 3)
        resized = torch.from_numpy(Unresized(pixels.numpy(), size, interpolation, corner, shape).resized().copy())
        into.copy_(table[resized.long(), torch.arange(3)].permute(2, 0, 1))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    module = type(sys)("sppfeat.engines.card_resize")
    module.resize_into = kernel.resize_into  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sppfeat.engines.card_resize", module)
    return kernel


def described(recipe: Recipe, folder: Path) -> dict[int, np.ndarray]:
    found = {}
    for each in Describer(recipe, ON_CPU).describe(sorted(folder.iterdir())):
        assert each.rows is not None, each.error
        found[each.position] = each.rows
    return found


def test_only_torch_resizes_on_nvidia_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    assert resizes_images("torch", "cuda:1")
    assert not any(resizes_images(*each) for each in (("torch", "cpu"), ("openvino", "cpu"), ("sift", "cpu")))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not resizes_images("torch", "cuda:0")


@pytest.mark.parametrize(
    "recipe",
    [
        TINY,
        replace(TINY, scales=(64, 96), interpolation="lanczos", size_multiple=16),
        replace(TINY, crop="center", precision="bfloat16"),
        replace(TINY, scales=("native",)),
    ],
)
def test_descriptors_are_the_same(
    recipe: Recipe, kernel: Kernel, make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_images(12)
    expected = described(recipe, folder)
    assert not kernel.calls
    monkeypatch.setattr(branch, "resizes_images", lambda engine, device: True)
    for most in (1 << 20, 70 * 70):
        monkeypatch.setattr(resizing, "MOST_UNRESIZED", most)
        kernel.calls.clear()
        found = described(recipe, folder)
        assert len(kernel.calls) == 12 * len(recipe.scales)
        assert found.keys() == expected.keys()
        for position, rows in found.items():
            np.testing.assert_array_equal(rows, expected[position])


def test_a_kernel_that_fails_warns_once(
    kernel: Kernel, make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_images(12)
    expected = described(TINY, folder)
    kernel.broken = True
    monkeypatch.setattr(branch, "resizes_images", lambda engine, device: True)
    engine = load_engine(Network(TINY), ON_CPU)
    monkeypatch.setattr(branch, "load_engine", lambda *arguments: engine)
    message = "kernel that resizes does not work here .PTX was .* toolchain.; falling back to the CPU"
    monkeypatch.setattr(engine, "streams", 1)
    with pytest.warns(SppFeatWarning, match=message) as warned:
        found = described(TINY, folder)
    assert len(warned) == len(kernel.calls) == 1
    for position, rows in found.items():
        np.testing.assert_array_equal(rows, expected[position])


def test_windows_are_pooled_from_images_that_the_engine_resized(
    kernel: Kernel, make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sppfeat.images import Item

    path = next(make_images(1).iterdir())
    item = replace(Item.at(path), windows=np.array([[0, 0, 47, 47], [5, 6, 30, 40]]))
    (expected,) = Describer(TINY, ON_CPU).describe([item])
    monkeypatch.setattr(branch, "resizes_images", lambda engine, device: True)
    (found,) = Describer(TINY, ON_CPU).describe([item])
    assert kernel.calls and found.rows is not None and expected.rows is not None
    np.testing.assert_array_equal(found.rows, expected.rows)


@pytest.mark.parametrize("crop", ["none", "center"])
@pytest.mark.parametrize("most", [1 << 20, 100])
def test_decoded_images_become_prepared_ones(
    crop: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 121, 3), np.uint8)
    Image.fromarray(pixels).save(path := tmp_path / "a.png")
    recipe = Recipe(scales=(64, 80), crop=crop, interpolation="bicubic")
    monkeypatch.setattr(resizing, "MOST_UNRESIZED", most)
    prepared, decoded = prepare_image(str(path), recipe), decode_image(str(path), recipe)
    assert prepared[1:] == decoded[1:]
    for expected, found in zip(prepared.inputs, decoded.inputs, strict=True):
        assert found.shape == expected.shape and found.pixels.flags.c_contiguous
        assert found.pixels.shape == (pixels.shape if most > 100 else expected.shape)
        np.testing.assert_array_equal(found.resized(), expected)


def test_images_that_wait_count_by_their_pixels() -> None:
    """Of images that are large until they are resized, fewer wait."""

    def wait(side: int) -> int:
        batcher: ShapeBatcher[int] = ShapeBatcher(4, patience=10**6)
        pixels = np.broadcast_to(np.uint8(0), (side, side, 3))
        for at in range(100):
            image = Unresized(pixels, (8 + at, 8), "bicubic", (0, 0), (8, 8 + at, 3))
            if list(batcher.add(at, image)):
                return at
        return 100

    assert wait(8) == 100 and wait(1000) == 6


def test_only_torch_takes_decoded_images() -> None:
    assert isinstance(load_engine(Network(TINY), ON_CPU), ResizingEngine)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_on_the_gpu(precision: str, tmp_path: Path) -> None:
    recipe = replace(TINY, scales=(64, 96), precision=precision)
    random = np.random.default_rng(0)
    images = []
    for at in range(4):
        Image.fromarray(random.integers(0, 256, (90 + at, 120 + at, 3), np.uint8)).save(path := tmp_path / f"{at}.png")
        images.append(path)
    engine = load_engine(Network(recipe), RunOptions(device="cuda:0"))
    assert isinstance(engine, ResizingEngine)
    of = Network(recipe).recipe
    for scale in range(2):
        expected = engine.feature_maps(np.stack([prepare_image(str(each), of).inputs[scale] for each in images]))
        found = engine.feature_maps_of([decode_image(str(each), of).inputs[scale] for each in images])
        assert torch.equal(found[0], expected[0])
