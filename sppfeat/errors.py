"""Every error that sppfeat raises on purpose.

    SppFeatError            anything below; the command line prints its text on one line
    ├── UsageError          an option, a source or a name that cannot be (exit code 2)
    ├── DeviceError         a device that was asked for and is not there
    ├── BackboneError       a network that cannot be built, cut at a layer, or given these weights
    ├── ImageError          one image that cannot be described; its row is marked failed, the run goes on
    ├── StoreError          a store that cannot be opened, written or trusted
    │   └── StoreBusyError  another process is writing to this store
    ├── ModelError          an SVM or a detector that cannot be opened, written or trusted
    ├── WindowsError        a file of windows that cannot be opened, written or trusted, or made
    ├── GalleryError        a gallery that cannot be opened, written or trusted
    ├── ReportError         a page that cannot be written
    └── MissingExtraError   a library that this needs and that is not installed

A text names the thing, what was expected and what was found. SppFeatWarning is for what works, but not as one would
expect: the command line prints it on one line, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from types import ModuleType


class SppFeatError(Exception):
    """Base of all errors that sppfeat raises on purpose."""


class SppFeatWarning(UserWarning):
    """Something works, but not as one would expect: a slower way took the place of one that failed."""


class UsageError(SppFeatError):
    """An option, a source or a name that cannot be."""


class DeviceError(SppFeatError):
    """A device that was asked for and is not there."""


class BackboneError(SppFeatError):
    """A network that cannot be built, cut at a layer, or given these weights."""


class ImageError(SppFeatError):
    """One image that cannot be described."""


class StoreError(SppFeatError):
    """A store that cannot be opened, written or trusted."""


class StoreBusyError(StoreError):
    """Another process is writing to this store."""


class ModelError(SppFeatError):
    """An SVM or a detector that cannot be opened, written or trusted."""


class WindowsError(SppFeatError):
    """A file of windows that cannot be opened, written or trusted, or made."""


class GalleryError(SppFeatError):
    """A gallery that cannot be opened, written or trusted."""


class ReportError(SppFeatError):
    """A page that cannot be written."""


class MissingExtraError(SppFeatError):
    """A library that this needs and that is not installed."""


def require_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """Import a module of one of our extras. Raises MissingExtraError, with the command that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        found = (
            "which is not installed" if isinstance(error, ModuleNotFoundError) else f"which fails: {one_line(error)}"
        )
        raise MissingExtraError(f"{purpose} needs {module}, {found}: pip install 'sppfeat[{extra}]'") from None


def unknown_name(kind: str, found: str, valid: Iterable[str]) -> str:
    """Text for a name that is not among `valid`: the nearest valid names, or all of them when few."""
    import difflib  # takes longer to load than everything else here, for texts that are rare

    names = list(dict.fromkeys(valid))
    nearest = difflib.get_close_matches(found, names, n=5, cutoff=0.4)
    if len(names) <= 8:
        return f"unknown {kind} {found!r}: expected one of {', '.join(names)}"
    if nearest:
        return f"unknown {kind} {found!r}: did you mean {', '.join(nearest)}?"
    return f"unknown {kind} {found!r}: {len(names)} are known, such as {', '.join(names[:5])}"


def one_line(error: BaseException) -> str:
    """First line of an error's own text, with its type where that text alone says little (a key, an index)."""
    text = str(error).strip()
    if not text or isinstance(error, LookupError):
        return f"{type(error).__name__} {text}".strip()
    return text.splitlines()[0].strip()
