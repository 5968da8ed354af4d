"""Docstrings on the page of the Python API: `name: what it is.` of a parameter or field becomes an item of a list."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from typing import Any

import griffe


class FieldLists(griffe.Extension):
    """Rewrites docstrings once the names that they may explain are known."""

    def on_class_members(self, *, node: ast.AST | griffe.ObjectNode, cls: griffe.Class, **kwargs: Any) -> None:
        """Fields of a class, and parameters of its `__init__`."""
        begin = cls.members.get("__init__")
        parameters = [one.name for one in begin.parameters] if isinstance(begin, griffe.Function) else []
        _rewrite(cls, {*cls.attributes, *cls.functions, *parameters})

    def on_function_instance(self, *, node: ast.AST | griffe.ObjectNode, func: griffe.Function, **kwargs: Any) -> None:
        """Parameters of a function."""
        _rewrite(func, {one.name for one in func.parameters})


def _rewrite(one: griffe.Object, names: Iterable[str]) -> None:
    if one.docstring is not None:
        one.docstring.value = "\n\n".join(_listed(part, names) for part in one.docstring.value.split("\n\n"))


def _listed(paragraph: str, names: Iterable[str]) -> str:
    if not names or paragraph.startswith((" ", "- ")):
        return paragraph
    name = f"(?:{'|'.join(sorted(map(re.escape, names), key=len, reverse=True))})"
    pieces = re.split(rf"(?:^|(?<=[.)`\]] ))(?=Raises |{name}(?:, {name})*: )", " ".join(paragraph.split()))
    lines = [re.sub(rf"^({name}(?:, {name})*): ", r"- `\1`: ", piece.strip()) for piece in pieces if piece.strip()]
    if not any(line.startswith("- ") for line in lines):
        return paragraph
    blocks = [lines[0]]
    for before, line in zip(lines, lines[1:], strict=False):
        blocks.append(("\n" if before.startswith("- ") and line.startswith("- ") else "\n\n") + line)
    return "".join(blocks)
