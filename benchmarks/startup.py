"""Short commands as whole processes, against `import torch, timm` alone: what a person at a terminal waits for.

    python benchmarks/startup.py

Every command runs on the photographs of `photos/`, without a GPU, with a cache of its own in a temporary folder: warm,
as the second run on a machine finds it, or cold, as the first does. `python -c "import torch, timm"` runs before and
after each, and the figure is the command's seconds over the mean of these two: the machine's speed drifts. Medians are
printed. Peak memory is the operating system's count.

A cold run converts the network for this processor, once for a machine. How long that takes by itself is measured in a
child that has torch and timm imported already, and belongs to the goal of the cold run.
"""

from __future__ import annotations

import argparse
import compileall
import importlib.util
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from extract import processor

from sppfeat.machine import available_cores

PHOTOS: Final = Path(__file__).parents[1] / "photos"
PHOTO: Final = PHOTOS / "animals" / "cat.jpg"
COMMAND: Final = (sys.executable, "-c", "from sppfeat_cli import main; main()")
REFERENCE: Final = (sys.executable, "-c", "import torch, timm")
WINDOWS: Final = 500
CLASSES: Final = 20
MEMORY_GOAL: Final = 450  # MB


# Children: what this process must not import itself, since the operating system counts its memory to its children's.


def make_detector(path: str) -> None:
    """Write a detector of random weights for the default network."""
    import numpy as np

    from sppfeat import Describer
    from sppfeat.detection import Detector, detection_recipe
    from sppfeat.detection.detector import save_detector
    from sppfeat.windows import ProposalOptions

    describer = Describer(detection_recipe())
    random = np.random.default_rng(0)
    detector = Detector(
        recipe=describer.recipe,
        weights_sha256=describer.weights_sha256,
        classes=[f"class{number}" for number in range(CLASSES)],
        weights=random.normal(0, 1e-3, (CLASSES, describer.dim)).astype(np.float32),
        biases=np.full(CLASSES, -0.4, np.float32),
        box_weights=random.normal(0, 1e-4, (CLASSES, 4, describer.dim)).astype(np.float32),
        box_biases=np.zeros((CLASSES, 4), np.float32),
        proposals=ProposalOptions(),
        training={},
        versions={},
    )
    save_detector(detector, path)


def make_windows(path: str) -> None:
    """Write windows all over the one photograph."""
    import numpy as np
    from PIL import Image

    with Image.open(PHOTO) as image:
        size = np.array([*image.size, *image.size])
    corners = np.random.default_rng(0).uniform(0, 1, (WINDOWS, 2, 2))
    boxes = np.concatenate([corners.min(1), corners.max(1)], 1) * (size - 1)
    lines = [",".join([PHOTO.name, *(f"{value:.0f}" for value in box)]) for box in boxes]
    Path(path).write_text("\n".join(["name,x1,y1,x2,y2", *lines, ""]))


def convert() -> None:
    """Print the seconds that building the default network and its engine take once torch is there."""
    import timm
    import torch

    assert timm and torch
    from sppfeat import Recipe, RunOptions
    from sppfeat.backbones import Network
    from sppfeat.engines import load_engine

    start = time.perf_counter()
    load_engine(Network(Recipe()), RunOptions(device="cpu"))
    print(time.perf_counter() - start)


CHILDREN: Final[dict[str, Callable[..., None]]] = {
    child.__name__: child for child in (make_detector, make_windows, convert)
}


@dataclass(frozen=True)
class Ran:
    """Seconds of a whole process, on the clock and of the processor; its peak memory in MB, and what it printed."""

    seconds: float
    cpu: float
    peak: float
    printed: str


def run(command: tuple[str, ...], cache: Path, code: int = 0) -> Ran:
    """Run a process to its end, which must have this exit code."""
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as child:
        printed, said = child.stdout, child.stderr
        assert printed is not None and said is not None
        # All that these commands say fits into a pipe.
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != code:
            raise SystemExit(f"{' '.join(command)}: exit code {child.returncode}, expected {code}\n{said.read()}")
        return Ran(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000, printed.read())


@dataclass(frozen=True)
class Row:
    """A command to measure. remove: what must not be there when it starts. goal: times the reference."""

    what: str
    goal: float | None
    arguments: tuple[str, ...]
    cache: Path
    remove: tuple[Path, ...] = ()
    code: int = 0

    def run(self) -> Ran:
        for path in self.remove:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        return run((*COMMAND, *self.arguments), self.cache, self.code)


