"""Decoding in processes: what threads give, whatever happens to the processes. The GPU is faked; the rest is real."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from sppfeat import Describer, DeviceError, Recipe, RunOptions, SppFeatWarning, extract_folder, open_store
from sppfeat.engines.torch_engine import TorchEngine
from sppfeat.extraction import branch, decoders
from sppfeat.extraction.decoders import Decoders
from sppfeat.extraction.shared_memory import SharedMemory
from sppfeat.extraction.stages import Stages
from sppfeat.images import (
    Decoder,
    Item,
    PreparedImage,
    Unresized,
    find_images,
    resizing,
)
from sppfeat.images.blobs import Blob
from sppfeat.images.memory import DecodingMemory
from sppfeat.images.remote import UrlFile
from sppfeat.images.tar_files import TarMember
from sppfeat.images.zip_files import ZipMember

MakeImages = Callable[..., Path]
OPTIONS = RunOptions(engine="torch", num_workers=2, batch_size=3)
LENT = 100 << 20
POISON = 0xAB

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="processes need memory without a name")


class LateEngine(TorchEngine):
    """Stands in for a GPU that resizes: it copies images no sooner than their rows are pooled, from where they were.

    Only addresses are kept until then: whoever drops an image early gives it away.
    """

    def feature_maps_of(self, images: Sequence[Unresized]) -> list[Any]:
        addresses = [(each.pixels.ctypes.data, each.pixels.shape, replace(each, pixels=_EMPTY)) for each in images]
        count = len(self._backbone.descriptions)
        return [(addresses, at) for at in range(count)]

    def pool(self, maps: Any) -> np.ndarray:
        if not isinstance(maps, tuple):
            return super().pool(maps)
        time.sleep(0.002)
        addresses, at = maps
        arrived = [
            replace(each, pixels=np.ctypeslib.as_array((ctypes.c_uint8 * int(np.prod(shape))).from_address(address)))
            for address, shape, each in addresses
        ]
        arrived = [
            replace(each, pixels=each.pixels.reshape(to[1])) for each, to in zip(arrived, addresses, strict=True)
        ]
        return super().pool(self.feature_maps(np.stack([each.resized() for each in arrived]))[at])


_EMPTY = np.zeros((0, 0, 3), np.uint8)


class Watched:
    """How many images were decoded by threads, and by processes."""

    def __init__(self) -> None:
        self.by_thread = self.by_process = 0
        self.started: list[Any] = []

    def processes(self) -> list[subprocess.Popen[bytes]]:
        return [process._process for each in self.started for process in each._running]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """A GPU is believed to be here; processes decode from the first image that comes after the network is loaded.

    Memory that is free again is overwritten at once.
    """
    watched = Watched()
    memory = DecodingMemory(resizing.MAX_WORKING_SET + 2 * LENT)
    monkeypatch.setattr(resizing, "_decoding_memory", lambda: memory)
    monkeypatch.setattr(decoders, "IMAGES_BEFORE_PROCESSES", 0)
    monkeypatch.setattr(branch, "engine_device", lambda recipe, options: "cuda:0")
    monkeypatch.setattr(branch, "resizes_images", lambda engine, device: True)
    monkeypatch.setattr(branch, "load_engine", lambda network, options: LateEngine(network.backbone, "cpu"))
    decode, take, begin, submit = (
        Decoders._decode,
        decoders._Processes._take,
        decoders._Processes._run,
        decoders._Processes.submit,
    )

    def give_back(memory: SharedMemory, begin: int, end: int) -> None:
        memory.whole[begin:end] = POISON
        memory._returned.append((begin, end))

    def counted(self: Any, item: Item) -> Any:
        watched.by_thread += 1
        return decode(self, item)

    def taken(self: Any, *arguments: Any) -> None:
        watched.by_process += 1
        take(self, *arguments)

    def noted(self: Any) -> None:
        watched.started.append(self)
        begin(self)

    def ready(self: Any, item: Item) -> Any:
        if self._number_ready == 0:
            wait_for(lambda: self.ready == self._workers or not self._listener.is_alive())
            self._number_ready = 1
        return submit(self, item)

    monkeypatch.setattr(SharedMemory, "give_back", give_back)
    monkeypatch.setattr(Decoders, "_decode", counted)
    monkeypatch.setattr(decoders._Processes, "_take", taken)
    monkeypatch.setattr(decoders._Processes, "_run", noted)
    monkeypatch.setattr(decoders._Processes, "submit", ready)
    monkeypatch.setattr(decoders._Processes, "_number_ready", 0, raising=False)
    yield watched
    gc.collect()
    wait_for(lambda: not watched.processes())
    wait_for(lambda: memory._most == resizing.MAX_WORKING_SET + 2 * LENT)  # what was lent came back


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextmanager
def threads_only() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoders, "IMAGES_BEFORE_PROCESSES", 1 << 60)
        yield


@pytest.fixture
def source(make_images: MakeImages, photos: Path) -> Path:
    """Images of all kinds, sound and not."""
    folder = make_images(40)
    for path in sorted(photos.rglob("*.jpg"))[:6]:
        (folder / path.name).write_bytes(path.read_bytes())
        (folder / f"cut-{path.name}").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    photo = Image.open(next(photos.rglob("*.jpg"))).convert("RGB")
    exif = Image.Exif()
    for turn in range(2, 9):
        exif[0x0112] = turn
        photo.resize((90, 61)).save(folder / f"turned-{turn}.jpg", exif=exif.tobytes())
    photo.resize((1400, 900)).save(folder / "large.jpg")  # resized by the decoder
    Image.new("RGB", (6000, 5500), "red").save(folder / "scan.png", compress_level=1)  # more memory than was lent
    photo.convert("L").resize((70, 80)).save(folder / "gray.png")
    photo.convert("P").resize((70, 80)).save(folder / "palette.gif")
    photo.resize((4000, 64)).save(folder / "wide.png")  # beyond max_aspect
    photo.resize((70, 80)).save(os.fsencode(folder) + b"/\xff.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_bytes(b"no image")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "folder.jpg").mkdir()
    return folder


@pytest.fixture
def archives(make_images: MakeImages, tmp_path: Path) -> list[Path]:
    """The same 40 images in archives of all kinds; the first three are opened by any process."""
    members = sorted(make_images(40).iterdir())
    for name, mode in (("a.tar", "w"), ("d.tar.gz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as tar:  # type: ignore[call-overload]
            for path in members:
                tar.add(path, path.name)
    for name, method in (("b.zip", zipfile.ZIP_STORED), ("c.zip", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(tmp_path / name, "w", method) as packed:
            for path in members:
                packed.write(path, path.name)
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    rows = {"image": [path.read_bytes() for path in members], "name": [path.name for path in members]}
    parquet.write_table(arrow.table(rows), tmp_path / "e.parquet")
    return [tmp_path / name for name in ("a.tar", "b.zip", "c.zip", "d.tar.gz", "e.parquet")]


def columns(path: Path) -> dict[str, Any]:
    store = open_store(path)
    return {"names": store.names} | {
        name: np.memmap(path, column.dtype, "r", column.offset, column.shape).tobytes()
        for name, column in store.columns.items()
    }


@pytest.mark.parametrize(
    "recipe",
    [
        TINY,
        replace(TINY, scales=(64, 96), interpolation="lanczos"),
        replace(TINY, crop="center"),
        replace(TINY, scales=("native",)),
        replace(TINY, jpeg_draft=True),
    ],
)
@pytest.mark.parametrize("resizes", [True, False])
def test_stores_are_the_same(
    recipe: Recipe, resizes: bool, source: Path, tmp_path: Path, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branch, "resizes_images", lambda engine, device: resizes)
    with threads_only():
        extract_folder(source, tmp_path / "threads.h5", recipe, OPTIONS)
    assert not watched.by_process
    watched.by_thread = 0
    extraction = extract_folder(source, tmp_path / "processes.h5", recipe, OPTIONS)
    assert watched.by_process > 40 and watched.by_thread > 5
    assert extraction.failed >= 11 and extraction.stages.decode > 0
    expected, found = columns(tmp_path / "threads.h5"), columns(tmp_path / "processes.h5")
    assert found.keys() == expected.keys() and len(expected) > 6
    for name, column in expected.items():
        assert column == found[name], name


def described(items: Sequence[Any], describer: Describer | None = None) -> dict[int, Any]:
    return {each.position: each for each in (describer or Describer(TINY, OPTIONS)).describe(items)}


def assert_same(found: dict[int, Any], expected: dict[int, Any]) -> None:
    assert found.keys() == expected.keys()
    for position, each in expected.items():
        assert (found[position].error, found[position].image_size) == (each.error, each.image_size)
        np.testing.assert_array_equal(found[position].rows, each.rows)


def test_memory_that_is_given_back_early_is_seen(
    make_images: MakeImages, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other tests could not fail otherwise: here images are dropped when the pass begins."""
    items = find_images([make_images(40)]).items
    with threads_only():
        expected = described(items)
    feature_maps_of = LateEngine.feature_maps_of

    def early(self: LateEngine, images: Sequence[Unresized]) -> list[Any]:
        maps = feature_maps_of(self, images)
        for each in images:
            object.__setattr__(each, "pixels", _EMPTY)
        return maps

    monkeypatch.setattr(LateEngine, "feature_maps_of", early)
    found = described(items)
    assert sum(not np.array_equal(found[at].rows, each.rows) for at, each in expected.items()) > 10


