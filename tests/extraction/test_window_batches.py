"""Images with windows in batches: the same rows as one by one, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

from sppfeat import RunOptions
from sppfeat.engines.torch_engine import TorchEngine
from sppfeat.extraction.pipeline import Described, Describer
from sppfeat.images import Item

RECIPE = replace(TINY, scales=(64, 96))


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    """Images of two shapes, mostly alternating, with no windows up to five; one cannot be read."""
    random = np.random.default_rng(0)
    found = []
    for number in range(14):
        height, width = ((60, 80), (80, 60), (60, 80), (60, 80), (90, 60))[number % 5]
        path = tmp_path / f"{number:02}.png"
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        corners = np.sort(random.integers(0, 60, (number % 6, 2, 2)), 1)
        found.append(Item.at(path, corners.reshape(-1, 4)))
    (tmp_path / "05.png").write_bytes(b"\x89PNG")
    return found


def described(items: Sequence[Item], scales: str, batch_size: int) -> list[Described]:
    """By a network on the processor; in batches as on a GPU where they have more than one image."""
    describer = Describer(RECIPE, RunOptions(engine="torch", device="cpu", batch_size=batch_size))
    if batch_size > 1:
        for each in describer._branches:
            each.device = "cuda"
    return list(describer.describe(items, scales=scales))


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each pass had."""
    seen: list[int] = []
    feature_maps = TorchEngine.feature_maps

    def counted(self: TorchEngine, images: np.ndarray) -> list[torch.Tensor]:
        seen.append(len(images))
        return feature_maps(self, images)

    monkeypatch.setattr(TorchEngine, "feature_maps", counted)
    return seen


def same(found: list[Described], expected: list[Described]) -> None:
    readable = [each.position for each in found if each.error is None]
    assert readable == sorted(readable) and len(readable) == len(found) - 1
    by_position = {each.position: each for each in found}
    assert len(by_position) == len(expected)
    for each in expected:
        other = by_position[each.position]
        assert other.error == each.error and other.row_errors == each.row_errors
        assert (other.rows is None) == (each.rows is None)
        if each.rows is not None and other.rows is not None:
            assert other.rows.shape == each.rows.shape
            np.testing.assert_allclose(other.rows, each.rows, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("scales", ["all", "nearest"])
def test_batches_give_the_rows_of_single_images(items: list[Item], scales: str, sizes: list[int]) -> None:
    expected = described(items, scales, 1)
    assert set(sizes) == {1}
    sizes.clear()
    same(described(items, scales, 4), expected)
    assert max(sizes) > 1


def test_a_processor_takes_one_image_at_a_time(items: list[Item], sizes: list[int]) -> None:
    """It is as fast so, and a stop waits for fewer images."""
    list(Describer(RECIPE, RunOptions(engine="torch", device="cpu", batch_size=4)).describe(items))
    assert set(sizes) == {1}


def test_windows_and_whole_images_do_not_share_a_batch(items: list[Item]) -> None:
    whole = [replace(item, windows=None) for item in items]
    mixed = [each for pair in zip(items, whole, strict=True) for each in pair]
    found = {each.position: each for each in described(mixed, "all", 4)}
    alone = {each.position: each for each in described(whole, "all", 4)}
    with_windows = {each.position: each for each in described(items, "all", 4)}
    for position, each in found.items():
        other = (alone if position % 2 else with_windows)[position // 2]
        assert each.error == other.error
        if each.rows is not None and other.rows is not None:
            np.testing.assert_allclose(each.rows, other.rows, rtol=2e-3, atol=1e-4)


def test_a_batch_that_does_not_fit_is_halved_with_its_windows(
    items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = described(items, "all", 1)
    feature_maps, refused = TorchEngine.feature_maps, []

    def small(self: TorchEngine, images: np.ndarray) -> list[torch.Tensor]:
        if len(images) > 1:
            refused.append(len(images))
            raise MemoryError("no room")
        return feature_maps(self, images)

    monkeypatch.setattr(TorchEngine, "feature_maps", small)
    same(described(items, "all", 4), expected)
    assert refused
