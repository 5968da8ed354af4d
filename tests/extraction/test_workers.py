"""Several processes that fill one store; on the CPU, since they share the file, not the GPUs."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY

from sppfeat import BackboneError, DeviceError, Recipe, RunOptions, UsageError, extract_folder, open_store, verify_store
from sppfeat.engines.devices import resolve_device
from sppfeat.extraction.plan import Todo
from sppfeat.extraction.stages import Stages
from sppfeat.extraction.workers import _Child, _heard, _told, fill_rows_with
from sppfeat.images import Item
from sppfeat.store.locking import lock_store

MakeImages = Callable[..., Path]
OPTIONS = RunOptions(device="cpu", engine="torch")


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunOptions, "devices", lambda self: ["cpu", "cpu"])


class Log:
    def __init__(self, stop_after: int = 1 << 30) -> None:
        self.rows: list[tuple[str, str | None]] = []
        self.stop = threading.Event()
        self._stop_after = stop_after

    def started(self, *, todo: int, reused: int, gone: list[str], device: str) -> None:
        pass

    def row(self, name: str, error: str | None) -> None:
        self.rows.append((name, error))
        if len(self.rows) >= self._stop_after:
            self.stop.set()


def test_two_processes_give_what_one_gives_and_resume(
    make_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, log = make_images(60), Log(stop_after=3)
    (folder / "bad.png").write_bytes(b"no image")
    os.rename(folder / "0003.png", os.fsencode(folder) + b"/\xff.png")  # a name that is not UTF-8
    extract_folder(folder, tmp_path / "one.h5", TINY, OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(RunOptions, "devices", lambda self: ["cpu", "cpu"])
        first = extract_folder(folder, tmp_path / "two.h5", TINY, OPTIONS, observer=log, stop=log.stop.is_set)
        assert first.described + first.failed == len(log.rows) >= 3 and first.pending == 61 - len(log.rows)
        stages = first.stages
        assert stages.workers >= 2 and stages.decode > 0 and stages.forward > 0 and stages.write > 0
        second = extract_folder(folder, tmp_path / "two.h5", TINY, OPTIONS, observer=log)
    assert (second.reused, second.pending, second.failed) == (first.described, 0, 1)
    assert sorted(name for name, _ in log.rows) == sorted(open_store(tmp_path / "two.h5").names)
    assert [name for name, error in log.rows if error is not None] == ["bad.png"]
    one, two = open_store(tmp_path / "one.h5"), open_store(tmp_path / "two.h5")
    assert verify_store(two) == [] and two.counts() == {"pending": 0, "done": 60, "failed": 1}
    assert one.names == two.names and one.recipe_hash == two.recipe_hash
    unit = np.spacing(np.abs(np.array(one.descriptors)))
    assert (np.abs(np.array(one.descriptors, np.float64) - two.descriptors) <= unit).all()


def test_the_error_of_a_process_is_that_of_the_run(make_images: MakeImages, tmp_path: Path) -> None:
    folder, output = make_images(6), tmp_path / "f.h5"
    extract_folder(folder, output, TINY, OPTIONS, stop=lambda: True)
    store = open_store(output)
    todo = [Todo(Item(str(folder), name), [row]) for row, name in enumerate(store.names)]
    arguments = (OPTIONS, store, todo, [], lambda: False, Stages())
    with lock_store(output), pytest.raises(DeviceError, match="device cuda:77: expected an NVIDIA GPU"):
        list(fill_rows_with(["cpu", "cuda:77"], *arguments))
    # Half of the rows were the other one's.
    assert open_store(output).counts()["done"] <= 3


def test_a_process_that_is_killed_leaves_its_rows(
    make_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_processes: None
) -> None:
    folder, output = make_images(40), tmp_path / "f.h5"
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def remember(*arguments: object, **options: object) -> object:
        started.append(popen(*arguments, **options))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr("sppfeat.extraction.workers.subprocess.Popen", remember)

    class Kill(Log):
        def row(self, name: str, error: str | None) -> None:
            super().row(name, error)
            with contextlib.suppress(ProcessLookupError):
                os.kill(started[0].pid, signal.SIGKILL)

    with pytest.raises(BackboneError, match="the process of device cpu ended early .* its remaining rows stay pending"):
        extract_folder(folder, output, TINY, OPTIONS, observer=Kill())
    monkeypatch.undo()
    left = open_store(output).counts()["pending"]
    assert left > 0 and all(process.poll() is not None for process in started)
    assert extract_folder(folder, output, TINY, OPTIONS).described == left
    assert verify_store(open_store(output)) == []


def test_a_process_that_cannot_be_started_ends_the_others(
    make_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = make_images(2), tmp_path / "f.h5"
    extract_folder(folder, output, TINY, OPTIONS, stop=lambda: True)
    store = open_store(output)
    todo = [Todo(Item(str(folder), name), [row]) for row, name in enumerate(store.names)]
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def only_one(*arguments: object, **options: object) -> object:
        if started:
            raise OSError("no more processes")
        started.append(popen(*arguments, **options))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr("sppfeat.extraction.workers.subprocess.Popen", only_one)
    before = len(os.listdir("/proc/self/fd"))
    with lock_store(output), pytest.raises(OSError, match="no more processes"):
        list(fill_rows_with(["cpu", "cpu"], OPTIONS, store, todo, [], lambda: False, Stages()))
    assert started[0].returncode is not None and len(os.listdir("/proc/self/fd")) == before


def test_a_process_that_is_killed_while_it_answers_has_ended_early(monkeypatch: pytest.MonkeyPatch) -> None:
    popen = subprocess.Popen

    def half_a_line(command: list[str], **options: object) -> object:
        code = "import os, sys; os.write(int(sys.argv[1]), b'[0, null]\\n[1, nu')"
        return popen([command[0], "-c", code, command[3]], **options)  # type: ignore[call-overload]

    monkeypatch.setattr("sppfeat.extraction.workers.subprocess.Popen", half_a_line)
    heard: queue.Queue[tuple[int, Any]] = queue.Queue()
    child = _Child(1, "cuda:3", heard)
    assert heard.get(timeout=60) == (1, [0, None])
    number, last = heard.get(timeout=60)
    child.end()
    assert number == 1 and last["kind"] == "BackboneError"
    assert last["error"] == "the process of device cuda:3 ended early (exit code 0); its remaining rows stay pending"


def test_a_process_ends_with_the_one_that_started_it() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "from sppfeat.extraction.workers import main; main()", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    child.communicate(b"", timeout=60)
    assert child.returncode


def test_an_item_is_sent_to_a_process_whole() -> None:
    """Including bytes in a root that are not UTF-8, and every digit of its windows."""
    item = Item("/a\udcff", "b\\xff.png", np.array([[0.125, 1 / 3, 7, 9]]))
    again = _heard(json.loads(json.dumps(_told(Todo(item, [3])))))
    assert (again.item.root, again.item.name, again.rows) == (item.root, item.name, [3])
    assert again.item.windows is not None and np.array_equal(again.item.windows, item.windows)  # type: ignore[arg-type]
    assert _heard(_told(Todo(Item("/", "a.png"), [0]))).item.windows is None


@pytest.mark.parametrize(
    ("recipe", "options", "what"),
    [
        (replace(TINY, precision="int8"), RunOptions(device="cuda:2,3"), "precision int8"),
        (TINY, RunOptions(device="cuda:2,3", engine="openvino"), "engine openvino"),
    ],
)
def test_engines_of_the_cpu_are_refused_on_several_gpus_before_a_store_is_made(
    make_images: MakeImages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: Recipe,
    options: RunOptions,
    what: str,
) -> None:
    monkeypatch.setattr(
        "sppfeat.engines.engine.resolve_device", lambda name: resolve_device(name) if "," in name else name
    )
    with pytest.raises(UsageError, match=f"{what} runs on the CPU: expected --device cpu, found cuda:2"):
        extract_folder(make_images(1), tmp_path / "f.h5", recipe, options)
    assert not (tmp_path / "f.h5").exists()


def test_invalid_lists_of_devices(make_images: MakeImages, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="device cuda:7[78]: expected an NVIDIA GPU"):
        extract_folder(make_images(1), tmp_path / "f.h5", TINY, RunOptions(device="cuda:77,78"))
    with pytest.raises(UsageError, match="device cuda:0,1: expected one device here, found several"):
        resolve_device("cuda:0,1")


def test_prints_of_libraries_do_not_disturb_the_answers(
    make_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_processes: None
) -> None:
    monkeypatch.setenv("ONEDNN_VERBOSE", "1")  # oneDNN then prints every primitive on standard output
    assert extract_folder(make_images(4), tmp_path / "f.h5", TINY, OPTIONS).described == 4