def test_windows(make_images: MakeImages, watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branch, "resizes_images", lambda engine, device: False)
    boxes = np.array([[0, 0, 47, 47], [5, 6, 30.5, 40], [0, 0, 500, 500]])
    items = [replace(each, windows=boxes) for each in find_images([make_images(30)]).items]
    with threads_only():
        expected = described(items)
    found = described(items)
    assert watched.by_process > 10
    assert_same(found, expected)
    assert all(each.row_errors == expected[at].row_errors != {} for at, each in found.items())


@pytest.mark.parametrize("how_many", [1, 2])
def test_processes_that_are_killed(how_many: int, make_images: MakeImages, watched: Watched) -> None:
    items = find_images([make_images(300)]).items
    with threads_only():
        expected = described(items)
    found = {}
    with pytest.warns(
        SppFeatWarning, match="process that decoded images ended early .signal 9.; its images are decoded"
    ):
        for each in Describer(TINY, OPTIONS).describe(items):
            found[each.position] = each
            if len(found) == 60:
                running = watched.processes()
                assert len(running) == 2
                for process in running[:how_many]:
                    process.kill()
                wait_for(lambda: len(watched.processes()) == 2 - how_many)
    assert_same(found, expected)
    assert watched.by_process > 20 and (how_many == 2) == (watched.by_thread - 300 > 100)


