"""Every error that sppfeat raises on purpose.

    SppFeatError            anything below; the command line prints its text on one line
    ├── UsageError          an invalid option, source or name (exit code 2)
    ├── DeviceError         a requested device that is not available
    ├── BackboneError       a network that cannot be built, cut at a layer, or given these weights
    ├── ImageError          one image that cannot be described; its row is marked failed and the run continues
    ├── StoreError          a store that cannot be opened, written or trusted
    │   └── StoreBusyError  another process is writing to this store
    ├── ModelError          an SVM, a detector or a vocabulary that cannot be opened, written or trusted
    ├── WindowsError        a file of windows that cannot be made, opened, written or trusted
    ├── GalleryError        a gallery that cannot be opened, written or trusted
    ├── ReportError         a page that cannot be written
    └── MissingExtraError   a required library that is not installed

A message names the thing, what was expected and what was found. SppFeatWarning is for what works, but not as expected;
the command line prints it on one line, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from importlib import import_module
from itertools import islice
from types import ModuleType
from typing import Final

# Names of which each is compared letter by letter with a mistyped one: a tenth of a second.
MOST_COMPARED: Final = 10_000


class SppFeatError(Exception):
    """Base of all errors that sppfeat raises on purpose."""


class SppFeatWarning(UserWarning):
    """Something works, but not as expected, such as a slower fallback for something that failed."""


class UsageError(SppFeatError):
    """An invalid option, source or name."""


class DeviceError(SppFeatError):
    """A requested device that is not available."""


class BackboneError(SppFeatError):
    """A network that cannot be built, cut at a layer, or given these weights."""


class ImageError(SppFeatError):
    """One image that cannot be described."""


class StoreError(SppFeatError):
    """A store that cannot be opened, written or trusted."""


class StoreBusyError(StoreError):
    """Another process is writing to this store."""


class ModelError(SppFeatError):
    """An SVM, a detector or a vocabulary that cannot be opened, written or trusted."""


class WindowsError(SppFeatError):
    """A file of windows that cannot be made, opened, written or trusted."""


class GalleryError(SppFeatError):
    """A gallery that cannot be opened, written or trusted."""


class ReportError(SppFeatError):
    """A page that cannot be written."""


class MissingExtraError(SppFeatError):
    """A required library that is not installed."""


def require_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """Import a module of one of our extras. Raises MissingExtraError, with the command that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        if _interrupted(error):
            raise KeyboardInterrupt from None
        found = (
            "which is not installed"
            if isinstance(error, ModuleNotFoundError)
            else f"which fails to import: {one_line(error)}"
        )
        raise MissingExtraError(f"{purpose} needs {module}, {found}: pip install 'sppfeat[{extra}]'") from None


def _interrupted(error: BaseException) -> bool:
    """Whether an import failed because of Ctrl-C: compiled modules make an ImportError of it."""
    chain: BaseException | None = error
    while chain is not None and not isinstance(chain, KeyboardInterrupt):
        chain = chain.__cause__ or chain.__context__
    return chain is not None


def unknown_name(kind: str, found: str, valid: Iterable[str]) -> str:
    """Message for a name that is not in `valid`: all of them if few, else those that may be meant."""
    names = list(dict.fromkeys(valid))
    if len(names) <= 8:
        return f"unknown {kind} {found!r}: expected one of {', '.join(names)}"
    if nearest := nearest_names(found, names):
        return f"unknown {kind} {found!r}: did you mean {one_of(nearest)}?"
    return f"unknown {kind} {found!r}: expected one of {len(names)} names, such as {', '.join(names[:5])}"


def one_of(names: Sequence[str]) -> str:
    """`a, b or c`."""
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]


def nearest_names(found: str, valid: Iterable[str], *, most: int = 5) -> list[str]:
    """The names that may be meant by one that is not valid, the likeliest first: those that it begins or that begin
    it, those that it is a part of, then those that differ in few letters. Of very many names, only the former."""
    names = list(dict.fromkeys(valid))
    typed, few = found.lower(), len(names) <= MOST_COMPARED
    ranked = []
    for at, name in enumerate(names):
        known = name.lower()
        if not typed:
            continue
        if known.startswith(typed) or (len(known) > 2 and typed.startswith(known)):
            ranked.append((0, abs(len(known) - len(typed)), at, name))
        elif len(typed) > 2 and typed in known:
            ranked.append((1, len(known) - len(typed), at, name))
        elif few and (edits := _edits(typed, known, most=max(len(typed) > 1, len(typed) // 3))) is not None:
            ranked.append((2, edits, at, name))
    return [name for *_, name in sorted(ranked)[:most]]


def near_path(path: str | os.PathLike[str]) -> str:
    """The end of a message about a path that does not exist: `; did you mean photos/?`, with the nearest name in its
    folder. Empty if none is near, or the folder cannot be listed or holds very many names."""
    folder, name = os.path.split(os.fspath(path).rstrip(os.sep))
    try:
        with os.scandir(folder or os.curdir) as entries:
            listed = {entry.name: entry for entry in islice(entries, MOST_COMPARED + 1)}
    except OSError:
        return ""
    if len(listed) > MOST_COMPARED:
        return ""
    shown = sorted(each for each in listed if name.startswith(".") or not each.startswith("."))
    if not (nearest := nearest_names(name, shown, most=1)):
        return ""
    ending = os.sep if listed[nearest[0]].is_dir() else ""
    return f"; did you mean {os.path.join(folder, nearest[0])}{ending}?"


def near_fraction(value: float) -> str:
    """The end of a message about a fraction that was given in percent: `; did you mean 0.95?`; empty for others."""
    return f"; did you mean {value / 100:g}?" if 2 <= value <= 100 else ""


def _edits(one: str, other: str, *, most: int) -> int | None:
    """Letters to insert, delete, replace or swap with their neighbor that lead from one text to another; None if more
    than `most` (the optimal string alignment distance)."""
    if abs(len(one) - len(other)) > most:
        return None
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one):
        earlier, before, row = before, row, [i + 1]
        for j, against in enumerate(other):
            cost = min(before[j + 1] + 1, row[j] + 1, before[j] + (letter != against))
            if i and j and letter == other[j - 1] and one[i - 1] == against:
                cost = min(cost, earlier[j - 1] + 1)
            row.append(cost)
        if min(row) > most:
            return None
    return row[-1] if row[-1] <= most else None


def one_line(error: BaseException) -> str:
    """First line of an error's message, with its type where the message alone says little (a key, an index)."""
    text = str(error).strip()
    if not text or isinstance(error, LookupError):
        return f"{type(error).__name__} {text}".strip()
    return text.splitlines()[0].strip()
