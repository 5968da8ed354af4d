"""The command line as a process: its descriptors, what reaches its standard output, connections, signals."""

from __future__ import annotations

import itertools
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from sppfeat import Status, open_store, verify_store
from sppfeat.store.locking import lock_store

TINY = ["--backbone", "timm:test_resnet", "--weights", "random", "--scales", "64", "--levels", "2,1", "--device", "cpu"]
RUN = "from sppfeat_cli import main; main()"


@pytest.fixture
def images(make_images: Callable[..., Path]) -> Path:
    """Three images, and a TIFF whose damage libtiff prints a line about."""
    folder = make_images(3)
    Image.new("RGB", (64, 64)).save(folder / "damaged.tif", compression="tiff_lzw")
    content = bytearray((folder / "damaged.tif").read_bytes())
    content[8:40] = b"\xff" * 32
    (folder / "damaged.tif").write_bytes(content)
    return folder


CLOSINGS = [
    "".join(f" {number}>&-" for number in closed)
    for count in (1, 2, 3)
    for closed in itertools.combinations((0, 1, 2), count)
]


def test_closed_descriptors_cost_nothing(images: Path, tmp_path: Path) -> None:
    """Libraries print onto descriptors 1 and 2, whatever file that is."""
    script = "import os, sys; from sppfeat_cli import start\n"
    # One process for all: it forks where torch is loaded. Each child runs the real command with descriptors closed.
    script += (
        "import torch, timm, PIL.Image, h5py, sppfeat_cli.app, sppfeat.extraction.run\n"
        "for number, closed in enumerate(sys.argv[1:]):\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        for one in closed: os.close(int(one))\n"
        "        sys.stdout = None if '1' in closed else sys.stdout\n"
        "        sys.stderr = None if '2' in closed else sys.stderr\n"
        f"        sys.argv = ['sppfeat', 'extract', {str(images)!r}, '-o', f'{tmp_path}/{{number}}.h5', '-j', '1',\n"
        f"                    '--engine', 'torch', *{TINY!r}]\n"
        "        from sppfeat_cli import main\n"
        "        try:\n"
        "            main()\n"
        "        except SystemExit as error:\n"
        "            os._exit(error.code)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)\n"
    )
    closings = ["".join(c for c in closing if c in "012") for closing in CLOSINGS]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script, *closings], capture_output=True, text=True)
    codes = [line for line in done.stdout.splitlines() if line.isdigit()]
    assert codes == ["3"] * len(closings), done.stderr
    for number in range(len(closings)):
        store = open_store(tmp_path / f"{number}.h5")
        assert verify_store(store) == []
        assert store.counts() == {"pending": 0, "done": 3, "failed": 1}


def test_closed_descriptors_of_a_shell(images: Path, tmp_path: Path) -> None:
    command = shlex.join([sys.executable, "-c", RUN, "extract", str(images), "-o", str(tmp_path / "a.h5"), *TINY])
    done = subprocess.run(["sh", "-c", f"{command} --quiet >&- 2>&-"], capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"", b"")
    assert verify_store(open_store(tmp_path / "a.h5")) == []


