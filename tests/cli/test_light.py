"""With a network that is kept, commands on a processor run without torch; each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openvino")
pytest.importorskip("faiss")

HEAVY = ("torch", "torchvision", "timm")
RUN = f"""
import sys
from sppfeat_cli import main
try:
    main()
finally:
    print(*[name for name in {HEAVY} if name in sys.modules], file=open("loaded.txt", "w"))
"""
TINY = ["--backbone", "timm:test_resnet", "--weights", "random", "--scales", "64", "--levels", "2,1"]


class Sandbox:
    """A folder with images and a cache of its own, and commands in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *words: str) -> tuple[dict[str, object], list[str]]:
        """What a command printed, and which heavy packages it loaded."""
        env = {**os.environ, "XDG_CACHE_HOME": str(self.folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, "-c", RUN, *words, "--json"], cwd=self.folder, env=env, capture_output=True, text=True
        )
        assert done.returncode in (0, 3), done.stderr
        return json.loads(done.stdout), (self.folder / "loaded.txt").read_text().split()


@pytest.fixture
def sandbox(make_images: Callable[..., Path], tmp_path: Path) -> Sandbox:
    for number, path in enumerate(sorted(make_images(6).iterdir())):
        folder = path.parent / "ab"[number % 2]
        folder.mkdir(exist_ok=True)
        path.rename(folder / path.name)
    return Sandbox(tmp_path)


def test_commands_that_need_no_torch(sandbox: Sandbox) -> None:
    extract = ["extract", "images", "-o", "f.h5", *TINY]
    cold, loaded = sandbox.run(*extract)
    assert cold["described"] == 6 and "torch" in loaded
    done, loaded = sandbox.run(*extract)
    assert (done["described"], done["reused"], done["engine"], loaded) == (0, 6, cold["engine"], [])
    # Other values of the same network need nothing new.
    for more in (
        ["--levels", "1"],
        ["--scales", "96"],
        ["--pooling", "gem"],
        ["--pooling", "avg", "--normalize", "none"],
    ):
        done, loaded = sandbox.run(*extract, *more, "-o", "g.h5", "--overwrite")
        assert done["described"] == 6 and loaded == []
    sandbox.run("index", "f.h5", "-o", "gallery")
    sandbox.run("train", "svm", "f.h5", "-o", "svm.h5", "--c", "1")
    done, loaded = sandbox.run("export", "f.h5", "-o", "f.npy")
    assert done["exported"] == 6 and loaded == []
    image = str(next((sandbox.folder / "images" / "a").iterdir()))
    found, loaded = sandbox.run("search", "gallery", image)
    assert loaded == [] and found["results"][0]["neighbors"][0]["score"] > 0.99  # type: ignore[index]
    found, loaded = sandbox.run("predict", "svm.h5", image)
    assert loaded == [] and found
    (sandbox.folder / "w.csv").write_text("name,x1,y1,x2,y2\na/0000.png,2,2,30,30\n")
    done, loaded = sandbox.run(*extract, "--windows", "w.csv", "-o", "w.h5")
    assert done["described"] == 1 and loaded == []


def test_detecting_needs_no_torch(sandbox: Sandbox) -> None:
    from sppfeat.backbones.network import Network
    from sppfeat.detection import Detector, detection_recipe
    from sppfeat.detection.detector import save_detector
    from sppfeat.windows import ProposalOptions

    description = Network(
        detection_recipe(backbone="timm:test_resnet", weights="random", scales=(64,), levels=(1,))
    ).descriptions[0]
    random = np.random.default_rng(0)
    detector = Detector(
        recipe=description.recipe,
        weights_sha256=description.weights_sha256,
        classes=["a", "b"],
        weights=random.normal(size=(2, description.channels)).astype(np.float32),
        biases=np.full(2, 9, np.float32),
        box_weights=None,
        box_biases=None,
        proposals=ProposalOptions(),
        training={},
        versions={},
    )
    save_detector(detector, sandbox.folder / "d.h5")
    (sandbox.folder / "w.csv").write_text("name,x1,y1,x2,y2\na/0000.png,2,2,30,30\na/0000.png,3,2,30,30\n")
    detect = ["detect", "d.h5", "images", "--windows", "w.csv", "--threshold", "-99"]
    sandbox.run(*detect)
    found, loaded = sandbox.run(*detect)
    assert loaded == [] and found["results"]
