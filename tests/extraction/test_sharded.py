"""Extraction into a folder of shards: the rows of a single file, whatever interrupts it."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from sppfeat import (
    BackboneError,
    RunOptions,
    Status,
    StoreError,
    UsageError,
    extract_folder,
    open_store,
    verify_store,
)
from sppfeat.engines.torch_engine import TorchEngine
from sppfeat.extraction import ShardOptions, sharded
from sppfeat.progress import Observer
from sppfeat.store import Manifest, Store, lock_store, open_folder, reading

MakeImages = Callable[..., Path]
CPU = RunOptions(device="cpu")


def rows(store: Store) -> dict[str, tuple[object, ...]]:
    """What a store holds of each image."""
    values = np.asarray(store.descriptors[:], np.float32)
    return {
        name: (int(status), tuple(size), bytes(error), int(length), int(mtime), row.tobytes())
        for name, status, size, error, length, mtime, row in zip(
            store.names,
            store.status,
            store.image_size[:].tolist(),
            store.error[:],
            store.file_size[:],
            store.file_mtime_ns[:],
            values,
            strict=True,
        )
    }


def same(folder: Path, file: Path) -> bool:
    """Whether two stores hold the same rows; values may differ by one unit in the last place of float16."""
    ours, theirs = rows(open_store(folder)), rows(open_store(file))
    assert ours.keys() == theirs.keys()
    for name, row in ours.items():
        assert row[:-1] == theirs[name][:-1], name
        a, b = (np.frombuffer(one, np.float32) for one in (row[-1], theirs[name][-1]))  # type: ignore[arg-type]
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6, err_msg=name)
    assert not verify_store(open_store(folder))
    return True


@pytest.fixture
def photos(make_images: MakeImages) -> Path:
    """23 images of several shapes, one of them damaged."""
    folder = make_images(22)
    whole = next(iter(sorted(folder.iterdir()))).read_bytes()
    (folder / "damaged.png").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.mark.parametrize("size", [1, 4, 23, 1000])
def test_shards_hold_what_one_file_holds(photos: Path, tmp_path: Path, size: int) -> None:
    one = extract_folder(photos, tmp_path / "one.h5", TINY, CPU)
    done = extract_folder(photos, tmp_path / "many", TINY, CPU, shards=ShardOptions(rows=size))
    assert (done.images, done.described, done.failed, done.pending) == (23, 22, 1, 0)
    assert sharded._open_shard.cache_info().currsize == 0
    assert (done.stages.workers, done.stages.streams) == (one.stages.workers, one.stages.streams)
    assert len(list((tmp_path / "many").glob("shard-*.h5"))) == -(-23 // size)
    assert same(tmp_path / "many", tmp_path / "one.h5")
    again = extract_folder(photos, f"{tmp_path}/many/", TINY, CPU)
    assert (again.described, again.reused, again.failed) == (0, 22, 1)


def test_a_slash_makes_a_folder(photos: Path, tmp_path: Path) -> None:
    extract_folder(photos, f"{tmp_path}/f/", TINY, CPU)
    assert {path.name for path in (tmp_path / "f").iterdir()} == {"manifest.json", "all.h5", "shard-00000.h5"}


def test_new_changed_and_failed_images(photos: Path, tmp_path: Path) -> None:
    output, options = tmp_path / "f", ShardOptions(rows=8)
    extract_folder(photos, output, TINY, CPU, shards=options)
    before = {path.name: path.read_bytes() for path in output.glob("shard-*.h5")}
    held = open_store(output)
    first = held.descriptors[:8]

    Image.new("RGB", (90, 70), "red").save(photos / "0001.png")
    Image.new("RGB", (90, 70), "blue").save(photos / "damaged.png")
    Image.new("RGB", (90, 70), "green").save(photos / "0000-new.png")
    (photos / "0002.png").unlink()
    done = extract_folder(photos, output, TINY, CPU, shards=options)
    assert (done.described, done.changed, done.reused, done.failed, done.gone) == (3, 1, 20, 0, 1)
    after = {path.name: path.read_bytes() for path in output.glob("shard-*.h5")}
    changed = {name for name in after if before.get(name) != after[name]}
    assert len(changed) == 3 and len(after) == 4, "two shards with changed rows, and one that is new"
    np.testing.assert_array_equal(held.descriptors[:8], first)  # its readers keep the old rows
    assert not verify_store(open_store(output))

    shutil.copy(photos / "0000-new.png", photos / "0002.png")
    extract_folder(photos, tmp_path / "one.h5", TINY, CPU)
    extract_folder(photos, output, TINY, CPU)
    assert same(output, tmp_path / "one.h5")


def test_windows(photos: Path, tmp_path: Path) -> None:
    boxes = np.array([[n, 0, 30 + n, 29] for n in range(5)], np.float64)
    windows = {f"{n:04}.png": boxes for n in range(3)} | {"none.png": boxes[:2], "0005.png": boxes[:0]}
    extract_folder(photos, tmp_path / "one.h5", TINY, CPU, windows=windows)
    done = extract_folder(photos, tmp_path / "f", TINY, CPU, windows=windows, shards=ShardOptions(rows=4))
    assert (done.images, done.described, done.failed, done.without_windows) == (17, 15, 2, 20)
    assert same(tmp_path / "f", tmp_path / "one.h5")
    more = windows | {"0004.png": boxes[:1]}
    done = extract_folder(photos, tmp_path / "f", TINY, CPU, windows=more)
    assert (done.described, done.reused, done.gone) == (1, 15, 0)
    with pytest.raises(UsageError, match="the windows belong to none of the 23 images"):
        extract_folder(photos, tmp_path / "g", TINY, CPU, windows={"none.png": boxes}, shards=ShardOptions())
    assert not (tmp_path / "g").exists()


def test_interrupted_runs_resume(photos: Path, tmp_path: Path) -> None:
    """Stopped again and again, also while rows of a published shard are described anew."""
    extract_folder(photos, tmp_path / "one.h5", TINY, CPU)
    output, options = tmp_path / "f", ShardOptions(rows=6)
    dice, slowly = random.Random(1), RunOptions(device="cpu", batch_size=1, num_workers=1)
    for turn in range(200):
        polls = itertools.count()
        last = dice.randrange(2, 6)
        done = extract_folder(photos, output, TINY, slowly, shards=options, stop=lambda p=polls, n=last: next(p) > n)
        if not done.interrupted:
            break
        if turn in (1, 3):
            os.utime(photos / "0000.png", ns=(turn, turn))
    assert not done.interrupted and turn > 3
    os.utime(photos / "0000.png", ns=(7, 7))
    extract_folder(photos, tmp_path / "one.h5", TINY, CPU)
    extract_folder(photos, output, TINY, CPU)
    assert same(output, tmp_path / "one.h5")


@pytest.mark.parametrize("complete", [False, True])
def test_a_shard_that_another_process_still_fills_is_waited_for(photos: Path, tmp_path: Path, complete: bool) -> None:
    """A worker of a cluster may outlive its driver by some seconds."""
    output, options, polls = tmp_path / "f", ShardOptions(rows=23), itertools.count()
    extract_folder(photos, tmp_path / "one.h5", TINY, CPU)
    if complete:
        extract_folder(photos, output, TINY, CPU, shards=options)
        with lock_store(output, folder=True):
            open_folder(output, writable=True).rework_shard(0)
    else:
        extract_folder(photos, output, TINY, CPU, shards=options, stop=lambda: next(polls) > 4)
    (shard,) = output.glob(".building-*.h5")
    before = shard.read_bytes()
    refused = []

    class Locked(Observer):
        def row(self, name: str, error: str | None) -> None:
            with open(shard) as other, pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            refused.append(name)

    with ThreadPoolExecutor() as pool, open(shard) as worker:
        fcntl.flock(worker, fcntl.LOCK_EX)
        run = pool.submit(extract_folder, photos, output, TINY, CPU, observer=Locked())
        time.sleep(3)
        assert not run.done() and shard.read_bytes() == before
        fcntl.flock(worker, fcntl.LOCK_UN)
        done = run.result()
    assert len(refused) == done.described + done.failed - complete  # of a complete one, the failed row is not tried
    assert same(output, tmp_path / "one.h5")
    assert not list(output.glob(".*"))


def test_kill_9_at_random_moments(photos: Path, tmp_path: Path) -> None:
    """Some 20 kills of a process that describes into shards of 5 rows: a minute, most of it starting Python."""
    extract_folder(photos, tmp_path / "one.h5", TINY, CPU)
    output = tmp_path / "f"
    code = (
        "import sys, time; from sppfeat import extract_folder, Recipe, RunOptions\n"
        "from sppfeat.extraction import ShardOptions; from sppfeat.images import decoder\n"
        "prepare = decoder.prepare_image\n"
        "decoder.prepare_image = lambda *a, **k: (time.sleep(0.1), prepare(*a, **k))[1]\n"
        "print('ready', flush=True)\n"
        "extract_folder(sys.argv[1], sys.argv[2], Recipe.from_json(sys.argv[3]),"
        " RunOptions(device='cpu', num_workers=1), shards=ShardOptions(rows=5))"
    )
    dice = random.Random(0)
    killed = 0
    for _ in range(40):
        command = [sys.executable, "-c", code, str(photos), str(output), TINY.to_json()]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            try:
                assert process.wait(timeout=dice.uniform(0.2, 1.2)) == 0
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                killed += 1
    assert killed >= 2
    extract_folder(photos, output, TINY, CPU)
    assert same(output, tmp_path / "one.h5")
    assert not [path for path in output.iterdir() if path.name.startswith(".")]


def test_parts_are_disjoint_and_complete(photos: Path, tmp_path: Path) -> None:
    extract_folder(photos, tmp_path / "one.h5", TINY, CPU)
    names: list[str] = []
    for number in (1, 2, 3):
        output = tmp_path / f"part-{number}"
        extract_folder(photos, output, TINY, CPU, shards=ShardOptions(part=(number, 3)))
        names += open_store(output).names[:]
        with pytest.raises(StoreError, match=f"expected part {number}/3, which this store describes, found all images"):
            extract_folder(photos, output, TINY, CPU)
    assert sorted(names) == sorted(open_store(tmp_path / "one.h5").names)
    with pytest.raises(UsageError, match="part must be i/n"):
        ShardOptions(part=(4, 3))


def test_what_does_not_belong_together_is_refused(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "f"
    extract_folder(photos, output, TINY, CPU, shards=ShardOptions(rows=9))
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(StoreError, match="was made with another recipe"):
        extract_folder(photos, output, replace(TINY, scales=(96,)), CPU)
    (tmp_path / "others").mkdir()
    Image.new("RGB", (70, 70)).save(tmp_path / "others" / "x.png")
    with pytest.raises(StoreError, match="its names are relative to"):
        extract_folder(tmp_path / "others", output, TINY, CPU)
    with pytest.raises(StoreError, match="already exists"):
        extract_folder(photos, output, TINY, CPU, resume=False)
    with pytest.raises(StoreError, match="found a file"):
        extract_folder(photos, photos / "0000.png", TINY, CPU, shards=ShardOptions())
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    done = extract_folder(tmp_path / "others", output, TINY, CPU, overwrite=True)
    assert done.images == 1 and list(open_store(output).names) == ["x.png"]


def test_a_network_that_cannot_run_leaves_no_trace(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise BackboneError("cannot be run")

    torch_only = RunOptions(device="cpu", engine="torch")
    extract_folder(photos, tmp_path / "old", TINY, torch_only, shards=ShardOptions(rows=9))
    os.utime(photos / "0000.png", ns=(5, 5))
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    monkeypatch.setattr(TorchEngine, "__init__", refuse)
    for output in ("new", "old"):
        with pytest.raises(BackboneError, match="cannot be run"):
            extract_folder(photos, tmp_path / output, TINY, torch_only, shards=ShardOptions(rows=9))
    assert not (tmp_path / "new").exists()
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before


def test_the_sources_are_listed_while_images_are_described(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collection that takes hours to list is not listed first."""
    listed: list[float] = []
    from sppfeat.images import Sources

    stream = Sources.__iter__

    def slowly(self: Sources) -> object:
        for item in stream(self):
            time.sleep(0.05)
            listed.append(time.monotonic())
            yield item

    monkeypatch.setattr(Sources, "__iter__", slowly)
    monkeypatch.setattr("sppfeat.extraction.streaming.BATCH_ROWS", 4)

    class First:
        at = 0.0

        def __getattr__(self, name: str) -> Callable[..., None]:
            def call(*arguments: object, **named: object) -> None:
                if name == "row" and not self.at:
                    self.at = time.monotonic()

            return call

    first = First()
    extract_folder(photos, tmp_path / "f", TINY, CPU, shards=ShardOptions(rows=4), observer=first)  # type: ignore[arg-type]
    assert first.at < listed[-1]


