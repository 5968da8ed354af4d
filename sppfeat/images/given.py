"""Paths as a user gave them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from sppfeat.images.urls import absolute, is_url


def as_given(path: str, sources: Sequence[str | os.PathLike[str]]) -> str:
    """The path of a listed image as its source was given: `photos/a.jpg` of `photos/`, whatever the current folder is.

    Paths from lists are relative to the current folder if they are below it.
    """
    if is_url(path):
        return path
    best = ("", "")
    for source in [os.fspath(source) for source in sources]:
        place = absolute(source)
        if path == place:
            return source
        if path.startswith(place.rstrip("/") + "/") and len(place) > len(best[0]) and os.path.lexists(source):
            best = (place, source)
    place, source = best
    if place:
        return os.path.join(source, path[len(place.rstrip("/")) + 1 :])
    here = os.getcwd().rstrip("/") + "/"
    return path.removeprefix(here)
