"""A store in a DataLoader, in this process and in others."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeStore
from torch.utils.data import DataLoader, Dataset

from sppfeat import Recipe, Store, StoreDataset, StoreError, open_store, to_numpy
from sppfeat.images import Fingerprint
from sppfeat.store import StoreWriter, extend_store


@pytest.fixture
def store(make_store: MakeStore) -> Store:
    """Seven rows, of which two have failed."""
    made = make_store(np.random.default_rng(0).normal(size=(7, 20)), recipe=Recipe(levels=(2, 1)))
    with StoreWriter(made) as writer:
        for row in (0, 4):
            writer.fail(row, "no image", Fingerprint(1, 1))
    return made


def test_it_is_a_map_of_described_rows(store: Store) -> None:
    dataset = StoreDataset(store.path)
    names, values = to_numpy(store)
    assert isinstance(dataset, Dataset) and len(dataset) == 5 and dataset.dim == 20
    for at in range(-5, 5):
        value, name = dataset[at]
        assert name == names[at] and value.dtype == torch.float16
        np.testing.assert_array_equal(value.numpy(), values[at])
    for at in (5, -6):
        with pytest.raises(IndexError, match="expected indices below 5"):
            dataset[at]
    assert [name for _, name in dataset] == names  # ends by itself


def test_batches_from_a_loader(store: Store) -> None:
    check_loader(str(store.path), 0)


def test_batches_from_the_processes_of_a_loader(store: Store) -> None:
    """In a process of its own: from that of all tests, after those of the engines, spawning ended in a crash."""
    code = "import sys; from test_dataset import check_loader; check_loader(sys.argv[1], 2)"
    folders = f"{Path(__file__).parent}:{Path(__file__).parents[1]}"
    command = [sys.executable, "-c", code, str(store.path)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": folders})


def check_loader(path: str, workers: int) -> None:
    """Hold a loader's batches against the whole matrix."""
    dataset = StoreDataset(path, levels=(1,), dtype="float32")
    context = "spawn" if workers else None
    loader = DataLoader(dataset, batch_size=2, num_workers=workers, multiprocessing_context=context)
    names, values = to_numpy(open_store(path), levels=(1,), dtype="float32")
    batches = list(loader)
    assert [len(batch) for _, batch in batches] == [2, 2, 1]
    assert [name for _, batch in batches for name in batch] == names
    np.testing.assert_array_equal(torch.cat([batch for batch, _ in batches]).numpy(), values)


def test_values_are_the_callers_own(store: Store) -> None:
    dataset = StoreDataset(store.path)
    value, _ = dataset[0]
    before = value.clone()
    value.zero_()
    assert torch.equal(dataset[0][0], before)


def test_it_travels_light_and_notices_another_store(store: Store, tmp_path: Path) -> None:
    dataset = StoreDataset(store.path)
    packed = pickle.dumps(dataset)
    assert len(packed) < 2000
    assert pickle.loads(packed)[3][1] == dataset[3][1]
    extend_store(store, [*store.names, "new.jpg"], source_root="/")
    with pytest.raises(StoreError, match="still to be described"):
        pickle.loads(packed)
    with StoreWriter(open_store(store.path)) as writer:
        writer.write(7, np.ones(20, np.float16), (1, 1), Fingerprint(1, 1))
    with pytest.raises(StoreError, match=r"f\.h5: was replaced or extended after this dataset was made"):
        pickle.loads(packed)
    assert dataset[3][1] == store.names[5]  # this one keeps the file that it opened
