"""The map over HTTP: made once, kept with the gallery and in the cache, and gone when rows change."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from PIL import Image
from starlette.testclient import TestClient

from sppfeat import RunOptions, extract_folder, open_store
from sppfeat.retrieval import create_gallery, open_gallery, remove_from_gallery, tile_order
from sppfeat.serve import ServeOptions
from sppfeat.serve.app import create_app
from sppfeat.serve.charting import sheet_folder
from sppfeat.serve.collection import Collection
from sppfeat.serve.guard import Guard
from sppfeat.serve.models import Models
from sppfeat.store import lock_store

CPU = RunOptions(device="cpu")


@pytest.fixture
def path(make_images, tmp_path: Path) -> Path:  # type: ignore[no-untyped-def]
    extract_folder(make_images(15), tmp_path / "f.h5", TINY, CPU)
    create_gallery(open_store(tmp_path / "f.h5"), tmp_path / "g")
    return tmp_path / "g"


def client(path: Path) -> TestClient:
    options = ServeOptions()
    app = create_app(Collection(path, CPU), Models(None, None), options)
    return TestClient(Guard(app, options), "http://127.0.0.1:8000")  # type: ignore[arg-type]


def ended(page: TestClient) -> dict[str, object]:
    for _ in range(400):
        found: dict[str, object] = page.get("/api/map").json()
        if found["state"] != "computing":
            return found
        time.sleep(0.05)
    raise AssertionError("expected an end")


def test_a_map_is_made_and_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sppfeat.serve.collection._LOOK_SECONDS", 0.0)
    with client(path) as page:
        absent = page.get("/api/map").json()
        assert absent["state"] == "absent" and (absent["images"], absent["sheets"]) == (15, 1)
        for url in ("/api/map/points", "/api/map/order", "/map/sheets/0", "/map/sheets/9"):
            assert page.get(url).status_code == 404, url
        state = page.get("/api/gallery").json()["generation"]
        assert page.post("/api/map").json()["state"] in ("computing", "ready")
        assert ended(page)["state"] == "ready"
        assert page.get("/api/gallery").json()["generation"] == state  # row numbers are the same
        points = np.frombuffer(page.get("/api/map/points").content, "<f4").reshape(-1, 2)
        kept = open_gallery(path).points
        assert kept is not None and (points == kept).all()
        order = np.frombuffer(page.get("/api/map/order").content, "<u4")
        assert (order == tile_order(kept)).all()
        with Image.open(io.BytesIO(page.get("/map/sheets/0").content)) as sheet:
            assert sheet.size == (absent["columns"] * absent["tile"],) * 2 and sheet.format == "JPEG"
        # Sheets that went from the cache are made again; the layout stays.
        for file in sheet_folder(open_gallery(path)).iterdir():
            file.unlink()
        assert page.get("/api/map").json()["state"] == "absent"
        page.post("/api/map")
        assert ended(page)["state"] == "ready" and (open_gallery(path).points == kept).all()
        remove_from_gallery(path, [open_gallery(path).rows.names[0]])
        assert page.get("/api/map").json()["state"] == "absent"
        page.post("/api/map")
        assert ended(page)["state"] == "ready"
        assert len(np.frombuffer(page.get("/api/map/order").content, "<u4")) == 14
    with client(path) as page:
        assert page.get("/api/map").json()["state"] == "ready"


def test_without_the_extra_no_map_is_offered(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openTSNE", None)
    with client(path) as page:
        told = page.get("/api/map").json()
    assert told["state"] == "unavailable" and "pip install 'sppfeat[map]'" in told["detail"]


def test_a_map_that_cannot_be_made_says_why(path: Path) -> None:
    with client(path) as page, lock_store(path):
        page.post("/api/map")
        failed = ended(page)
        assert failed["state"] == "failed" and str(path) in str(failed["detail"])
        assert page.get("/api/map").json()["state"] == "absent"  # told once
