"""Extraction against the loop that people write: images per second and memory, both sides in one run.

    python benchmarks/extract.py DATA/caltech101-subset

The plain loop: the network's own transform with its center crop, a DataLoader (every worker count tried once, the best
one kept), and the eager network up to the pooled features; batch of 8. sppfeat: `extract_folder` into a store. Each run
is a separate process and sides take turns; medians are printed. Images per second count from the first requested image
to the last finished row; the whole process also counts imports and loading the network, on both sides.
Peak memory is that of the largest single process.

The limit is what decoding and the network alone allow on the cores they share, 1 / (1 / forward + 1 / decode): forward
is the engine over images that are decoded already, decode is decoding and resizing alone, each over all cores.

int8 is calibrated on the first images once, before anything is measured.

ONEDNN_MAX_CPU_ISA=AVX2 in the environment holds PyTorch and OpenVINO to that, as on a processor that has no more.

With `--thingsvision PYTHON`, the Python of an environment that has thingsvision (and timm), the same backbone over the
same files is measured there too.
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
from typing import TYPE_CHECKING

from sppfeat.machine import available_cores

if TYPE_CHECKING:
    from sppfeat import Recipe


@dataclass(frozen=True)
class Network:
    """One backbone: its name here, and how it is built for the plain loop and for thingsvision."""

    name: str
    timm: str
    weights: str = "pretrained"


NETWORKS = {
    "lite0": Network("efficientnet_lite0", "tf_efficientnet_lite0"),
    # The same network: timm's `resnet50` has torchvision's layers, one by one.
    "resnet50": Network("torchvision:resnet50", "resnet50", "random"),
}


def plain_loop(listing: str, network_name: str, size: int, workers: int) -> None:
    """Child process: the plain loop over the listed files; prints its seconds."""
    import timm
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    network = timm.create_model(NETWORKS[network_name].timm).eval()  # values do not matter for the time
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


def thingsvision(listing: str, network_name: str, size: int) -> None:
    """Child process, in its own environment: thingsvision over the listed files; prints its seconds."""
    import numpy as np
    import torch
    from PIL import Image
    from thingsvision import get_extractor
    from thingsvision.utils.data import DataLoader
    from torchvision import transforms

    extractor = get_extractor(
        model_name=NETWORKS[network_name].timm, source="timm", device="cpu", pretrained=False, model_parameters=None
    )
    # The extractor's own transforms take the network's size, whatever size they are asked for.
    transform = transforms.Compose(
        [
            transforms.Resize(round(size / 0.875), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
        ]
    )
    paths = Path(listing).read_text().splitlines()

    class Files(torch.utils.data.Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, index: int) -> torch.Tensor:
            tensor: torch.Tensor = transform(Image.open(paths[index]).convert("RGB"))
            return tensor

    start = time.perf_counter()
    rows = extractor.extract_features(
        batches=DataLoader(dataset=Files(), batch_size=8, backend="pt"), module_name="global_pool", flatten_acts=True
    )
    if len(np.asarray(rows)) != len(paths):
        raise SystemExit("thingsvision lost images")
    print(time.perf_counter() - start)


def recipe_of(network_name: str, size: int, crop: str, precision: str) -> Recipe:
    from sppfeat import Recipe

    network = NETWORKS[network_name]
    return Recipe(backbone=network.name, weights=network.weights, scales=(size,), crop=crop, precision=precision)


def ours(listing: str, network_name: str, size: int, crop: str, precision: str, engine: str, store: str) -> None:
    """Child process: sppfeat over the listed files; prints its seconds."""
    from sppfeat import RunOptions, extract_folder
    from sppfeat.progress import Observer

    class Clock(Observer):
        def started(self, *, todo: int, reused: int, gone: list[str], device: str) -> None:
            self.start = time.perf_counter()

        def row(self, name: str, error: str | None) -> None:
            pass

    clock = Clock()
    recipe = recipe_of(network_name, size, crop, precision)
    done = extract_folder(
        listing, store, recipe, RunOptions(device="cpu", engine=engine), overwrite=True, observer=clock
    )
    if done.described != done.images:
        raise SystemExit(f"{done.failed} images failed")
    print(time.perf_counter() - clock.start)


def limit(listing: str, network_name: str, size: int, crop: str, precision: str, engine: str) -> None:
    """Child process: seconds that the listed files would take if only decoding and the network took time."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    from sppfeat import RunOptions
    from sppfeat.backbones.network import Network
    from sppfeat.engines.engine import load_engine
    from sppfeat.extraction import calibrate
    from sppfeat.images import find_images
    from sppfeat.images.resizing import prepare_image

    recipe = calibrate(recipe_of(network_name, size, crop, precision), find_images([listing]).items)
    network = Network(recipe)
    runner = load_engine(network, RunOptions(device="cpu", engine=engine))
    paths = Path(listing).read_text().splitlines()

    def decode(path: str) -> np.ndarray:
        return prepare_image(path, network.descriptions[0].recipe).inputs[0][None]

    def forward(image: np.ndarray) -> None:
        with runner.lane():
            runner.feature_maps(image)

    with ThreadPoolExecutor(available_cores()) as decoders:
        list(decoders.map(decode, paths[:20]))
        start = time.perf_counter()
        images = list(decoders.map(decode, paths))
        decoding = time.perf_counter() - start
    with ThreadPoolExecutor(runner.streams) as forwarders:
        # As in a run, the network prepares for each shape at its first image.
        start = time.perf_counter()
        list(forwarders.map(forward, images))
        forwarding = time.perf_counter() - start
    print(decoding + forwarding, decoding, forwarding)


