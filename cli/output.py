"""What the commands share in printing and in reading options."""

import json
import re
from collections.abc import Mapping
from typing import Any

import typer

from sppfeat.errors import UsageError


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON document on standard output, in ASCII: names and paths may hold bytes that no encoding takes."""
    typer.echo(json.dumps(document, indent=2))


def printable(text: str) -> str:
    """The text on one line: control characters and stray bytes as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def counted(number: int, noun: str) -> str:
    """`1 image`, `2 images`, `3 classes`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def integers(option: str, text: str) -> tuple[int, ...]:
    """`6,3,2,1` as numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--{option}: expected whole numbers separated by commas, found {text!r}") from None


def numbers(option: str, text: str) -> tuple[float, ...]:
    """`0.5,0.5,0.5` as numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--{option}: expected numbers separated by commas, found {text!r}") from None


def scales(text: str) -> tuple[int | str, ...]:
    """`224,native` as scales."""
    return tuple(int(part) if part.strip().isdecimal() else part.strip() for part in text.split(","))


def byte_count(option: str, text: str) -> int:
    """`4GB` as bytes; units are powers of 1000, as `human_bytes` prints them, or of 1024 when written GiB."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*(?:([kKmMgGtT]?)(i?)[bB]?)\s*", text)
    if found is None or (found[3] and not found[2]):
        raise UsageError(f"--{option}: expected a size such as 800MB or 4GB, found {text!r}")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2].lower() or " "))


def human_bytes(count: int) -> str:
    """`61.2 MB`."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
