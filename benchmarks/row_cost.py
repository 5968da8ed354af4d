"""What many images cost beside decoding and the network.

    python benchmarks/row_cost.py [--parts rows] [--rows 20000] [--repeats 3]

`rows`: the pipeline and the store alone. Decoding returns an image of 8 x 8 that is in memory already; the network
returns maps without reading its input, and pooling rows of noise. All else is a run's own: scheduling, batches,
normalizing, the stored type, the store's writer with its syncs. CPU time is the threads' own, by what they do, and the
process's for all of them; the wall clock stops when the last row's status is on disk. Medians are printed. `--profile`
prints where the scheduling thread and the writer spend their time instead.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import platform
import pstats
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import h5py
import numpy as np
from extract import processor

from sppfeat import Recipe, RunOptions, open_store
from sppfeat.backbones import Network
from sppfeat.extraction import branch, workers
from sppfeat.extraction.pipeline import Describer
from sppfeat.extraction.plan import Todo
from sppfeat.extraction.stages import Stages
from sppfeat.images import Fingerprint, Item, PreparedImage, decoder
from sppfeat.machine import available_cores
from sppfeat.store import StoreWriter, create_store

SHA: Final = "0" * 64
BATCH: Final = 32
STAGES: Final = {"decode": "decoding threads", "forward": "network threads", "store": "writing thread"}


class StubEngine:
    """An engine whose network and pooling cost nothing but the copy of their result."""

    name, device, streams, threads, batch_size, patience = "torch", "cpu", 2, 1, BATCH, 8

    def __init__(self, dim: int) -> None:
        self._pooled = np.random.default_rng(0).normal(size=(BATCH, dim)).astype(np.float32)

    def at_work(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    lane = at_work

    def feature_maps(self, images: np.ndarray) -> list[np.ndarray]:
        return [images]

    def pool(self, maps: np.ndarray) -> np.ndarray:
        return self._pooled[: len(maps)].copy()

    def release(self) -> None:
        pass


class ThreadTimes:
    """CPU seconds of the threads of this process, by the first part of their names; `MainThread` is this one."""

    def __init__(self) -> None:
        self._seconds: dict[threading.Thread, float] = {}
        self.look()
        self._before = dict(self._seconds)

    def look(self) -> None:
        """Read the clocks: a thread's is gone when it ends."""
        for thread in threading.enumerate():
            with contextlib.suppress(OSError):
                clock = time.pthread_getcpuclockid(cast(int, thread.ident))
                self._seconds[thread] = time.clock_gettime(clock)

    def by_name(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for thread, seconds in self._seconds.items():
            name = thread.name.split("_")[0]
            found[name] = found.get(name, 0.0) + seconds - self._before.get(thread, 0.0)
        return found


@contextlib.contextmanager
def stubbed(dim: int) -> Iterator[Describer]:
    """A describer of `dim` values without decoder and network."""
    prepared = np.zeros((8, 8, 3), np.uint8)
    recipe = Recipe(levels=(1,))
    description = SimpleNamespace(
        layer=SimpleNamespace(name="stub", stride=1, cells=0),
        fixed_side=None,
        hooked=False,
        steps=(),
        channels=dim,
        minimum_side=1,
        weights_sha256=SHA,
        geometry=lambda *_: None,
    )
    network = cast(Network, SimpleNamespace(descriptions=(description,), recipe=recipe))
    real = decoder.prepare_image, branch.load_engine
    patched, loading = cast(Any, decoder), cast(Any, branch)
    patched.prepare_image = lambda *_, **__: PreparedImage([prepared], (8, 8), Fingerprint(1, 1))
    loading.load_engine = lambda *_: StubEngine(dim)
    try:
        yield Describer(recipe, RunOptions(device="cpu", engine="torch"), network=network)
    finally:
        patched.prepare_image, loading.load_engine = real


def describe_rows(rows: int, dim: int, folder: Path) -> dict[str, float]:
    """Microseconds per row: CPU by thread, CPU of the process, and wall clock."""
    path = folder / "rows.h5"
    names = [f"{number:08}.jpg" for number in range(rows)]
    create_store(path, names, recipe=Recipe(), weights_sha256=SHA, dim=dim, source_root=str(folder))
    todo = [Todo(Item(str(folder), name), [row]) for row, name in enumerate(names)]
    store = open_store(path)
    with stubbed(dim) as describer:
        times, wall, cpu = ThreadTimes(), time.perf_counter(), time.process_time()
        with StoreWriter(store) as writer:
            for number, _ in enumerate(workers.fill_rows(writer, describer, todo, (), lambda: False, Stages())):
                if number % 1000 == 999:
                    times.look()
            writer.flush()
            times.look()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert open_store(path).counts()["done"] == rows
    path.unlink()
    found = times.by_name()
    return {name: 1e6 / rows * seconds for name, seconds in (*found.items(), ("process", cpu), ("wall", wall))}


def part_rows(arguments: argparse.Namespace) -> None:
    """The pipeline and the store, with decoder and network stubbed."""
    if arguments.profile:
        profile_rows(arguments)
        return
    shown = ", ".join(STAGES.values())
    print(f"\n{arguments.rows:,} rows, float16; microseconds of CPU per row, and the rate by the wall clock\n")
    print(f"| values per row | scheduling thread | {shown.replace(', ', ' | ')} | process | wall | rows/s |")
    print("|---|---|---|---|---|---|---|---|")
    for dim in map(int, arguments.dims.split(",")):
        runs = []
        for number in range(arguments.repeats + 1):
            with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
                found = describe_rows(arguments.rows, dim, Path(folder))
            if number:  # the first imports and allocates
                runs.append(found)
        medians = {name: statistics.median(run.get(name, 0.0) for run in runs) for name in {n for r in runs for n in r}}
        columns = ("MainThread", *STAGES, "process", "wall")
        cells = " | ".join(f"{medians.get(name, 0.0):.1f}" for name in columns)
        print(f"| {dim:,} | {cells} | {1e6 / medians['wall']:,.0f} |", flush=True)


def profile_rows(arguments: argparse.Namespace) -> None:
    """Where the threads spend their time, by Python's profiler, which triples the cost of a call."""
    for dim in map(int, arguments.dims.split(",")):
        profiles: dict[str, list[cProfile.Profile]] = {}
        run = threading.Thread.run

        def profiled(thread: threading.Thread, run: Callable[..., None] = run, into: Any = profiles) -> None:
            profile = cProfile.Profile()
            into.setdefault(thread.name.split("_")[0], []).append(profile)
            profile.runcall(run, thread)

        cast(Any, threading.Thread).run = profiled
        try:
            with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
                main_thread = cProfile.Profile()
                main_thread.runcall(describe_rows, arguments.rows, dim, Path(folder))
        finally:
            cast(Any, threading.Thread).run = run
        for name, several in {"scheduling": [main_thread], **profiles}.items():
            print(f"\n{dim:,} values per row: {name}\n")
            statistics_of = pstats.Stats(several[0])
            for other in several[1:]:
                statistics_of.add(other)
            statistics_of.strip_dirs().sort_stats("tottime").print_stats(18)


PARTS: Final = {"rows": part_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dims", default="320,16000", help="values per row")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", help="folder for temporary files", default=None)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    libraries = ", ".join(f"{name} {version(name)}" for name in ("numpy", "h5py"))
    hdf5 = h5py.version.hdf5_version
    print(f"{processor()}, {available_cores()} cores, Python {platform.python_version()}, {libraries}, HDF5 {hdf5}")
    for part in arguments.parts.split(","):
        if part not in PARTS:
            parser.error(f"unknown part {part!r}: expected one of {', '.join(PARTS)}")
        PARTS[part](arguments)


if __name__ == "__main__":
    main()
