"""What is to be done, from items, a store and the files as they are; no network is looked at."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeStore

from sppfeat import UsageError, open_store
from sppfeat.extraction.plan import make_plan, with_windows
from sppfeat.images import ImageList, Item, find_images
from sppfeat.store import Store, row_name, row_names
from sppfeat.store.writing import StoreWriter

BOXES = np.array([[0, 0, 9, 9], [1.23456, 0, 9, 9], [0, 0, 9, 9.0001]])


@pytest.fixture
def images(make_images: Callable[..., Path]) -> ImageList:
    return find_images([make_images(4)])


def rows_of(store: Store) -> dict[str, int]:
    return {name: row for row, name in enumerate(store.names)}


def test_every_kind_of_row(images: ImageList, make_store: MakeStore) -> None:
    """Done, changed, failed, gone, pending, and no image at all."""
    folder = Path(images.root)
    names = [*images.names, "gone.png", "lost.png"]
    store = make_store(np.ones((6, 4), np.float32), names=names, root=str(folder))
    with StoreWriter(store) as writer:
        for row, item in enumerate(images.items):
            writer.write(row, np.ones(4, store.descriptors.dtype), (9, 9), item.fingerprint())
        writer.fail(2, "broken", images.items[2].fingerprint())
        writer.reset([5])
    (folder / images.names[1]).write_bytes(b"changed")
    items = [*images.items[:3], Item(str(folder), images.names[3], problem="is a folder")]
    plan = make_plan(open_store(store.path), rows_of(store), ImageList(str(folder), items, 0), retry_failed=False)
    assert [(todo.item.name, todo.rows) for todo in plan.todo] == [(names[1], [1]), (names[3], [3])]
    assert (plan.reused, plan.failed_before, plan.redo, plan.changed) == (1, 1, {1, 3}, {1, 3})
    assert (plan.gone, plan.lost, plan.rows) == (["gone.png", "lost.png"], [5], 2)
    again = make_plan(open_store(store.path), rows_of(store), ImageList(str(folder), items, 0), retry_failed=True)
    assert [todo.rows for todo in again.todo] == [[1], [2], [3]] and again.failed_before == 0


def test_an_item_is_cut_down_to_the_windows_that_are_left(images: ImageList, make_store: MakeStore) -> None:
    name = images.names[0]
    listed, without = with_windows(images, {name: BOXES})
    (item,) = listed.items
    names = row_names(item)
    assert names == [f"{name}#0,0,9,9", f"{name}#1.235,0,9,9"] and (listed.repeated, without) == (1, 3)
    assert item.windows is not None and item.windows.tolist() == [[0, 0, 9, 9], [1.235, 0, 9, 9]]
    store = make_store(np.ones((2, 4), np.float32), names=names, root=images.root)
    with StoreWriter(store) as writer:
        writer.write(0, np.ones(4, store.descriptors.dtype), (9, 9), item.fingerprint())
        writer.reset([1])
    (todo,) = make_plan(open_store(store.path), rows_of(store), listed, retry_failed=False).todo
    assert todo.rows == [1] and todo.item.windows is not None and row_names(todo.item) == names[1:]


def test_windows_of_other_images(images: ImageList) -> None:
    listed, _ = with_windows(images, {images.names[0]: BOXES[:1], "no.png": BOXES[:1], images.names[1]: BOXES[:0]})
    assert [item.name for item in listed.items] == [images.names[0], "no.png"]
    assert listed.problems == {"no.png": "its image is not in the sources (no.png)"}
    with pytest.raises(UsageError, match="none of the 4 images .* found 'no.png'"):
        with_windows(images, {"no.png": BOXES})


def test_windows_are_rounded_once_as_their_names_are(images: ImageList) -> None:
    """0.0005 becomes 0.001 or 0; of two windows with one name, one would be a row that is never filled."""
    ties = np.array([[0.0005, 0, 50, 50], [0, 0, 50, 50], [0.0015, 0.0025, 50.0005, 50.1235]])
    listed, _ = with_windows(images, {images.names[0]: ties})
    (item,) = listed.items
    assert item.windows is not None
    assert row_names(item) == list(dict.fromkeys(row_name(item.name, box) for box in ties))
    assert len(set(row_names(item))) == len(item.windows)


def test_no_network_is_needed() -> None:
    import subprocess

    code = "import sys, sppfeat.extraction.plan; print('torch' in sys.modules, 'openvino' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
