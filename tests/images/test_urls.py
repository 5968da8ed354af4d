"""Images behind URLs, from a local web server and a local S3."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from image_server import ImageServer
from packing import KINDS, image_bytes, numbered_images, pack

from sppfeat.errors import ImageError, MissingExtraError, UsageError
from sppfeat.images import NO_FINGERPRINT, Item, find_images, fingerprints, item_at, open_image, read_ahead, urls
from sppfeat.images.urls import absolute, is_url


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ImageServer]:
    monkeypatch.setattr(urls, "WAITS", (0.01, 0.02, 0.04))
    with ImageServer().running() as server:
        yield server


def content_of(item: Item) -> bytes:
    raw, fingerprint = item.open()
    with raw:
        assert fingerprint == item.fingerprint() != NO_FINGERPRINT
        return raw.read()


def test_a_list_of_urls(server: ImageServer, tmp_path: Path) -> None:
    server.files = {f"/a/{name}": content for name, content in numbered_images(6)} | {"/b/x.png?size=3": image_bytes(9)}
    lines = [f"{server.url}{path}" for path in server.files]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    found = find_images([tmp_path / "list.txt"])
    assert found.root == server.url and server.requests == []  # nothing is asked for a list
    assert found.names == [path[1:] for path in server.files]
    assert [content_of(item) for item in found.items] == list(server.files.values())
    assert [content_of(item_at(found.root, name)) for name in found.names] == list(server.files.values())


def test_one_request_brings_an_image(server: ImageServer) -> None:
    server.files = {"/x.png": image_bytes(1)}
    (item,) = find_images([f"{server.url}/x.png"]).items
    item.open()[0].close()
    assert server.requests == [("GET", "/x.png")]


def test_several_hosts_and_protocols(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("https://a.example/x/1.jpg\nHTTPS://b.example/2\nhttps://a.example/x/1.jpg\n")
    found = find_images([tmp_path / "list.txt"])
    assert (found.root, found.names, found.repeated) == ("https://", ["a.example/x/1.jpg", "b.example/2"], 1)
    assert [item.path for item in found.items] == ["https://a.example/x/1.jpg", "https://b.example/2"]
    (tmp_path / "list.txt").write_text("https://a.example/1.jpg\nhttp://b.example/2.jpg\n")
    with pytest.raises(UsageError, match=r"http://b\.example/2\.jpg: expected local sources only, or URLs"):
        find_images([tmp_path / "list.txt"])
    (tmp_path / "list.txt").write_text(f"https://a.example/1.jpg\n{tmp_path}/x.jpg\n")
    with pytest.raises(UsageError, match=r"x\.jpg: expected local .* found https://a\.example as well"):
        find_images([tmp_path / "list.txt"])
    with pytest.raises(UsageError, match=r"ftp://a/x\.jpg: unknown protocol ftp: expected one of http, https, s3"):
        find_images(["ftp://a/x.jpg"])


def test_temporary_errors_are_tried_again_and_lasting_ones_said(server: ImageServer) -> None:
    server.files = {"/x.png": image_bytes(1)}
    (item,) = find_images([f"{server.url}/x.png"]).items
    server.failures = {"/x.png": [503, 429]}
    assert item.open()[0].read() == image_bytes(1)
    assert len(server.requests) == 3
    server.failures = {"/x.png": [500] * 9}
    with pytest.raises(ImageError, match=r"^the server answers 500 .*\(4 tries\)$"):
        item.open()
    server.failures = {"/x.png": [500, 500]}  # HEAD, and GET in its place
    assert item.fingerprint().file_size == len(image_bytes(1))
    for status, reason in ((403, "access refused"), (404, "no such object"), (410, "the server answers 410")):
        server.requests.clear()
        server.failures = {"/x.png": [status] * 9}
        with pytest.raises(ImageError, match=reason):
            item.open()
        assert len(server.requests) == 1


def test_a_server_that_is_gone(server: ImageServer) -> None:
    (item,) = find_images(["http://127.0.0.1:1/x.png"]).items
    with pytest.raises(ImageError, match=r"cannot be read: .*\(4 tries\)$"):
        open_image(item)
    assert item.fingerprint() == NO_FINGERPRINT
    with pytest.raises(UsageError, match=r"list\.txt: expected a readable text list, found: cannot be read: .*4 tries"):
        find_images(["http://127.0.0.1:1/list.txt"])


def test_what_never_ends_is_a_failed_row_in_bounded_memory(
    server: ImageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sppfeat.images.remote.MAX_WHOLE_FILE", 16 << 20)
    server.files, server.endless = {"/x.png": b"x" * 65536}, True
    (item,) = find_images([f"{server.url}/x.png"]).items
    tracemalloc.start()
    with pytest.raises(ImageError, match=r"sends more than 16,777,216 bytes"):
        item.open()
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_latency_does_not_add_up(server: ImageServer) -> None:
    server.files, server.latency = {f"/{at}.png": image_bytes(at) for at in range(64)}, 0.1
    items = [item for at in range(64) for item in find_images([f"{server.url}/{at}.png"]).items]
    start = time.perf_counter()
    for item in items:
        item.expect()
    got = []
    for item in items:
        raw, _ = item.open()
        got.append(raw.read())
        raw.close()
    assert got == list(server.files.values())
    assert len(server.requests) == 64
    assert time.perf_counter() - start < 64 * 0.1 / 4
    items[0].expect()
    read_ahead.forget()
    assert items[0].open()[0].read() == got[0]


def test_fingerprints_are_asked_for_many_at_a_time(server: ImageServer, tmp_path: Path) -> None:
    server.files, server.latency = {f"/{at}.png": image_bytes(at) for at in range(70)}, 0.1
    (tmp_path / "x.png").write_bytes(image_bytes(1))
    items = [Item.at(tmp_path / "x.png")] * 2
    for at in range(70):
        items += find_images([f"{server.url}/{at}.png"]).items
    items.insert(40, items[0])
    start = time.perf_counter()
    found = list(fingerprints(items))
    assert time.perf_counter() - start < 70 * 0.1 / 4
    assert [one.file_size for one in found] == [len(content_of(item)) for item in items]
    assert found[40] == items[0].fingerprint() and len(set(found)) == 71


def test_a_server_that_sends_no_parts(server: ImageServer, tmp_path: Path) -> None:
    server.ranges = False
    for kind in ("tar", "zip"):
        server.files[f"/pack.{kind}"] = pack(tmp_path, kind, numbered_images(3)).read_bytes()
        with pytest.raises(ImageError, match=r"whole objects only, expected support of parts \(Range\)"):
            find_images([f"{server.url}/pack.{kind}"]).items[1].open()
    server.files["/pack.tgz"] = pack(tmp_path, "tgz", numbered_images(3)).read_bytes()
    found = find_images([f"{server.url}/pack.tgz"]).items
    assert [content_of(item) for item in found] == [content for _, content in numbered_images(3)]


@pytest.mark.parametrize("kind", KINDS)
def test_archives_behind_urls(server: ImageServer, tmp_path: Path, kind: str) -> None:
    files = numbered_images(7)
    server.files = {f"/d/pack.{kind}": pack(tmp_path, kind, files).read_bytes()}
    found = find_images([f"{server.url}/d/pack.{kind}"])
    assert found.root == f"{server.url}/d" and found.problems == {}
    assert found.names == [f"pack.{kind}/{name}" for name, _ in files]
    for item in found.items:
        item.expect()
    assert [content_of(item) for item in found.items] == [content for _, content in files]
    assert content_of(item_at(found.root, found.names[4])) == files[4][1]


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_is_known_before_the_query_of_its_url(server: ImageServer, tmp_path: Path, kind: str) -> None:
    files = numbered_images(3)
    server.files = {f"/pack.{kind}?signed=1": pack(tmp_path, kind, files).read_bytes()}
    found = find_images([f"{server.url}/pack.{kind}?signed=1"])
    assert [content_of(item) for item in found.items] == [content for _, content in files]
    assert [content_of(item_at(found.root, name)) for name in found.names] == [content for _, content in files]


def test_archives_that_are_not_there(server: ImageServer) -> None:
    assert find_images([f"{server.url}/x-{{0..1}}.tar"]).problems == {
        "x-0.tar/(rest)": "no such object",
        "x-1.tar/(rest)": "no such object",
    }


def test_no_name_reaches_above_its_root_and_no_local_root_makes_a_connection(
    server: ImageServer, tmp_path: Path
) -> None:
    server.files = {"/secret.png": image_bytes(1)}
    for name in ("../secret.png", "%2e%2e/secret.png", "a/%2E%2E/../secret.png"):
        with pytest.raises(ImageError, match="leads out of its URL"):
            item_at(f"{server.url}/below", name).open()
    with pytest.raises(ImageError, match="no such file"):
        item_at(str(tmp_path), f"{server.url}/secret.png").open()
    assert server.requests == []


def test_urls_are_told_from_paths() -> None:
    assert absolute("s3://bucket/x") == "s3://bucket/x" and absolute("x") == f"{Path.cwd()}/x"
    assert is_url("s3://bucket/x") and is_url("https://h/x") and is_url("HF://datasets/x")
    assert not any(map(is_url, ["/s3://x", "s3:/x", "s3:///x", "c://x", "file:///etc/passwd", "x.tar", "-"]))


def test_a_protocol_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(urls.PROTOCOLS, "gs", "no_such_module")
    urls.file_system.cache_clear()
    with pytest.raises(MissingExtraError, match=r"^gs:// needs no_such_module, .* pip install 'sppfeat\[cloud\]'$"):
        find_images(["gs://bucket/prefix"])


def put(bucket: str, files: dict[str, bytes]) -> None:
    import s3fs

    for name, content in files.items():
        s3fs.S3FileSystem(skip_instance_cache=True).pipe(f"{bucket}/{name}", content)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_prefixes_of_a_bucket_are_walked_as_folders_are(bucket: str, tmp_path: Path) -> None:
    files = {
        f"pre/{name}": image_bytes(at) for at, name in enumerate(["b/x.png", "a.png", "b.png", "b/a/y.png", "c/1.jpg"])
    }
    put(bucket, files | {"pre/notes.txt": b"x", "pre/b/p.HEIC": b"x", "pre/t.tar": b"x", "pre2/z.png": b"x"})
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    found, local = find_images([f"{bucket}/pre/"]), find_images([tmp_path / "pre"])
    assert found.root == f"{bucket}/pre" and found.names == local.names
    assert found.extent is not None and found.extent.unread == ((".heic", 1),)
    assert [content_of(item) for item in found.items] == [content_of(item) for item in local.items]
    before = {item.name: item.fingerprint() for item in found.items}
    assert {item.name: item.fingerprint() for item in find_images([f"{bucket}/pre"]).items} == before
    put(bucket, {"pre/a.png": image_bytes(77)})
    after = {item.name: item.fingerprint() for item in find_images([f"{bucket}/pre"]).items}
    assert {name for name in after if after[name] != before[name]} == {"a.png"}
    put(bucket, {"list.txt": f"{bucket}/pre/a.png\n{bucket}/pre2/z.png\n".encode()})
    assert find_images([f"{bucket}/list.txt"]).names == ["pre/a.png", "pre2/z.png"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_archives_in_a_bucket(bucket: str, tmp_path: Path, kind: str) -> None:
    files = numbered_images(7)
    put(bucket, {f"pack.{kind}": pack(tmp_path, kind, files).read_bytes()})
    found = find_images([f"{bucket}/pack.{kind}"])
    assert [content_of(item) for item in found.items] == [content for _, content in files]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_bucket_that_refuses_is_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"^s3://other/x: expected a prefix .*, found: no such object$"):
        find_images(["s3://other/x"])

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(urls.file_system("s3"), "ls", refuse)
    with pytest.raises(UsageError, match=r"found: access refused \(Access Denied\)$"):
        find_images([f"{bucket}/x"])
