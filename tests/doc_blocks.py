"""The blocks of code in README and the guide: reading them, parsing their command lines, and running them.

A comment before a block says what it needs beyond this machine: `<!-- needs: gpu -->`. A block with a title is the file
of that name, which the commands after it read. A block `text` right after commands is what they print.

`python tests/doc_blocks.py` runs all blocks and writes what they print into the pages.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from typer.main import get_command

from sppfeat_cli import main
from sppfeat_cli.app import build

ROOT: Final = Path(__file__).parents[1]
PAGES: Final = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
# What a reader may have and a test has not. edit: a change of the source; time: minutes, or a run of the tests.
NEEDS: Final = ("browser", "bucket", "cluster", "data", "edit", "gpu", "network", "time")

_FENCE: Final = re.compile(r'```(\w*)(?: title="([^"]+)")?$')
_NEEDS: Final = re.compile(r"<!-- needs: (\w+) -->$")
_OPERATOR: Final = re.compile(r"[();<>|&]+")
# What only a shell expands, once quoted text is taken away.
_SHELL: Final = re.compile(r"[*?\[{$`<>|]|(?<!&)&(?!&)")
_QUOTED: Final = re.compile(r"'[^']*'|\"[^\"$`]*\"")
_INSTALLS: Final = re.compile(r"\bpip install\b")


@dataclass(frozen=True)
class Block:
    """A fenced block. line: of its fence, from 1. title: file that it is. needs: one of NEEDS."""

    page: Path
    line: int
    language: str
    title: str | None
    needs: str | None
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def read_blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page. Raises ValueError for a fence that is indented, unknown or not closed."""
    lines = page.read_text("utf-8").splitlines()
    at, before = 0, ""
    while at < len(lines):
        line = lines[at]
        if line.lstrip().startswith("```"):
            fence = _FENCE.match(line)
            if fence is None or "```" not in lines[at + 1 :]:
                raise ValueError(f"{page.name}:{at + 1}: expected a fence at the margin, and its end, found {line!r}")
            end = lines.index("```", at + 1)
            needs = _NEEDS.match(before)
            text = "\n".join(lines[at + 1 : end]) + "\n"
            yield Block(page, at + 1, fence[1], fence[2], needs[1] if needs else None, text)
            at, before = end, ""
        elif line.strip():
            before = line
        at += 1


def command_lines(text: str) -> Iterator[str]:
    """The lines of a block of commands, joined where they end with a backslash; comments and empty ones left out."""
    for line in text.replace("\\\n", " ").splitlines():
        if words(line):
            yield line


def words(line: str) -> list[str]:
    """The words of a line, as a shell splits them, operators included."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split = True
    return list(lexer)


def simple_commands(line: str) -> Iterator[list[str]]:
    """The commands that operators join in a line."""
    command: list[str] = []
    for word in [*words(line), ";"]:
        if not _OPERATOR.fullmatch(word):
            command.append(word)
        elif command:
            yield command
            command = []


def sppfeat_arguments(line: str) -> Iterator[list[str]]:
    """The arguments of each `sppfeat` in a line."""
    for command in simple_commands(line):
        while command and re.match(r"[A-Z_]+=", command[0]):
            command = command[1:]
        if command and Path(command[0]).name == "sppfeat":
            yield command[1:]


def check_arguments(arguments: list[str]) -> None:
    """Raise unless the command line has such a command, and it such options."""
    command = whole_command_line()
    rest = list(arguments)
    if rest == ["--version"]:
        return
    name = "sppfeat"
    while hasattr(command, "commands"):
        name = rest.pop(0)
        command = command.commands[name]
    command.make_context(name, rest)


@functools.cache
def whole_command_line() -> Any:
    """The group of all commands."""
    return get_command(build())


def run_block(block: Block, folder: Path, names: dict[str, Any]) -> None:
    """Run a block in a folder. names: those that Python blocks of its page have defined so far.

    Raises AssertionError with the place and the command. `pip install` is left out, and `sppfeat` runs in this process
    where a line needs no shell.
    """
    if block.title is not None:
        (target := folder / block.title).parent.mkdir(parents=True, exist_ok=True)
        target.write_text(block.text)
    elif block.language == "python":
        exec(compile(block.text, block.place, "exec"), names)
    elif block.language == "sh":
        for line in command_lines(block.text):
            ours = list(sppfeat_arguments(line))
            if _INSTALLS.search(line) or (len(ours) == 1 and not _SHELL.search(_QUOTED.sub("", line))):
                for arguments in ours:
                    code = call(arguments)
                    assert code == 0, f"{block.place}: exit code {code}: {line}"
            else:
                done = subprocess.run(["bash", "-euo", "pipefail", "-c", line], env=with_sppfeat(folder))
                assert done.returncode == 0, f"{block.place}: exit code {done.returncode}: {line}"


def call(arguments: list[str]) -> int:
    """Run the command line within this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("default")  # as for a user: of libraries, few are errors
        patch.setattr(sys, "argv", ["sppfeat", *arguments])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def with_sppfeat(folder: Path) -> Mapping[str, str]:
    """An environment in which `sppfeat` is the command line of this Python."""
    (tools := folder.parent / "tools").mkdir(exist_ok=True)
    # Processes that it spawns import it again.
    text = f'#!{sys.executable}\nfrom sppfeat_cli import main\n\nif __name__ == "__main__":\n    main()\n'
    (script := tools / "sppfeat").write_text(text)
    script.chmod(0o755)
    return {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "COLUMNS": "110"}


def prepare(folder: Path) -> None:
    """Make the folder that a reader starts in: it holds the photographs."""
    shutil.copytree(ROOT / "photos", folder / "photos")


def write_outputs(page: Path) -> None:
    """Run a page's blocks, each in a process of its own, and write what commands print into the blocks after them."""
    lines, blocks = page.read_text("utf-8").splitlines(), list(read_blocks(page))
    outputs: dict[int, str] = {}
    code = ""
    with tempfile.TemporaryDirectory() as work:
        (folder := Path(work) / "here").mkdir()
        prepare(folder)
        for block, after in itertools.zip_longest(blocks, blocks[1:]):
            if block.needs is not None:
                continue
            if block.title is not None:
                run_block(block, folder, {})
            elif block.language == "python":
                code += block.text  # goes on with the names of the blocks before
            elif block.language == "sh":
                _run_python(code, folder)
                code = ""
                text = "\n".join(line for line in command_lines(block.text) if not _INSTALLS.search(line))
                command = ["bash", "-euo", "pipefail", "-c", text]
                done = subprocess.run(
                    command, cwd=folder, env=with_sppfeat(folder), check=True, stdout=subprocess.PIPE, text=True
                )
                end = block.line + block.text.count("\n") + 1
                if after and after.language == "text" and not after.title and not any(lines[end : after.line - 1]):
                    outputs[after.line] = done.stdout.replace(f"{folder}/", "")
        _run_python(code, folder)
    for line, output in sorted(outputs.items(), reverse=True):
        lines[line : lines.index("```", line)] = output.rstrip("\n").splitlines()
    page.write_text("\n".join(lines) + "\n", "utf-8")


def _run_python(code: str, folder: Path) -> None:
    if code:
        subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    for path in [Path(name).resolve() for name in sys.argv[1:]] or PAGES:
        write_outputs(path)
