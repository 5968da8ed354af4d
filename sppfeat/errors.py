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

from collections.abc import Iterable
from importlib import import_module
from types import ModuleType


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
        found = (
            "which is not installed"
            if isinstance(error, ModuleNotFoundError)
            else f"which fails to import: {one_line(error)}"
        )
        raise MissingExtraError(f"{purpose} needs {module}, {found}: pip install 'sppfeat[{extra}]'") from None


def unknown_name(kind: str, found: str, valid: Iterable[str]) -> str:
    """Message for a name that is not in `valid`: the nearest valid names, or all of them if few."""
    import difflib  # slower to load than everything else here, and rarely needed

    names = list(dict.fromkeys(valid))
    nearest = difflib.get_close_matches(found, names, n=5, cutoff=0.4)
    if len(names) <= 8:
        return f"unknown {kind} {found!r}: expected one of {', '.join(names)}"
    if nearest:
        return f"unknown {kind} {found!r}: did you mean {', '.join(nearest)}?"
    return f"unknown {kind} {found!r}: expected one of {len(names)} names, such as {', '.join(names[:5])}"


def one_line(error: BaseException) -> str:
    """First line of an error's message, with its type where the message alone says little (a key, an index)."""
    text = str(error).strip()
    if not text or isinstance(error, LookupError):
        return f"{type(error).__name__} {text}".strip()
    return text.splitlines()[0].strip()
