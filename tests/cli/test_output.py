"""What commands print while they work: bounded, on standard error, and nothing before it is true."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from voc_xml import xml

from sppfeat import Recipe, Store
from sppfeat.errors import MissingExtraError, SppFeatError, require_extra
from sppfeat.training import Epoch
from sppfeat.transfer.options import TransferOptions
from sppfeat.windows.proposals import open_windows
from sppfeat_cli.output import end_learning, finite, options_document, print_json
from sppfeat_cli.progress import LISTED, Progress

Run = Callable[..., subprocess.CompletedProcess[str]]
TINY = ["--backbone", "timm:test_resnet", "--weights", "random", "--scales", "64", "--levels", "1"]


def test_options_read_back_from_json(capsys: pytest.CaptureFixture[str]) -> None:
    options = TransferOptions(costs=(0.5, 2.0), levels=(2, 1), trials=3, shots=(1, 2))
    print_json({"options": options_document(options), "recipe": options_document(Recipe(scales=(224, "native")))})
    document = json.loads(capsys.readouterr().out)
    lists = {"costs": (0.5, 2.0), "levels": (2, 1), "shots": (1, 2)}
    assert TransferOptions(**document["options"] | lists) == options
    assert document["recipe"]["scales"] == [224, "native"] and document["options"]["costs"] == [0.5, 2.0]


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"value": finite(float("nan")), "score": finite(float("-inf")), "loss": finite(0.5)})
    assert json.loads(capsys.readouterr().out) == {"value": None, "score": None, "loss": 0.5}
    with pytest.raises(SppFeatError, match="JSON: expected finite numbers, found NaN or infinity"):
        print_json({"value": float("nan")})
    assert not capsys.readouterr().out


def test_a_million_gone_files_are_a_dozen_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(quiet=False) as progress:
        progress.started(todo=0, reused=0, gone=[f"{number}\x1b[31m.jpg" for number in range(1_000_000)])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == LISTED + 2 and lines[1] == r"gone: 0\x1b[31m.jpg (its row is kept)"
    assert lines[-1] == f"... and {1_000_000 - LISTED:,} more gone"


def test_failures_and_notes_are_bounded_each(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(quiet=False, all_listed_by="`sppfeat inspect f.h5 --failures`") as progress:
        progress.started(todo=50_000, reused=0)
        for number in range(50_000):
            progress.row(f"{number}.jpg", "no such file" if number % 2 else None)
        for number in range(LISTED):
            progress.note(f"{number}.jpg: has no windows")
        progress.say("pass 1: 7 hard negatives added")
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("failed: ") for line in lines) == LISTED
    assert sum("has no windows" in line for line in lines) == LISTED and "pass 1: 7 hard negatives added" in lines
    assert "... more failed, counted at the end" in lines
    assert lines[-1] == f"... and {25_000 - LISTED:,} more failed; `sppfeat inspect f.h5 --failures` lists them all"
    assert len(lines) == 2 * LISTED + 4
    with Progress(quiet=True) as progress:
        progress.started(todo=99, reused=0, gone=["x"] * 99)
        for _ in range(99):
            progress.row("x", "y")
            progress.note("z")
    assert capsys.readouterr() == ("", "")


def test_work_without_items_has_a_bar_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for quiet in (False, True):
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        with Progress(quiet=quiet) as progress:
            for part in (0.25, 0.5, 1.0):
                progress.part(part)
                assert quiet or progress._bar.n == 100 * part
        assert ("| 0/100 [" in terminal.getvalue()) is not quiet


@pytest.mark.parametrize("command", ["extract", "windows"])
def test_failures_are_listed_where_it_says(
    command: str, make_images: Callable[..., Path], tmp_path: Path, run_sppfeat: Run
) -> None:
    folder, file = make_images(1), tmp_path / "f.h5"
    for number in range(LISTED + 5):
        (folder / f"bad{number:02}.jpg").write_bytes(b"")
    done = run_sppfeat(command, folder, "-o", file, *(TINY if command == "extract" else ["-j", "1"]))
    assert done.returncode == 3 and done.stderr.count("failed: bad") == LISTED
    said = re.search(r"\.\.\. and 5 more failed; `sppfeat (.*)` lists them all", done.stderr)
    assert said is not None, done.stderr
    assert run_sppfeat(*said[1].split()).stdout.count("empty file (0 bytes)") == LISTED + 5
    assert len(json.loads(run_sppfeat(*said[1].split(), "--json").stdout)["failures"]) == LISTED + 5


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """A VOC layout of six images of a red block, with windows.json."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / "voc" / folder).mkdir(parents=True)
    generator, names, windows = np.random.default_rng(0), [f"{n}" for n in range(6)], {}
    for name in names:
        pixels = generator.integers(100, 150, (90, 120, 3)).astype(np.uint8)
        pixels[20:70, 30:90] = (220, 30, 30)
        Image.fromarray(pixels).save(tmp_path / f"voc/JPEGImages/{name}.png")
        (tmp_path / f"voc/Annotations/{name}.xml").write_text(xml(("red", 31, 21, 90, 70), size=(120, 90)))
        windows[f"{name}.png"] = [[30, 20, 89, 69], [0, 0, 25, 18], [90, 70, 119, 89], [28, 24, 85, 66]]
    (tmp_path / "voc/ImageSets/Main/trainval.txt").write_text("\n".join(names))
    (tmp_path / "windows.json").write_text(json.dumps(windows))
    return tmp_path / "voc"


