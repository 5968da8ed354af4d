"""Extraction against the loop that people write: images a second and memory, both sides in one run.

    python benchmarks/extract.py DATA/caltech101-subset

The plain loop: the timm transform with its centre crop, a DataLoader (every worker count tried once, the best one
kept), and the eager network up to the pooled features; batch of 8. sppfeat: `extract_folder` into a store. Each run is
a process of its own and sides take turns; medians of three are printed. Images a second count from the first image
asked for to the last row done; the whole process counts imports and loading of the network too, on both sides.
Peak memory is that of the largest single process.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path


def plain_loop(listing: str, workers: int, size: int) -> None:
    """Child process: the plain loop over the listed files; prints its seconds."""
    import timm
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    network = timm.create_model("tf_efficientnet_lite0").eval()  # values do not matter for the time
    config = timm.data.resolve_data_config({"input_size": (3, size, size)}, model=network)
    transform = timm.data.create_transform(**config)
    paths = Path(listing).read_text().splitlines()

    class Files(Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, index: int) -> torch.Tensor:
            tensor: torch.Tensor = transform(Image.open(paths[index]).convert("RGB"))
            return tensor

    start = time.perf_counter()
    rows = []
    with torch.no_grad():
        for batch in DataLoader(Files(), batch_size=8, num_workers=workers):
            rows.append(network.forward_head(network.forward_features(batch), pre_logits=True))
    if sum(map(len, rows)) != len(paths):
        raise SystemExit("the plain loop lost images")
    print(time.perf_counter() - start)


def ours(listing: str, store: str, size: int, crop: str, precision: str) -> None:
    """Child process: sppfeat over the listed files; prints its seconds."""
    from sppfeat import Recipe, extract_folder

    class Clock:
        def started(self, *, todo: int, reused: int, gone: list[str], device: str) -> None:
            self.start = time.perf_counter()

        def row(self, name: str, error: str | None) -> None:
            pass

    clock = Clock()
    done = extract_folder(
        listing, store, Recipe(scales=(size,), crop=crop, precision=precision), overwrite=True, observer=clock
    )
    if done.described != done.images:
        raise SystemExit(f"{done.failed} images failed")
    print(time.perf_counter() - clock.start)


@dataclass(frozen=True)
class Run:
    """Seconds of the loop, seconds of the whole process, peak memory in MB."""

    loop: float
    whole: float
    peak: float


def run(*arguments: object) -> Run:
    """Run a side as a child; its memory is what the operating system counted."""
    start = time.perf_counter()
    command = [sys.executable, __file__, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        printed = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {child.returncode}")
    return Run(float(printed), time.perf_counter() - start, usage.ru_maxrss / 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with at least 500 images")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=224)
    arguments = parser.parse_args()

    suffixes = (".jpg", ".jpeg", ".png")
    files = sorted(path for path in arguments.data.resolve().rglob("*") if path.suffix.lower() in suffixes)
    # Every fourth file, so that all classes, and with them all picture shapes, take part.
    some = files[:: max(1, len(files) // 500)][:500]
    size = arguments.size
    with tempfile.TemporaryDirectory() as folder:
        listing, whole, store = (Path(folder, name) for name in ("500.txt", "all.txt", "out.h5"))
        listing.write_text("\n".join(map(str, some)) + "\n")
        whole.write_text("\n".join(map(str, files)) + "\n")
        tried = {n: run("--plain-loop", listing, n, size).loop for n in sorted({0, 1, 2, os.cpu_count() or 1})}
        best = min(tried, key=lambda workers: tried[workers])
        sides: dict[str, tuple[object, ...]] = {
            f"plain loop, {size} centre crop, {best} workers": ("--plain-loop", listing, best, size),
            f"sppfeat, whole picture, short side {size}": ("--sppfeat", listing, store, size, "none", "float32"),
            f"sppfeat, {size} centre crop (equal pixels)": ("--sppfeat", listing, store, size, "center", "float32"),
            "sppfeat, whole picture, bfloat16": ("--sppfeat", listing, store, size, "none", "bfloat16"),
        }
        runs: dict[str, list[Run]] = {name: [] for name in sides}
        for _ in range(arguments.repeats):
            for name, side in sides.items():
                runs[name].append(run(*side))
        larger = run("--sppfeat", whole, store, size, "none", "float32")

    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "pillow"))
    print(f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, {libraries}")
    rates = ", ".join(f"{workers}: {len(some) / seconds:.1f}" for workers, seconds in tried.items())
    print(f"{len(some)} files; medians of {arguments.repeats}; plain loop by worker count: {rates} images/s\n")
    print("| what | images/s | times the plain loop | whole process, times | peak memory, MB |")
    print("|---|---|---|---|---|")
    base = next(iter(runs.values()))
    for name, results in runs.items():
        rate = statistics.median(len(some) / result.loop for result in results)
        # Ratios of runs that stood next to each other: the machine's speed drifts.
        loop = statistics.median(b.loop / a.loop for a, b in zip(results, base, strict=True))
        process = statistics.median(b.whole / a.whole for a, b in zip(results, base, strict=True))
        peak = statistics.median(result.peak for result in results)
        print(f"| {name} | {rate:.1f} | {loop:.2f} | {process:.2f} | {peak:.0f} |")
    print(f"| sppfeat, whole picture, {len(files)} files | {len(files) / larger.loop:.1f} | | | {larger.peak:.0f} |")


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--plain-loop"]:
        plain_loop(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    elif sys.argv[1:2] == ["--sppfeat"]:
        ours(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5], sys.argv[6])
    else:
        main()
