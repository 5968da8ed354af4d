"""Options of all commands: one text for each name, the library's defaults, and checks before heavy imports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeStore
from typer.main import get_command

from sppfeat.detection import DetectOptions, TrainingOptions, detection_recipe
from sppfeat.detection.detecting import DEFAULT_PROBABILITY, DEFAULT_SCORE
from sppfeat.recipe import Recipe, RunOptions
from sppfeat.retrieval import DEFAULT_DIMS, IndexOptions, SearchOptions, create_gallery
from sppfeat.windows import ProposalOptions
from sppfeat_cli import main
from sppfeat_cli.app import build

# Names whose values, or what they are of, differ by command, which their texts say.
VARIED = {
    *("--output", "--device", "--levels", "--windows", "--c", "--weights", "--threshold", "--parts", "--classifier"),
    *("--batch-size", "--scales", "--precision", "--from", "--pooling", "--csv"),
}


def commands(group: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command by its whole name, those of groups included."""
    for key, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name}{key} ")
        else:
            yield f"{name}{key}", command


COMMANDS = dict(commands(get_command(build())))


def defaults(name: str) -> dict[str, Any]:
    """What a command's options are when they are not given."""
    context = COMMANDS[name].make_context(name, [], resilient_parsing=True)
    return {parameter.name: parameter.get_default(context) for parameter in COMMANDS[name].params}


def shown(name: str) -> str:
    """A command's help on one line."""
    context = COMMANDS[name].make_context(name, [], resilient_parsing=True)
    return " ".join(COMMANDS[name].get_help(context).split())


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line within this process: exit code, standard output, standard error."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sppfeat", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


def test_an_option_reads_the_same_in_every_command() -> None:
    texts: dict[str, set[tuple[Any, ...]]] = defaultdict(set)
    for command in COMMANDS.values():
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                texts[max(parameter.opts, key=len)].add((*parameter.opts, parameter.metavar, parameter.help))
    assert {name for name, found in texts.items() if len(found) > 1} == VARIED
    assert "--overlap" not in texts


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_of_one_vocabulary(name: str) -> None:
    text = shown(name)
    assert "picture" not in text.lower() and "(dynamic)" not in text
    for parameter in COMMANDS[name].params:
        assert parameter.help and parameter.help[0].isupper() or parameter.help.startswith("efficientnet"), parameter
        assert parameter.help.endswith((".", "...")), parameter.help


def test_defaults_are_those_of_the_library() -> None:
    recipe, training, found = detection_recipe(), TrainingOptions(), defaults("train detector")
    for field in ("c", "positive_weight", "passes", "box_regression", "seed"):
        assert found[field] == getattr(training, field)
    assert found["scale_list"] == ",".join(map(str, recipe.scales))
    assert found["level_list"] == ",".join(map(str, recipe.levels))
    assert found["memory"] is None and "[default: (1 GiB," in shown("train detector") and training.memory == 1 << 30
    assert defaults("extract")["level_list"] == ",".join(map(str, Recipe.levels))
    for name, options in (
        ("detect", DetectOptions()),
        ("detect", RunOptions()),
        ("windows", ProposalOptions()),
        ("search", SearchOptions()),
        ("search", RunOptions()),
        ("index", IndexOptions()),
    ):
        found = defaults(name)
        assert {key: value for key, value in vars(options).items() if key in found} == {
            key: found[key] for key in vars(options) if key in found
        }
    assert defaults("evaluate detection")["iou"] == 0.5 and defaults("evaluate transfer")["protocol"] == "random"
    assert f"{DEFAULT_DIMS} with --whiten" in shown("index")
    assert f"[default: ({DEFAULT_PROBABILITY:g}; {DEFAULT_SCORE:g} as an SVM score)]" in shown("detect")
    assert f"[default: {DetectOptions.nms}]" in shown("detect") and "[default: 3,2,1]" in shown("train detector")


@pytest.mark.parametrize(
    "words",
    [
        "extract none -o f.h5",
        "extract none -o f.h5 --device cuda:0",
        "windows none -o f.h5",
        "train detector none -o f.h5 --windows w.csv",
        "train svm none.h5 -o f.h5",
        "train vocabulary none -o f.h5",
        "predict none.h5 .",
        "detect none.h5 .",
        "detect none.h5 none",
        "index none.h5 -o g",
        "search none x.png",
        "duplicates none.h5",
        "inspect none.h5",
        "evaluate transfer none.h5",
        "evaluate retrieval none.h5",
        "evaluate detection none.h5 none",
    ],
)
def test_a_missing_path_is_found_before_heavy_imports(words: str, tmp_path: Path) -> None:
    code = (
        "import sys; from sppfeat_cli import main\n"
        "try: main()\n"
        "finally: print([name for name in ('torch', 'timm', 'openvino', 'faiss', 'cv2') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.returncode in (1, 2) and done.stdout == "[]\n", done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and "none" in done.stderr


def test_sources_are_checked_before_anything_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from sppfeat_cli import main\n"
        "try: main()\n"
        "finally: print([name for name in ('torch', 'PIL', 'numpy', 'h5py') if name in sys.modules])"
    )
    words = ["extract", ".", "none", "-o", "f.h5"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "[]\n")
    assert done.stderr == "sppfeat: none: no such file or folder\n"


@pytest.mark.parametrize("words", ["train detector voc -o det.h5", "windows voc -o w.h5"])
def test_a_missing_opencv_is_told_before_images_are_listed(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]]
) -> None:
    def listed(*arguments: object, **options: object) -> None:
        raise AssertionError("images were listed")

    (tmp_path / "voc").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setattr("sppfeat.detection.read_annotations", listed)
    monkeypatch.setattr("sppfeat.windows.propose_folder", listed)
    code, _, errors = call(*words.split())
    assert code == 1
    assert errors == ("sppfeat: selective search needs cv2, which is not installed: pip install 'sppfeat[detect]'\n")


def test_a_gallery_is_described_without_faiss(
    make_store: MakeStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., tuple[int, str, str]],
) -> None:
    pytest.importorskip("faiss")
    create_gallery(make_store(np.random.default_rng(0).normal(size=(10, 16))), tmp_path / "g")
    monkeypatch.setitem(sys.modules, "faiss", None)
    code, text, _ = call("inspect", tmp_path / "g")
    assert code == 0 and "gallery of 10 images" in text
    assert json.loads(call("inspect", tmp_path / "g", "--json")[1])["images"] == 10
    code, _, errors = call("inspect", tmp_path / "g", "--verify")
    assert code == 1 and "similarity search needs faiss, which is not installed" in errors


@pytest.mark.parametrize("name", ["detect", "evaluate detection"])
def test_nms_is_the_overlap_of_suppression(
    name: str, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, errors = call(*name.split(), "det.h5", tmp_path, "--nms", "2")
    assert (code, errors) == (2, "sppfeat: --nms must be a number from 0 to 1, found 2.0\n")
