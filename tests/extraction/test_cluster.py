"""Extraction on Ray's own cluster of several nodes on this machine: the rows of a local run, whatever dies.

Each test is a process of its own, which Ray fills with threads and sockets; starting a cluster takes some seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from test_sharded import CPU, same

from sppfeat import extract_folder, open_store

pytest.importorskip("ray", reason="the extra `cluster` is not installed")

# A worker that is lost while it starts, the first time.
DIES_AT_START = """
import os, signal
from sppfeat.extraction import cluster as clusters

class Worker(clusters.Worker):
    def __init__(self, *given):
        try:
            os.close(os.open(dies, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            super().__init__(*given)
        else:
            os.kill(os.getpid(), signal.SIGKILL)

dies = {path!r}
clusters.Worker = Worker
"""
# Starts a head without room for workers and two nodes of one core; runs an extraction that takes some seconds.
DRIVER = """
import json, os, sys, threading, time
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
from ray.cluster_utils import Cluster
from sppfeat import Recipe, RunOptions, extract_folder
from sppfeat.extraction import ShardOptions

folder, output, recipe, remove = sys.argv[1:5]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
print("ready", flush=True)

def lose() -> None:
    time.sleep(float(remove))
    cluster.remove_node(nodes[0])
    cluster.add_node(num_cpus=1)

if float(remove):
    threading.Thread(target=lose, daemon=True).start()
done = extract_folder(
    folder, output, Recipe.from_json(recipe), RunOptions(device="cpu", num_workers=1),
    shards=ShardOptions(rows=12), cluster=cluster.address,
)
print(json.dumps({"images": done.images, "described": done.described, "failed": done.failed, "left": done.pending}))
"""


# In the environment of a driver, and of all that Ray starts for it in sessions of their own.
MARK = "SPPFEAT_TEST_OUTPUT"


def kill_all(process: subprocess.Popen[str], output: Path) -> None:
    """Kill a driver and its cluster, and no other Ray on this machine."""
    os.killpg(process.pid, signal.SIGKILL)
    mark = f"{MARK}={output}".encode()
    for other in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (other / "environ").read_bytes().split(b"\0"):
                os.kill(int(other.name), signal.SIGKILL)


@pytest.fixture
def photos(make_images: Callable[..., Path]) -> Path:
    """61 images, one of them damaged."""
    folder = make_images(60)
    whole = min(folder.iterdir()).read_bytes()
    (folder / "damaged.png").write_bytes(whole[: len(whole) // 2])
    return folder


def start(folder: Path, output: Path, remove: float = 0.0, before: str = "") -> subprocess.Popen[str]:
    """A driver with a cluster of its own; remove: seconds after which a node is lost and another one joins.

    before: code that it runs first.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", before + DRIVER, str(folder), str(output), TINY.to_json(), str(remove)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, MARK: str(output)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_cluster_describes_what_one_process_does(photos: Path, tmp_path: Path) -> None:
    extract_folder(photos, tmp_path / "one.h5", TINY, CPU)
    process = start(photos, tmp_path / "f")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-3000:]
    assert json.loads(out.splitlines()[-1]) == {"images": 61, "described": 60, "failed": 1, "left": 0}
    assert same(tmp_path / "f", tmp_path / "one.h5")
    assert extract_folder(photos, tmp_path / "f", TINY, CPU).reused == 60  # without the cluster


def test_a_lost_node_costs_no_row(photos: Path, tmp_path: Path) -> None:
    extract_folder(photos, tmp_path / "one.h5", TINY, CPU)
    process = start(photos, tmp_path / "f", remove=random.Random(5).uniform(3, 9))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert json.loads(out.splitlines()[-1]) == {"images": 61, "described": 60, "failed": 1, "left": 0}
    assert same(tmp_path / "f", tmp_path / "one.h5")


def test_a_worker_lost_while_it_starts_is_replaced(photos: Path, tmp_path: Path) -> None:
    process = start(photos, tmp_path / "f", before=DIES_AT_START.format(path=str(tmp_path / "died")))
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-3000:]
    assert json.loads(out.splitlines()[-1]) == {"images": 61, "described": 60, "failed": 1, "left": 0}
    assert (tmp_path / "died").exists()


def test_a_driver_that_is_killed_leaves_a_store_that_resumes(photos: Path, tmp_path: Path) -> None:
    extract_folder(photos, tmp_path / "one.h5", TINY, CPU)
    process = start(photos, tmp_path / "f")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "f").glob("shard-*.h5")) and time.monotonic() < deadline:
        time.sleep(0.05)
    kill_all(process, tmp_path / "f")  # as a cluster does with a lost driver's workers
    process.communicate()
    extract_folder(photos, tmp_path / "f", TINY, CPU)
    assert same(tmp_path / "f", tmp_path / "one.h5")
    assert np.asarray(open_store(tmp_path / "f").status).tolist().count(2) == 1
