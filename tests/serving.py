"""What tests of the page share: a server as a process of its own, and small models."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from conftest import TINY

from sppfeat import RunOptions, extract_folder, open_store
from sppfeat.detection import Detector, detection_recipe
from sppfeat.detection.detector import save_detector
from sppfeat.extraction import Describer
from sppfeat.retrieval import create_gallery
from sppfeat.transfer import save_classifier
from sppfeat.transfer.train_classifier import train_classifier
from sppfeat.windows import ProposalOptions

CPU = RunOptions(device="cpu")


@contextlib.contextmanager
def running(*given: str | Path) -> Iterator[str]:
    """The address of a server of its own; it must end without a traceback."""
    code = "import sys; from sppfeat_cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", *map(str, given), "--port", "0", "--device", "cpu"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        line = child.stdout.readline()
        assert line.startswith(f"{given[0]}: http://127.0.0.1:") and line.endswith("  (Ctrl-C ends it)\n"), line
        yield line.split()[1]
    finally:
        child.send_signal(signal.SIGINT)
        _, error = child.communicate(timeout=20)
    assert "Traceback" not in error and child.returncode in (0, 130), (child.returncode, error)


def make_models(make_images: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path, Path]:
    """A gallery, a detector with random weights, and a classifier of two folders."""
    for seed, label in enumerate(("left", "right")):
        make_images(4, f"classes/{label}", seed=seed)
    extract_folder(tmp_path / "classes", tmp_path / "f.h5", TINY, CPU)
    create_gallery(open_store(tmp_path / "f.h5"), tmp_path / "g")
    save_classifier(train_classifier(open_store(tmp_path / "f.h5")), tmp_path / "c.h5")
    recipe = detection_recipe(backbone="timm:test_resnet", weights="random", scales=(64,), levels=(1,))
    describer = Describer(recipe, CPU)
    weights = np.random.default_rng(0).normal(size=(2, describer.dim)).astype(np.float32)
    detector = Detector(
        recipe=describer.recipe,
        weights_sha256=describer.weights_sha256,
        classes=["cat", "dog"],
        weights=weights,
        biases=np.zeros(2, np.float32),
        box_weights=None,
        box_biases=None,
        proposals=ProposalOptions(),
        training={},
        versions={},
    )
    save_detector(detector, tmp_path / "d.h5")
    return tmp_path / "g", tmp_path / "d.h5", tmp_path / "c.h5"
