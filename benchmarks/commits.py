"""Images per second of this checkout against those of others, in turn: does a change cost speed where a run is long?

    python benchmarks/commits.py FOLDER OTHER_CHECKOUT... [--scales 224,448] [--rounds 3]

Every side is a process of its own, `sppfeat extract FOLDER` with a network that is already kept; the figures are those
of its summary, so that starting does not count. Other checkouts are worktrees of other commits.
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

from extract import processor

from sppfeat.machine import available_cores

HERE = Path(__file__).parents[1]


def run(checkout: Path, folder: Path, scale: str, store: Path, cache: str) -> tuple[float, float, float]:
    """Images per second without starting, seconds of the whole process, and its peak memory in MB."""
    code = "from sppfeat_cli import main; main()"
    command = [sys.executable, "-c", code, "extract", str(folder), "-o", str(store), "--scales", scale, "--overwrite"]
    env = {**os.environ, "PYTHONPATH": f"{checkout}:{checkout / '.mypy'}", "XDG_CACHE_HOME": cache}
    start = time.perf_counter()
    with subprocess.Popen([*command, "--json", "--quiet"], stdout=subprocess.PIPE, env=env, cwd=checkout) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 3):
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    done = json.loads(output)
    return done["images_per_second"], time.perf_counter() - start, usage.ru_maxrss / 1000


def commit(checkout: Path) -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True
    ).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("others", type=Path, nargs="+")
    parser.add_argument("--scales", default="224,448")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    sides = [HERE, *(path.resolve() for path in arguments.others)]
    print(f"{processor()}, {available_cores()} cores, Python {platform.python_version()}, ", end="")
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "openvino", "pillow")))
    columns = "commit | short side | images/s | times this one | whole process, s | peak memory, MB"
    print(f"\n| {columns} |\n|{'---|' * 6}")
    with tempfile.TemporaryDirectory() as work:
        for scale in arguments.scales.split(","):
            found: dict[Path, list[tuple[float, float, float]]] = {side: [] for side in sides}
            for number in range(arguments.rounds + 1):
                for side in sides:
                    figures = run(
                        side, arguments.folder.resolve(), scale, Path(work, "f.h5"), f"{work}/cache-{commit(side)}"
                    )
                    if number:  # the first prepares the network, and brings the files into memory
                        found[side].append(figures)
            for side in sides:
                rate, seconds, peak = (statistics.median(each) for each in zip(*found[side], strict=True))
                ratio = statistics.median(
                    theirs[0] / own[0] for theirs, own in zip(found[side], found[HERE], strict=True)
                )
                print(
                    f"| {commit(side)} | {scale} | {rate:.1f} | {ratio:.2f} | {seconds:.1f} | {peak:.0f} |", flush=True
                )


if __name__ == "__main__":
    main()
