"""README and the guide: their commands run, in order, on the project's photographs, and their names exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from doc_blocks import (
    NEEDS,
    PAGES,
    ROOT,
    Block,
    check_arguments,
    command_lines,
    prepare,
    read_blocks,
    run_block,
    sppfeat_arguments,
    whole_command_line,
)

import sppfeat

GUIDE = [page for page in PAGES if page.parent.name == "docs"]
NEEDY = [block for page in PAGES for block in read_blocks(page) if block.needs is not None]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder := tmp_path / "here").mkdir()
    prepare(folder)
    monkeypatch.chdir(folder)
    names = {"__name__": "__main__"}
    for block in read_blocks(page):
        if block.needs is None:
            run_block(block, folder, names)


@pytest.mark.parametrize("block", NEEDY, ids=lambda block: f"{block.place}-{block.needs}")
def test_blocks_that_need_more_than_this_machine_parse(block: Block) -> None:
    assert block.needs in NEEDS, f"{block.place}: expected one of {NEEDS}, found {block.needs}"
    if block.language == "python":
        compile(block.text, block.place, "exec")
    parse(block)
    pytest.skip(f"needs: {block.needs}")


def parse(block: Block) -> int:
    """Check the command lines of a block; returns how many there are."""
    count = 0
    if block.language == "sh":
        for line in command_lines(block.text):
            for arguments in sppfeat_arguments(line):
                try:
                    check_arguments(arguments)
                except Exception as error:
                    raise AssertionError(f"{block.place}: {line}: {error!r}") from error
                count += 1
    return count


def test_command_lines_have_such_commands_and_options() -> None:
    assert sum(parse(block) for page in PAGES for block in read_blocks(page)) > 80
    with pytest.raises(Exception, match="--levles"):
        check_arguments(["extract", "photos/", "-o", "f.h5", "--levles", "1"])
    with pytest.raises(KeyError, match="extrcat"):
        check_arguments(["extrcat", "photos/"])


def commands(group: object, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, command in group.commands.items():  # type: ignore[attr-defined]
        found |= commands(command, f"{prefix}{key} ") if hasattr(command, "commands") else {f"{prefix}{key}": command}
    return found


def test_the_guide_shows_every_command() -> None:
    shown = " ".join(block.text for page in GUIDE for block in read_blocks(page) if block.language == "sh")
    missing = [command for command in commands(whole_command_line()) if f"sppfeat {command} " not in shown]
    assert missing == []


def test_options_in_the_text_exist() -> None:
    ours = {
        option
        for command in commands(whole_command_line()).values()
        for parameter in command.params  # type: ignore[attr-defined]
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    unknown = {
        (name(page), option)
        for page in PAGES
        for code in re.findall(r"`([^`\n]+)`", page.read_text("utf-8"))
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", code)
        if option not in ours
    }
    assert unknown == set()


def test_installation_names_extras_that_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        (name(page), extra)
        for page in PAGES
        for found in re.findall(r"(?:sppfeat|'\.)\[([a-z0-9,]+)\]", page.read_text("utf-8"))
        for extra in found.split(",")
    }
    assert len(named) > 10
    assert {(page, extra) for page, extra in named if extra not in extras} == set()
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/install.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(extras)


def test_every_public_name_is_on_the_page_of_the_python_api() -> None:
    written = re.findall(r"^::: sppfeat\.(\w+)$", (ROOT / "docs/python.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(written) == sorted(set(sppfeat.__all__) - {"__version__"})


def test_what_README_links_to_is_there() -> None:
    links = re.findall(r"\]\(([^)\s#]+)", (ROOT / "README.md").read_text("utf-8"))
    here = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert len(here) > 3
    assert [link for link in here if not (ROOT / link).exists()] == []


def test_every_result_of_a_benchmark_is_in_the_guide() -> None:
    text = (ROOT / "docs/benchmarks.md").read_text("utf-8")
    for file in (*(ROOT / "benchmarks/results").glob("*.md"), *(ROOT / "benchmarks").glob("*.py")):
        assert f"{file.relative_to(ROOT)}" in text, f"docs/benchmarks.md: expected {file.name}"


def test_contributing_lists_every_room_with_its_purpose() -> None:
    text = (ROOT / "docs/contributing.md").read_text("utf-8")
    for file in ROOT.glob("sppfeat/*/__init__.py"):
        purpose = (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").split("\n")[0]
        line = f"| `sppfeat/{file.parent.name}/` | {purpose} |"
        assert line in text, f"docs/contributing.md: expected {line}"


def test_what_commands_print_is_on_the_page() -> None:
    """`python tests/doc_blocks.py` writes it there."""
    empty = [block.place for page in PAGES for block in read_blocks(page) if not block.text.strip()]
    assert empty == []


class _Loaded(HTMLParser):
    """Addresses that a page loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        loads = tag in ("script", "img", "iframe", "source") or (
            tag == "link" and given.get("rel") not in ("canonical", "next", "prev")
        )
        if loads:
            self.addresses += [value for key in ("src", "href") if (value := given.get(key))]


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(GUIDE)
    for page in pages:
        loaded = _Loaded()
        loaded.feed(page.read_text("utf-8"))
        assert loaded.addresses
        assert [one for one in loaded.addresses if re.match(r"(https?:)?//", one)] == [], page
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(https?:)?//", sheet.read_text("utf-8")), sheet
