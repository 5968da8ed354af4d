"""The rooms: what each is for, what others may import from it, and what importing it costs."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sppfeat

ROOT = Path(sppfeat.__file__).parent
CLI = ROOT.parent / "cli"
ROOMS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
# What takes seconds to import, or is an extra: modules that need one import it only when they compute.
HEAVY = ("torch", "torchvision", "timm", "openvino", "faiss", "cv2", "jinja2", "tqdm", "sklearn", "ray", "fastapi")


def imported(path: Path) -> list[tuple[str, str]]:
    """Modules and names that a file imports from sppfeat."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sppfeat."):
            found += [(str(node.module), alias.name) for alias in node.names]
    return found


def loads_torch(module: str) -> bool:
    """Whether importing a module of sppfeat imports torch, directly or through others."""
    path = ROOT.parent / f"{module.replace('.', '/')}.py"
    if not path.exists():
        return False
    for node in ast.parse(path.read_text("utf-8")).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        if any(name.split(".")[0] == "torch" or (name != module and loads_torch(name)) for name in names):
            return True
    return False


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_light(room: str) -> None:
    """In a fresh interpreter."""
    code = f"import sys, sppfeat.{room}; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is_for_and_what_it_exports(room: str) -> None:
    module = importlib.import_module(f"sppfeat.{room}")
    assert module.__doc__ and module.__doc__.split("\n")[0].endswith(".")
    assert module.__all__ == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def test_rooms_import_only_what_others_export() -> None:
    """From another room, only what its `__init__` exports; modules that load torch are imported by their own names."""
    wrong = []
    for path in [*ROOT.rglob("*.py"), *CLI.glob("*.py")]:
        own = path.parent.name
        for module, name in imported(path):
            parts = module.split(".")
            if len(parts) == 2 and parts[1] in ROOMS:
                if name not in importlib.import_module(module).__all__:
                    wrong.append(f"{path.name}: {module} hands on no {name}")
            elif len(parts) == 3 and parts[1] != own and path != ROOT / "__init__.py" and not loads_torch(module):
                wrong.append(f"{path.name}: {module} is behind the door of {parts[1]}")
    assert wrong == []


def test_every_extra_that_a_message_names_exists() -> None:
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text("utf-8"))["project"]
    named = set()
    for path in [*ROOT.rglob("*.py"), *CLI.glob("*.py")]:
        text = path.read_text("utf-8")
        named |= set(re.findall(r"sppfeat\[([a-z0-9]+)\]", text))
        named |= set(re.findall(r'require_extra\(\s*[^,]+,\s*"([a-z0-9]+)"', text))
    assert named <= project["optional-dependencies"].keys() and len(named) >= 6
    # Pages are for everybody.
    assert any(one.startswith("jinja2") for one in project["dependencies"])