@dataclass(frozen=True)
class Run:
    """Seconds of the loop (and what else was printed), seconds of the whole process, peak memory in MB."""

    loop: float
    parts: tuple[float, ...]
    whole: float
    peak: float


def run(what: str, *arguments: object, python: str = sys.executable) -> Run:
    """Run a side as a child; its memory is as counted by the operating system."""
    start = time.perf_counter()
    command = [python, __file__, what, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        printed = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {child.returncode}")
    loop, *parts = map(float, printed.splitlines()[-1].split())
    return Run(loop, tuple(parts), time.perf_counter() - start, usage.ru_maxrss / 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with at least 500 images")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--networks", default="lite0:224,lite0:448,resnet50:224", help="NAME:SIZE,...")
    parser.add_argument("--thingsvision", metavar="PYTHON", help="of an environment that has thingsvision")
    arguments = parser.parse_args()

    suffixes = (".jpg", ".jpeg", ".png")
    files = sorted(path for path in arguments.data.resolve().rglob("*") if path.suffix.lower() in suffixes)
    # From all over the list, so that all classes, and thus all image shapes, take part.
    some = files[:: max(1, len(files) // arguments.files)][: arguments.files]
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "openvino", "timm", "pillow"))
    print(f"{processor()}, {available_cores()} cores, Python {platform.python_version()}, {libraries}")
    print(f"{len(some)} files; medians of {arguments.repeats}\n")
    with tempfile.TemporaryDirectory() as folder:
        listing, store = Path(folder, "some.txt"), Path(folder, "out.h5")
        listing.write_text("\n".join(map(str, some)) + "\n")
        for asked in arguments.networks.split(","):
            name, _, size = asked.partition(":")
            compare(listing, len(some), name, int(size), store, arguments.repeats, arguments.thingsvision)
        listing.write_text("\n".join(map(str, files)) + "\n")
        every = run("ours", listing, "lite0", 224, "none", "float32", "auto", store)
        print(
            f"All {len(files)} files, lite0 at 224: {len(files) / every.loop:.1f} images/s, {every.peak:.0f} MB at most"
        )


def compare(listing: Path, count: int, name: str, size: int, store: Path, repeats: int, python: str | None) -> None:
    """Measure all sides with one network at one size, and print their table."""
    tried = {n: run("plain_loop", listing, name, size, n).loop for n in sorted({0, 1, 2, available_cores()})}
    best = min(tried, key=lambda workers: tried[workers])
    sides: dict[str, tuple[object, ...]] = {
        f"plain loop, {size} center crop, {best} workers": ("plain_loop", listing, name, size, best)
    }
    if python is not None:
        sides[f"thingsvision, {size} center crop"] = ("thingsvision", listing, name, size)
    for text, crop, precision, engine in (
        (f"sppfeat, whole image, short side {size}", "none", "float32", "auto"),
        (f"sppfeat, {size} center crop (equal pixels)", "center", "float32", "auto"),
        ("sppfeat, whole image, int8", "none", "int8", "auto"),
        ("sppfeat, whole image, bfloat16", "none", "bfloat16", "auto"),
        ("sppfeat, whole image, torch engine", "none", "float32", "torch"),
    ):
        sides[text] = ("ours", listing, name, size, crop, precision, engine, store)
    if os.environ.get("ONEDNN_MAX_CPU_ISA"):  # held to less than it has, OpenVINO crashes in bfloat16
        sides = {text: side for text, side in sides.items() if "bfloat16" not in side}
    for precision in {
        str(side[5]) for side in sides.values() if side[0] == "ours"
    }:  # converts the networks, once per machine
        run("ours", listing, name, size, "none", precision, "auto", store)
    runs: dict[str, list[Run]] = {text: [] for text in sides}
    limits: dict[str, list[Run]] = {text: [] for text in sides}
    for _ in range(repeats):
        for text, (what, *rest) in sides.items():
            runs[text].append(run(what, *rest, python=python if what == "thingsvision" and python else sys.executable))
            if what == "ours":
                limits[text].append(run("limit", *rest[:-1]))

    rates = ", ".join(f"{workers}: {count / seconds:.1f}" for workers, seconds in tried.items())
    print(f"{NETWORKS[name].name} at {size}; plain loop by worker count: {rates} images/s\n")
    print(
        "| what | images/s | times the plain loop | forward alone | decode alone | share of the limit "
        "| whole process, times | peak memory, MB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    base = next(iter(runs.values()))
    for text, results in runs.items():
        rate = statistics.median(count / result.loop for result in results)
        # Ratios of consecutive runs: the machine's speed drifts.
        loop = statistics.median(b.loop / a.loop for a, b in zip(results, base, strict=True))
        process = statistics.median(b.whole / a.whole for a, b in zip(results, base, strict=True))
        peak = statistics.median(result.peak for result in results)
        alone = ["", "", ""]
        if limits[text]:
            decode, forward = (statistics.median(count / r.parts[part] for r in limits[text]) for part in (0, 1))
            share = statistics.median(b.loop / a.loop for a, b in zip(results, limits[text], strict=True))
            alone = [f"{forward:.1f}", f"{decode:.0f}", f"{share:.2f}"]
        print(f"| {text} | {rate:.1f} | {loop:.2f} | {' | '.join(alone)} | {process:.2f} | {peak:.0f} |")
    print(flush=True)


def processor() -> str:
    """The CPU's name and vector extensions, if the system reports them, and what libraries are held to."""
    held = os.environ.get("ONEDNN_MAX_CPU_ISA")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name, flags = (
            next(line.partition(":")[2].strip() for line in lines if line.startswith(key))
            for key in ("model name", "flags")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
    told = {
        "avx2": "AVX2",
        "avx512f": "AVX-512",
        "avx_vnni": "VNNI",
        "avx512_vnni": "VNNI",
        "avx512_bf16": "BF16",
        "amx_int8": "AMX",
    }
    has = dict.fromkeys(text for flag, text in told.items() if flag in flags.split())
    return f"{name} ({', '.join(has)})" + (f", held to {held}" if held else "")


if __name__ == "__main__":
    if sys.argv[1:2] == ["plain_loop"]:
        plain_loop(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    elif sys.argv[1:2] == ["thingsvision"]:
        thingsvision(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    elif sys.argv[1:2] == ["ours"]:
        ours(sys.argv[2], sys.argv[3], int(sys.argv[4]), *sys.argv[5:9])
    elif sys.argv[1:2] == ["limit"]:
        limit(sys.argv[2], sys.argv[3], int(sys.argv[4]), *sys.argv[5:8])
    else:
        main()