def test_a_store_is_never_a_standard_descriptor(tmp_path: Path, make_store: Callable[..., object]) -> None:
    import numpy as np

    path = make_store(np.zeros((2, 4), np.float32)).path  # type: ignore[attr-defined]
    script = (
        "import os, sys\nfrom pathlib import Path\n"
        "from sppfeat.store import StoreWriter, lock_store, open_store\n"
        "os.close(0); os.close(2)\n"
        "with lock_store(Path(sys.argv[1])), StoreWriter(open_store(sys.argv[1])):\n"
        "    held = {os.readlink(f'/proc/self/fd/{n}') for n in (0, 1, 2) if os.path.exists(f'/proc/self/fd/{n}')}\n"
        "print(*held)"
    )
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    done = subprocess.run([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True, check=True)
    assert str(path.name) not in done.stdout


@pytest.mark.parametrize("as_json", [True, False])
def test_what_libraries_print_is_no_result(images: Path, tmp_path: Path, as_json: bool) -> None:
    """By Python, by the descriptor, and by a child."""
    noise = (
        "import os, sppfeat.backbones.backbone as d; real = d.load_backbone\n"
        "def noisy(*a, **k):\n"
        "    print('noise of Python'); os.write(1, b'noise of C\\n'); os.system('echo noise of a child')\n"
        "    return real(*a, **k)\n"
        "d.load_backbone = noisy\n"
    )
    words = ["extract", str(images), "-o", str(tmp_path / "a.h5"), *TINY, "--engine", "torch"]
    done = subprocess.run(
        [sys.executable, "-c", noise + RUN, *words, *["--json"] * as_json], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 3, done.stderr
    assert "noise of C\n" in done.stderr and "noise of a child\n" in done.stderr
    if as_json:
        assert json.loads(done.stdout)["described"] == 3
        assert "noise of Python\n" in done.stderr
    else:
        assert "noise of C" not in done.stdout


WATCH = """
import os, sys
def record(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request"):
        if event == "socket.connect" and isinstance(arguments[1], (str, bytes)):
            return  # within this machine
        with open(os.environ["RECORD"], "a") as file:
            file.write(f"{event} {arguments[1:] if event == 'socket.connect' else arguments}\\n")
sys.addaudithook(record)
"""


def test_no_command_connects_to_anything(make_images: Callable[..., Path], tmp_path: Path) -> None:
    """Nor leaves anything at home but its cache."""
    pytest.importorskip("openvino")
    pytest.importorskip("faiss")
    folder = make_images(4, "photos/a")
    make_images(4, "photos/b", seed=1)
    home, watch, record = tmp_path / "home", tmp_path / "watch", tmp_path / "record"
    home.mkdir()
    watch.mkdir()
    (watch / "sitecustomize.py").write_text(WATCH)
    env = {k: v for k, v in os.environ.items() if not k.startswith("XDG_")} | {
        "HOME": str(home),
        "PYTHONPATH": os.pathsep.join([str(watch), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "RECORD": str(record),
    }
    store, gallery, model = (str(tmp_path / name) for name in ("f.h5", "gallery", "svm.h5"))
    tiny, photos, one = TINY, str(folder.parent), str(folder / "0000.png")
    # Several commands a process: each loads the same libraries.
    runs = [
        [
            ["extract", photos, "-o", store, *tiny, "--engine", "openvino", "--quiet"],
            ["inspect", store, "--verify"],
            ["index", store, "-o", gallery, "--quiet"],
            ["search", gallery, one, "--json"],
            ["evaluate", "retrieval", store, "--json"],
            ["duplicates", store, "--quiet"],
            ["evaluate", "transfer", store, "--c", "1", "--json"],
            ["train", "svm", store, "-o", model],
            ["predict", model, one, "--json"],
            ["models"],
        ],
        [["extract", photos, "-o", str(tmp_path / "g.h5"), *tiny, "--engine", "torch", "--quiet"]],
        [["extract", one, "-o", str(tmp_path / "h.h5"), "--quiet"]],
    ]
    for commands in runs:
        script = (
            "import json, sys\nfrom sppfeat_cli import main\n"
            "for words in json.loads(sys.argv[1]):\n"
            "    sys.argv = ['sppfeat', *words]\n"
            "    try: main()\n"
            "    except SystemExit as error:\n"
            "        assert not error.code, words\n"
        )
        subprocess.run([sys.executable, "-c", script, json.dumps(commands)], env=env, check=True, timeout=200)
    assert not record.exists() or record.read_text() == ""
    assert [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()] and all(
        path.is_relative_to(home / ".cache" / "sppfeat") for path in home.rglob("*") if path.is_file()
    )


def test_no_name_commands_the_terminal_while_it_waits(make_images: Callable[..., Path], tmp_path: Path) -> None:
    """On a terminal, the name of a network that is being prepared is shown; it may come from anybody's model."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", RUN, "extract", str(make_images(1)), "-o", str(tmp_path / "f.h5")]
    done = subprocess.run(
        [*command, "--backbone", "timm:x\x1b]0;OWNED\x07"],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    os.close(theirs)
    shown = os.read(ours, 10_000)
    os.close(ours)
    assert done.returncode == 2 and b"preparing timm:x" in shown and b"\x1b" not in shown


@pytest.mark.parametrize("delay", [0.0, 0.3, 1.0, 2.5, 4.5])
def test_a_signal_at_any_moment_is_one_line(make_images: Callable[..., Path], tmp_path: Path, delay: float) -> None:
    """While libraries load, while images are described; before `main` has begun it is Python's to say."""
    folder, output = make_images(60), tmp_path / "a.h5"
    script = f"import os; from sppfeat_cli import start; start.begin(); os.write(1, b'begun'); {RUN}"
    command = [sys.executable, "-c", script, "extract", str(folder), "-o", str(output), *TINY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None and process.stdout.read(5) == b"begun"
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert b"Traceback" not in stderr
    if process.returncode != -signal.SIGINT:
        assert process.returncode in (0, 130), stderr
        assert stderr.count(b"interrupted") == (process.returncode == 130)
    else:  # Python was taking itself down, all done
        assert open_store(output).counts()["pending"] == 0
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    with lock_store(output):
        pass
    if output.exists():
        assert (open_store(output).status != Status.FAILED).all()


# Interrupts the run within the first line that it prints to standard error.
INTERRUPTED_LINE = """
import io, os, signal, sys

class Raw(io.RawIOBase):
    lines = 0
    def writable(self): return True
    def write(self, data):
        Raw.lines += 1
        if Raw.lines == 1:
            signal.raise_signal(signal.SIGINT)
        return os.write(2, data)

from sppfeat_cli import main
sys.stderr = io.TextIOWrapper(io.BufferedWriter(Raw()), line_buffering=True)
main()
"""


def test_an_interrupt_within_a_line(make_images: Callable[..., Path], tmp_path: Path) -> None:
    words = ["extract", str(make_images(300)), "-o", str(tmp_path / "f.h5"), *TINY, "-b", "1"]
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_LINE, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130, done.stderr
    assert "finishing images in flight; interrupt again" in done.stderr and "300 images to describe" in done.stderr
    assert verify_store(open_store(tmp_path / "f.h5")) == []
