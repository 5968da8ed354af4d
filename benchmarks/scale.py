"""Large stores: seconds, rows per second and peak memory of what people do with them, as whole processes.

    python benchmarks/scale.py make FOLDER --rows 10000000
    python benchmarks/scale.py inspect FOLDER...
    python benchmarks/scale.py plan FOLDER...
    python benchmarks/scale.py add FOLDER

`make` writes a folder of shards of a small network through the store's own code: every shard is created, filled and
published as by an extraction, except that its columns are filled whole and not row by row. One row in a thousand is
failed. Nothing is described, and no image exists.

`plan` lists the images of a store anew, as a source that knows their fingerprints does (an archive, a bucket), and
matches them with the rows: all described already; all, after a fifth of the shards was lost; all, in random order.
`add` describes one more image, as a whole process, and checks that no older file has changed.

Peak memory is that of the process itself (VmHWM), without the page cache, which holds the files.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Final

# 32 values a row, and a network of which 10 million rows fit onto a disk.
NETWORK: Final = {
    "backbone": "timm:test_resnet",
    "weights": "random",
    "scales": (64,),
    "levels": (1,),
    "layer": "layer1",
}
FAILED_EVERY: Final = 1000
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
    network = Network(Recipe(**NETWORK)).description  # type: ignore[arg-type]

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
    else:
        add(options.folder, options.repeats)


if __name__ == "__main__":
    main()
