"""Row names that come from a file: which of them may be followed to an image."""

from __future__ import annotations

import re


def unsafe_name(name: str) -> str | None:
    """Why a name from a file of unknown origin must not be followed below its root; None where it may.

    Names are relative POSIX paths as `sppfeat.images.path_to_name` writes them, and stay below their root.
    """
    if name.startswith("/"):
        return "is absolute"
    if ".." in name.split("/"):
        return "contains '..'"
    if "\0" in name:
        return "contains a NUL"
    # Only a backslash and a byte that is not UTF-8 are ever escaped; others could spell `..` past the check above.
    if "\\" in re.sub(r"\\\\|\\x[89a-f][0-9a-f]", "", name):
        return "contains an escape that stands for no byte of a file name"
    return None
