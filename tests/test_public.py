"""The library's public names: each command is one public call, documented, and lazily imported."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import sppfeat
from sppfeat_cli.app import build

CLI = Path(sppfeat.__file__).parents[1] / "cli"
CALLS = {
    "extract": ["extract_folder"],
    "windows": ["propose_folder"],
    "inspect": ["open_store", "open_classifier", "open_detector", "open_vocabulary", "open_windows"]
    + ["describe_gallery", "verify_store", "verify_gallery", "count_lost"],
    "models": ["describe_backbones", "layers_and_default", "survey_families"],
    "evaluate transfer": ["evaluate_transfer"],
    "evaluate retrieval": ["evaluate_retrieval"],
    "evaluate detection": ["evaluate_detector"],
    "evaluate all": ["evaluate_matrix"],
    "train svm": ["train_classifier", "save_classifier"],
    "train detector": ["train_detector", "tune_detector"],
    "train vocabulary": ["learn_vocabulary"],
    "tune": ["tune"],
    "predict": ["predict"],
    "detect": ["detect_images"],
    "index": ["create_gallery", "add_to_gallery", "remove_from_gallery", "add_map"],
    "search": ["search_images"],
    "serve": ["serve_gallery"],
    "duplicates": ["find_duplicates", "find_crops"],
    "export": ["export_store"],
    "merge": ["merge_stores"],
}


def commands(group: Any, name: str = "") -> Iterator[str]:
    for key, command in group.commands.items():
        yield from commands(command, f"{name}{key} ") if hasattr(command, "commands") else [f"{name}{key}"]


def test_every_command_is_listed() -> None:
    assert set(commands(get_command(build()))) == CALLS.keys()


@pytest.mark.parametrize("command", CALLS)
def test_a_command_makes_public_calls(command: str) -> None:
    texts = [path.read_text("utf-8") for path in CLI.glob("*.py")]
    for name in CALLS[command]:
        assert name in sppfeat.__all__
        assert any(re.search(rf"import [^#]*\b{name}\b", text) for text in texts), name
        call = getattr(sppfeat, name)
        assert call.__doc__ and "." in call.__doc__.split("\n\n")[0], f"{name}: one sentence"
        assert re.search(rf"\b{name}\b", str(sppfeat.__doc__)) or name in ("count_lost", "save_classifier")


@pytest.mark.parametrize("name", [name for names in CALLS.values() for name in names])
def test_a_call_can_be_made_with_public_types_alone(name: str) -> None:
    """Classes of sppfeat among the annotations of its parameters, those of results and of what reads them apart."""
    call = getattr(sppfeat, name)
    named = " ".join(str(parameter.annotation) for parameter in inspect.signature(call).parameters.values())
    wanted = {word for word in re.findall(r"\b[A-Z]\w+", named) if word not in PLAIN}
    assert wanted <= {*sppfeat.__all__, *APART}, wanted


PLAIN = {"Any", "Callable", "Collection", "Iterable", "Mapping", "None", "Path", "PathLike", "Sequence"}
# Made by a public call (`read_annotations`, `read_data`, `read_ground_truth`, `read_voc_labels`), or plain values.
APART = {"AnnotatedImages", "DataSet", "Box", "GroundTruth", "Source", "VocLabels"}


def test_importing_sppfeat_imports_nothing_else() -> None:
    code = "import sys, sppfeat; print(*sorted(n for n in sys.modules if n.split('.')[0] in ('sppfeat', 'numpy')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["sppfeat", "sppfeat._version"]