def prepare(folder: Path) -> tuple[Row, ...]:
    """Make the files that the commands read, and with them the warm cache."""
    for package in ("sppfeat", "sppfeat_cli"):  # as installing them does; a checkout may not be allowed to
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            compileall.compile_dir(place, quiet=1)
    warm, cold = folder / "warm", folder / "cold"
    store, gallery, svm = folder / "photos.h5", folder / "photos.gallery", folder / "photos.svm"
    detector, windows, fresh = folder / "detector.h5", folder / "windows.csv", folder / "fresh.h5"
    for arguments in (
        ("extract", str(PHOTOS), "-o", str(store)),
        ("index", str(store), "-o", str(gallery)),
        ("train", "svm", str(store), "-o", str(svm), "--c", "1"),
    ):
        run((*COMMAND, *arguments), warm)
    run((sys.executable, __file__, "--child", "make_detector", str(detector)), warm)
    run((sys.executable, __file__, "--child", "make_windows", str(windows)), warm)
    extract = ("extract", str(PHOTOS), "-o")
    rows = (
        Row("`extract`, 13 photographs", 0.35, (*extract, str(fresh)), warm, remove=(fresh,)),
        Row("`search` by one image", 0.30, ("search", str(gallery), str(PHOTO)), warm),
        Row("`predict` of one image", 0.35, ("predict", str(svm), str(PHOTO)), warm),
        Row(
            f"`detect --windows`, one image, {WINDOWS} windows",
            0.35,
            ("detect", str(detector), str(PHOTO), "--windows", str(windows)),
            warm,
        ),
        Row("`extract`, nothing to do", 0.12, (*extract, str(store)), warm),
        Row("`inspect` of the store", 0.10, ("inspect", str(store)), warm),
        Row("`extract` of a folder that is not there", None, ("extract", "nofolder", "-o", str(fresh)), warm, code=2),
        Row("`extract`, 13 photographs, cold", 1.1, (*extract, str(fresh)), cold, remove=(fresh, cold)),
    )
    for row in rows[:-1]:
        row.run()
    return rows


def verdict(figure: float, goal: float | None) -> str:
    return "" if goal is None else "met" if figure <= goal else "MISSED"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "openvino", "timm", "typer", "numpy", "h5py"))
    print(f"{processor()}, {available_cores()} cores, Python {platform.python_version()}, {libraries}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = prepare(folder)
        ran: dict[Row, list[Ran]] = {row: [] for row in rows}
        references = [run(REFERENCE, folder / "warm")]
        beside: dict[Row, list[float]] = {row: [] for row in rows}
        conversions = []
        for repeat in range(arguments.repeats):
            for row in rows:
                ran[row].append(row.run())
                references.append(run(REFERENCE, folder / "warm"))
                beside[row].append((references[-2].seconds + references[-1].seconds) / 2)
            child = (sys.executable, __file__, "--child", "convert")
            conversions.append(float(run(child, folder / f"convert{repeat}").printed))

    reference = statistics.median(each.seconds for each in references)
    reference_cpu = statistics.median(each.cpu for each in references)
    conversion = statistics.median(conversions)
    print(
        f"medians of {arguments.repeats}; `import torch, timm`: {reference:.2f} s, {reference_cpu:.2f} s of processor\n"
    )
    print(
        "| whole process | goal | times `import torch, timm` | | seconds | processor, s | processor, times | peak, MB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        figure = statistics.median(each.seconds / base for each, base in zip(ran[row], beside[row], strict=True))
        seconds, cpu, peak = (
            statistics.median(getattr(each, name) for each in ran[row]) for name in ("seconds", "cpu", "peak")
        )
        goal, said = row.goal, "" if row.goal is None else f"{row.goal:.2f}"
        if row is rows[-1] and goal is not None:
            goal += conversion / reference
            said += f" + {conversion / reference:.2f}"
        print(
            f"| {row.what} | {said} | {figure:.2f} | {verdict(figure, goal)} | {seconds:.2f} | {cpu:.2f} "
            f"| {cpu / reference_cpu:.2f} | {peak:.0f} |"
        )
    peak = statistics.median(each.peak for each in ran[rows[0]])
    print(
        f"| peak memory of the warm `extract`, MB | {MEMORY_GOAL} | {peak:.0f} | {verdict(peak, MEMORY_GOAL)} | | | | |"
    )
    print(f"\nThe conversion by itself, in the goal of the cold run: {conversion:.2f} s.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        CHILDREN[sys.argv[2]](*sys.argv[3:])
    else:
        main()
