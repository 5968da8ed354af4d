"""The short form of tests/fuzz.py: a few hundred damaged files of every kind end in clean errors alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fuzz
import pytest

NAMES = [
    *("store", "manifest", "svm", "detector", "vocabulary", "windows-h5", "training-state", "gallery-rows"),
    *("windows-csv", "windows-json"),
    *("labels", "image-list", "coco", "ground-truth", "voc-xml", "voc-labels", "voc-list"),
    *("windows-journal", "gone-names", "oxford-query", "oxford-list", "cache-entry", "safetensors", "pth"),
]


@pytest.fixture(scope="module")
def printed() -> str:
    """In a separate process, as small as can be: every damaged HDF5 file is looked at in a fork of it."""
    done = subprocess.run([sys.executable, fuzz.__file__, "--impatient"], capture_output=True, text=True, timeout=280)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_end_in_clean_errors(printed: str, name: str) -> None:
    assert f"{name}: 300 files, 0 findings\n" in printed, printed


def test_every_kind_is_damaged(printed: str) -> None:
    assert [line.partition(":")[0] for line in printed.splitlines() if ", 0 findings" in line] == NAMES


def test_a_finding_is_found(tmp_path: Path) -> None:
    """The fuzzer itself: a reader that raises anything else is told of."""
    path = tmp_path / "f.csv"
    path.write_text("abc")

    def read(path: Path) -> None:
        if path.read_text("latin-1") != "abc":
            raise KeyError("x")

    assert "KeyError" in fuzz.fuzz("odd", fuzz.Kind(path, read), 2, seed=0)[0]
