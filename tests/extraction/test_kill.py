"""`kill -9`, SIGINT and SIGTERM at random moments: the file opens, every row is whole, and resuming loses nothing."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, sppfeat_command

from sppfeat import extract_folder, open_store, verify_store

KILLS = 20
TINY_FLAGS = ["--backbone", "timm:test_resnet", "--weights", "random", "--scales", "64", "--levels", "2,1"]


def rows_by_name(path: Path) -> dict[str, np.ndarray]:
    store = open_store(path)
    return dict(zip(store.names, np.array(store.descriptors), strict=True))


def done_rows(output: Path) -> int:
    return open_store(output).counts()["done"] if output.exists() else 0


@pytest.mark.timeout(280)
def test_kill_9_at_random_moments(make_images: Callable[..., Path], tmp_path: Path) -> None:
    """Twenty kills: while the file is created, rewritten for new names, and filled."""
    folder, output = make_images(100), tmp_path / "f.h5"
    # Images take long enough here for rows to be flushed before a run ends, on a fast machine as well.
    flags = [*TINY_FLAGS, "--scales", "256"]
    command = sppfeat_command("extract", folder, "-o", output, "--quiet", "-b", "1", "-j", "1", *flags)
    moments = random.Random(0)
    # Learn how long a whole run takes here, so that the kills fall all over it.
    started = time.monotonic()
    subprocess.run([*command, "-o", str(tmp_path / "timed.h5")], check=True)
    whole_run = time.monotonic() - started
    killed = seen_partial = 0
    images = 100
    while killed < KILLS:
        store_before, rows_before = output.stat().st_ino if output.exists() else None, done_rows(output)
        child = subprocess.Popen(command)
        # One kill of three comes at any moment, one soon after the store appeared or was rewritten, one once rows are.
        if killed % 3 == 0:
            time.sleep(moments.uniform(0.4, 1.0) * whole_run)
        elif killed % 3 == 1:
            while (not output.exists() or output.stat().st_ino == store_before) and child.poll() is None:
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.25))
        else:
            while done_rows(output) <= rows_before and child.poll() is None:
                time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        child.wait()
        killed += 1
        if output.exists():
            store = open_store(output)
            assert verify_store(store) == []
            seen_partial += 0 < store.counts()["done"] < len(store)
            # New images mean that the next run rewrites the file before it fills it.
            images += 60
            make_images(images)
    assert seen_partial >= 4
    subprocess.run(command, check=True)
    store = open_store(output)
    assert verify_store(store) == [] and store.counts() == {"pending": 0, "done": images, "failed": 0}

    reference = tmp_path / "whole.h5"
    subprocess.run(sppfeat_command("extract", folder, "-o", reference, "--quiet", *flags), check=True)
    expected, found = rows_by_name(reference), rows_by_name(output)
    assert expected.keys() == found.keys()
    for name, row in expected.items():
        unit = np.spacing(np.maximum(np.abs(row), np.abs(found[name])))
        assert (np.abs(row.astype(np.float64) - found[name]) <= unit).all(), name
    assert sorted(p.name for p in tmp_path.glob(".*")) == []  # no half-made file or lock is left


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_finish_the_rows_in_flight(make_images: Callable[..., Path], tmp_path: Path, number: int) -> None:
    folder, output = make_images(400), tmp_path / "f.h5"
    command = sppfeat_command("extract", folder, "-o", output, "--json", "-b", "1", "-j", "1", *TINY_FLAGS)
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    assert "400 images to describe" in child.stderr.readline()
    child.send_signal(number)
    printed, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    summary = json.loads(printed)
    store = open_store(output)
    assert verify_store(store) == []
    assert summary["described"] == store.counts()["done"] < 400
    assert summary["pending"] == store.counts()["pending"] > 0
    assert "the same command resumes" in errors
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0
    assert json.loads(again.stdout)["reused"] == summary["described"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_before_the_first_image(make_images: Callable[..., Path], tmp_path: Path, number: int) -> None:
    """While the network loads, or a list is awaited, the program ends, and an old store stays even with --overwrite."""
    folder, output = make_images(3), tmp_path / "f.h5"
    extract_folder(folder, output, TINY)
    before = output.read_bytes()
    command = sppfeat_command("extract", "-", "-o", output, "--overwrite", *TINY_FLAGS)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        time.sleep(15)  # torch is loaded, and the list is read; none comes
        child.send_signal(number)
        assert child.wait(30) == 130
        assert child.stderr is not None
        assert child.stderr.read() == "sppfeat: interrupted\n"
    assert output.read_bytes() == before


# Runs the command line, with a SIGINT during one of HDF5's writes.
INTERRUPTED = """
import io, signal
from sppfeat.files import output
from sppfeat_cli import main

class Interrupting(io.FileIO):
    left = 4

    def write(self, data):
        Interrupting.left -= 1
        if not Interrupting.left:
            signal.raise_signal(signal.SIGINT)
        return super().write(data)

output._HeldBack.__bases__ = (Interrupting,)
main()
"""


def test_an_interrupt_inside_hdf5_leaves_the_store_as_it_was(make_images: Callable[..., Path], tmp_path: Path) -> None:
    """HDF5 would turn it into another error, or crash when it closes the file."""
    output = tmp_path / "f.h5"
    extract_folder(make_images(3), output, TINY)
    before = output.read_bytes()
    words = ["extract", make_images(5), "-o", output, *TINY_FLAGS]
    command = [sys.executable, "-c", INTERRUPTED, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, "") and done.stderr.endswith("sppfeat: interrupted\n"), done.stderr
    assert "Traceback" not in done.stderr and output.read_bytes() == before
    assert verify_store(open_store(output)) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.h5", "images"]
    again = subprocess.run(sppfeat_command(*words, "--json"), capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and json.loads(again.stdout)["described"] == 2, again.stderr


def test_two_concurrent_writers(make_images: Callable[..., Path], tmp_path: Path) -> None:
    folder, output = make_images(3), tmp_path / "f.h5"
    command = sppfeat_command("extract", folder, "-o", output, "--quiet", *TINY_FLAGS)
    seconds: list[subprocess.CompletedProcess[str]] = []

    class StartAnother:
        """While the first extraction runs, run it a second time."""

        def started(self, **known: object) -> None:
            seconds.append(subprocess.run(command, capture_output=True, text=True))

        def row(self, name: str, error: str | None) -> None:
            pass

    assert extract_folder(folder, output, TINY, observer=StartAnother()).described == 3
    assert seconds[0].returncode == 1
    assert seconds[0].stderr == f"sppfeat: {output}: another process is writing to it; wait for it to end\n"
