"""Detections and classes of the image that is looked at: those of `detect` and `predict`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from serving import make_models
from starlette.testclient import TestClient

from sppfeat import RunOptions
from sppfeat.detection import DetectOptions, DetectorRunner, open_detector
from sppfeat.detection.detecting import detected
from sppfeat.images import Item
from sppfeat.serve import ServeOptions
from sppfeat.serve.app import create_app
from sppfeat.serve.collection import Collection
from sppfeat.serve.guard import Guard
from sppfeat.serve.models import Models
from sppfeat.transfer import open_classifier, predict

CPU = RunOptions(device="cpu")


@pytest.fixture
def made(make_images: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path, Path]:
    return make_models(make_images, tmp_path)


def test_the_image_that_is_looked_at(made: tuple[Path, Path, Path], photos: Path) -> None:
    gallery, detector, classifier = made
    photo = photos / "animals" / "cat.jpg"
    options = ServeOptions()
    app = create_app(Collection(gallery, CPU), Models(detector, classifier, CPU), options)
    with TestClient(Guard(app, options), "http://127.0.0.1:8000") as page:  # type: ignore[arg-type]
        about = page.get("/api/gallery").json()
        assert about["detector"] == {"classes": ["cat", "dog"]} and about["classifier"] == {
            "classes": ["left", "right"]
        }
        files = {"image": ("cat.jpg", photo.read_bytes())}
        found = page.post("/api/detect", files=files).json()
        runner = DetectorRunner(open_detector(detector), CPU)
        (wanted,) = detected(runner, [Item.at(photo)], None, DetectOptions())
        assert (found["width"], found["height"]) == wanted.image_size and len(found["detections"]) == len(
            wanted.labels
        ) > 0
        scores = [one["score"] for one in found["detections"]]
        assert scores == sorted(scores, reverse=True)
        assert scores == pytest.approx(np.sort(wanted.scores)[::-1], abs=1e-4)
        classes = page.post("/api/classify", files=files).json()["classes"]
        (told,) = predict(open_classifier(classifier), [photo], CPU)
        assert told.scores is not None
        by_name = dict(zip(open_classifier(classifier).classes, told.scores, strict=True))
        assert {one["label"]: pytest.approx(one["score"], abs=1e-4) for one in classes} == by_name
        assert classes[0]["score"] >= classes[1]["score"]
        again = page.post("/api/classify", data={"query": "r-0"})
        assert again.status_code == 200
        for url in ("/api/detect", "/api/classify"):
            bad = page.post(url, files={"image": ("x", b"no image")})
            assert bad.status_code == 415 and "not an image" in bad.json()["detail"]
