"""The described rows of a store, against the whole store in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import MakeStore
from hypothesis import given, settings
from hypothesis import strategies as st

from sppfeat import Recipe, Store, StoreError, UsageError, iter_blocks, open_store, to_numpy
from sppfeat.images import Fingerprint
from sppfeat.store import StoreWriter, blocks, create_store
from sppfeat.store.subset import DescriptorView


def store_of(path: Path, values: np.ndarray, states: list[bool]) -> Store:
    """A finished store; False: the row failed."""
    names = [f"{row}.jpg" for row in range(len(values))]
    create_store(path, names, recipe=Recipe(), weights_sha256="0" * 64, dim=values.shape[1], source_root="/")
    with StoreWriter(open_store(path)) as writer:
        for row, done in enumerate(states):
            if done:
                writer.write(row, values[row], (row + 1, 9), Fingerprint(1, 1))
            else:
                writer.fail(row, "no image", Fingerprint(1, 1))
    return open_store(path)


@settings(max_examples=30, deadline=None)
@given(states=st.lists(st.booleans(), min_size=1, max_size=20), most=st.integers(1, 7))
def test_blocks_hold_every_described_row_once(
    states: list[bool], most: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = np.random.default_rng(0).normal(size=(len(states), 3)).astype(np.float16)
    store = store_of(tmp_path_factory.mktemp("s") / "f.h5", values, states)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "MOST_ROWS", most)
        if not any(states):
            with pytest.raises(StoreError, match=r"f\.h5: expected described images, found \d+, all of them failed"):
                iter_blocks(store)
            return
        found = list(iter_blocks(store))
        names, matrix = to_numpy(store)
    kept = np.flatnonzero(states)
    assert all(0 < len(block.names) <= most for block in found)
    assert [name for block in found for name in block.names] == names == [f"{row}.jpg" for row in kept]
    np.testing.assert_array_equal(np.concatenate([block.values for block in found]), values[kept])
    np.testing.assert_array_equal(matrix, values[kept])
    assert matrix.dtype == np.float16
    sizes = np.concatenate([block.image_size for block in found])
    assert sizes.tolist() == [[row + 1, 9] for row in kept]


def test_levels_and_types(make_store: MakeStore) -> None:
    recipe = Recipe(levels=(2, 1))
    store = make_store(np.random.default_rng(1).normal(size=(6, 5 * 4)), recipe=recipe)
    exact = DescriptorView(store, levels=(1,))[:]
    assert to_numpy(store, levels=(1,), dtype="float32")[1].tolist() == exact.tolist()
    half = to_numpy(store, levels=(1,))[1]
    assert half.dtype == np.float16 and half.tolist() == exact.astype(np.float16).tolist()
    assert to_numpy(store, dtype="float32")[1].tolist() == store.descriptors[:].tolist()
    with pytest.raises(UsageError, match=r"f\.h5: expected levels among its 2,1, found 3"):
        to_numpy(store, levels=(3,))
    with pytest.raises(UsageError, match="unknown dtype 'float64': expected one of float16, float32"):
        to_numpy(store, dtype="float64")


def test_values_too_large_for_a_type(make_store: MakeStore) -> None:
    rows = np.array([[1.0, 2.0], [7e4, -8e4]])
    store = make_store(rows, recipe=Recipe(dtype="float32", normalize="none"))
    with pytest.raises(StoreError, match=r"expected values that are finite as float16, found 8e\+04; choose float32"):
        to_numpy(store, dtype="float16")
    np.testing.assert_array_equal(to_numpy(store)[1], rows.astype(np.float32))


def test_pending_rows_are_refused(make_store: MakeStore) -> None:
    store = make_store(np.ones((3, 2)))
    with StoreWriter(store) as writer:
        writer.reset([1])
    with pytest.raises(StoreError, match="1 of 3 images are still to be described; run extract again"):
        iter_blocks(store)  # at once, not at the first block
