"""Folder stores in a bucket of a local S3: the rows of a local store, whatever interrupts a run, on any machine."""

from __future__ import annotations

import base64
import concurrent.futures
import hashlib
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import TINY, sppfeat_command
from test_sharded import same

from sppfeat import (
    Extraction,
    RunOptions,
    StoreBusyError,
    StoreError,
    UsageError,
    extract_folder,
    merge_stores,
    open_store,
    verify_store,
)
from sppfeat.extraction import ShardOptions, cluster
from sppfeat.extraction.stages import Stages
from sppfeat.progress import Observer
from sppfeat.store import (
    BucketFolder,
    Folder,
    Mirror,
    buckets,
    create_folder,
    is_store,
    iter_blocks,
    open_folder,
    require_complete,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # botocore's own
MakeImages = Callable[..., Path]
Run = Callable[..., subprocess.CompletedProcess[str]]
TINY_FLAGS = ["--backbone", "timm:test_resnet", "--weights", "random", "--scales", "64", "--levels", "2,1"]


@pytest.fixture
def url(bucket: str, request: pytest.FixtureRequest) -> str:
    """A place for a store of its own."""
    return f"{bucket}/{abs(hash(request.node.nodeid))}/feats/"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_home: Path) -> Callable[[str], None]:
    """Go to another machine: one with a cache of its own, but for networks."""

    def go(name: str) -> None:
        (folder := tmp_path / name / "sppfeat").mkdir(parents=True, exist_ok=True)
        if not (folder / "networks").exists():
            (cache_home / "sppfeat" / "networks").mkdir(parents=True, exist_ok=True)
            (folder / "networks").symlink_to(cache_home / "sppfeat" / "networks")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))

    go("first")
    return go


def s3() -> Any:
    import s3fs

    return s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)


def objects(url: str) -> dict[str, bytes]:
    """The objects of a store, by name."""
    place = url.removeprefix("s3://")
    return {path.removeprefix(place): s3().cat_file(path) for path in s3().find(place)}


def describe(folder: Path, url: str, **options: Any) -> Extraction:
    return extract_folder(
        folder, url, TINY, RunOptions(device="cpu", batch_size=1), shards=ShardOptions(rows=12), **options
    )


@pytest.fixture
def local(make_images: MakeImages, tmp_path: Path) -> Path:
    """A file with the rows of the images."""
    extract_folder(make_images(40, "all"), tmp_path / "file.h5", TINY, RunOptions(device="cpu"))
    return tmp_path / "file.h5"


