"""Names of images from untrusted files: whether a name may be resolved to a file."""

from __future__ import annotations

import re
from typing import Final

_ESCAPE: Final = re.compile(r"\\(\\|x[89a-f][0-9a-f]|x00|(?<![^/]\\)(?:x2f|x2e\.)(?=(?:~\d+)?(?:/|\Z)))?")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def unsafe_name(name: str) -> str | None:
    r"""Why a name must not be resolved to a file below its source root; None if it may be.

    Sound names are relative, stay below the root, and have `\\` for a backslash and `\x80` to `\xff` for bytes that
    are not UTF-8, as `sppfeat.images.path_to_name` writes them; and in the names of an archive's members, a part
    `\x2f` for a leading slash, parts `\x2e.` for `..`, and `\x00` for a NUL byte, as `member_to_name` writes them.
    These three are never turned back into a path.
    """
    if not name or "\0" in name:
        return "contains a NUL byte" if name else "is empty"
    if name.startswith("/"):
        return "is absolute"
    if ".." in name.split("/"):
        return "leads out of the image folder"
    if any(match[1] is None for match in _ESCAPE.finditer(name)):
        return "contains an invalid escape"
    if _SURROGATE.search(name):
        return "contains a lone surrogate"
    return None
