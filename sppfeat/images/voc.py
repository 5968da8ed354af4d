"""Where a PASCAL VOC data set is: the folder itself, or one that holds it, as its archives unpack."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from sppfeat.errors import UsageError

_LISTS: Final = Path("ImageSets", "Main")


def find_voc(folder: str | os.PathLike[str]) -> Path | None:
    """The folder with ImageSets/Main: the given one, or the one VOCyear in it or in its VOCdevkit; None: no such one.

    Raises UsageError for several years, of which one must be given.
    """
    root = Path(folder)
    if (root / _LISTS).is_dir():
        return root
    found = sorted(lists.parents[1] for at in (root, root / "VOCdevkit") for lists in at.glob("VOC*/ImageSets/Main"))
    if len(found) > 1:
        years = ", ".join(one.name for one in found)
        raise UsageError(f"{root}: expected one VOC folder in it, found {years}: give one")
    return found[0] if found else None


def voc_root(folder: str | os.PathLike[str]) -> Path:
    """The folder of a VOC data set, see `find_voc`. Raises UsageError, with what is expected, if there is none."""
    found = find_voc(folder)
    if found is None:
        what = "no such folder" if not Path(folder).is_dir() else f"no {_LISTS} in it"
        raise UsageError(
            f"{folder}: expected a VOC folder such as VOC2007, with {_LISTS}, JPEGImages and Annotations, or the "
            f"folder that holds it, found {what}"
        )
    return found
