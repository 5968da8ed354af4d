"""Walking a folder for images: in name order, links followed, nothing that looks like an image passed over."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from sppfeat.images.items import Fingerprint, count_unread, is_image_name, reason_not_readable


class Found(NamedTuple):
    """Something that a source names: an image, an archive, or what has a problem. place: absolute path, or URL."""

    place: str
    problem: str | None = None
    fingerprint: Fingerprint | None = None


def walk(top: str, unread: Counter[str]) -> Iterator[Found]:
    """What a folder contains, and the folders below it, in name order. unread: see `count_unread`."""
    # A stack instead of recursion: depth is bounded by the file system, not by Python. Each folder carries the
    # identities of those above it, to detect symlinks that loop back to one of them.
    stack: list[tuple[str, Iterator[tuple[str, bool]], frozenset[tuple[int, int]]]]
    stack = [(top, iter([("", False)]), frozenset())]
    while stack:
        folder, entries, above = stack[-1]
        name, is_file = next(entries, (None, False))
        if name is None:
            stack.pop()
            continue
        path = os.path.join(folder, name) if name else folder
        if is_file:
            yield Found(path)
            continue
        is_image = bool(name) and is_image_name(name)
        try:
            info = os.stat(path)
        except OSError as error:
            # What stat cannot read may be a folder of images. A dangling symlink is not.
            if is_image or error.errno != errno.ENOENT:
                yield Found(path, reason_not_readable(path, error))
            continue
        if not stat.S_ISDIR(info.st_mode):
            if is_image:
                yield Found(path)
            continue
        reason = "is a folder, not an image" if is_image else None
        identity = (info.st_dev, info.st_ino)
        inside: list[tuple[str, bool]] = []
        if identity in above:
            reason = "symlink loops back to a folder that contains it"
        else:
            try:
                inside = _entries(path, unread)
            except OSError as error:
                reason = reason_not_readable(path, error)
        if reason is not None:
            yield Found(path, reason)
        stack.append((path, iter(inside), above | {identity}))


def _entries(folder: str, unread: Counter[str]) -> list[tuple[str, bool]]:
    """A folder's images, links and folders in name order, and whether each is certainly a regular file."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                is_file = entry.is_file(follow_symlinks=False)
            except OSError:  # the walk looks again, and says why
                is_file = False
            if not is_file or is_image_name(entry.name):
                found.append((entry.name, is_file))
            else:
                count_unread(entry.name, unread)
    return sorted(found, key=lambda entry: os.fsencode(entry[0]))