def test_a_process_that_is_killed_while_it_decodes(
    make_images: MakeImages, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped first: what it was told of is lost with it."""
    items = find_images([make_images(60)]).items
    with threads_only():
        expected = described(items)
    describer = Describer(TINY, OPTIONS)
    call = describer.describe(items)
    found = {each.position: each for _, each in zip(range(3), call, strict=False)}
    stuck = watched.processes()[0]
    os.kill(stuck.pid, signal.SIGSTOP)
    (processes,) = watched.started
    wait_for(lambda: len(processes._running[0].images) == decoders.LINES_AHEAD or not processes._waiting)
    stuck.kill()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        found |= {each.position: each for each in call}
    assert_same(found, expected)


def test_processes_that_cannot_start(
    make_images: MakeImages, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = find_images([make_images(30)]).items
    with threads_only():
        expected = described(items)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.warns(SppFeatWarning, match="no processes decode images .*nowhere.*; falling back to threads"):
        found = described(items)
    assert_same(found, expected)
    assert not watched.by_process


def test_memory_is_pinned_before_images_are_in_it(
    make_images: MakeImages, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = find_images([make_images(30)]).items
    pinned: list[tuple[int, int]] = []

    def pin(self: LateEngine, memory: np.ndarray) -> None:
        assert not memory.any()
        pinned.append((len(memory), len(watched.processes())))
        raise DeviceError("device cuda:0: no memory can be pinned")

    monkeypatch.setattr(decoders, "SHARED_BYTES", 64 << 20)
    monkeypatch.setattr(LateEngine, "pin", pin)
    describer = Describer(TINY, OPTIONS)
    with pytest.warns(SppFeatWarning, match="cuda:0: no memory can be pinned; images are copied once more"):
        described(items, describer)
    described(items, describer)
    assert pinned == [(64 << 20, 0)] and watched.by_process > 40


def test_no_room_in_the_memory(make_images: MakeImages, watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    items = find_images([make_images(80)]).items
    with threads_only():
        expected = described(items)
    watched.by_thread = 0
    monkeypatch.setattr(decoders, "SHARED_BYTES", 3 * resizing.MOST_UNRESIZED + (64 << 10))
    found = described(items)
    assert watched.by_process > 0 and watched.by_thread > 30
    assert_same(found, expected)


def test_a_call_that_is_left_early_leaves_nothing_behind(make_images: MakeImages, watched: Watched) -> None:
    items = find_images([make_images(100)]).items
    with threads_only():
        expected = described(items)
    describer = Describer(TINY, OPTIONS)
    call = describer.describe(items)
    for _ in range(5):
        next(call)
    running = [process.pid for process in watched.processes()]
    call.close()
    assert_same(described(items, describer), expected)
    assert [process.pid for process in watched.processes()] == running  # they stay from call to call
    (processes,) = watched.started
    gc.collect()
    whole = processes._memory.take(len(processes._memory.whole))
    assert whole is not None  # no image is in the memory any more
    del whole


def test_processes_end_with_their_describer(make_images: MakeImages, watched: Watched) -> None:
    def describe() -> list[subprocess.Popen[bytes]]:
        describer = Describer(TINY, OPTIONS)
        list(describer.describe(find_images([make_images(30)]).items))
        return watched.processes()

    running = describe()
    assert len(running) == 2
    gc.collect()
    wait_for(lambda: all(process.returncode is not None for process in running))


def test_an_error_of_decoding_is_that_of_the_run(
    make_images: MakeImages, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails as it never should fails in the parent, too, and is raised there."""
    path = next(make_images(1).iterdir())
    stages = Stages()
    several = Decoders(Decoder((TINY,), 1, False), 2, 1 << 20, stages)
    several.allow_processes([])
    futures = [several.submit(Item.at(path)), several.submit(Item(str(path.parent), "a\0.png"))]
    assert isinstance(futures[0].result(20), PreparedImage)
    with pytest.raises(ValueError, match="null"):
        futures[1].result(20)
    assert watched.by_process == 2 and watched.by_thread == 1
    several.end()


def test_few_cores_or_little_memory_keep_to_threads(
    make_images: MakeImages, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = DecodingMemory(resizing.MAX_WORKING_SET + (4 << 20))
    with monkeypatch.context() as patch:
        patch.setattr(resizing, "_decoding_memory", lambda: memory)
        patch.setattr(decoders._Processes, "_number_ready", 1, raising=False)
        found = described(find_images([make_images(30)]).items)
        wait_for(lambda: memory._most == resizing.MAX_WORKING_SET + (4 << 20))
    assert len(found) == 30 and not watched.by_process and not watched.processes()


def test_processes_are_for_many_images_on_a_gpu(
    make_images: MakeImages, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = find_images([make_images(30)]).items
    with monkeypatch.context() as patch:
        patch.setattr(branch, "engine_device", lambda recipe, options: "cpu")
        patch.setattr(branch, "resizes_images", lambda engine, device: False)
        described(items)
    monkeypatch.setattr(decoders, "IMAGES_BEFORE_PROCESSES", 30)
    described(items)
    assert not watched.started and watched.by_thread == 60
    described(items + items)
    assert watched.started


def test_archives(archives: list[Path], watched: Watched) -> None:
    """Where members are read in their order, or many at once, they are left to this process."""
    for number, archive in enumerate(archives):
        items = find_images([archive]).items
        assert len(items) == 40 and all(each.is_apart() == (number < 3) for each in items)
        with threads_only():
            expected = described(items)
        watched.by_process = 0
        assert_same(described(items), expected)
        assert watched.by_process > 20 if number < 3 else not watched.by_process
        assert all(each.error is None for each in expected.values())


def test_what_is_far_away_or_no_image_is_left_to_this_process() -> None:
    assert not Item("/", "x.png", problem="no such file").is_apart()
    assert not UrlFile("http://localhost/x.png").is_apart()
    far = Blob("http://localhost/x.tar", 9, 9)
    assert not TarMember(far, "", 0, 9, 9).is_apart()
    assert not ZipMember(far, 0, 9, 9, 0, 0, 0).is_apart()
    assert not ZipMember(Blob("/x.zip", 9, 9), 0, 9, 5 << 20, 8, 0, 0).is_apart()


def test_memory_for_decoding_is_shared() -> None:
    memory = DecodingMemory(1000)
    assert memory.lend(3, keep=400) == 200 and memory._most == 400
    assert memory.lend(2, keep=400) == 0
    memory.regain(600)
    assert memory._most == 1000
    assert memory.lend(7, keep=2000) == 0 and memory._most == 1000


STARTED = """
import os, sys
from sppfeat import Recipe, RunOptions
from sppfeat.engines.torch_engine import TorchEngine
from sppfeat.extraction import branch, decoders
from sppfeat.images import resizing
from sppfeat.images.memory import DecodingMemory
from sppfeat_cli import main
memory = DecodingMemory(2 << 30)
resizing._decoding_memory = lambda: memory
decoders.IMAGES_BEFORE_PROCESSES = 0
branch.engine_device = lambda recipe, options: "cuda:0"
branch.resizes_images = lambda engine, device: False
branch.load_engine = lambda network, options: TorchEngine(network.backbone, "cpu")
take = decoders._Processes._take
told = []
def taken(self, process, line):
    told or told.append(print(*[each._process.pid for each in self._running], file=sys.stderr, flush=True))
    take(self, process, line)
decoders._Processes._take = taken
main()
"""


LEFT = """
import gc
gc.disable()
from sppfeat import Describer
items = [sys.argv[1]] * 20_000
recipe = Recipe(backbone="timm:test_resnet", weights="random", scales=(64,), levels=(2, 1))
kept = Describer(recipe, RunOptions(engine="torch", num_workers=2)).describe(items)
for _ in range(19_000):  # the processes may take long to start
    next(kept)
    if told:
        break
print("told" if told else "none", flush=True)
"""


def test_a_program_ends_in_the_middle_of_a_call(photos: Path) -> None:
    """The call is left when the interpreter ends, when the processes are gone."""
    script = STARTED.replace("main()\n", "") + LEFT
    command = [sys.executable, "-c", script, str(next(photos.rglob("*.jpg")))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (run.returncode, run.stdout) == (0, "told\n"), run.stderr
    children = [int(pid) for pid in run.stderr.split()]
    assert len(children) == 2
    wait_for(lambda: not any(map(is_running, children)))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="processes are looked up in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_processes_end_with_a_run_that_is_killed(
    number: signal.Signals, make_images: MakeImages, tmp_path: Path, run_sppfeat: Any
) -> None:
    folder = make_images(600)
    network = ["--backbone", "timm:test_resnet", "--weights", "random", "--scales", "224", "--levels", "2,1"]
    flags = ["-o", str(tmp_path / "f.h5"), *network, "--engine", "torch", "-j", "2", "--quiet"]
    run = subprocess.Popen(
        [sys.executable, "-c", STARTED, "extract", str(folder), *flags],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stderr is not None
    children = [int(pid) for pid in run.stderr.readline().split()]
    assert len(children) == 2 and all(map(is_running, children))
    open_files = [os.readlink(each) for each in Path(f"/proc/{children[0]}/fd").iterdir()]
    assert "/memfd:sppfeat-images (deleted)" in open_files  # no name that could stay behind
    run.send_signal(number)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == (
        130 if number == signal.SIGINT else -number if number == signal.SIGKILL else run.returncode
    )
    assert run.returncode and "Traceback" not in said and "rror" not in said, said
    wait_for(lambda: not any(map(is_running, children)))
    assert len(open_store(tmp_path / "f.h5").names) == 600
