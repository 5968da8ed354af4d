"""Large stores, clusters and sources: seconds, images per second, peak memory, and what a loss costs.

    python benchmarks/scale.py make FOLDER --rows 10000000
    python benchmarks/scale.py inspect FOLDER...
    python benchmarks/scale.py plan FOLDER...
    python benchmarks/scale.py add FOLDER
    python benchmarks/scale.py losses IMAGES
    python benchmarks/scale.py sources IMAGES
    python benchmarks/scale.py cluster IMAGES

`make` writes a folder of shards of a small network through the store's own code: every shard is created, filled and
published as by an extraction, except that its columns are filled whole and not row by row. One row in a thousand is
failed. Nothing is described, and no image exists.

`plan` lists the images of a store anew, as a source that knows their fingerprints does (an archive, a bucket), and
matches them with the rows: all described already; all, after a fifth of the shards was lost; all, in random order.
`add` describes one more image, as a whole process, and checks that no older file has changed.

Peak memory is that of the process itself (VmHWM), without the page cache, which holds the files.

`losses` describes a folder of images into small shards, on a Ray cluster of two nodes with one core each on this
machine, or in one process, and takes something away at random moments that fall all over the run: a node; the driver
(`kill -9`), which is then started again, in turn on the cluster and without it; the disk of one worker, whose process
may write no file beyond 256 kB from then on. In the end each store is compared with one of an uninterrupted run.
`sources` describes the same images from a folder, archives and local servers, in turn. `cluster` compares two workers
of one core with one process of two. Every run is a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.parse
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from sppfeat import Store

# 32 values a row, and a network of which 10 million rows fit onto a disk.
NETWORK: Final = {
    "backbone": "timm:test_resnet",
    "weights": "random",
    "scales": (64,),
    "levels": (1,),
    "layer": "layer1",
}
FAILED_EVERY: Final = 1000
# Beyond the first rows of a shard, and what Ray logs.
DISK_BYTES: Final = 256 << 10
# Runs a command of sppfeat, and writes its peak memory in kB to the file descriptor that it is given.
CHILD: Final = """
import os, sys
from sppfeat_cli import main
try:
    main()
finally:
    status = open("/proc/self/status").read()
    os.write(int(os.environ["PEAK"]), status.partition("VmHWM:")[2].split()[0].encode())
