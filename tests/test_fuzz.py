"""The short form of tests/fuzz.py: a few hundred damaged files of every kind end in clean errors alone."""

from __future__ import annotations

from pathlib import Path

import fuzz
import pytest


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzz.Kind]:
    return fuzz.kinds(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few of these files do hang HDF5, until they are given up: after one second here, not eight."""
    monkeypatch.setattr("sppfeat.files.hdf5_check.DEADLINE_SECONDS", 1)


NAMES = [
    *("store", "svm", "detector", "windows-h5", "training-state", "gallery-rows", "windows-csv", "windows-json"),
    *("labels", "image-list", "coco", "ground-truth", "voc-xml", "voc-labels", "voc-list", "safetensors"),
    *("windows-journal", "gone-names", "oxford-query", "oxford-list", "cache-entry", "pth"),
]


def test_every_kind_is_damaged(kinds: dict[str, fuzz.Kind]) -> None:
    assert list(kinds) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_end_in_clean_errors(kinds: dict[str, fuzz.Kind], name: str) -> None:
    assert fuzz.fuzz(name, kinds[name], 300, seed=0) == []


def test_a_finding_is_found(tmp_path: Path) -> None:
    """The fuzzer itself: a reader that raises anything else is told of."""
    path = tmp_path / "f.csv"
    path.write_text("abc")

    def read(path: Path) -> None:
        if path.read_text("latin-1") != "abc":
            raise KeyError("x")

    assert "KeyError" in fuzz.fuzz("odd", fuzz.Kind(path, read), 2, seed=0)[0]
