"""Fixtures that several test modules share."""

from __future__ import annotations

import os

# Tests run small networks: more threads would only wait for each other. The pipeline sets its own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Two processes of tests share two cores: threads that spin while they wait take the other's.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import subprocess
import sys
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
from PIL import Image

from sppfeat import Recipe, Store, open_store
from sppfeat.images import Fingerprint, fingerprint_of, name_to_path, urls
from sppfeat.store.writing import StoreWriter, create_store

PHOTOS = Path(__file__).parents[1] / "photos"

# A seeded network of 0.5 million weights that timm builds for tests: nothing is downloaded.
TINY = Recipe(backbone="timm:test_resnet", weights="random", scales=(64,), levels=(2, 1))


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Compiled networks are cached between tests, child processes included, but not in the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder := tmp_path_factory.mktemp("cache")))
        yield folder


@pytest.fixture
def tiny() -> Recipe:
    """A recipe that describes an image in about a millisecond."""
    return TINY


@pytest.fixture
def photos() -> Path:
    """The project's photographs."""
    return PHOTOS


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data sets and weights that are not part of the project: SPPFEAT_SHARED, or a folder `shared` beside it."""
    folder = Path(os.environ.get("SPPFEAT_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"needs the data sets of {folder}, which are not there")
    return folder


@pytest.fixture
def make_images(tmp_path: Path) -> Callable[..., Path]:
    """Write `count` small random images of a few sizes to a folder below `tmp_path`; returns the folder.

    Images that are there already stay untouched, so that a larger count only adds some.
    """

    def make(count: int, folder: str = "images", *, seed: int = 0) -> Path:
        generator = np.random.default_rng(seed)
        target = tmp_path / folder
        target.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            height, width = generator.choice([48, 64, 80, 100], 2)
            pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
            if not (path := target / f"{number:04}.png").exists():
                Image.fromarray(pixels).save(path, compress_level=0)
        return target

    return make


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of an empty bucket on a local S3."""
    moto = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        }.items():
            patch.setenv(name, value)
        urls.file_system.cache_clear()
        # Servers of one process share what they hold.
        urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
        yield "s3://bucket"
    urls.file_system.cache_clear()
    server.stop()


class MakeStore(Protocol):
    """Write a finished store of rows [N, D], and open it."""

    def __call__(
        self,
        rows: np.ndarray,
        file: str = "f.h5",
        *,
        names: Sequence[str] | None = None,
        recipe: Recipe | None = None,
        weights: str = "0" * 64,
        root: str = "/nowhere",
    ) -> Store: ...


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """Stores of given rows below `tmp_path`; names are 0000.jpg, 0001.jpg, ... unless given."""

    def make(
        rows: np.ndarray,
        file: str = "f.h5",
        *,
        names: Sequence[str] | None = None,
        recipe: Recipe | None = None,
        weights: str = "0" * 64,
        root: str = "/nowhere",
    ) -> Store:
        path, recipe = tmp_path / file, recipe or Recipe()
        names = names or [f"{number:04}.jpg" for number in range(len(rows))]
        create_store(path, names, recipe=recipe, weights_sha256=weights, dim=rows.shape[1], source_root=root)
        with StoreWriter(open_store(path)) as writer:
            for row, values in enumerate(rows):
                there = fingerprint_of(name_to_path(root, names[row]))
                writer.write(row, values.astype(recipe.dtype), (10, 10), max(there, Fingerprint(1, 1)))
        return open_store(path)

    return make


MakeMany = Callable[[np.ndarray], Store]


@pytest.fixture
def make_many(tmp_path: Path) -> MakeMany:
    """A finished store of many rows [N, D] below `tmp_path`, whose columns are written at once; names are numbers."""

    def make(rows: np.ndarray) -> Store:
        path = tmp_path / "many.h5"
        names = [f"{number:07}.jpg" for number in range(len(rows))]
        create_store(path, names, recipe=Recipe(), weights_sha256="0" * 64, dim=rows.shape[1], source_root="/nowhere")
        stored = rows.astype(Recipe().dtype)
        values = {"descriptors": stored, "checksum": [zlib.crc32(row.data) for row in stored], "image_size": 10}
        for name, value in (values | {"status": 1}).items():
            column = open_store(path).columns[name]
            np.memmap(path, column.dtype, "r+", column.offset, column.shape)[:] = value
        return open_store(path)

    return make


@pytest.fixture
def run_sppfeat() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a separate process, without a GPU; returns what it printed and its exit code."""

    def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            sppfeat_command(*arguments), capture_output=True, text=True, timeout=120, env=env, **options
        )  # type: ignore[call-overload, no-any-return]

    return run


def sppfeat_command(*arguments: str | Path) -> list[str]:
    """The command line of this Python, whatever is on the PATH."""
    return [sys.executable, "-c", "from sppfeat_cli import main; main()", *map(str, arguments)]
