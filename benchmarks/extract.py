"""Extraction against the loop that people write: images a second and memory, both sides in one run.

    python benchmarks/extract.py DATA/caltech101-subset

The plain loop: the timm transform with its centre crop, a DataLoader (every worker count tried once, the best one
kept), and the eager network up to the pooled features; batch of 8. sppfeat: `sppfeat extract`. Each run is a process of
its own, timed from its start to its end, imports and loading of the network included on both sides; sides take turns;
medians of three are printed. Peak memory is that of the largest single process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

EXTRACT = [sys.executable, "-c", "from sppfeat_cli import main; main()", "extract"]
SELF = [sys.executable, __file__]


def plain_loop(listing: str, workers: int, size: int) -> None:
    """Child process: the plain loop over the listed files; prints its figures as JSON."""
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

    rows = []
    with torch.no_grad():
        for batch in DataLoader(Files(), batch_size=8, num_workers=workers):
            rows.append(network.forward_head(network.forward_features(batch), pre_logits=True))
    if sum(map(len, rows)) != len(paths):
        raise SystemExit("the plain loop lost images")


def run(command: list[str], images: int) -> dict[str, float]:
    """Run a child; images a second of its whole life, and its peak memory as the operating system counted it."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {child.returncode}")
    return {"images_per_second": images / (time.perf_counter() - start), "peak_mb": usage.ru_maxrss / 1000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with at least 500 images")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=224)
    arguments = parser.parse_args()

    files = sorted(
        path for path in arguments.data.resolve().rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")
    )
    with tempfile.TemporaryDirectory() as folder:
        listing, whole, store = Path(folder, "500.txt"), Path(folder, "all.txt"), Path(folder, "out.h5")
        # Every fourth file, so that all classes, and with them all picture shapes, take part.
        step = max(1, len(files) // 500)
        count = len(files[::step][:500])
        listing.write_text("\n".join(map(str, files[::step][:500])) + "\n")
        whole.write_text("\n".join(map(str, files)) + "\n")
        size = str(arguments.size)
        plain = {
            workers: [*SELF, "--plain-loop", str(listing), str(workers), size]
            for workers in sorted({0, 1, 2, os.cpu_count() or 1})
        }
        ours = [*EXTRACT, str(listing), "-o", str(store), "--overwrite", "--quiet", "--scales", size]
        tried = {workers: run(command, count)["images_per_second"] for workers, command in plain.items()}
        best = max(tried, key=lambda workers: tried[workers])
        sides = {
            f"plain loop, {size} centre crop, {best} workers": plain[best],
            f"sppfeat, whole picture, short side {size}": ours,
            f"sppfeat, {size} centre crop (equal pixels)": [*ours, "--crop", "center"],
            "sppfeat, whole picture, bfloat16": [*ours, "--precision", "bfloat16"],
        }
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for _ in range(arguments.repeats):
            for name, command in sides.items():
                runs[name].append(run(command, count))
        larger = run([*EXTRACT, str(whole), "-o", str(store), "--overwrite", "--quiet", "--scales", size], len(files))

        print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, ", end="")
        print(", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "pillow")))
        print(f"{count} files; medians of {arguments.repeats}; plain loop by worker count: ", end="")
        print(", ".join(f"{workers}: {rate:.1f}" for workers, rate in tried.items()), "images/s\n")
        print("| what | images/s | times the plain loop | peak memory, MB |")
        print("|---|---|---|---|")
        base = next(iter(runs.values()))
        for name, results in runs.items():
            rate = statistics.median(result["images_per_second"] for result in results)
            # Ratios of runs that stood next to each other: the machine's speed drifts.
            ratio = statistics.median(
                a["images_per_second"] / b["images_per_second"] for a, b in zip(results, base, strict=True)
            )
            memory = statistics.median(result["peak_mb"] for result in results)
            print(f"| {name} | {rate:.1f} | {ratio:.2f} | {memory:.0f} |")
        rate, memory = larger["images_per_second"], larger["peak_mb"]
        print(f"| sppfeat, whole picture, {len(files)} files | {rate:.1f} | | {memory:.0f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--plain-loop"]:
        plain_loop(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
