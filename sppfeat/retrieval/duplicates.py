"""Near-duplicates: groups of images whose descriptors are almost equal, every two of them, and which of them to keep.

Pairs are found exactly, also among millions of images: see `near_rows`. Groups are those of complete linkage: see
`linkage`.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np

from sppfeat.errors import ReportError, UsageError, near_fraction
from sppfeat.files import appearing, check_new_file
from sppfeat.images import is_url, path_to_name
from sppfeat.recipe import Recipe
from sppfeat.retrieval.crops import Crops, by_whole
from sppfeat.retrieval.keeping import KEEP, Files, Keeping, check_keeping, different_files, plan_keeping
from sppfeat.retrieval.linkage import link_rows
from sppfeat.retrieval.members import Member, member_of
from sppfeat.retrieval.near_rows import equal_rows, near_components
from sppfeat.retrieval.same_images import SameImages
from sppfeat.store import Store, UnitRows, block_rows, unit_rows

# Of images that cannot be read to be compared.
DEFAULT_THRESHOLD: Final = 0.95
# From here on images are compared: as low as the number of pairs allows, since small copies of low quality are not
# nearer. Of 2,020 images of Caltech-101, 1 pair in 1,000 reaches 0.7, 1 in 9,000 reaches 0.8
# (benchmarks/results/duplicates.md).
COMPARED_FROM: Final = 0.7
COMPARED_FROM_OF_MANY: Final = 0.8
FEW_IMAGES: Final = 20_000
# Images linked through others of which all pairs are compared; of more, those that link them.
COMPARED_ROWS: Final = 512
CSV_COLUMNS: Final = ("group", "action", "name", "path", "score", "width", "height", "bytes")


@dataclass(frozen=True)
class Duplicates:
    """Groups of two or more, the largest first; every pair in a group reaches the threshold.

    compared: whether the images were compared; then a group is of copies, and the threshold is that of candidates.
    The first of a group is the one to keep; see `Keeping`. images: the number compared. pairs: those that reach the
    threshold, in one group or not. root: the folder that names are relative to. recipe, weights_sha256: of the
    descriptors compared. unreadable: images that could not be read to tell which is the sharpest, and why. notes: for
    the user. not_compared: images that could not be read to be compared, or changed since they were described, and
    why. left_out: images that are in no group whatever they show: those that changed, and further paths of a file.
    """

    store: str
    root: str
    recipe: Recipe
    weights_sha256: str
    threshold: float
    keep: str
    images: int
    pairs: int
    groups: list[list[Member]]
    compared: bool = False
    unreadable: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    not_compared: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def spare(self) -> int:
        """Images that are not the first of their group."""
        return sum(len(group) - 1 for group in self.groups)


def find_duplicates(
    store: Store,
    threshold: float | None = None,
    *,
    keep: str = KEEP[0],
    root: str | os.PathLike[str] | None = None,
    progress: Callable[[float], None] = lambda part: None,
) -> Duplicates:
    """Find all pairs of a finished store's described rows that are near each other, and groups of such rows.

    threshold: cosine similarity, above 0 and at most 1, which pairs reach. None: pairs are copies of one image, of
    another size, quality or color: every two of a group are, and they are linked by pairs that reach COMPARED_FROM, or
    of more than FEW_IMAGES COMPARED_FROM_OF_MANY. Their images are read for this, see `same_images`; of those that
    cannot be, pairs reach DEFAULT_THRESHOLD.
    keep: one of KEEP, see `Keeping`; for `sharpest`, the images of groups are read. root: the folder that names are
    relative to now; None: the store's. progress: called with the fraction
    of the work done, 0 to 1.
    Raises UsageError, StoreError.
    """
    if threshold is not None and not 0 < threshold <= 1:
        raise UsageError(
            "threshold must be above 0 and at most 1, a cosine similarity, found "
            f"{threshold:g}{near_fraction(threshold)}"
        )
    check_keeping(store, keep)
    if root is not None:
        store = replace(store, source_root=os.fspath(root))
    files = different_files(unit_rows(store), copied=root is not None)
    rows = files.rows
    same = SameImages(rows, DEFAULT_THRESHOLD) if threshold is None else None
    if threshold is None:
        threshold = COMPARED_FROM if len(rows) <= FEW_IMAGES else COMPARED_FROM_OF_MANY
    found, pairs, notes = _groups(rows, threshold, same, lambda part: progress(0.9 * part))
    not_compared = {} if same is None else dict(same.unreadable)
    not_compared |= dict.fromkeys(files.changed, "changed since it was described")
    notes += _of_files(files)
    if not_compared and not is_url(store.source_root) and not os.path.isdir(store.source_root):
        notes.append(
            f"the folder of its images, {store.source_root}, is not there; if it was moved, "
            f"`sppfeat extract FOLDER -o {store.place}` takes the new one"
        )
    if same is not None and (count := len(same.unreadable)):
        name, reason = next(iter(same.unreadable.items()))
        notes.append(
            f"{count} {'images' if count > 1 else 'image'} could not be read, and must have a cosine similarity of "
            f"{DEFAULT_THRESHOLD:g} with others to be duplicates, such as {name}: {reason}"
        )
    keeping = plan_keeping(rows, found, keep)
    groups = [_members(rows, keeping, members) for members in found]
    groups.sort(key=lambda group: (-len(group), group[0].name))
    progress(1.0)
    if keeping.unreadable:
        name, reason = next(iter(keeping.unreadable.items()))
        count = len(keeping.unreadable)
        said = f"{count} images could not be read and come" if count > 1 else "1 image could not be read and comes"
        notes.append(f"{said} last, such as {name}: {reason}")
    return Duplicates(
        store.place,
        store.source_root,
        store.recipe,
        store.weights_sha256,
        threshold,
        keep,
        len(rows),
        pairs,
        groups,
        same is not None,
        keeping.unreadable,
        notes,
        not_compared,
        [*files.changed, *files.links],
    )


def _of_files(files: Files) -> list[str]:
    """What was left out, since it must not be kept or removed for another."""
    found, told = [], []
    if files.lost:
        told.append(f"{files.lost} {'image' if files.lost == 1 else 'images'} whose file is gone")
    if files.changed:
        since = "changed since it was described" if len(files.changed) == 1 else "changed since they were described"
        told.append(f"{len(files.changed)} {since} ({files.changed[0]}{', ...' * (len(files.changed) > 1)})")
    if told:
        then = "`sppfeat extract --prune` brings the store up to date"
        found.append(f"left out of the groups: {', '.join(told)}; {then}")
    if files.links:
        found.append(f"paths left out, since they lead to files that other paths name: {len(files.links)}")
    return found


def _groups(
    rows: UnitRows, threshold: float, same: SameImages | None, progress: Callable[[float], None]
) -> tuple[list[np.ndarray], int, list[str]]:
    """Ascending positions of each group, the number of pairs, and notes."""
    # Equal rows are nearest each other, and as near to any other: one of them stands for all.
    first = equal_rows(rows)
    copies = np.bincount(first, minlength=len(rows))
    groups: list[np.ndarray] = []
    notes = []
    pairs = int((copies * (copies - 1) // 2).sum())
    for component in near_components(rows, np.flatnonzero(copies), threshold, progress, same):
        if len(component) == 2:
            groups.append(component)
            pairs += int(copies[component].prod())
            continue
        fully = same if len(component) <= COMPARED_ROWS else None
        linked = link_rows(rows, component, copies[component], threshold, fully)
        groups += linked.groups
        pairs += linked.pairs
        if not linked.exact:
            notes.append(
                f"{len(component)} different images are linked through others, too many for complete linkage: each "
                "joined the first group with which it reaches the threshold throughout"
            )
    alone = copies > 1
    for group in groups:
        alone[group] = False
    by_first = np.argsort(first, kind="stable")
    ends = np.cumsum(copies)
    whole = [
        np.sort(np.concatenate([by_first[ends[at] - copies[at] : ends[at]] for at in group.tolist()]))
        for group in [*groups, *np.flatnonzero(alone)[:, None]]
    ]
    return whole, pairs, notes


def _members(rows: UnitRows, keeping: Keeping, which: np.ndarray) -> list[Member]:
    which = keeping.order(rows, which)
    first = rows.take(which[:1])[0]
    size = block_rows(rows.dim)
    scores = np.concatenate([rows.take(which[at : at + size]) @ first for at in range(0, len(which), size)])
    return [member_of(rows, int(at), float(score)) for at, score in zip(which, scores, strict=True)]


def check_duplicates_csv(path: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The path, if `write_duplicates_csv` may write there; call this before the work. Raises ReportError."""
    start = ",".join(CSV_COLUMNS).encode()

    def other(existing: Path) -> str | None:
        with open(existing, "rb") as file:
            return None if file.read(len(start)) == start else "another file"

    return check_new_file(path, overwrite=overwrite, error=ReportError, kind="a CSV file of duplicates", other=other)


