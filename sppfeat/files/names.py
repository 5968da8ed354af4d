"""Names of images from untrusted files: whether a name may be resolved to a file."""

from __future__ import annotations

import re
from typing import Final

_ESCAPE: Final = re.compile(r"\\(\\|x[89a-f][0-9a-f])?")


def unsafe_name(name: str) -> str | None:
    r"""Why a name must not be resolved to a file below its source root; None if it may be.

    Sound names are relative, stay below the root, and have `\\` for a backslash and `\x80` to `\xff` for bytes that
    are not UTF-8, as `sppfeat.images.path_to_name` writes them.
    """
    if not name or "\0" in name:
        return "contains a NUL byte" if name else "is empty"
    if name.startswith("/"):
        return "is absolute"
    if ".." in name.split("/"):
        return "leads out of the image folder"
    if any(match[1] is None for match in _ESCAPE.finditer(name)):
        return "contains an invalid escape"
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        return "contains a lone surrogate"
    return None
