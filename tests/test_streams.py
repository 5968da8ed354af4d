"""Closed standard streams, prints of libraries, and connections: what a run does beside its work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY, sppfeat_command
from PIL import Image

from sppfeat import RunOptions, extract_folder, open_store, verify_store
from sppfeat.store import StoreWriter, lock_store

TINY_FLAGS = ["--backbone", "timm:test_resnet", "--weights", "random", "--scales", "64", "--levels", "2,1"]
Run = Callable[..., subprocess.CompletedProcess[str]]


def environment(tmp_path: Path, sitecustomize: str) -> dict[str, str]:
    """Where every process of a run begins with this code."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(sitecustomize)
    (tmp_path / "home").mkdir()
    return {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "site"),
        "HOME": str(tmp_path / "home"),
        "XDG_CACHE_HOME": str(tmp_path / "home" / ".cache"),
        "CUDA_VISIBLE_DEVICES": "",
    }


# Each is a run of some seconds: most of it is torch's import.
@pytest.mark.parametrize("closed", ["1", "2", "12", "012"])
def test_a_store_is_never_a_standard_stream(make_images: Callable[..., Path], tmp_path: Path, closed: str) -> None:
    folder, output = make_images(3), tmp_path / "f.h5"
    Image.effect_noise((64, 64), 50).save(folder / "x.tif", compression="tiff_lzw")
    damaged = bytearray((folder / "x.tif").read_bytes())
    damaged[40:400] = b"\xff" * 360
    (folder / "x.tif").write_bytes(damaged)
    command = sppfeat_command("extract", folder, "-o", output, "--quiet", "--device", "cpu", *TINY_FLAGS)
    redirections = " ".join(f"{number}>&-" for number in closed)
    ended = subprocess.run(["sh", "-c", f'exec "$@" {redirections}', "sh", *command], timeout=120)
    store = open_store(output)
    assert ended.returncode == 3 and verify_store(store) == []
    assert store.counts() == {"pending": 0, "done": 3, "failed": 1}


def test_writers_stay_above_the_standard_streams(make_images: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "f.h5"
    extract_folder(make_images(1), output, TINY, RunOptions(device="cpu", engine="torch"))
    kept = os.dup(0)
    try:
        os.close(0)
        with lock_store(output), StoreWriter(open_store(output)) as writer:
            assert writer._descriptor > 2
            with pytest.raises(OSError):
                os.fstat(0)
    finally:
        os.dup2(kept, 0)
        os.close(kept)


def test_json_is_alone_on_standard_output(make_images: Callable[..., Path], tmp_path: Path) -> None:
    env = environment(tmp_path, "")
    code = (
        "import os, torch, timm\n"
        "create = timm.create_model\n"
        "def chatty(*a, **k):\n"
        "    print('Downloading: x'); os.write(1, b'from C\\n'); return create(*a, **k)\n"
        "timm.create_model = chatty\n"
        "from sppfeat_cli import main; main()"
    )
    arguments = ["extract", str(make_images(2)), "-o", str(tmp_path / "f.h5"), "--json", *TINY_FLAGS]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env)
    assert json.loads(done.stdout)["described"] == 2
    assert "Downloading: x" in done.stderr and "from C" in done.stderr


RECORDER = """
import os, sys
def record(event, arguments):
    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'os.fork', 'subprocess.Popen'):
        descriptor = os.open(os.environ['SEEN'], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, (event + ' ' + repr(arguments) + chr(10)).encode())
        os.close(descriptor)
sys.addaudithook(record)
"""


def test_no_command_opens_a_connection(make_images: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    env = {**environment(tmp_path, RECORDER), "SEEN": str(tmp_path / "seen")}
    folder, store, gallery = make_images(4), tmp_path / "f.h5", tmp_path / "gallery"
    image = next(folder.iterdir())
    for arguments in (
        ["extract", folder, "-o", store, "--engine", "openvino", *TINY_FLAGS],
        ["index", store, "-o", gallery],
        ["search", gallery, image, "--engine", "openvino"],
    ):
        done = subprocess.run(sppfeat_command(*arguments), capture_output=True, text=True, env=env, timeout=120)
        assert done.returncode == 0, done.stderr
    seen = (tmp_path / "seen").read_text() if (tmp_path / "seen").exists() else ""
    assert not [line for line in seen.splitlines() if line.startswith(("socket", "os.fork"))], seen
    assert [path.name for path in (tmp_path / "home").iterdir()] == [".cache"]
    assert [path.name for path in (tmp_path / "home" / ".cache").iterdir()] == ["sppfeat"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_modules_load_is_one_line(tmp_path: Path, number: int) -> None:
    env = environment(tmp_path, "")
    (tmp_path / "site" / "typer.py").write_text("import os, time\nos.write(1, b'.')\ntime.sleep(60)\n")
    with subprocess.Popen(
        sppfeat_command("--version"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    ) as child:
        assert child.stdout is not None and child.stdout.read(1) == b"."
        child.send_signal(number)
        assert child.communicate(timeout=30)[1] == b"sppfeat: interrupted\n" and child.returncode == 130