def write_duplicates_csv(path: Path, found: Duplicates, crops: Crops | None = None) -> None:
    r"""Write a CSV file in UTF-8, a line for each image of each group, the one to keep first. Raises ReportError.

    Columns: group, from 1; action, `keep` or `remove`; name; path, empty if the file is missing; score, its cosine
    similarity with the image kept; width, height, in pixels; bytes. Names and paths are written as stores write names:
    `\\` for a backslash, and `\xNN` for a byte that is not UTF-8.
    Crops follow, a group for each whole: it is the one to keep, and the action of the others is `part`, their score
    that of the crop. An image may be in several groups then.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(CSV_COLUMNS)
    groups = [
        [("remove" if place else "keep", one, one.score) for place, one in enumerate(group)] for group in found.groups
    ]
    groups += [
        [("keep", whole, 1.0), *(("part", crop.part, crop.score) for crop in parts)]
        for whole, parts in by_whole(crops.found if crops is not None else [])
    ]
    for number, group in enumerate(groups, 1):
        for action, one, score in group:
            where = "" if one.path is None else path_to_name(one.path)
            table.writerow([number, action, one.name, where, f"{score:.6f}", *one.size, one.file_size])
    with appearing(path, ReportError) as partial:
        # A name of unknown origin may hold characters that cannot be encoded.
        partial.write_text(text.getvalue(), "utf-8", errors="backslashreplace", newline="")
