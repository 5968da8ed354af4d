"""The footer of a page: the command and the recipes that made it."""

from __future__ import annotations

import html
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sppfeat import Recipe
from sppfeat.report import Origin, write_page
from sppfeat_cli.output import command_line


def test_a_page_says_what_made_it(tmp_path: Path) -> None:
    command = "sppfeat search '<b>' --html p.html"
    recipe = replace(Recipe(), scales=(224, 320), layer="blocks.5")
    values = {"data": [], "rows": [], "best": {}}
    origins = [Origin("<i>f.h5", recipe, "abc" * 21), Origin("other", Recipe())]
    write_page(tmp_path / "p.html", "matrix.html", values, origins=origins, command=command)
    text = (tmp_path / "p.html").read_text()
    assert f"<code>{html.escape(command).replace('&#x27;', '&#39;')}</code>" in text and "<b>'" not in text
    assert "Recipe of &lt;i&gt;f.h5: efficientnet_lite0, layer blocks.5, scales 224,320, levels 6,3,2,1" in text
    assert text.count("<td>224,320</td>") == 1 and text.count("abc" * 21) == 1 and text.count("<details>") == 2
    assert "gem_p" in text and "calibration" not in text  # what is not set
    write_page(tmp_path / "p.html", "matrix.html", values)
    text = (tmp_path / "p.html").read_text()
    assert "<code>" not in text and "<details>" not in text and "Made by sppfeat" in text


def test_the_command_as_a_shell_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one line, and without the passwords of URLs."""
    monkeypatch.setattr(sys, "argv", ["/x/sppfeat", "search", "a b", "https://me:pw@host/g", "it's", "x\n\x1b", "a@b"])
    assert command_line() == r"""sppfeat search 'a b' https://host/g 'it'"'"'s' 'x\n\x1b' a@b"""
