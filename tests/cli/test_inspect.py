"""`sppfeat inspect`: what files of unknown origin hold never reaches the terminal as commands."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import MakeStore

from sppfeat import Recipe, open_store
from sppfeat.store.writing import StoreWriter

Run = Callable[..., subprocess.CompletedProcess[str]]
ESCAPES = "\x1b[2J\x1b]0;title\x07\r\x9b1m\u202e"
SHOWN = r"\x1b[2J\x1b]0;title\x07\r\x9b1m\u202e"


@pytest.fixture
def hostile(make_store: MakeStore) -> Path:
    """A store with a terminal's commands in every text: a row that is done, one that failed, one that is damaged."""
    names = [f"{ESCAPES}{row}.jpg" for row in range(3)]
    recipe = Recipe(layer=f"layer{ESCAPES}", backbone=f"backbone{ESCAPES}")
    weights, root = f"sha{ESCAPES}", f"/root{ESCAPES}"
    store = make_store(np.ones((3, 4)), f"f{ESCAPES}.h5", names=names, recipe=recipe, weights=weights, root=root)
    with StoreWriter(store) as writer:
        writer.fail(1, f"reason{ESCAPES}")
    with h5py.File(store.path, "r+") as file:
        file["checksum"][2] += 1
        file.attrs["versions"] = json.dumps({f"library{ESCAPES}": f"version{ESCAPES}"})
    assert open_store(store.path).names == names
    return store.path


@pytest.mark.parametrize(
    ("options", "code", "shown"),
    [
        ([], 0, ["layer", "backbone", "/root", "sha256 sha", "library", "version"]),
        (["--failures"], 0, ["reason"]),
        (["--verify"], 1, [f"row 2 ('{SHOWN}2.jpg'): its values do not match"]),
        (["--json", "--failures", "--verify"], 1, []),
    ],
    ids=lambda options: " ".join(map(str, options)) if isinstance(options, list) else None,
)
def test_a_terminals_commands_are_never_printed(
    hostile: Path,
    run_sppfeat: Callable[..., subprocess.CompletedProcess[str]],
    options: list[str],
    code: int,
    shown: list[str],
) -> None:
    done = run_sppfeat("inspect", hostile, *options)
    assert done.returncode == code, done.stderr
    for line in [*done.stdout.split("\n"), *done.stderr.split("\n")]:
        assert line.isprintable(), ascii(line)
    for text in shown:
        assert text in done.stdout + done.stderr


def test_nor_are_they_in_the_reason_why_a_file_is_refused(hostile: Path, run_sppfeat: Run) -> None:
    for key, value in {"recipe": json.dumps({"recipe_version": 1, ESCAPES: 1}), "format": ESCAPES}.items():
        with h5py.File(hostile, "r+") as file:
            file.attrs[key] = value
        done = run_sppfeat("inspect", hostile)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.endswith("\n") and done.stderr[:-1].isprintable(), ascii(done.stderr)
