"""The server as a process: its address, a port in use, a gallery that is none, and its end."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TINY
from serving import running

from sppfeat import RunOptions, UsageError, extract_folder, open_store
from sppfeat.retrieval import create_gallery
from sppfeat.serve import ServeOptions, open_in_browser
from sppfeat.serve.server import address_of, listen
from sppfeat.serve.thumbnails import Thumbnails
from sppfeat.serve.uploads import Uploads
from sppfeat_cli import main

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def gallery(photos: Path, tmp_path: Path) -> Path:
    extract_folder(photos, tmp_path / "f.h5", replace(TINY, scales=(64,)), RunOptions(device="cpu"))
    create_gallery(open_store(tmp_path / "f.h5"), tmp_path / "g")
    return tmp_path / "g"


def test_from_the_command_line(gallery: Path) -> None:
    with running(gallery) as address:
        with urllib.request.urlopen(address) as page:
            assert b"<!doctype html>" in page.read()[:100].lower()
        with urllib.request.urlopen(f"{address}api/gallery") as answer:
            assert b'"name":"g"' in answer.read()
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(f"{address}api/gallery", headers={"Host": "evil.example"}))


def test_no_request_makes_it_fail(gallery: Path, tmp_path: Path) -> None:
    """Requests made from its own description, with values at and beyond the bounds: none is answered by 500."""
    with running(gallery) as address:
        program = Path(sys.executable).with_name("schemathesis")
        given = [f"{address}api/openapi.json", "--url", address.rstrip("/"), "-c", "not_a_server_error", "--seed", "1"]
        command = [str(program), "run", *given, "-n", "25", "--phases", "coverage,fuzzing"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "generated" in done.stdout and "failed" not in done.stdout


def test_what_cannot_be_served(gallery: Path, tmp_path: Path, run_sppfeat: Run) -> None:
    for given, status, fault in (
        ([tmp_path / "nothing"], 1, f"sppfeat: {tmp_path}/nothing: expected a gallery, found no such folder; first: "),
        ([gallery, "--token", "x"], 2, "token must be 8 or more letters and digits"),
        ([gallery, "--images", tmp_path / "nothing"], 2, "images: expected a folder"),
        ([gallery, "--detector", tmp_path / "f.h5"], 1, "expected a detector"),
        ([gallery, "--classifier", tmp_path / "f.h5"], 1, "expected an SVM"),
        ([gallery, "--port", "99999"], 2, "port must be from 0 to 65535"),
        ([gallery, "--host", "no-such-host.invalid"], 2, "host no-such-host.invalid"),
        ([gallery, "--host", "a..b"], 2, "host a..b: expected a name or an address"),
    ):
        done = run_sppfeat("serve", *given)
        assert done.returncode == status and fault in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(UsageError, match=rf"port {port} is in use; \d+ is free: --port \d+"):
            listen(ServeOptions(port=port))


def test_the_token_is_no_argument_of_the_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    done = threading.Event()
    monkeypatch.setattr("webbrowser.open", lambda address: (opened.append(address), done.set()))
    open_in_browser("http://127.0.0.1:8000/")
    assert done.wait(5) and opened == ["http://127.0.0.1:8000/"]
    done.clear()
    open_in_browser("http://localhost:8000/?token=12345678")
    assert done.wait(5) and opened[1].startswith("file://") and "12345678" not in opened[1]
    file = Path(opened[1].removeprefix("file://"))
    assert "url=http://localhost:8000/?token=12345678" in file.read_text() and file.stat().st_mode & 0o077 == 0
    file.unlink()


def test_addresses() -> None:
    with listen(ServeOptions(port=0)) as here:
        port = here.getsockname()[1]
        assert address_of(ServeOptions(), here) == f"http://127.0.0.1:{port}/"
        assert address_of(ServeOptions(host="::1"), here) == f"http://[::1]:{port}/"
        assert (
            address_of(ServeOptions(host="0.0.0.0", token="12345678"), here)
            == f"http://localhost:{port}/?token=12345678"
        )


@pytest.mark.parametrize(("host", "told"), [("127.0.0.1", False), ("0.0.0.0", True), ("::", True)])
def test_who_can_connect_is_told(
    host: str, told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def served(gallery: str, *given: object, ready: Callable[[str], None], **options: object) -> None:
        ready("http://address/")

    monkeypatch.setattr("sppfeat.serve.serve_gallery", served)
    monkeypatch.setattr("sys.argv", ["sppfeat", "serve", "g", "--host", host])
    with contextlib.suppress(SystemExit):
        main()
    out = capsys.readouterr().out
    assert out.startswith("g: http://address/  (Ctrl-C ends it)\n")
    assert ("other machines can connect" in out) == told


class TestThumbnails:
    def test_bounded(self, photos: Path, tmp_path: Path) -> None:
        from sppfeat.images import Item

        file = tmp_path / "t.sqlite"
        kept = Thumbnails(60_000, file)
        items = [Item.at(path) for path in sorted(photos.rglob("*.jpg"))]
        first = [kept.get(item, 160) for item in items]
        for _ in range(3):
            for item in items:
                kept.get(item, 320)
        kept.close()
        assert [Thumbnails(60_000, file).get(item, 160) for item in items] == first
        assert file.stat().st_size < 200_000

    def test_what_was_sent_is_never_on_disk(self, make_images: Callable[..., Path], tmp_path: Path) -> None:
        uploads = Uploads(1 << 20, 1 << 20)
        query = uploads.add("x.png", sorted(make_images(1).iterdir())[0].read_bytes())
        kept = Thumbnails(1 << 20, tmp_path / "t.sqlite")
        assert kept.get(query.item, 160) == kept.get(query.item, 160)
        kept.close()
        with contextlib.closing(sqlite3.connect(tmp_path / "t.sqlite")) as held:
            assert held.execute("SELECT COUNT(*) FROM thumbnails").fetchone() == (0,)

    def test_a_changed_image_is_rendered_again(self, make_images: Callable[..., Path], tmp_path: Path) -> None:
        from sppfeat.images import Item

        path = sorted(make_images(2).iterdir())
        kept = Thumbnails(1 << 20, tmp_path / "t.sqlite")
        before = kept.get(Item.at(path[0]), 160)
        os.replace(path[1], path[0])
        os.utime(path[0], ns=(time.time_ns(), time.time_ns()))
        assert kept.get(Item.at(path[0]), 160) != before

    def test_a_damaged_file_costs_time_alone(self, make_images: Callable[..., Path], tmp_path: Path) -> None:
        from sppfeat.images import Item

        (tmp_path / "t.sqlite").write_bytes(b"no database" * 100)
        item = Item.at(sorted(make_images(1).iterdir())[0])
        assert Thumbnails(1 << 20, tmp_path / "t.sqlite").get(item, 160)[:2] == b"\xff\xd8"
        (tmp_path / "file").write_bytes(b"")
        assert Thumbnails(1 << 20, tmp_path / "file" / "t.sqlite").get(item, 160)[:2] == b"\xff\xd8"