"""


def make(folder: Path, rows: int) -> None:
    """Write a folder store of `rows` rows; adds shards to what an interrupted run left."""
    from sppfeat import Recipe
    from sppfeat.backbones import Network
    from sppfeat.store import SHARD_ROWS, create_folder, lock_store, open_folder

    images = folder.absolute().with_name(folder.name + "-images")
    images.mkdir(exist_ok=True)
    network = Network(Recipe(**NETWORK)).descriptions[0]  # type: ignore[arg-type]

    with lock_store(folder, folder=True):
        if (folder / "manifest.json").exists():
            store = open_folder(folder, writable=True)
        else:
            store = create_folder(
                folder,
                recipe=network.recipe,
                weights_sha256=network.weights_sha256,
                dim=network.dim,
                source_root=str(images),
            )
        for file in store.building.values():
            file.unlink()
        store.building.clear()
        for start in range(sum(store.manifest.counts().values()), rows, SHARD_ROWS):
            shard = store.begin_shard([name_of(number) for number in range(start, min(start + SHARD_ROWS, rows))])
            fill(shard.path, start)
            store.publish(shard)
        store.finish()


def name_of(number: int) -> str:
    return f"{number // 1000:06}/{number:09}.jpg"


def fill(path: Path, seed: int) -> None:
    """Describe all rows of a shard under work, column by column."""
    import numpy as np

    from sppfeat.store import open_store

    columns = open_store(path).columns
    view = {name: np.memmap(path, one.dtype, "r+", one.offset, one.shape) for name, one in columns.items()}
    count = len(view["status"])
    values = np.random.default_rng(seed).random(view["descriptors"].shape).astype(np.float16)
    failed = np.arange(count) % FAILED_EVERY == 0
    values[failed] = 0
    view["descriptors"][:] = values
    view["checksum"][:] = [zlib.crc32(row.data) for row in values]
    view["image_size"][:] = np.where(failed[:, None], 0, (640, 480))
    view["error"][failed] = b"could not be decoded"
    view["file_size"][:] = 100_000 + np.arange(count)
    view["file_mtime_ns"][:] = 1_700_000_000_000_000_000
    for column in view.values():
        column.flush()
    view["status"][:] = np.where(failed, 2, 1)
    view["status"].flush()


def measured(*arguments: str) -> tuple[float, int]:
    """Seconds of a command as a whole process, and its peak memory in bytes."""
    receiver, sender = os.pipe()
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        env={**os.environ, "PEAK": str(sender)},
        pass_fds=[sender],
        stdout=subprocess.DEVNULL,
        check=True,
    )
    seconds = time.perf_counter() - began
    os.close(sender)
    with os.fdopen(receiver) as said:
        return seconds, int(said.read()) << 10


def inspect(folders: list[Path], repeats: int) -> None:
    """Print a table of `sppfeat inspect`, its `--failures` and its `--verify`."""
    from sppfeat import open_store

    print("| command | rows | seconds | rows/s | peak memory, MB |\n|---|---|---|---|---|")
    for option in ([], ["--failures"], ["--verify"]):
        for folder in folders:
            rows = len(open_store(folder))
            runs = [measured("inspect", str(folder), *option) for _ in range(repeats)]
            seconds, peak = min(run[0] for run in runs), max(run[1] for run in runs)
            what = " ".join(["inspect", *option])
            print(f"| `{what}` | {rows:,} | {seconds:.2f} | {rows / seconds:,.0f} | {peak / 1e6:.0f} |", flush=True)


def plan(folders: list[Path]) -> None:
    """Print a table of planning."""
    from sppfeat import open_store

    print("| images listed | rows of the store | to describe | seconds | rows/s | peak memory, MB |")
    print("|---|---|---|---|---|---|")
    for what in ("in order", "a fifth new", "in random order"):
        for folder in folders:
            rows = len(open_store(folder))
            command = [sys.executable, __file__, "plan-one", str(folder), "--rows", str(rows), "--what", what]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
            seconds, peak, known, todo = float(done[0]), int(done[1]) / 1e6, int(done[2]), int(done[3])
            rate = rows / seconds
            print(f"| {rows:,}, {what} | {known:,} | {todo:,} | {seconds:.1f} | {rate:,.0f} | {peak:.0f} |", flush=True)


def plan_one(folder: Path, rows: int, what: str) -> None:
    """Plan a run over a folder, and print its seconds, peak memory in bytes, the store's rows and those to describe."""
    import msgspec
    import numpy as np

    from sppfeat.extraction.sharded import OnDisk
    from sppfeat.extraction.streaming import StreamingPlan
    from sppfeat.images import Fingerprint, Item
    from sppfeat.store import SHARD_ROWS, open_folder

    class Listed:
        """An image of which a listing told size and time."""

        __slots__ = ("number",)

        def __init__(self, number: int) -> None:
            self.number = number

        def fingerprint(self) -> Fingerprint:
            return Fingerprint(100_000 + self.number % SHARD_ROWS, 1_700_000_000_000_000_000)

    store = open_folder(folder)
    if what == "a fifth new":
        kept = [entry for entry in store.manifest.shards if entry.index % 5 != 2]
        store.manifest = msgspec.structs.replace(store.manifest, shards=kept)
    order = np.random.default_rng(0).permutation(rows) if what == "in random order" else range(rows)
    began = time.perf_counter()
    items = (Item("/r", name_of(int(number)), content=Listed(int(number))) for number in order)  # type: ignore[arg-type]
    numbers = sorted(store.shards)
    planned = StreamingPlan([OnDisk(store, number) for number in numbers], items, shard_rows=SHARD_ROWS)
    todo = sum(job.rows for job in planned.jobs())
    seconds = time.perf_counter() - began
    assert planned.listed.reused + planned.listed.failed_before == rows - todo, planned.listed
    peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    print(seconds, int(peak) << 10, sum(store.manifest.counts().values()), todo)


