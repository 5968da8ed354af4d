"""Names of images that come from files of unknown origin: which of them may be followed to a file."""

from __future__ import annotations

import re
from typing import Final

_ESCAPE: Final = re.compile(r"\\(\\|x[89a-f][0-9a-f])?")


def unsafe_name(name: str) -> str | None:
    r"""Why a name may not be followed to a file below its source root; None for one that may.

    Sound names are relative, stay below the root, and have `\\` for a backslash and `\x80` to `\xff` for bytes that
    are not UTF-8, as `sppfeat.images.reading.path_to_name` writes them.
    """
    if not name or "\0" in name:
        return "holds a zero byte" if name else "is empty"
    if name.startswith("/"):
        return "is absolute"
    if ".." in name.split("/"):
        return "leads out of the folder of the images"
    if any(match[1] is None for match in _ESCAPE.finditer(name)):
        return "holds an escape that stands for no byte outside UTF-8"
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        return "holds a lone surrogate"
    return None