def test_a_bucket_holds_what_a_file_holds(
    make_images: MakeImages, local: Path, tmp_path: Path, url: str, machine: Callable[[str], None]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for path in make_images(40, "all").iterdir():  # the same files, with their times
        if path.name < "0030":
            shutil.copy2(path, folder)
    done = describe(folder, url)
    assert (done.store, done.described, done.pending) == (url, 30, 0)
    assert sorted(objects(url)) == ["all.h5", "manifest.json", *(f"shard-0000{at}.h5" for at in range(3))]
    again = describe(folder, url)
    assert (again.described, again.reused) == (0, 30)
    before = objects(url)
    for path in (tmp_path / "all").iterdir():
        shutil.copy2(path, folder)
    assert describe(folder, url).described == 10
    after = objects(url)
    assert len(after) == 6 and all(after[name] == before[name] for name in before if name.startswith("shard"))

    store = open_store(url)
    assert store.place == url and len(store) == 40 and verify_store(store) == []
    found = {name: row for block in iter_blocks(store) for name, row in zip(block.names, block.values, strict=True)}
    expected = open_store(local)
    for name, row in zip(expected.names, np.asarray(expected.descriptors), strict=True):
        np.testing.assert_array_max_ulp(found[name].astype(np.float16), row)

    # The objects are a folder of shards as it is on a disk; what a writer keeps of them has room for no values.
    for name, content in after.items():
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    assert same(tmp_path / "copy", local)
    kept = next((tmp_path / "first/sppfeat/stores").glob("*/writing/shard-00000.h5"))
    assert kept.stat().st_size == len(after["shard-00000.h5"]) and kept.read_bytes() != after["shard-00000.h5"]


def test_another_machine_goes_on(
    make_images: MakeImages, local: Path, url: str, tmp_path: Path, machine: Callable[[str], None]
) -> None:
    describe(make_images(20), url)
    machine("second")
    images = make_images(30)
    assert describe(images, url).described == 10
    os.utime(images / "0003.png", ns=(1, 1))  # a row of the first machine's first shard
    machine("first")
    assert describe(make_images(40), url).described == 11
    machine("third")
    assert describe(images, url).described == 0
    store = open_store(url)
    assert verify_store(store) == [] and store.counts() == {"pending": 0, "done": 40, "failed": 0}
    assert sorted(store.names) == sorted(open_store(local).names)
    assert store.file_mtime_ns[list(store.names).index("0003.png")] == 1


class Seen(Observer):
    """Counts rows."""

    def __init__(self) -> None:
        self.rows = 0

    def row(self, name: str, error: str | None) -> None:
        self.rows += 1


def test_shards_under_work_elsewhere_are_not_taken_twice(
    make_images: MakeImages, url: str, tmp_path: Path, machine: Callable[[str], None]
) -> None:
    """The first machine is stopped within a shard; the second describes its images into shards of its own."""
    images, seen = make_images(40), Seen()
    first = describe(images, url, observer=seen, stop=lambda: seen.rows > 16)
    assert first.interrupted and ".unfinished" in objects(url)
    with pytest.raises(StoreError, match=f"{url}: a run was interrupted before its shards were complete; run extract"):
        require_complete(open_store(url))
    machine("second")
    describe(images, url)
    machine("first")
    assert describe(images, url).described == 0
    store = open_store(url)
    require_complete(store)
    assert len(set(store.names)) == len(store) == 40 and verify_store(store) == []


@pytest.mark.timeout(280)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_kill_9_at_random_moments(
    make_images: MakeImages, local: Path, url: str, tmp_path: Path, machine: Callable[[str], None], elsewhere: bool
) -> None:
    command = sppfeat_command("extract", make_images(40), "-o", url, "--quiet", "--shard-rows", "8", *TINY_FLAGS)
    started = time.monotonic()
    subprocess.run([*command[:-1], "2,1", "-o", f"{url[:-1]}-timed/"], check=True)
    whole = time.monotonic() - started
    moments = random.Random(0)
    for number in range(8):
        with subprocess.Popen(command) as child:
            time.sleep(moments.uniform(0.4, 1.0) * whole)
            child.kill()
        if elsewhere:
            machine(f"machine{number}")
        if "manifest.json" in objects(url):
            assert verify_store(open_store(url)) == []
    subprocess.run(command, check=True)
    store = open_store(url)
    require_complete(store)
    assert verify_store(store) == [] and store.counts() == {"pending": 0, "done": 40, "failed": 0}
    for name, content in objects(url).items():
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    assert same_values(tmp_path / "copy", local)


def test_of_two_writers_one_ends(make_images: MakeImages, url: str, machine: Callable[[str], None]) -> None:
    folder = make_images(30)

    class Overtaken(Seen):
        """While the first run describes images, one on another machine does."""

        def row(self, name: str, error: str | None) -> None:
            super().row(name, error)
            if self.rows == 1:
                machine("second")
                describe(folder, url)

    with pytest.raises(
        StoreBusyError, match=f"^{url}(shard-00000.h5|manifest.json|.unfinished): another run has written"
    ):
        describe(folder, url, observer=Overtaken())
    store = open_store(url)
    assert len(set(store.names)) == len(store) == 30 and verify_store(store) == []
    machine("first")
    assert describe(folder, url).described == 0
    assert ".unfinished" not in objects(url)


@pytest.mark.parametrize("replaces", [None, '"0"'], ids=["absent", "unchanged"])
def test_an_object_of_another_writer_stays(url: str, replaces: str | None) -> None:
    bucket = buckets.Bucket(url)
    bucket.put("x", b"theirs", replaces=None)
    with pytest.raises(StoreBusyError, match=f"^{url}x: another run has written"):
        bucket.put("x", b"ours", replaces=replaces)
    found = bucket.read("x")
    assert found is not None and found[0] == b"theirs"


@pytest.mark.parametrize(
    ("replaces", "condition"), [(None, "IfNoneMatch"), ('"0"', "IfMatch")], ids=["absent", "unchanged"]
)
def test_a_botocore_without_conditions(
    url: str, replaces: str | None, condition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """s3fs leaves out what botocore does not know, so that the put would replace whatever is there."""
    bucket = buckets.Bucket(url)
    known = buckets.file_system("s3").s3.meta.service_model.operation_model("PutObject").input_shape.members
    monkeypatch.delitem(known, condition)
    with pytest.raises(StoreError, match=rf"^{url}: expected a botocore .* \({condition}\), found \d"):
        bucket.put("x", b"ours", replaces=replaces)
    assert bucket.read("x") is None


def test_two_runs_of_one_machine(make_images: MakeImages, url: str, machine: Callable[[str], None]) -> None:
    with (
        Mirror(url),
        pytest.raises(StoreBusyError, match=f"^{url}: another process is writing to it; wait for it to end$"),
    ):
        describe(make_images(3), url)


def test_a_put_whose_answer_was_lost(
    make_images: MakeImages, url: str, machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The object is there when the put is tried again: it is this writer's own."""
    client, lost = buckets.file_system("s3"), 0
    call = client.call_s3

    def lose(method: str, *arguments: Any, **options: Any) -> Any:
        nonlocal lost
        answer = call(method, *arguments, **options)
        if method == "put_object" and lost < 3:
            lost += 1
            raise ConnectionResetError("lost")
        return answer

    monkeypatch.setattr(client, "call_s3", lose)
    assert describe(make_images(3), url).described == 3
    assert lost == 3 and verify_store(open_store(url)) == []


def test_a_shard_without_what_we_say_of_it(make_images: MakeImages, url: str, machine: Callable[[str], None]) -> None:
    """As other programs put it: it is fetched whole. With something wrong said, it is damaged."""
    folder = make_images(3)
    describe(folder, url)
    place = url.removeprefix("s3://") + "shard-00000.h5"
    content = s3().cat_file(place)
    s3().pipe_file(place, content)
    machine("second")
    assert describe(folder, url).described == 0
    kept = next(path for path in Path(os.environ["XDG_CACHE_HOME"]).glob("sppfeat/stores/*/writing/shard-00000.h5"))
    assert kept.stat().st_size == len(content) and kept.read_bytes() != content
    for wrong in ("8+8", "99999999+1", "x"):
        s3().rm_file(place)
        s3().call_s3(
            "put_object", Bucket="bucket", Key=place.partition("/")[2], Body=content, Metadata={"sppfeat-values": wrong}
        )
        machine(f"wrong{wrong}")
        if wrong == "8+8":
            with pytest.raises(StoreError, match=f"^{url}shard-00000.h5: "):
                describe(folder, url)
        else:
            assert describe(folder, url).described == 0


def test_overwriting(make_images: MakeImages, url: str, machine: Callable[[str], None]) -> None:
    describe(make_images(30), url)
    with pytest.raises(StoreError, match=f"^{url}: already exists; choose another output, or use --overwrite$"):
        describe(make_images(30), url, resume=False)
    assert describe(make_images(5, "others"), url, overwrite=True).described == 5
    assert sorted(objects(url)) == ["all.h5", "manifest.json", "shard-00000.h5"]
    s3().pipe_file(f"{url.removeprefix('s3://')}notes.txt", b"mine")
    with pytest.raises(StoreError, match=f"^{url}: expected a store or nothing, found 'notes.txt' there$"):
        describe(make_images(5, "others"), url, overwrite=True)
    assert describe(make_images(6, "others"), url).described == 1  # nothing is removed
    assert objects(url)["notes.txt"] == b"mine"


def test_another_recipe_or_part(make_images: MakeImages, url: str, machine: Callable[[str], None]) -> None:
    describe(make_images(5), url)
    before = objects(url)
    with pytest.raises(StoreError, match=f"^{url}: was made with another recipe"):
        extract_folder(make_images(5), url, RECIPE, RunOptions(device="cpu"))
    with pytest.raises(StoreError, match=f"^{url}: expected all images, which this store describes, found part 1/2"):
        extract_folder(make_images(5), url, TINY, RunOptions(device="cpu"), shards=ShardOptions(part=(1, 2)))
    assert objects(url) == before


RECIPE = TINY.__class__(backbone="timm:test_resnet", weights="random", scales=(64,), levels=(1,))


def test_damaged_stores(make_images: MakeImages, url: str, machine: Callable[[str], None]) -> None:
    folder = make_images(20)
    describe(folder, url)
    place = url.removeprefix("s3://")
    whole = objects(url)
    s3().pipe_file(f"{place}shard-00000.h5", whole["shard-00000.h5"][:3000])
    machine("second")
    problems = verify_store(open_store(url))
    assert len(problems) == 1 and problems[0].startswith(f"{url}shard-00000.h5: ")
    with pytest.raises(StoreError, match=f"^{url}shard-00000.h5: "):
        describe(folder, url)
    s3().rm_file(f"{place}shard-00000.h5")
    for ask in (open_store, lambda url: describe(folder, url)):
        with pytest.raises(StoreError, match=f"^{url}: damaged: its manifest names shard-00000.h5 with 12 rows, found"):
            ask(url)
    s3().pipe_file(f"{place}shard-00000.h5", whole["shard-00000.h5"])
    s3().rm_file(f"{place}manifest.json")
    assert not is_store(url)
    with pytest.raises(StoreError, match=f"^{url}: expected a store, found no manifest.json there$"):
        open_store(url)
    with pytest.raises(StoreError, match=f"^{url}: damaged: expected manifest.json beside its 2 shards, found none"):
        describe(folder, url)
    assert len(objects(url)) == 3  # nothing is removed
    s3().pipe_file(f"{place}manifest.json", b"{}")
    with pytest.raises(StoreError, match=f"^{url}manifest.json: damaged: "):
        open_store(url)
    s3().pipe_file(f"{place}manifest.json", whole["manifest.json"])
    assert verify_store(open_store(url)) == []


def test_a_shard_that_is_replaced_while_it_is_read(
    make_images: MakeImages, url: str, machine: Callable[[str], None]
) -> None:
    folder = make_images(20)
    describe(folder, url)
    machine("reader")
    store = open_store(url)
    machine("first")
    os.utime(folder / "0003.png", ns=(1, 1))
    assert describe(folder, url).described == 1
    machine("reader")
    with pytest.raises(StoreError, match=f"^{url}shard-00000.h5: changed while it was read; run the command again$"):
        store.descriptors[0]
    np.testing.assert_array_equal(open_store(url).descriptors[0].shape, store.dim)


@pytest.mark.parametrize("place", ["s3://bucket", "s3://bucket/", "s3://bucket/../x", "gs://b/x/", "https://h/x/"])
def test_places_that_hold_no_store(place: str, make_images: MakeImages, machine: Callable[[str], None]) -> None:
    with pytest.raises(UsageError, match=r": expected s3://BUCKET/FOLDER/, a folder of its own"):
        describe(make_images(1), place)


def test_buckets_that_refuse(
    bucket: str, make_images: MakeImages, machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match="^s3://other-bucket/x/: no such bucket$"):
        describe(make_images(1), "s3://other-bucket/x/")
    with pytest.raises(StoreError, match="^s3://other-bucket/x/: no such bucket$"):
        open_store("s3://other-bucket/x/")

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(buckets.file_system("s3"), "call_s3", refuse)
    with pytest.raises(StoreError, match=r"^s3://bucket/x/: access refused \(Access Denied\)$"):
        describe(make_images(1), "s3://bucket/x/")


def test_a_shard_that_is_too_large(
    make_images: MakeImages, url: str, machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "MAX_OBJECT", 5000)
    with pytest.raises(StoreError, match=r"shard-00000.h5: expected at most 5,000 bytes .*\(--shard-rows\)$"):
        describe(make_images(20), url)


def test_a_cache_that_cannot_be_written(url: str, make_images: MakeImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    with pytest.raises(StoreError, match=f"^{url}: expected room for its shards in the cache, found that /dev/null/"):
        describe(make_images(1), url)


def test_only_folders_are_merged(tmp_path: Path, local: Path, url: str) -> None:
    for place, parts in ((url, [str(local)]), (str(tmp_path / "all"), [str(local), url])):
        with pytest.raises(UsageError, match=f"^{url}: expected folders that this machine has, found a URL"):
            merge_stores(place, parts)


def test_inspect(make_images: MakeImages, url: str, machine: Callable[[str], None], run_sppfeat: Run) -> None:
    describe(make_images(20), url)
    machine("second")
    shown = run_sppfeat("inspect", url)
    assert shown.stdout.startswith(f"{url}: store of 20 images, ") and "in 2 shards" in shown.stdout, shown.stderr
    assert not list(Path(os.environ["XDG_CACHE_HOME"]).glob("sppfeat/stores/*/reading/*.h5"))  # the manifest is enough
    s3().pipe_file(f"{url.removeprefix('s3://')}.unfinished", b"")
    assert "  a run writes to it, or was interrupted\n" in run_sppfeat("inspect", url).stdout
    about = json.loads(run_sppfeat("inspect", url, "--json", "--verify").stdout)
    assert about["unfinished"] is True and about["verified"] is True
    assert about["bytes"] == sum(len(content) for name, content in objects(url).items() if name.startswith("shard"))


class Killed(BaseException):
    """As if the process ended here."""


def opened(mirror: Mirror) -> Any:
    return open_folder(mirror.path, writable=True, kind=partial(BucketFolder, mirror=mirror))


def test_a_kill_between_a_put_and_its_rename(
    make_images: MakeImages, url: str, machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept here of a shard is then older than the bucket's, whatever changes there meanwhile."""
    folder = make_images(20)
    whole = (folder / "0003.png").read_bytes()
    (folder / "0003.png").write_bytes(b"broken")
    assert describe(folder, url).failed == 1
    (folder / "0003.png").write_bytes(whole)

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Folder, "place", kill)
        describe(folder, url)
    machine("second")
    os.utime(folder / "0015.png", ns=(1, 1))
    assert describe(folder, url).described == 1
    machine("first")
    os.utime(folder / "0016.png", ns=(1, 1))
    assert describe(folder, url).described == 1
    store = open_store(url)
    assert verify_store(store) == [] and store.counts() == {"pending": 0, "done": 20, "failed": 0}


def test_shards_that_workers_did_not_put_are_dropped(
    make_images: MakeImages, url: str, machine: Callable[[str], None]
) -> None:
    """They have no descriptors here."""
    folder = make_images(20)
    describe(folder, url)
    before = objects(url)
    with Mirror(url) as mirror:
        there = opened(mirror)
        there.leave_to_others()
        there.rework_shard(0)
    assert describe(folder, url).described == 0
    after = objects(url)
    assert all(after[name] == before[name] for name in before if name.startswith("shard"))
    with Mirror(url) as mirror:
        there = opened(mirror)
        there.leave_to_others()
        with pytest.raises(StoreError, match="expected a shard that a worker has put into the bucket, found none$"):
            there.publish(there.rework_shard(0))


def test_a_worker_that_is_stopped_puts_nothing(
    make_images: MakeImages, url: str, machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_images(20)
    describe(folder, url)
    before = objects(url)
    os.utime(folder / "0003.png", ns=(1, 1))

    def answer(value: Any) -> Any:
        return SimpleNamespace(remote=lambda *_: lambda: value)

    worker = SimpleNamespace(fill=answer((Stages().told(), "torch")), take=answer([]), stop=answer(None))
    ray = SimpleNamespace(
        exceptions=SimpleNamespace(RayError=RuntimeError),
        wait=lambda references, **_: (references[:1], references[1:]),
        get=lambda reference: reference(),
        kill=lambda _: None,
    )

    def enter(self: cluster.RayCluster) -> cluster.RayCluster:
        self._ray, self._actor, self.workers = ray, SimpleNamespace(remote=lambda *_: worker), 1
        return self

    monkeypatch.setattr(cluster.RayCluster, "__enter__", enter)
    done = describe(folder, url, cluster="local")
    assert (done.described, done.pending) == (0, 1)
    after = objects(url)
    assert all(after[name] == before[name] for name in before if name.startswith("shard"))


def test_a_shard_that_was_removed(make_images: MakeImages, url: str, machine: Callable[[str], None]) -> None:
    describe(make_images(3), url)
    store = open_store(url)
    s3().rm_file(f"{url.removeprefix('s3://')}shard-00000.h5")
    with pytest.raises(StoreError, match=f"^{url}shard-00000.h5: no such object$"):
        store.descriptors[0]


def test_a_store_that_grows_while_it_is_opened(
    make_images: MakeImages, url: str, machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    describe(make_images(20), url)
    look, grown = buckets.Bucket.list, False

    def grow(self: buckets.Bucket) -> Any:
        nonlocal grown
        found = look(self)
        if not grown:
            grown = True
            describe(make_images(40), url)
        return found

    monkeypatch.setattr(buckets.Bucket, "list", grow)
    store = open_store(url)
    assert len(store) == 40 and verify_store(store) == []


def test_several_readers_of_one_machine(make_images: MakeImages, url: str, machine: Callable[[str], None]) -> None:
    describe(make_images(20), url)
    left = next(Path(os.environ["XDG_CACHE_HOME"]).glob("sppfeat/stores/*")) / "reading" / ".x.partial"
    left.parent.mkdir()
    for age in (60, 10_000):
        left.touch()
        os.utime(left, (time.time() - age,) * 2)
        open_store(url)
        assert left.exists() is (age == 60)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert set(threads.map(lambda _: len(open_store(url)), range(64))) == {20}


def test_a_mark_stays_while_a_run_goes_on(make_images: MakeImages, url: str, machine: Callable[[str], None]) -> None:
    seen = Seen()
    describe(make_images(40), url, observer=seen, stop=lambda: seen.rows > 16)
    machine("second")
    with Mirror(url) as mirror:  # as if no network could be loaded
        there = opened(mirror)
        there.discard(there.begin_shard(["new.png"]))
    assert ".unfinished" in objects(url)
    describe(make_images(40), url)
    assert ".unfinished" not in objects(url)
    with Mirror(url) as mirror:
        there = opened(mirror)
        there.begin()
        machine("third")
        with Mirror(url) as other:
            opened(other).begin()
            with pytest.raises(StoreBusyError, match=f"^{url}.unfinished: another run has written"):
                there.begin()
            there.finish()
            assert ".unfinished" in objects(url)


def test_a_new_store_that_another_run_has_continued(
    make_images: MakeImages, url: str, machine: Callable[[str], None]
) -> None:
    describe(make_images(5), f"{url[:-1]}-like/")
    like = open_store(f"{url[:-1]}-like/")
    about = {"recipe": like.recipe, "weights_sha256": like.weights_sha256, "source_root": like.source_root}
    with Mirror(url) as mirror:
        there = create_folder(mirror.path, dim=like.dim, **about, kind=partial(BucketFolder, mirror=mirror))
        machine("second")
        describe(make_images(5), url)
        there.remove_if_empty()
    assert len(open_store(url)) == 5


def test_a_put_that_is_sent_again(
    make_images: MakeImages, url: str, machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """s3fs sends a file from where it is: at its end. S3 compares what arrives with its MD5; this one does not."""
    from botocore.exceptions import ClientError

    describe(make_images(3), url)
    client, lost = buckets.file_system("s3")._s3, 0
    put = client.put_object

    async def put_object(**about: Any) -> Any:
        nonlocal lost
        if not isinstance(about["Body"], bytes):
            about["Body"] = about["Body"].read()
            if not lost:
                lost += 1
                raise TimeoutError
            md5 = base64.b64encode(hashlib.md5(about["Body"]).digest()).decode()
            if about.get("ContentMD5", md5) != md5:
                raise ClientError({"Error": {"Code": "BadDigest"}}, "PutObject")
        return await put(**about)

    monkeypatch.setattr(client, "put_object", put_object)
    assert describe(make_images(6), url).described == 3
    assert lost and verify_store(open_store(url)) == []


def test_a_shard_of_a_run_that_was_overtaken(make_images: MakeImages, url: str, machine: Callable[[str], None]) -> None:
    """A worker may put its shard after its run was killed, and another has described the same images."""
    describe(make_images(20), url)
    place = url.removeprefix("s3://")
    s3().pipe_file(f"{place}shard-00002.h5", objects(url)["shard-00001.h5"])
    machine("second")
    assert describe(make_images(24), url).described == 4
    store = open_store(url)
    assert len(set(store.names)) == len(store) == 24 and verify_store(store) == []


def test_another_machine_changes_a_store_between_two_runs_of_a_process(
    make_images: MakeImages, url: str, machine: Callable[[str], None]
) -> None:
    folder = make_images(20)
    describe(folder, url)
    assert describe(folder, url).described == 0
    machine("second")
    os.utime(folder / "0003.png", ns=(1, 1))
    assert describe(folder, url).described == 1
    machine("first")
    assert describe(folder, url).described == 0


def test_a_cluster_puts_its_shards_itself(
    make_images: MakeImages, local: Path, url: str, tmp_path: Path, run_sppfeat: Run, machine: Callable[[str], None]
) -> None:
    pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    words = ["extract", make_images(40), "-o", url, "--shard-rows", "8", "-j", "1", "--json", *TINY_FLAGS]
    done = run_sppfeat(*words, "--cluster", "local")
    assert done.returncode == 0 and json.loads(done.stdout)["described"] == 40, done.stderr
    found = objects(url)
    assert sorted(found) == ["all.h5", "manifest.json", *(f"shard-0000{at}.h5" for at in range(5))]
    os.utime(tmp_path / "images/0003.png", ns=(1, 1))
    again = run_sppfeat(*words, "--cluster", "local")
    assert json.loads(again.stdout)["described"] == 1, again.stderr
    for name, content in objects(url).items():
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    assert verify_store(open_store(tmp_path / "copy")) == [] and same_values(tmp_path / "copy", local)


def same_values(one: Path, other: Path) -> bool:
    first, second = open_store(one), open_store(other)
    order = np.argsort(first.names)
    assert [first.names[row] for row in order] == sorted(second.names)
    values = np.asarray(first.descriptors)[order], np.asarray(second.descriptors)[np.argsort(second.names)]
    np.testing.assert_array_max_ulp(*values)
    return True
