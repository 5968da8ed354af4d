"""Labels of a store's images: their class or classes, and which are for training and which for testing.

From folders, from a CSV file, or from a PASCAL VOC folder.
"""

from __future__ import annotations

import csv
import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from sppfeat.errors import UsageError, near_path, one_line
from sppfeat.files import os_reason
from sppfeat.images import voc_root

# The parts that a split may name. Later ones are tested where the earlier ones have no images.
TEST_PARTS: Final = ("test", "val", "valid", "validation")
PARTS: Final = ("train", *TEST_PARTS)
_VOC_LINE: Final = re.compile(r"(\S+)\s+(-1|0|1)\s*")


@dataclass(frozen=True)
class Labels:
    """The class of each name, and its part (one of `PARTS`) where a split is known."""

    classes: dict[str, str]
    splits: dict[str, str]


def labels_from_folders(names: Sequence[str]) -> Labels:
    """Labels from names: the folder that holds an image; the split from the first folder, if that names a part."""
    classes = {name: posixpath.basename(posixpath.dirname(name)) for name in names if "/" in name}
    splits = {name: part for name in names if (part := name.split("/")[0]) in PARTS}
    return Labels(classes, splits)


def read_labels(path: str | os.PathLike[str]) -> Labels:
    """Read a CSV file with the columns name,label and, optionally, split (one of PARTS). Raises UsageError."""
    classes: dict[str, str] = {}
    splits: dict[str, str] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not {"name", "label"} <= set(rows.fieldnames or ()):
                found = ",".join(rows.fieldnames or ()) or "nothing"
                raise UsageError(f"{path}: expected the columns name,label[,split], found {found}")
            for row in rows:
                name, label, split = row["name"], row["label"], row.get("split") or ""
                if not name or not label or name in classes:
                    fault = "a duplicate name" if name in classes else "an empty name or label"
                    raise UsageError(f"{path}, line {rows.line_num}: found {fault} ({name!r})")
                if split and split not in PARTS:
                    raise UsageError(
                        f"{path}, line {rows.line_num}: expected split {', '.join(PARTS)} or none, found {split!r}"
                    )
                classes[name] = label
                splits |= {name: split} if split else {}
    except FileNotFoundError:
        raise UsageError(
            f"{path}: expected a CSV file with the columns name,label[,split], found no such file{near_path(path)}"
        ) from None
    except OSError as error:
        raise UsageError(f"{path}: could not be read: {os_reason(error)}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: expected a CSV file in UTF-8, found: {one_line(error)}") from None
    return Labels(classes, splits)


@dataclass(frozen=True)
class VocLabels:
    """The classification task of a PASCAL VOC folder.

    classes: in rising order. targets: by image id, [K] int8: +1 the class is present, -1 it is not, 0 only as
    "difficult" objects, which are ignored. splits: `train` or `test` by image id.
    """

    classes: list[str]
    targets: dict[str, np.ndarray]
    splits: dict[str, str]


def read_voc_labels(folder: str | os.PathLike[str], *, train: str = "trainval", test: str = "test") -> VocLabels:
    """Read `ImageSets/Main/CLASS_SPLIT.txt`, whose lines are an image id and -1, 0 or 1, for two splits.

    folder: VOC2007, or the folder that holds it. Raises UsageError, naming the file and what is wrong with it.
    """
    lists = voc_root(folder) / "ImageSets" / "Main"
    parts = {"train": train, "test": test}
    found = {
        part: sorted(path.name.removesuffix(f"_{split}.txt") for path in lists.glob(f"*_{split}.txt"))
        for part, split in parts.items()
    }
    for part, split in parts.items():
        if not found[part]:
            raise UsageError(f"{lists}: expected lists CLASS_{split}.txt, found none")
    if lacking := set(found["train"]) ^ set(found["test"]):
        name = min(lacking)
        absent = parts["test" if name in found["train"] else "train"]
        raise UsageError(f"{lists}: expected {name}_{absent}.txt beside its other list, found none")
    classes = found["train"]
    targets: dict[str, np.ndarray] = {}
    splits: dict[str, str] = {}
    for part, split in parts.items():
        ids: list[str] | None = None
        columns = []
        for name in classes:
            path = lists / f"{name}_{split}.txt"
            listed = _read_voc_list(path)
            if ids is not None and listed.keys() != set(ids):
                other = min(listed.keys() ^ set(ids))
                raise UsageError(
                    f"{path}: expected the images of {classes[0]}_{split}.txt, found {other!r} in only one of them"
                )
            ids = ids or list(listed)
            columns.append([listed[one] for one in ids])
        for one, row in zip(ids or (), np.array(columns, np.int8).T, strict=True):
            if one in splits:
                raise UsageError(f"{lists}: image {one!r} is in both {train} and {test}")
            targets[one], splits[one] = row, part
    return VocLabels(classes, targets, splits)


def _read_voc_list(path: Path) -> dict[str, int]:
    listed: dict[str, int] = {}
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise UsageError(f"{path}: could not be read: {os_reason(error)}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: expected a text file in UTF-8, found: {error}") from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        match = _VOC_LINE.fullmatch(line.strip())
        if match is None:
            raise UsageError(f"{path}, line {number}: expected an image id and -1, 0 or 1, found {line!r}")
        if match[1] in listed:
            raise UsageError(f"{path}, line {number}: duplicate image {match[1]!r}")
        listed[match[1]] = int(match[2])
    if not listed:
        raise UsageError(f"{path}: expected one image per line, found none")
    return listed
