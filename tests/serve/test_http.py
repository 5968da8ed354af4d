"""The HTTP interface of a served gallery: what it answers, what it refuses, and what it never does."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY
from PIL import Image
from starlette.testclient import TestClient

from sppfeat import RunOptions, UsageError, extract_folder, find_duplicates, open_store
from sppfeat.retrieval import SearchOptions, add_to_gallery, create_gallery, open_gallery, search_images
from sppfeat.serve import ServeOptions
from sppfeat.serve.app import create_app
from sppfeat.serve.collection import Collection
from sppfeat.serve.guard import Guard
from sppfeat.serve.models import Models

CPU = RunOptions(device="cpu")
HOME = "http://127.0.0.1:8000"
BINS = replace(TINY, scales=(96,), levels=(4, 1))


@pytest.fixture
def images(photos: Path, tmp_path: Path) -> Path:
    """The photographs, and beside them what must never be served."""
    folder = tmp_path / "library" / "images"
    shutil.copytree(photos, folder)
    (tmp_path / "library" / "secret.txt").write_text("secret")
    shutil.copy(sorted(folder.rglob("*.jpg"))[0], folder / "<script>alert(1)<.jpg")
    return folder


@pytest.fixture
def path(images: Path, tmp_path: Path) -> Path:
    extract_folder(images, tmp_path / "f.h5", BINS, CPU)
    create_gallery(open_store(tmp_path / "f.h5"), tmp_path / "g", keep_bins=True)
    return tmp_path / "g"


def client(path: Path, options: ServeOptions | None = None, base: str = HOME, **models: str) -> TestClient:
    options = options or ServeOptions()
    collection = Collection(path, CPU, images=options.images)
    app = create_app(collection, Models(models.get("detector"), models.get("classifier"), CPU), options)
    return TestClient(Guard(app, options), base, raise_server_exceptions=False)  # type: ignore[arg-type]


@pytest.fixture
def page(path: Path) -> Iterator[TestClient]:
    with client(path) as found:
        yield found


def jpeg(size: tuple[int, int] = (64, 48), kind: str = "JPEG") -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)).save(content, kind)
    return content.getvalue()


def sent(data: bytes, name: str = "query.jpg") -> dict[str, tuple[str, bytes]]:
    return {"image": (name, data)}


def test_the_gallery_is_told(page: TestClient, path: Path) -> None:
    found = page.get("/api/gallery").json()
    assert found["images"] == len(open_gallery(path)) and found["grid"] == 4 and found["exact"]
    assert found["rerank"] == ["none", "bins", "expand", "reciprocal", "diffuse"]
    assert found["missing"] == found["notes"] == [] and found["detector"] is found["classifier"] is None


@pytest.mark.parametrize(
    "form", [{}, {"parts": "true"}, {"rerank": "bins"}, {"rerank": "expand"}, {"box": "20,20,90,80"}]
)
def test_hits_are_those_of_a_search(page: TestClient, path: Path, images: Path, form: dict[str, str]) -> None:
    file = sorted(images.rglob("*.jpg"))[1]
    answer = page.post("/api/search", data={"k": "3"} | form, files=sent(file.read_bytes(), "x.jpg")).json()
    options = SearchOptions(k=3, parts="parts" in form, rerank=form.get("rerank", "none"))
    box = (20, 20, 90, 80) if "box" in form else None
    (wanted,) = search_images(open_gallery(path), [file], options, CPU, box=box).answers
    assert [hit["name"] for hit in answer["hits"]] == [one.name for one in wanted.neighbors]
    for hit, one in zip(answer["hits"], wanted.neighbors, strict=True):
        assert hit["score"] == pytest.approx(one.score, abs=1e-5) and hit["row"] == one.row and hit["there"]
        assert hit["box"] == (None if one.box is None else pytest.approx(one.box))
        with Image.open(images / one.name) as opened:
            assert (hit["width"], hit["height"]) == opened.size
        if options.aligned:
            for side in ("query", "image"):
                assert np.sum(hit["why"][side]) == pytest.approx(hit["score"], abs=1e-4)
        else:
            assert hit["why"] is None
    with Image.open(file) as opened:
        assert (answer["query"]["width"], answer["query"]["height"]) == opened.size
    # Once more by its id, without sending it again.
    again = page.post("/api/search", data={"k": "3", "query": answer["query"]["id"]} | form).json()
    assert [hit["row"] for hit in again["hits"]] == [hit["row"] for hit in answer["hits"]]
    assert page.get(f"/queries/{answer['query']['id']}?side=160").headers["content-type"] == "image/jpeg"


def test_a_hit_becomes_the_next_query_and_is_not_its_own_hit(page: TestClient, path: Path) -> None:
    count = len(open_gallery(path))
    found = page.post("/api/search", data={"query": "r-1", "k": "200"}).json()
    assert found["query"]["id"] == "r-1" and 1 not in [hit["row"] for hit in found["hits"]]
    assert len(found["hits"]) == count - 1


def test_images_are_upright_jpegs_of_a_bounded_side(page: TestClient, images: Path, tmp_path: Path) -> None:
    for side in (160, 320, 1280):
        done = page.get(f"/images/0?side={side}")
        with Image.open(io.BytesIO(done.content)) as shown:
            assert max(shown.size) <= side and shown.format == "JPEG"
    again = page.get("/images/0?side=160", headers={"if-none-match": page.get("/images/0?side=160").headers["etag"]})
    assert again.status_code == 304 and again.content == b""
    about = page.get("/api/images/0").json()
    assert about["there"] and about["name"] == open_gallery(tmp_path / "g").rows.names[0]


@pytest.mark.parametrize(
    ("form", "files", "status", "fault"),
    [
        ({}, {}, 400, "expected an image or a query"),
        ({"query": "r-0"}, sent(jpeg()), 400, "expected an image or a query, and not both"),
        ({"query": "u-0"}, {}, 404, "this image was not kept; send it again"),
        ({"query": "r-99999"}, {}, 404, "expected a row from 0 to"),
        ({"query": "../../secret.txt"}, {}, 404, "this image was not kept"),
        ({}, sent(b"no image"), 415, "not an image: expected JPEG"),
        ({}, sent(b"<svg onload='alert(1)'/>", "x.svg"), 415, "not an image"),
        ({}, sent(b""), 415, "empty file"),
        ({}, sent(jpeg()[:700]), 415, "cannot be decoded|truncated|damaged"),
        ({"query": "r-0", "box": "1,2"}, {}, 422, "box: expected x1,y1,x2,y2, found '1,2'"),
        ({"query": "r-0", "box": "nan,0,1,1"}, {}, 400, "box: expected a part of the image of"),
        ({"query": "r-0", "box": "0,0,99999,5"}, {}, 400, "box: expected a part of the image of"),
        ({"query": "r-0", "box": "9,9,3,3"}, {}, 400, "box: expected a part of the image"),
        ({"query": "r-0", "k": "0"}, {}, 422, "k: .*greater than or equal to 1"),
        ({"query": "r-0", "k": "201"}, {}, 422, "k: "),
        ({"query": "r-0", "rerank": "magic"}, {}, 422, "rerank: "),
        ({"query": "r-0", "rerank": "expand", "parts": "true"}, {}, 422, "parts orders by bins already"),
    ],
)
def test_what_is_refused(
    page: TestClient, form: dict[str, str], files: dict[str, tuple[str, bytes]], status: int, fault: str
) -> None:
    done = page.post("/api/search", data=form, files=files or None)
    assert done.status_code == status, done.text
    detail = done.json()["detail"]
    assert "\n" not in detail
    import re

    assert re.search(fault, detail), detail


def test_rows_that_are_not_there(page: TestClient) -> None:
    for url in ("/images/99999", "/api/images/99999", "/images/-1", "/images/x", "/images/0?side=7", "/queries/u-0"):
        assert page.get(url).status_code in (404, 422), url
    for url in ("/images/../../secret.txt", "/static/../app.py", "/static/%2e%2e/app.py", "/secret.txt"):
        assert page.get(url).status_code in (404, 422), url
    assert page.post("/api/names", json={"rows": [0, 10**9]}).status_code == 404
    assert page.post("/api/names", json={"rows": [-1]}).status_code == 404
    assert page.post("/api/detect", data={"query": "r-0"}).status_code == 404
    assert "--classifier" in page.post("/api/classify", data={"query": "r-0"}).json()["detail"]


def test_the_interface_is_described(page: TestClient) -> None:
    described = page.get("/api/openapi.json").json()
    assert {"/api/search", "/api/images/{row}", "/api/duplicates"} <= described["paths"].keys()
    docs = page.get("/api/docs")
    assert "script-src 'self';" in docs.headers["content-security-policy"] and "<script>" not in docs.text
    for file in ("/api/swagger/swagger-ui-bundle.js", "/api/swagger/swagger-ui.css", "/static/docs.js"):
        assert file in docs.text and page.get(file).status_code == 200
    assert "https://" not in docs.text


def test_names_of_rows(page: TestClient, path: Path) -> None:
    names = open_gallery(path).rows.names
    assert page.post("/api/names", json={"rows": [2, 0]}).json() == {"names": [names[2], names[0]]}


def test_a_gallery_without_bins(images: Path, tmp_path: Path) -> None:
    extract_folder(images, tmp_path / "f.h5", BINS, CPU)
    create_gallery(open_store(tmp_path / "f.h5"), tmp_path / "plain")
    with client(tmp_path / "plain") as page:
        assert page.get("/api/gallery").json()["grid"] is None
        assert "bins" not in page.get("/api/gallery").json()["rerank"]
        done = page.post("/api/search", data={"query": "r-0", "parts": "true"})
        assert done.status_code == 409 and "--keep-bins" in done.json()["detail"]
        assert page.post("/api/search", data={"query": "r-0"}).json()["hits"][0]["width"] > 0


def test_a_source_folder_that_moved(path: Path, images: Path, tmp_path: Path) -> None:
    images.rename(tmp_path / "elsewhere")
    with client(path) as page:
        about = page.get("/api/gallery").json()
        assert about["missing"] == [str(images)] and "--images DIR" in about["notes"][0]
        assert page.get("/images/0").status_code == 410
        hit = page.post("/api/search", files=sent(jpeg()), data={"k": "1"}).json()["hits"][0]
        assert not hit["there"]
    with client(path, ServeOptions(images=str(tmp_path / "elsewhere"))) as page:
        assert page.get("/api/gallery").json()["missing"] == []
        assert page.get("/images/0").status_code == 200
    with pytest.raises(UsageError, match="images: expected a folder, found"):
        client(path, ServeOptions(images=str(tmp_path / "nowhere")))


def test_a_gallery_replaced_while_it_is_served(
    path: Path, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sppfeat.serve.collection._LOOK_SECONDS", 0.0)
    with client(path) as page:
        before = page.get("/api/gallery").json()
        (more := tmp_path / "more").mkdir()
        Image.new("RGB", (90, 60), "red").save(more / "red.png")
        extract_folder(more, tmp_path / "m.h5", BINS, CPU)
        add_to_gallery(open_store(tmp_path / "m.h5"), path)
        after = page.get("/api/gallery").json()
        assert after["images"] == before["images"] + 1 and after["generation"] != before["generation"]
        found = page.post("/api/search", files=sent((more / "red.png").read_bytes()), data={"k": "1"}).json()
        assert found["hits"][0]["name"] == "red.png"
        assert page.get(f"/images/0?of={after['generation']}").status_code == 200
        refused = page.get(f"/images/0?of={before['generation']}")
        assert refused.status_code == 409 and "the gallery was changed" in refused.json()["detail"]
        assert page.post("/api/names", json={"rows": [0], "of": before["generation"]}).status_code == 409
        (path / "gallery.json").write_text("{")
        broken = page.get("/api/gallery").json()
        assert broken["images"] == after["images"] and "cannot be opened" in broken["notes"][0]
        assert page.post("/api/search", data={"query": "r-0"}).status_code == 200


def test_another_gallery_in_its_place(
    path: Path, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built anew, its files have the names of those before; its rows are others all the same."""
    monkeypatch.setattr("sppfeat.serve.collection._LOOK_SECONDS", 0.0)
    with client(path) as page:
        before = page.get("/api/gallery").json()
        extract_folder(photos / "space", tmp_path / "other.h5", BINS, CPU)
        create_gallery(open_store(tmp_path / "other.h5"), tmp_path / "other", keep_bins=True)
        path.rename(tmp_path / "old")
        gone = page.get("/api/gallery").json()
        assert gone["generation"] == before["generation"] and "cannot be opened" in gone["notes"][0]
        (tmp_path / "old").rename(path)
        assert page.get("/api/gallery").json()["notes"] == []
        path.rename(tmp_path / "old")
        (tmp_path / "other").rename(path)
        after = page.get("/api/gallery").json()
        assert after["images"] == 2 and after["generation"] != before["generation"] and after["notes"] == []