def test_command_line(photos: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from sppfeat_cli import main; main()"]
    tiny = ["--backbone", "timm:test_resnet", "--weights", "random", "--scales", "64", "--levels", "2,1"]

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *words], capture_output=True, text=True)

    done = call("extract", str(photos), "-o", f"{tmp_path}/f/", "--json", "--quiet", *tiny)
    assert done.returncode == 3 and json.loads(done.stdout)["described"] == 22
    assert call("extract", str(photos), "-o", f"{tmp_path}/f", "--part", "x", *tiny).returncode == 2
    empty = tmp_path / "empty"
    empty.mkdir()
    done = call("extract", str(empty), "-o", f"{tmp_path}/g/", *tiny)
    assert done.returncode == 2 and done.stderr == f"sppfeat: {empty}: expected images, found none\n"
    assert not (tmp_path / "g").exists()
    assert open_store(tmp_path / "f").counts()["done"] == 22
    assert Status.FAILED in open_store(tmp_path / "f").status


def test_other_images_in_the_folder_of_an_earlier_run(make_images: MakeImages, tmp_path: Path) -> None:
    """What one run has kept of a folder's shards says nothing to the next one of the process."""

    def describe(folder: Path, **options: bool) -> int:
        done = extract_folder(folder, tmp_path / "out", TINY, CPU, shards=ShardOptions(), **options)  # type: ignore[arg-type]
        return done.described

    first, second = make_images(4, "in/first"), make_images(4, "in/second", seed=1)
    for path in list(second.iterdir()):
        path.rename(path.with_name(f"other-{path.name}"))
    assert describe(first) == 4 and describe(first) == 0
    assert describe(second, overwrite=True) == 4 and describe(second) == 0


def test_a_run_that_ends_while_its_store_is_opened(
    make_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read of the manifest may be from before its last shard."""
    extract_folder(make_images(4), tmp_path / "out", TINY, CPU, shards=ShardOptions())
    mark, read = tmp_path / "out" / ".unfinished", reading.read_manifest
    mark.touch()

    def end(folder: Path) -> Manifest:
        mark.unlink()
        return read(folder)

    monkeypatch.setattr(reading, "read_manifest", end)
    assert open_store(tmp_path / "out").unfinished
