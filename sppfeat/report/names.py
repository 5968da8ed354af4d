"""How a page writes the names of images: without the folder that they have in common, and not too long."""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from sppfeat.images import Item

# Three lines below a thumbnail of 120 pixels.
NAME_LENGTH: Final = 40
# How far up from its own folder a page links by a relative path: it is likely to be moved together with what is nearer.
_NEAR: Final = 1


def common_folder(names: Iterable[str]) -> str:
    """The deepest folder that holds all of these names; "" if there is none, or no name."""
    folders = [name.split("/")[:-1] for name in names]
    if not folders:
        return ""
    first, last = min(folders), max(folders)
    common = 0
    while common < min(len(first), len(last)) and first[common] == last[common]:
        common += 1
    return "/".join(first[:common])


def short_name(name: str, folder: str = "", length: int = NAME_LENGTH) -> str:
    """The name from a folder on, and with its middle left out where it is longer than `length` characters."""
    name = name.removeprefix(f"{folder}/") if folder else name
    if len(name) <= length:
        return name
    start = (length - 1) * 2 // 5
    return f"{name[:start]}\u2026{name[len(name) - (length - 1 - start) :]}"


def image_link(page: Path, item: Item) -> str | None:
    """The address of an image's file for a page: relative if the file is in the page's folder, beside it or below;
    else absolute. A URL of the web is its own address; None for members of archives and objects of buckets."""
    path = item.path
    if re.match(r"https?://", path, re.IGNORECASE):
        return path
    if item.content is not None:
        return None
    path, folder = os.path.abspath(path), os.path.dirname(os.path.abspath(page))
    relative = os.path.relpath(path, folder)
    if os.path.commonpath([path, folder]) == os.sep or relative.split(os.sep).count(os.pardir) > _NEAR:
        return f"file://{_quoted(path)}"
    # "./", because a colon in the first part would make it a protocol.
    return f"./{_quoted(relative)}"


def _quoted(path: str) -> str:
    return urllib.parse.quote(os.fsencode(path))