def test_an_interrupted_training_announces_no_detector(
    scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither as text nor as JSON; the run that goes on does."""
    det = tmp_path / "det.h5"
    command = ["train", "detector", str(scene), "-o", str(det), "--windows", str(tmp_path / "windows.json"), *TINY]
    row = Progress.row

    def stopping(self: Progress, name: str, error: str | None) -> None:
        row(self, name, error)
        self.stop.set()

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "row", stopping)
        assert call(command, monkeypatch) == 130
        shown = capsys.readouterr()
        assert str(det) not in shown.out and shown.out.startswith("no detector yet: 1 class, 6 objects in 6 images")
        assert re.search(r"sppfeat: interrupted, \d images? left in this pass; the same command resumes\n$", shown.err)
        assert call([*command, "--overwrite", "--json"], monkeypatch) == 130
        document = json.loads(capsys.readouterr().out)
        assert document["detector"] is None and document["pending"] > 0 and not det.exists()
    assert call([*command, "--json"], monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["detector"] == str(det) and det.exists()


def call(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The command line within this process; its exit code."""
    from sppfeat_cli import main

    monkeypatch.setattr(sys, "argv", ["sppfeat", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("command", ["train", "windows", "extract"])
def test_a_folder_that_takes_no_file_is_found_before_the_work(
    command: str,
    scene: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sppfeat.extraction.pipeline import Describer
    from sppfeat.windows.selective_search import Proposer

    def worked(*arguments: object, **options: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(Describer, "__init__", worked)
    monkeypatch.setattr(Proposer, "__init__", worked)
    words = {
        "train": ["train", "detector", str(scene), *TINY],
        "windows": ["windows", str(scene / "JPEGImages")],
        "extract": ["extract", str(scene / "JPEGImages"), *TINY],
    }[command]
    for output in ("/proc/out.h5", str(tmp_path / ("x" * 250 + ".h5"))):
        assert call([*words, "-o", output], monkeypatch) == 1
        shown = capsys.readouterr()
        assert shown.out == "" and re.fullmatch(r"sppfeat: [^\n]+: cannot (be written|write)[^\n]*\n", shown.err), (
            shown.err
        )
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def limited(size: int, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """The command line where no file may be larger than `size` bytes: every write meets the limit as a full disk."""
    return subprocess.run(
        [sys.executable, "-c", "from sppfeat_cli import main; main()", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )


def ends_in_one_line(done: subprocess.CompletedProcess[str]) -> bool:
    lines = [line for line in done.stderr.splitlines() if line.startswith("sppfeat: ")]
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr, done.stderr
    return len(lines) == 1 and lines[0].endswith("cannot be written: File too large")


def test_windows_on_a_full_disk_end_in_one_line_and_go_on(scene: Path, tmp_path: Path) -> None:
    """Four starts of a process, since HDF5 crashed one that could not write, and Python's own buffers failed later."""
    output, words = tmp_path / "w.h5", ["windows", scene / "JPEGImages", "-j", "1", "-o"]
    assert limited(resource.RLIM_INFINITY, *words, tmp_path / "whole.h5").returncode == 0
    expected = {name: windows.tolist() for name, windows in open_windows(tmp_path / "whole.h5").items()}
    # Amid the journal; and amid the file, after a journal that is smaller.
    for limit in (700, min((tmp_path / "whole.h5").stat().st_size - 1, 3000)):
        assert ends_in_one_line(limited(limit, *words, output))
        assert not output.exists() and (tmp_path / ".w.h5.journal").exists()
    done = limited(resource.RLIM_INFINITY, *words, output)
    assert done.returncode == 0 and "reused" in done.stdout, done.stderr
    assert {name: windows.tolist() for name, windows in open_windows(output).items()} == expected


@pytest.mark.parametrize("limit", [2_000, 6_000, 9_000])
def test_a_store_on_a_full_disk_ends_in_one_line(make_images: Callable[..., Path], tmp_path: Path, limit: int) -> None:
    folder = make_images(30)
    assert ends_in_one_line(limited(limit, "extract", folder, "-o", tmp_path / "f.h5", *TINY))
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_a_model_on_a_full_disk_ends_in_one_line(make_store: Callable[..., Store], tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(12, 400))
    store = make_store(rows, names=[f"{'ab'[number % 2]}/{number}.jpg" for number in range(12)])
    assert ends_in_one_line(limited(3_000, "train", "svm", store.path, "-o", tmp_path / "svm.h5", "--c", "1"))
    assert [path.name for path in tmp_path.iterdir()] == ["f.h5"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["--version"], ["models", "--json"], ["extract", "--help"]], ids=" ".join)
def test_standard_output_on_a_full_disk(words: list[str], unbuffered: str, tmp_path: Path) -> None:
    """One line and exit code 1, also where what is printed is longer than a buffer, or goes through none."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", "from sppfeat_cli import main; main()", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == 1
    assert done.stderr == "sppfeat: standard output: cannot be written: No space left on device\n"


def test_what_an_interrupted_run_is_to_be_told(capsys: pytest.CaptureFixture[str]) -> None:
    """--overwrite deletes a checkpoint; before the first one, the output is still to be replaced."""
    first = [Epoch(0, None, 50.0, 1.0)]
    for history, overwrite, line in (
        (first, True, "interrupted in epoch 1; without --overwrite, the same command resumes"),
        (first, False, "interrupted in epoch 1; the same command resumes"),
        ([], True, "interrupted; the same command resumes"),
    ):
        with pytest.raises(typer.Exit) as ended:
            end_learning(None, history, None, overwrite=overwrite)
        assert ended.value.exit_code == 130 and capsys.readouterr().err == f"sppfeat: {line}\n"


def test_an_import_that_ctrl_c_ends_is_no_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled modules make an ImportError of it, which would lead to a fallback."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "half_loaded.py").write_text("raise ImportError('initialization failed') from KeyboardInterrupt()\n")
    with pytest.raises(KeyboardInterrupt):
        require_extra("half_loaded", "cpu", "engine openvino")
    (tmp_path / "broken_module.py").write_text("raise ImportError('initialization failed') from ValueError()\n")
    with pytest.raises(MissingExtraError, match="broken_module, which fails to import: initialization failed"):
        require_extra("broken_module", "cpu", "engine openvino")