def test_the_gallery_is_told_while_a_network_is_loaded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loading, loaded = threading.Event(), threading.Event()

    def slow(*given: object, **options: object) -> object:
        loading.set()
        loaded.wait(20)
        raise UsageError("no network")

    monkeypatch.setattr("sppfeat.serve.collection.describer_for", slow)
    with client(path) as page:
        assert loading.wait(20)
        began = time.monotonic()
        assert page.get("/api/gallery").status_code == 200 and time.monotonic() - began < 10
        loaded.set()


def test_who_waits_gets_the_newest_gallery(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sppfeat.serve.collection._LOOK_SECONDS", 0.0)
    served = Collection(path, CPU)
    before, opening, go = served.current(), threading.Event(), threading.Event()

    def slow(at: Path) -> object:
        opening.set()
        go.wait(20)
        return open_gallery(at)

    monkeypatch.setattr("sppfeat.serve.collection.open_gallery", slow)
    os.utime(path / "gallery.json", ns=(1, 1))
    with ThreadPoolExecutor(2) as threads:
        opener = threads.submit(served.current)
        assert opening.wait(20) and served.current() is before
        waits = threads.submit(served.current, wait=True)
        time.sleep(0.05)
        assert not waits.done()
        go.set()
        assert waits.result(20) is opener.result(20) is served.current() is not before


def test_large_uploads(path: Path) -> None:
    with client(path, ServeOptions(max_upload=2000, max_pixels=100 * 100)) as page:
        done = page.post("/api/search", files=sent(bytes(5000)))
        assert done.status_code == 413 and done.json()["detail"] == "expected at most 2,000 bytes, found more"

        def slowly() -> Iterator[bytes]:
            yield b"--x\r\nContent-Disposition: form-data; name=image; filename=x\r\n\r\n"
            for _ in range(50):
                yield bytes(100)

        kind = {"content-type": "multipart/form-data; boundary=x"}  # without a length
        assert page.post("/api/search", content=slowly(), headers=kind).status_code == 413
        wide = io.BytesIO()
        Image.new("L", (200, 60)).save(wide, "PNG")
        done = page.post("/api/search", files=sent(wide.getvalue()))
        assert done.status_code == 415 and done.json()["detail"] == "expected at most 10,000 pixels, found 200 x 60"


def test_uploads_are_kept_within_a_bound(path: Path, tmp_path: Path) -> None:
    before = sorted(os.listdir(path))
    with client(path, ServeOptions(uploads=30_000)) as page:
        keys = []
        for side in (60, 62, 64, 66, 68, 70):
            keys.append(page.post("/api/search", files=sent(jpeg((side, side), "PNG"))).json()["query"]["id"])
        assert page.get(f"/queries/{keys[0]}").status_code == 404
        assert page.get(f"/queries/{keys[-1]}").status_code == 200
    assert sorted(os.listdir(path)) == before


class TestGuard:
    def test_other_hosts_and_sites(self, page: TestClient) -> None:
        for host in ("evil.example", "127.0.0.1.evil.example", "evil@127.0.0.1", "[::1", "", "a b"):
            assert page.get("/api/gallery", headers={"host": host}).status_code in (400, 403), host
        for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST"):
            assert page.get("/api/gallery", headers={"host": host}).status_code == 200, host
        for headers in (
            {"origin": "http://evil.example"},
            {"origin": "null"},
            {"origin": "http://127.0.0.1:9999"},
            {"sec-fetch-site": "cross-site"},
            {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"},
        ):
            assert page.post("/api/search", data={"query": "r-0"}, headers=headers).status_code == 403, headers
            assert page.get("/images/0", headers=headers).status_code == 403, headers
        own = {"origin": HOME, "sec-fetch-site": "same-origin"}
        assert page.post("/api/search", data={"query": "r-0"}, headers=own).status_code == 200
        link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
        assert page.get("/", headers=link).status_code == 200  # a link to the page may be followed
        assert page.get("/api/gallery", headers=link).status_code == 403

    def test_headers_of_every_answer(self, page: TestClient) -> None:
        for url in ("/", "/api/gallery", "/images/0", "/nothing", "/static/nothing.js"):
            headers = page.get(url).headers
            assert "default-src 'none'" in headers["content-security-policy"], url
            assert "unsafe" not in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["cross-origin-resource-policy"] == "same-origin"
        assert page.get("/api/gallery", headers={"host": "evil"}).headers["x-content-type-options"] == "nosniff"

    def test_a_token(self, path: Path) -> None:
        options = ServeOptions(host="0.0.0.0", token="secret42")
        with client(path, options, "http://192.168.1.5:8000") as page:
            assert page.get("/api/gallery").status_code == 401 and page.get("/").status_code == 401
            for wrong in ("/?token=", "/?token=secret43", "/api/gallery?token=secret42"):
                assert page.get(wrong).status_code == 401, wrong
            assert page.get("/api/gallery", headers={"cookie": "sppfeat_token=\x01;;="}).status_code == 401
            assert page.get("/api/gallery", headers={"authorization": "Bearer secret42"}).status_code == 200
            opened = page.get("/?token=secret42", follow_redirects=False)
            assert (opened.status_code, opened.headers["location"]) == (303, "/")
            assert "HttpOnly" in opened.headers["set-cookie"] and "SameSite=Lax" in opened.headers["set-cookie"]
            assert page.get("/api/gallery").status_code == 200  # by the cookie

    def test_what_is_no_origin_and_no_name(self, page: TestClient) -> None:
        assert page.get("/api/gallery", headers={"origin": "http://["}).status_code == 403
        boundary = "multipart/form-data; charset=utf-7; boundary=x"
        part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="+2AA-.jpg"\r\n\r\n'
        body = part + jpeg() + b"\r\n--x--\r\n"
        done = page.post("/api/search", content=body, headers={"content-type": boundary})
        assert done.status_code in (200, 415, 422), done.text

    def test_a_body_that_does_not_end(self, path: Path) -> None:
        """One that trickles in is given up, and answered."""

        async def ask() -> list[dict[str, object]]:
            options = ServeOptions(seconds=0.2)
            app = create_app(Collection(path, CPU), Models(None, None, CPU), options)
            told: list[dict[str, object]] = []

            async def receive() -> dict[str, object]:
                await asyncio.sleep(0.05)
                return {"type": "http.request", "body": b"x", "more_body": True}

            async def send(message: dict[str, object]) -> None:
                told.append(message)

            kind = (b"content-type", b"application/octet-stream")
            scope = {"type": "http", "method": "POST", "path": "/api/names", "query_string": b"", "http_version": "1.1"}
            scope |= {"headers": [(b"host", b"127.0.0.1:8000"), kind], "scheme": "http", "root_path": ""}
            await Guard(app, options)(scope, receive, send)  # type: ignore[arg-type]
            return told

        assert asyncio.run(ask())[0]["status"] == 408

    def test_options(self) -> None:
        made = ServeOptions(host="0.0.0.0").token
        assert made is not None and len(made) == 32 and ServeOptions().token is None
        for host in ("127.0.0.1", "::1", "localhost", "127.3.4.5"):
            assert ServeOptions(host=host).token is None
        with pytest.raises(UsageError, match="token must be 8 or more letters and digits"):
            ServeOptions(token="short")
        with pytest.raises(UsageError, match="port must be from 0 to 65535"):
            ServeOptions(port=70000)


def duplicates_of(page: TestClient, query: str = "") -> dict[str, Any]:
    """The answer, once it is there."""
    for _ in range(100):
        answer = page.get(f"/api/duplicates{query}").json()
        if answer["state"] != "computing":
            break
        time.sleep(0.1)
    return dict(answer)


def test_duplicates(page: TestClient, path: Path, tmp_path: Path) -> None:
    """Begun by the first request; the copy among the photographs is found."""
    found = duplicates_of(page, "?threshold=0.99")
    assert found["state"] == "ready" and found["threshold"] == 0.99 and found["more"] == 0
    names = open_gallery(path).rows.names
    (copied,) = (group for group in found["groups"] if "<script>alert(1)<.jpg" in [one["name"] for one in group])
    assert found["generation"] == page.get("/api/gallery").json()["generation"] and found["cut"] == 0
    assert len(copied) == 2 and all(names[one["row"]] == one["name"] and one["there"] for one in copied)
    assert copied[0]["score"] == pytest.approx(1, abs=1e-5) and copied[1]["score"] > 0.99
    # Without a threshold images are compared, as `sppfeat duplicates` does.
    by_pixels = duplicates_of(page)
    assert by_pixels["state"] == "ready" and by_pixels["threshold"] is None and by_pixels["notes"] == []
    expected = find_duplicates(open_store(tmp_path / "f.h5"))
    assert expected.compared and expected.groups
    assert [[one["name"] for one in group] for group in by_pixels["groups"]] == [
        [one.name for one in group] for group in expected.groups
    ]
    (tmp_path / "f.h5").unlink()
    gone = duplicates_of(page, "?threshold=0.9")
    assert gone["state"] == "failed" and "f.h5" in gone["detail"]
    assert page.get("/api/duplicates?threshold=2").status_code == 422


def test_duplicates_of_images_that_moved(path: Path, images: Path, tmp_path: Path) -> None:
    expected = find_duplicates(open_store(tmp_path / "f.h5"))
    shutil.copytree(images, tmp_path / "elsewhere", copy_function=shutil.copyfile)  # with other times
    shutil.rmtree(images)
    with client(path) as page:
        lost = duplicates_of(page)
    assert lost["state"] == "ready" and len(lost["notes"]) == 2
    assert "is not there; if it was moved" in lost["notes"][0] and "could not be read" in lost["notes"][1]
    with client(path, ServeOptions(images=str(tmp_path / "elsewhere"))) as page:
        found = duplicates_of(page)
    assert found["notes"] == [] and all(one["there"] for group in found["groups"] for one in group)
    assert [[one["name"] for one in group] for group in found["groups"]] == [
        [one.name for one in group] for group in expected.groups
    ]


def test_hostile_names_are_only_text(page: TestClient, path: Path) -> None:
    row = open_gallery(path).rows.names.index("<script>alert(1)<.jpg")
    assert page.get(f"/api/images/{row}").headers["content-type"] == "application/json"
    done = page.post("/api/search", files=sent(jpeg(), "<img src=x onerror=alert(1)>.jpg"))
    assert done.headers["content-type"] == "application/json" and json.loads(done.text)["query"]["name"].startswith(
        "<img"
    )


def test_a_slow_image_holds_up_nobody(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many wait for one slow decoder each; small ones pass them."""
    from concurrent.futures import ThreadPoolExecutor

    from sppfeat.serve import collection as module

    honest = module.Collection.search
    slow = jpeg((80, 80))

    def search(self: Collection, gallery: object, query: object, *rest: object) -> object:
        if query.size == (80, 80):  # type: ignore[attr-defined]
            time.sleep(1.5)
        return honest(self, gallery, query, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module.Collection, "search", search)
    with client(path) as page, ThreadPoolExecutor(4) as threads:
        page.post("/api/search", data={"query": "r-0"})  # loads the network
        begun = [threads.submit(page.post, "/api/search", files=sent(slow)) for _ in range(3)]
        time.sleep(0.1)
        started = time.perf_counter()
        assert page.post("/api/search", data={"query": "r-0"}).status_code == 200
        assert time.perf_counter() - started < 1
        assert [one.result().status_code for one in begun] == [200] * 3


def test_searches_at_once(path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with client(path) as page, ThreadPoolExecutor(20) as threads:
        found = list(threads.map(lambda at: page.post("/api/search", data={"query": f"r-{at % 3}"}), range(20)))
        assert [one.status_code for one in found] == [200] * 20
        for at in range(3):
            hits = [[hit["row"] for hit in one.json()["hits"]] for one in found[at::3]]
            assert all(one == hits[0] for one in hits)
    with client(path, ServeOptions(workers=1, waiting=0, seconds=0.001)) as page:
        assert page.post("/api/search", files=sent(jpeg((500, 500)))).status_code == 503
