"""The command line: what is printed where, exit codes, help, and messages."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.main import get_command

import sppfeat
from sppfeat import open_store
from sppfeat_cli.app import build

Run = Callable[..., subprocess.CompletedProcess[str]]
TINY_FLAGS = ["--backbone", "timm:test_resnet", "--weights", "random", "--scales", "64", "--levels", "2,1"]
COMMANDS = get_command(build()).commands  # type: ignore[attr-defined]


def test_extract_and_inspect(make_images: Callable[..., Path], tmp_path: Path, run_sppfeat: Run) -> None:
    folder, output = make_images(4), tmp_path / "f.h5"
    (folder / "bad.jpg").write_bytes(b"")
    done = run_sppfeat("extract", folder, "-o", output, "--json", *TINY_FLAGS)
    assert done.returncode == 3
    document = json.loads(done.stdout)
    expected = {"store", "images", "described", "reused", "failed", "dim", "seconds", "images_per_second", "device"}
    assert expected | {"engine", "stages"} <= document.keys() and document["stages"].keys() == {
        "decode",
        "forward",
        "write",
    }
    assert (document["images"], document["described"], document["failed"]) == (5, 4, 1)
    assert (
        document["device"] == "cpu"
        and document["engine"] in ("openvino", "torch")
        and min(document["stages"].values()) >= 0
    )
    assert "failed: bad.jpg: empty file (0 bytes)" in done.stderr

    text = run_sppfeat("inspect", output)
    assert text.returncode == 0 and "done 4, failed 1, pending 0" in text.stdout and "timm:test_resnet" in text.stdout
    assert run_sppfeat("inspect", output, "--failures").stdout == "bad.jpg: empty file (0 bytes)\n"
    about = json.loads(run_sppfeat("inspect", output, "--failures", "--verify", "--json").stdout)
    assert about["failures"] == {"bad.jpg": "empty file (0 bytes)"} and about["verified"] is True
    assert about["recipe"]["levels"] == [2, 1] and about["done"] == 4

    place = open_store(output).columns["descriptors"]
    with open(output, "r+b") as file:
        file.seek(place.offset)
        file.write(b"\x11")
    broken = run_sppfeat("inspect", output, "--verify")
    assert broken.returncode == 1
    assert re.fullmatch(r"sppfeat: .*f\.h5: row 0 \('0000.png'\): its values .* checksum\n", broken.stderr)


def test_summary_for_people_and_quiet(make_images: Callable[..., Path], tmp_path: Path, run_sppfeat: Run) -> None:
    folder, output = make_images(3), tmp_path / "f.h5"
    done = run_sppfeat("extract", folder, "-o", output, *TINY_FLAGS)
    assert done.returncode == 0
    assert "3 images (3 described)" in done.stdout and "images/s on cpu" in done.stdout and "decode" in done.stdout
    assert "\r" not in done.stdout + done.stderr  # a progress bar only on a terminal
    again = run_sppfeat("extract", folder, "-o", output, "--quiet", *TINY_FLAGS)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_lists_and_standard_input(make_images: Callable[..., Path], tmp_path: Path, run_sppfeat: Run) -> None:
    folder = make_images(3)
    output = tmp_path / "f.h5"
    listing = "\n".join(f"images/{path.name}" for path in sorted(folder.iterdir())[:2])
    done = run_sppfeat("extract", "-", "-o", output, "--json", *TINY_FLAGS, cwd=tmp_path, input=listing)
    assert json.loads(done.stdout)["described"] == 2
    assert open_store(output).names == ["0000.png", "0001.png"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["extract", "missing/", "-o", "f.h5"], 2, "missing/: no such file or folder"),
        (["extract", ".", "-o", "f.h5"], 2, ".: expected images, found "),
        (["extract", "x.rar", "-o", "f.h5"], 2, "x.rar: expected a folder, an image (.*) or a text list"),
        (["extract", ".", "-o", "f.h5", "--levels", "6,0"], 2, "levels must be different whole numbers from 1 to 64"),
        (["extract", ".", "-o", "f.h5", "--levels", "six"], 2, "--levels: expected whole numbers .*, found 'six'"),
        (["extract", ".", "-o", "f.h5", "--scales", "224,tall"], 2, "scales must be .* or 'native', .*224,tall"),
        (["extract", ".", "-o", "f.h5", "--scales", "5"], 2, "scales must be different short sides from 16 to 4096"),
        (["extract", ".", "-o", "f.h5", "--pooling", "mox"], 2, "unknown pooling 'mox': expected one of max, avg, gem"),
        (
            ["extract", "one.png", "-o", "f.h5", "--device", "cuda:99"],
            1,
            "device cuda:99: expected an NVIDIA GPU, found",
        ),
        (
            ["extract", "one.png", "-o", "f.h5", "--device", "tpu"],
            2,
            "device must be auto, cpu, cuda, cuda:N or",
        ),
        (["extract", "one.png", "-o", "f.h5", "--layer", "block"], 2, "unknown layer 'block': did you mean blocks"),
        (
            ["extract", "one.png", "-o", "f.h5", "--backbone", "resnet50"],
            2,
            "unknown backbone 'resnet50': did you mean torchvision:resnet50 or timm:resnet50",
        ),
        (["extract", "one.png", "-o", "f.h5", "--backbone", "torchvision:resnet5"], 2, "did you mean .*resnet50"),
        (["extract", "one.png", "-o", "f.h5", "--weights", "none.pth"], 1, "none.pth: expected a weights file"),
        (["extract", "one.png", "-o", "f.h5", "--weights", "x.rar"], 1, "x.rar: expected a weights file"),
        (["extract", "one.png", "-o", "none/f.h5"], 1, "none/f.h5: its folder none does not exist"),
        (
            ["extract", "one.png", "-o", "x.rar"],
            1,
            "x.rar: expected a store or a new file, found a file that is not a store",
        ),
        (["extract", "one.png", "-o", "f.h5", "--root", "none"], 2, "one.png: expected a path below the root .*none"),
        (["inspect", "x.rar"], 1, "x.rar: expected a store, found a file that cannot be opened"),
        (["inspect", "none.h5"], 1, "none.h5: expected a store, found no such file"),
        (["evaluate", "transfer", "f.h5", "--trials", str(10**11)], 2, "trials must be at most 1000, found 1000000"),
        (["evaluate", "transfer", "f.h5", "--trials", "0"], 2, "trials must be at least 1, found 0"),
        (["search", "g", "x.png", "--neighborhood", str(10**11)], 2, "neighborhood must be from 1 to 5000 images"),
        (["evaluate", "retrieval", "f.h5", "--candidates", "0"], 2, "candidates must be from 1 to 100000 images"),
        (["extract", ".", "-o", "f.h5", "-b", str(10**11)], 2, "batch-size must be a whole number from 1 to 4096"),
        (["extract", ".", "-o", "f.h5", "-j", str(10**11)], 2, "num-workers must be a whole number from 1 to 1024"),
        (["extract", ".", "-o", "f.h5", "--max-pixels", str(10**30)], 2, "max-pixels must be a whole number from 1 to"),
        (["windows", ".", "-o", "f.h5", "-j", str(10**11)], 2, "num-workers must be a whole number from 1 to 1024"),
        (["windows", ".", "-o", "f.h5", "-j", "-1"], 2, "num-workers must be a whole number from 1 to 1024"),
        (["windows", ".", "-o", "f.h5", "--max-windows", str(10**11)], 2, "max-windows must be .* from 1 to 100000"),
        (["windows", ".", "-o", "f.h5", "--base-k", "0"], 2, "base-k must be a whole number from 1 to 10000, found 0"),
        (["windows", ".", "-o", "f.h5", "--seed", str(10**11)], 2, "seed must be a whole number from 0 to 2147483648"),
        (["index", "f.h5", "-o", "g", "--seed", "-1"], 2, "seed must be a whole number from 0, found -1"),
        (["train", "detector", ".", "-o", "f.h5", "--passes", str(10**11)], 2, "passes must be .* from 1 to 100"),
        (["models", "timm:resnet1888"], 2, "unknown timm backbone 'resnet1888': did you mean"),
    ],
    ids=lambda value: " ".join(value[:6]) if isinstance(value, list) else None,
)
def test_one_line_for_each_mistake(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make_images: Callable[..., Path],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.rar").write_bytes(b"PK\x03\x04 no image, no store, no weights")
    if "one.png" in arguments:
        make_images(1, ".")
        Path("0000.png").rename("one.png")
    assert call(arguments, monkeypatch) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert re.match("sppfeat: .*" + message, captured.err), captured.err
    assert not Path("f.h5").exists() and not list(tmp_path.glob(".*"))


def call(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["sppfeat", *arguments])
    try:
        sppfeat_main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def sppfeat_main() -> None:
    from sppfeat_cli import main

    main()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example_that_parses(name: str) -> None:
    command = COMMANDS[name]
    assert command.epilog.startswith(f"Example: sppfeat {name} ")
    words = shlex.split(command.epilog.removeprefix("Example: sppfeat "))
    command.make_context(name, words[1:])  # raises on a wrong flag or a missing argument
    assert command.help and all(p.help for p in command.params if p.param_type_name == "option")


def test_help_and_version(run_sppfeat: Run) -> None:
    for arguments in (["--help"], ["extract", "--help"]):
        shown = run_sppfeat(*arguments)
        assert shown.returncode == 0 and shown.stdout.rstrip().split("\n")[-1].strip().startswith(
            "Example: sppfeat extract"
        )
    assert run_sppfeat("--version").stdout == f"sppfeat {sppfeat.__version__}\n"
    assert run_sppfeat("extract").returncode == 2


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['sppfeat', '--help']\n"
        "from sppfeat_cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'h5py', 'numpy', 'PIL', 'timm', 'tqdm') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("[]\n")


def test_help_loads_little_beyond_typer() -> None:
    """Modules, not seconds: which are loaded does not change with the machine's load."""

    def modules(code: str) -> set[str]:
        code = f"import sys; sys.argv = ['sppfeat', '--help']\n{code}\nprint(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return set(done.stdout.splitlines()[-1].split())

    known = {*sys.stdlib_module_names, "typer"}
    ours = modules("from sppfeat_cli import main\ntry: main()\nexcept SystemExit: pass")
    more = {name for name in ours - modules("import typer") if name.split(".")[0] not in known}
    assert {name for name in more if not name.startswith("sppfeat_cli")} <= {
        "sppfeat",
        "sppfeat._version",
        "sppfeat.errors",
        "sppfeat.progress",
        "sppfeat.recipe",
        "sppfeat.recipes",
    }


def test_public_names() -> None:
    for name in sppfeat.__all__:
        assert getattr(sppfeat, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        sppfeat.no_such_name  # noqa: B018


@pytest.mark.parametrize(("given", "spins"), [(None, "0"), ("ACTIVE", "30000000000")])
def test_threads_that_wait_give_up_their_core(
    make_images: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_sppfeat: Run,
    given: str,
    spins: str,
) -> None:
    """As the OpenMP that torch brings says itself when it is loaded; what the user has set stays."""
    monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    done = run_sppfeat("extract", make_images(1), "-o", tmp_path / "f.h5", "--engine", "torch", *TINY_FLAGS)
    assert done.returncode == 0
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)) == {spins}
