"""What is found where images, a store or a gallery belong, in words, with the command that makes one of it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from sppfeat.images.archives import is_archive
from sppfeat.images.items import is_image_name
from sppfeat.images.urls import is_url

# A folder that holds images has one early on; a home folder must not be walked for the sake of a message.
_LOOKED_AT: Final = 2_000
_KINDS_SHOWN: Final = 5


def found_instead(path: str | os.PathLike[str], belongs: str) -> str | None:
    """What is at a path where a store or a gallery belongs, and what to do first; None if that is not known.

    belongs: STORE or GALLERY, of `sppfeat.files`.
    """
    from sppfeat.files import NOUNS, format_of  # h5py, which images do not need

    found = format_of(path)
    if found is not None and found != belongs:
        return NOUNS[found] + _first(found, belongs, path)
    if (images := _images(Path(path))) is not None:
        return images + _first(None, belongs, path)
    return None


def no_images(sources: Sequence[str | os.PathLike[str]]) -> str:
    """The message for sources without images, with the kinds of the files that are there instead."""
    from sppfeat.files import NOUNS, format_of  # h5py, which images do not need

    shown = ", ".join(os.fspath(source) for source in sources)
    for source in sources:
        if not is_url(os.fspath(source)) and (kind := format_of(source)) is not None:
            return f"{os.fspath(source)}: expected images, found {NOUNS[kind]}"
    others = [name for source in sources for name in _files_below(Path(source))]
    kinds = sorted({Path(name).suffix.lower() for name in others} - {""})
    if not kinds:
        return f"{shown}: expected images, found none"
    some = ", ".join(kinds[:_KINDS_SHOWN]) + ", ..." * (len(kinds) > _KINDS_SHOWN)
    return f"{shown}: expected images, found files of other kinds alone ({some}); convert them to JPEG or PNG"


def left_out(unread: Sequence[tuple[str, int]]) -> str:
    """The note for images of kinds that are not read; see `Extent.unread`. Of one at least."""
    count = sum(number for _, number in unread)
    files = "1 file" if count == 1 else f"{count} files"
    kinds = ", ".join(f"{number} {kind}" for kind, number in unread)
    return f"{files} left out, of kinds that are not read: {kinds}; convert them to JPEG or PNG"


def _first(found: str | None, belongs: str, path: str | os.PathLike[str]) -> str:
    from sppfeat.files import GALLERY, STORE

    place = shlex.quote(os.fspath(path))
    if found is None:
        then = ", then: sppfeat index feats.h5 -o gallery/" * (belongs == GALLERY)
        return f"; first: sppfeat extract {place} -o feats.h5{then}"
    if (found, belongs) == (STORE, GALLERY):
        return f"; first: sppfeat index {place} -o gallery/"
    if (found, belongs) == (GALLERY, STORE):
        return f"; give the store that it was built from, which `sppfeat inspect {place}` names"
    return ""


def _images(path: Path) -> str | None:
    if path.is_dir():
        return "a folder of images" if _holds_images(path) else None
    if not path.is_file():
        return None
    return "an image" if is_image_name(path.name) else "an archive" if is_archive(path.name) else None


def _holds_images(folder: Path) -> bool:
    return any(map(is_image_name, _files_below(folder)))


def _files_below(folder: Path) -> Iterator[str]:
    """Names of the first files, hidden ones left out."""
    looked_at = 0
    for _, folders, files in os.walk(folder):
        yield from (name for name in files if not name.startswith("."))
        looked_at += len(folders) + len(files)
        if looked_at > _LOOKED_AT:
            break
