"""The threads of a describer: they stay from one call to the next, and end with it."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sppfeat import Describer, Recipe, RunOptions
from sppfeat.images import find_images

MakeImages = Callable[..., Path]
OPTIONS = RunOptions(device="cpu", engine="torch", num_workers=2)


def threads() -> set[threading.Thread]:
    """Those of all describers that are alive in this process."""
    return {one for one in threading.enumerate() if one.name.startswith(("decode", "forward"))}


@pytest.fixture
def describer(tiny: Recipe) -> Describer:
    return Describer(tiny, OPTIONS)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_threads_stay_from_call_to_call(
    describer: Describer, make_images: MakeImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = threads()
    items = find_images([make_images(6)]).items
    (engine,) = describer.load()
    used = set()
    original = engine.feature_maps

    def noted(images: np.ndarray) -> object:
        used.add(threading.get_ident())
        return original(images)

    monkeypatch.setattr(engine, "feature_maps", noted)
    rows = [
        np.stack([each.row()[0] for each in sorted(describer.describe(items), key=lambda found: found.position)])
        for _ in range(5)
    ]
    assert len(used) <= engine.streams
    assert all(np.array_equal(rows[0], each) for each in rows)
    assert 0 < len(threads() - before) <= 2 + engine.streams


def test_a_describer_that_nobody_holds_ends_its_threads(tiny: Recipe, make_images: MakeImages) -> None:
    def describe() -> set[threading.Thread]:
        before = threads()
        describer = Describer(tiny, OPTIONS)
        list(describer.describe(find_images([make_images(3)]).items))
        return threads() - before

    made = describe()
    assert made
    gc.collect()
    wait_for(lambda: not any(one.is_alive() for one in made))


def test_a_call_that_is_left_early_leaves_nothing_running(
    describer: Describer, make_images: MakeImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = find_images([make_images(40)]).items
    (engine,) = describer.load()
    passes = []
    original = engine.feature_maps

    def slow(images: np.ndarray) -> object:
        time.sleep(0.01)
        passes.append(len(images))
        return original(images)

    monkeypatch.setattr(engine, "feature_maps", slow)
    call = describer.describe(items)
    next(call)
    call.close()
    done = len(passes)
    time.sleep(0.1)
    assert len(passes) == done < 40
    assert len(list(describer.describe(items))) == 40
