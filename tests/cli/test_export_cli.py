"""`sppfeat export` as a person runs it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeStore

from sppfeat.images import Fingerprint
from sppfeat.store import Store, StoreWriter

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def store(make_store: MakeStore) -> Store:
    made = make_store(np.random.default_rng(0).normal(size=(5, 50)))
    with StoreWriter(made) as writer:
        writer.fail(2, "no image", Fingerprint(1, 1))
    return made


def test_text_and_json(store: Store, tmp_path: Path, run_sppfeat: Run) -> None:
    done = run_sppfeat("export", store.path, "-o", tmp_path / "out.npy")
    assert (done.returncode, done.stderr) == (0, "")
    expected = f"{tmp_path}/out.npy: 4 descriptors of 50 values, float16, 1 failed left out"
    assert done.stdout == f"{expected}; names in {tmp_path}/out.names.txt\n"
    assert np.load(tmp_path / "out.npy").shape == (4, 50)
    quiet = run_sppfeat("export", store.path, "-o", tmp_path / "quiet.npy", "--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "") and (tmp_path / "quiet.npy").exists()
    done = run_sppfeat(
        *("export", store.path, "-o", tmp_path / "out.csv", "--levels", "2,1", "--dtype", "float32", "--json")
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "store": str(store.path),
        "output": f"{tmp_path}/out.csv",
        "names": None,
        "format": "csv",
        "exported": 4,
        "failed": 1,
        "dim": 5,
        "dtype": "float32",
        "levels": [2, 1],
    }


def test_errors_are_one_line(store: Store, tmp_path: Path, run_sppfeat: Run) -> None:
    (tmp_path / "photo.npy").write_bytes(b"a photograph")
    cases = [
        ((store.path, "-o", tmp_path / "out.xlsx"), 2, "or format hloc, found '.xlsx'"),
        ((store.path, "-o", tmp_path / "photo.npy", "--overwrite"), 1, "it is left as it is"),
        ((store.path, "-o", tmp_path / "no/out.npy"), 1, f"its folder {tmp_path}/no does not exist"),
        ((store.path, "-o", tmp_path / "out.npy", "--levels", "5"), 2, "expected levels among its 6,3,2,1, found 5"),
        ((store.path, "-o", tmp_path / "out.npy", "--dtype", "int8"), 2, "unknown dtype 'int8'"),
        ((tmp_path / "none.h5", "-o", tmp_path / "out.npy"), 1, "expected a store, found no such file"),
    ]
    for words, code, text in cases:
        done = run_sppfeat("export", *words)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert text in done.stderr and done.stderr.count("\n") == 1 and done.stderr.startswith("sppfeat: ")
    with StoreWriter(store) as writer:
        writer.reset([0])
    done = run_sppfeat("export", store.path, "-o", tmp_path / "out.npy")
    assert done.returncode == 1 and "1 of 5 images are still to be described; run extract again" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.h5", "photo.npy"]
