"""Every file of a gallery, damaged at random: clear errors or correct answers, no crash, no hang."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from conftest import MakeStore

from sppfeat.retrieval.changes import add_to_gallery, create_gallery
from sppfeat.retrieval.faiss_index import IndexOptions
from sppfeat.retrieval.whitening import ProjectionOptions


def test_damage(make_store: MakeStore, tmp_path: Path) -> None:
    """300 of each file, and of the indexes of four kinds; takes about 10 s, mostly in FAISS and HDF5."""
    generator = np.random.default_rng(0)
    store = make_store(generator.normal(size=(90, 16)))
    factories = {"lists": "IVF4,SQ8", "graph": "HNSW8", "refined": "PCA6,IVF4,Flat,RFlat", "bits": "HR16,IVF4,RaBitQ3"}
    for name, factory in factories.items():
        projected = ProjectionOptions(dims=8) if name == "lists" else None
        create_gallery(store, tmp_path / name, IndexOptions(factory=factory), projected)
    # Three rows beside 400.
    create_gallery(make_store(generator.normal(size=(400, 16)), "many.h5"), tmp_path / "more")
    few = make_store(generator.normal(size=(3, 16)), "few.h5", names=["a.jpg", "b.jpg", "c.jpg"])
    assert add_to_gallery(few, tmp_path / "more").about.files.added is not None
    cases = ["lists:json", "lists:projection", "graph:rows", *(f"{name}:index" for name in factories)]
    cases += ["more:json", "more:added-index", "more:added-rows"]
    done = subprocess.run(
        [
            sys.executable,
            Path(__file__).parents[1] / "fuzz_gallery.py",
            "300",
            *(f"{tmp_path}/{case}" for case in cases),
        ],
        capture_output=True,
        text=True,
        timeout=200,
    )
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 0, f"ended with {done.returncode} at {last}: {done.stderr[-3000:]}"
    for case, outcomes in json.loads(last).items():
        assert outcomes["refused"] > 100 and outcomes["refused"] + outcomes["opened"] == 300, case