def add(folder: Path, repeats: int) -> None:
    """Print a table of adding one image."""
    from PIL import Image

    from sppfeat import open_store

    images = Path(open_store(folder).source_root)
    options = ["--backbone", "timm:test_resnet", "--weights", "random", "--scales", "64", "--levels", "1"]
    options += ["--layer", "layer1", "--device", "cpu"]
    found = []
    for _ in range(repeats + 1):  # the first fills caches
        rows = len(open_store(folder))
        before = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.glob("shard-*.h5")}
        image = images / f"{rows:09}.png"
        Image.new("RGB", (64, 64), (rows % 256, 0, 0)).save(image)
        found.append(measured("extract", str(image), "-o", f"{folder}/", *options))
        after = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.glob("shard-*.h5")}
        assert before.items() <= after.items() and len(after) == len(before) + 1
        assert len(open_store(folder)) == rows + 1
    seconds = sorted(run[0] for run in found[1:])[repeats // 2]
    print("| what | rows of the store | seconds | peak memory, MB |\n|---|---|---|---|")
    print(f"| `extract` of one new image | {rows:,} | {seconds:.2f} | {max(run[1] for run in found) / 1e6:.0f} |")


class Told:
    """Adds a line for each described row to a file, which outlives who is killed: seconds, process and name."""

    def __init__(self, path: str) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def row(self, name: str, error: str | None) -> None:
        os.write(self.file, f"{time.time()} {os.getpid()} {name}\n".encode())


def told(path: Path) -> list[tuple[float, int, str]]:
    """What `Told` wrote; nothing before the first row."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [(float(seconds), int(pid), name) for seconds, pid, name in (line.split(" ", 2) for line in lines)]


def extract_one(source: str, output: str, scale: int, rows: int, workers: int, address: str | None, log: str) -> None:
    """Describe images, with a line in the file `log` for each; prints seconds."""
    from sppfeat import Recipe, RunOptions, extract_folder
    from sppfeat.extraction import ShardOptions, cluster
    from sppfeat.progress import Observer

    class Telling(cluster.Worker):
        """The driver hears late of what a worker did, and never if either dies."""

        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            hear, file = self._log.row, Told(log)

            def row(name: str, error: str | None) -> None:
                hear(name, error)
                file.row(name, error)

            self._log.row = row  # type: ignore[method-assign]

    cluster.Worker = Telling  # type: ignore[assignment,misc]
    observer = Observer()
    if address is None:
        observer.row = Told(log).row  # type: ignore[method-assign]
    options = RunOptions(device="cpu", num_workers=workers or None)
    recipe, shards = Recipe(scales=(scale,)), ShardOptions(rows=rows)
    done = extract_folder(source, output, recipe, options, shards=shards, cluster=address, observer=observer)
    if done.failed or done.pending:
        raise SystemExit(f"{done.failed} images failed, {done.pending} are left")
    print(done.seconds)


class Runs:
    """Runs of `extract_one` with the same images, scale and shards, and what they left in a folder."""

    def __init__(self, folder: Path, source: Path, scale: int, rows: int) -> None:
        self.folder, self.source, self.scale, self.rows = folder, source, scale, rows
        self.count = 0

    def start(self, store: Path, address: str | None = None, *, source: str = "", workers: int = 0) -> Run:
        self.count += 1
        log = self.folder / f"told-{self.count}.txt"
        command = [sys.executable, __file__, "extract-one", source or str(self.source), str(store), "--log", str(log)]
        command += ["--scale", str(self.scale), "--shard-rows", str(self.rows)]
        command += ["--workers", str(1 if address else workers), *(["--address", address] if address else [])]
        return Run(command, log)


class Run:
    """One process, from its start."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.command, self.log = " ".join(command), log
        self.began = time.time()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait_until(self, seconds: float) -> bool:
        """Wait that long from the start; whether the process still runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0, self.began + seconds - time.time()))
        return self.process.poll() is None

    def end(self) -> float:
        """Wait for a process that has to succeed; the seconds that it printed."""
        out, errors = self.process.communicate()
        if self.process.returncode:
            raise SystemExit(f"{self.command} ended with {self.process.returncode}:\n{errors}")
        return float(out.splitlines()[-1])  # Ray prints what a lost node said

    def kill(self) -> None:
        """`kill -9` of this process alone."""
        self.process.kill()
        self.process.communicate()


def differing(store: Path, whole: Path) -> int:
    """Rows that are not as those of an uninterrupted run; rows that are missing, doubled or damaged are such ones.

    Values may differ by one unit in the last place of the stored type.
    """
    import numpy as np

    from sppfeat import open_store, verify_store

    def about(found: Store) -> dict[str, tuple[Any, ...]]:
        columns = (found.status, found.image_size, found.file_size, found.file_mtime_ns, found.descriptors)
        return {name: tuple(row) for name, *row in zip(found.names, *(np.asarray(one) for one in columns), strict=True)}

    found = open_store(store)
    ours, theirs = about(found), about(open_store(whole))
    wrong = set(verify_store(found)) | (ours.keys() ^ theirs.keys())
    for name in ours.keys() & theirs.keys():
        a, b = ours[name][-1], theirs[name][-1]
        near = np.abs(a.astype(np.float32) - b) <= np.spacing(np.maximum(np.abs(a), np.abs(b)))
        if not near.all() or any(np.any(x != y) for x, y in zip(ours[name][:-1], theirs[name][:-1], strict=True)):
            wrong.add(name)
    return len(found) - len(ours) + len(wrong)


@contextlib.contextmanager
def ray_cluster() -> Iterator[Any]:
    """A cluster of this machine: a head without room for workers, and two nodes of one core."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]


def names_of(log: Path) -> list[str]:
    return [name for _, _, name in told(log)]


def losses(runs: Runs, nodes: int, disks: int, kills: int) -> None:
    """Print a table of what is lost with a node, with a worker's disk, and with a driver."""
    from sppfeat import open_store

    moments = random.Random(0)
    whole = runs.folder / "whole"

    def report(kind: str, times: int, stores: list[Path], again: list[int]) -> None:
        compared = len(stores) * len(open_store(whole))
        differ = sum(differing(store, whole) for store in stores)
        left = sum(len(list(store.glob(".*"))) for store in stores)
        span = f"{min(again, default=0)}-{max(again, default=0)}"
        print(f"| {kind} | {times} | {len(stores)} | {compared:,} | {differ} | {span} | {left} |", flush=True)

    def strike_each(kind: str, times: int, strike: Callable[[Run, int], bool], least: int = 0) -> None:
        """Runs that go on by themselves after a loss.

        One that was over before, or in which less than `least` processes described rows, is not counted.
        """
        stores: list[Path] = []
        again = []
        while len(stores) < times:
            store = runs.folder / f"store-{runs.count}"
            run = runs.start(store, cluster.address)
            moment = lasted[cluster.address] * moments.uniform(len(stores), len(stores) + 1) / times
            struck = run.wait_until(moment) and strike(run, len(stores))
            run.end()
            while len(cluster.worker_nodes) < 2:
                cluster.add_node(num_cpus=1)
            if struck and len({pid for _, pid, _ in told(run.log)}) >= least:
                stores.append(store)
                again.append(len(names_of(run.log)) - len(set(names_of(run.log))))
        report(kind, times, stores, again)

    def lose_node(run: Run, number: int) -> bool:
        """In turn another node joins at once, or the one that is left goes on alone."""
        cluster.remove_node(moments.choice(sorted(cluster.worker_nodes, key=id)), allow_graceful=False)
        if number % 2 == 0:
            cluster.add_node(num_cpus=1)
        return True

    def fill_disk(run: Run, number: int) -> bool:
        """The worker that described the last row can write no file beyond some rows of a shard."""
        while not told(run.log):
            time.sleep(0.01)
        worker = told(run.log)[-1][1]
        with contextlib.suppress(ProcessLookupError):  # there was nothing more to do
            resource.prlimit(worker, resource.RLIMIT_FSIZE, (DISK_BYTES, DISK_BYTES))
        return True

    print("| lost | times | stores | rows compared | rows that differ | rows described again | files left over |")
    print("|---|---|---|---|---|---|---|")
    with ray_cluster() as cluster:
        joined = cluster.address  # None once it is shut down
        lasted = {}
        for address, store in ((None, whole), (joined, runs.folder / "cluster")):
            run = runs.start(store, address)
            run.end()
            lasted[address] = time.time() - run.began
        report("nothing, on the cluster", 1, [store], [len(names_of(run.log)) - len(set(names_of(run.log)))])
        strike_each("a node", nodes, lose_node)
        strike_each("the disk of a worker", disks, fill_disk, least=3)

        stores = []
        again: dict[str | None, list[int]] = defaultdict(list)
        killed = 0
        while killed < kills:
            stores.append(runs.folder / f"store-{runs.count}")
            logs: list[tuple[str | None, Path]] = []
            while True:
                address = joined if killed % 2 else None
                run = runs.start(stores[-1], address)
                logs.append((address, run.log))
                if killed == kills or not run.wait_until(lasted[address] * moments.random()):
                    run.end()
                    break
                run.kill()
                killed += 1
            for at, (address, log) in enumerate(logs[:-1]):
                later = {name for _, log in logs[at + 1 :] for name in names_of(log)}
                again[address].append(len(later.intersection(names_of(log))))
        report("the driver", kills, stores, again[None] + again[joined])
    for address, where in ((None, "in one process"), (joined, "on the cluster")):
        counts = f"{min(again[address], default=0)}-{max(again[address], default=0)}"
        print(f"\nUninterrupted {where}: {lasted[address]:.0f} s; a driver killed there: {counts} rows again.")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def serving(port: int, *command: str) -> Iterator[str]:
    """The URL of a server in a process of its own."""
    quiet = subprocess.DEVNULL
    with subprocess.Popen([sys.executable, "-m", *command], stdout=quiet, stderr=quiet) as server:
        try:
            while True:
                with contextlib.suppress(ConnectionRefusedError):
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()


def pack(folder: Path, images: dict[str, Path]) -> dict[str, Path]:
    """Archives of the images, by kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = {kind: folder / f"images.{kind}" for kind in ("tar", "tar.gz", "zip", "parquet")}
    for kind, mode in (("tar", "w"), ("tar.gz", "w:gz")):
        with tarfile.open(found[kind], mode) as tar:  # type: ignore[call-overload]
            for name, path in images.items():
                tar.add(path, name)
    with zipfile.ZipFile(found["zip"], "w", zipfile.ZIP_DEFLATED) as file:
        for name, path in images.items():
            file.write(path, name)
    rows = [{"bytes": path.read_bytes(), "path": name} for name, path in images.items()]
    image = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    # As `datasets` writes them.
    pq.write_table(pa.table({"image": image}), found["parquet"], row_group_size=100, use_dictionary=False)
    return found


def sources(runs: Runs, rounds: int) -> None:
    """Print a table of images per second by source."""
    import numpy as np

    from sppfeat import open_store
    from sppfeat.images import find_images

    found = find_images([runs.source])
    images = {name: runs.source / name for name in found.names}
    web, bucket = free_port(), free_port()
    os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{bucket}"}
    http = ("http.server", str(web), "--bind", "127.0.0.1", "--protocol", "HTTP/1.1", "-d", str(runs.source))
    with serving(web, *http) as url, serving(bucket, "moto.server", "-p", str(bucket)):
        import s3fs  # type: ignore[import-untyped]

        files = s3fs.S3FileSystem()
        files.mkdir("bucket")
        files.put([str(path) for path in images.values()], [f"bucket/images/{name}" for name in images])
        listing = runs.folder / "urls.txt"
        listing.write_text("".join(f"{url}/{urllib.parse.quote(name)}\n" for name in images))
        kinds = {"folder": str(runs.source), **{kind: str(path) for kind, path in pack(runs.folder, images).items()}}
        kinds |= {"HTTP server": str(listing), "S3 server": "s3://bucket/images"}

        runs.start(runs.folder / "warm").end()
        seconds: dict[str, list[float]] = defaultdict(list)
        for turn in range(rounds):
            for kind, source in kinds.items():
                seconds[kind].append(runs.start(runs.folder / f"{kind}-{turn}", source=source).end())

    def rows(kind: str) -> dict[str, bytes]:
        """Descriptors by name in the folder, which some sources give with more before it."""
        store = open_store(runs.folder / f"{kind}-0")
        names = [urllib.parse.unquote(f"{store.source_root}/{name}") for name in store.names]
        roots = (f"{runs.source}/", f"{runs.folder}/images.{kind}/", f"{url}/", "s3://bucket/images/")
        for root in roots:
            names = [name.removeprefix(root) for name in names]
        return dict(zip(names, map(bytes, np.asarray(store.descriptors)), strict=True))

    whole = rows("folder")
    print("| source | images | seconds | images/s | to the folder | rows that differ |\n|---|---|---|---|---|---|")
    for kind, each in seconds.items():
        ours = rows(kind)
        differ = sum(ours.get(name) != whole.get(name) for name in ours.keys() | whole.keys())
        middle = statistics.median(each)
        ratio = statistics.median(theirs / own for own, theirs in zip(each, seconds["folder"], strict=True))
        span = f"{min(each):.1f}-{max(each):.1f}"
        print(f"| {kind} | {len(ours):,} | {span} | {len(ours) / middle:.1f} | {ratio:.3f} | {differ} |")


def cluster(runs: Runs, rounds: int) -> None:
    """Print a table of two workers of one core and of one process with both cores."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    kinds = {"one process, two cores": None, "two workers, one core each": "local"}
    for turn in range(rounds):
        for kind, address in kinds.items():
            run = runs.start(runs.folder / f"{address}-{turn}", address, workers=2)
            run.end()
            lines = sorted(told(run.log))
            if len({pid for _, pid, _ in lines}) != (2 if address else 1):
                raise SystemExit(f"{kind}: expected a machine of two cores, and shards for both")
            first, last = lines[0][0], lines[-1][0]
            found[kind].append(((len(lines) - 1) / (last - first), first - run.began))
    print("| | images/s, each round | median | to one process | seconds until the first row |\n|---|---|---|---|---|")
    one = [rate for rate, _ in next(iter(found.values()))]
    for kind, each in found.items():
        rates = [rate for rate, _ in each]
        ratio = statistics.median(ours / theirs for ours, theirs in zip(rates, one, strict=True))
        starts = statistics.median(start for _, start in each)
        shown = ", ".join(f"{rate:.1f}" for rate in rates)
        print(f"| {kind} | {shown} | {statistics.median(rates):.1f} | {ratio:.3f} | {starts:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    making = parts.add_parser("make", help="write a folder of shards")
    making.add_argument("folder", type=Path)
    making.add_argument("--rows", type=int, default=1_000_000)
    inspecting = parts.add_parser("inspect", help="measure `sppfeat inspect`")
    inspecting.add_argument("folders", type=Path, nargs="+")
    inspecting.add_argument("--repeats", type=int, default=3)
    planning = parts.add_parser("plan", help="measure planning")
    planning.add_argument("folders", type=Path, nargs="+")
    one = parts.add_parser("plan-one", help="one line of `plan`, in a process of its own")
    one.add_argument("folder", type=Path)
    one.add_argument("--rows", type=int, required=True)
    one.add_argument("--what", required=True)
    adding = parts.add_parser("add", help="measure adding one image")
    adding.add_argument("folder", type=Path)
    adding.add_argument("--repeats", type=int, default=3)
    described = parts.add_parser("extract-one", help="one run of the parts below, in a process of its own")
    described.add_argument("source")
    described.add_argument("output")
    described.add_argument("--log", required=True)
    described.add_argument("--address")
    described.add_argument("--workers", type=int, default=0)
    losing = parts.add_parser("losses", help="lose nodes, disks and drivers while images are described")
    losing.add_argument("--nodes", type=int, default=10)
    losing.add_argument("--disks", type=int, default=5)
    losing.add_argument("--kills", type=int, default=20)
    comparing = parts.add_parser("sources", help="measure images from folders, archives and servers")
    sharing = parts.add_parser("cluster", help="measure two workers against one process")
    for one in (comparing, sharing):
        one.add_argument("--rounds", type=int, default=3)
    for one, scale, rows in (
        (described, 224, 1 << 16),
        (losing, 224, 64),
        (comparing, 224, 1 << 16),
        (sharing, 224, 1 << 16),
    ):
        if one is not described:
            one.add_argument("images", type=Path)
        one.add_argument("--scale", type=int, default=scale)
        one.add_argument("--shard-rows", type=int, default=rows)
    options = parser.parse_args()
    if options.part == "make":
        began = time.perf_counter()
        make(options.folder, options.rows)
        print(f"{options.rows:,} rows in {time.perf_counter() - began:.1f} s")
    elif options.part == "inspect":
        inspect(options.folders, options.repeats)
    elif options.part == "plan":
        plan(options.folders)
    elif options.part == "plan-one":
        plan_one(options.folder, options.rows, options.what)
    elif options.part == "add":
        add(options.folder, options.repeats)
    elif options.part == "extract-one":
        given = (options.scale, options.shard_rows, options.workers, options.address, options.log)
        extract_one(options.source, options.output, *given)
    else:
        with tempfile.TemporaryDirectory(prefix="scale-") as folder:
            runs = Runs(Path(folder), options.images.absolute(), options.scale, options.shard_rows)
            if options.part == "losses":
                losses(runs, options.nodes, options.disks, options.kills)
            elif options.part == "sources":
                sources(runs, options.rounds)
            else:
                cluster(runs, options.rounds)


if __name__ == "__main__":
    main()
