"""Retrieval ground truth: which images of a gallery are relevant to which queries, and which are ignored.

Read from JSON, including that of revisited Oxford and Paris, from the text files of Oxford5k and Paris6k, or from
boxes that say where queries are.
"""

from __future__ import annotations

import csv
import io
import math
import os
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Generic, TypeVar

import msgspec

from sppfeat.errors import UsageError, one_line, unknown_name
from sppfeat.files import decode_document
from sppfeat.images import EXTENSIONS
from sppfeat.store import Box, window_text
from sppfeat.windows import COLUMNS

DIFFICULTIES: Final = ("easy", "medium", "hard")
BOX_COLUMNS: Final = ("query", "name", *COLUMNS[1:])
T = TypeVar("T", str, int)
# The prefix that Oxford5k gives only to the names of its query images.
_OXFORD_PREFIX: Final = "oxc1_"


@dataclass(frozen=True)
class JudgedQuery:
    """A query: its image, the gallery names that are relevant to it, and those that are ignored.

    window: the part of the image to search with, see `sppfeat.windows`; None: the whole image.
    boxes: where the query is in relevant images, in their pixels, if that is known.
    """

    image: str
    relevant: frozenset[str]
    junk: frozenset[str]
    window: Box | None = None
    boxes: Mapping[str, Box] = field(default_factory=dict)


@dataclass(frozen=True)
class GroundTruth:
    """Queries, and how they are evaluated.

    own_counts: the query's own image counts as the lists say, as in the original protocol of Oxford5k; else it is
    excluded. outside: images excluded from all rankings. revisited: also report the mean precision at 1, 5 and 10.
    """

    queries: list[JudgedQuery]
    own_counts: bool = False
    outside: frozenset[str] = frozenset()
    revisited: bool = False

    @property
    def boxed(self) -> bool:
        """Whether it says where queries are."""
        return any(query.boxes for query in self.queries)


class _Lists(msgspec.Struct, Generic[T], forbid_unknown_fields=True):
    relevant: list[T] | None = None
    ok: list[T] | None = None
    easy: list[T] | None = None
    hard: list[T] | None = None
    junk: list[T] = []
    bbx: tuple[float, float, float, float] | None = None


class _Places(msgspec.Struct):
    imlist: list[str]
    qimlist: list[str]
    gnd: list[_Lists[int]]


def read_ground_truth(path: str | os.PathLike[str], *, difficulty: str = "medium") -> GroundTruth:
    """Read ground truth from JSON: a query's name -> {"relevant": [names], "junk": [names]}; junk is optional.

    Or, as in revisited Oxford and Paris, -> {"easy": [names], "hard": [names], "junk": [names]}. There, `difficulty`
    says what is relevant: `easy` treats the hard ones as junk, `medium` uses both, `hard` treats the easy ones as junk
    (Radenovic, Iscen, Tolias, Avrithis, Chum 2018, "Revisiting Oxford and Paris", 3.3). Their own layout, lists
    `imlist`, `qimlist` and `gnd` with indices into `imlist`, is also read, and so is that of the original protocol,
    with lists `ok` and `junk`. `bbx`, the part of the query's image to search with, is x1, y1, x2, y2 in pixels with
    x2 and y2 exclusive, and is rounded to whole pixels, as their code crops.

    A folder is read as that of Oxford5k: QUERY_query.txt with an image and its box, and lists QUERY_good.txt,
    QUERY_ok.txt (both relevant) and QUERY_junk.txt. Raises UsageError.
    """
    if difficulty not in DIFFICULTIES:
        raise UsageError(unknown_name("difficulty", difficulty, DIFFICULTIES))
    if os.path.isdir(path):
        return _read_oxford(Path(path))
    try:
        content = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UsageError(f"{path}: expected ground truth in JSON, found: {one_line(error)}") from None
    what = f"{path}: expected ground truth in JSON, query -> relevant and junk"
    outside: frozenset[str] = frozenset()
    listed = decode_document(content, dict[str, msgspec.Raw], what=what, error=UsageError)
    if {"imlist", "qimlist", "gnd"} <= listed.keys():
        places = decode_document(content, _Places, what=what, error=UsageError)
        if len(places.qimlist) != len(places.gnd):
            raise UsageError(
                f"{path}: expected one query in qimlist per entry of gnd, found {len(places.qimlist)} and "
                f"{len(places.gnd)}"
            )
        queries = [
            (name, _named(path, name, one, places.imlist)) for name, one in zip(places.qimlist, places.gnd, strict=True)
        ]
        # Queries are not in the gallery unless they are listed there; a store of all images holds them.
        outside = frozenset(places.qimlist) - frozenset(places.imlist)
    else:
        queries = list(decode_document(content, dict[str, _Lists[str]], what=what, error=UsageError).items())
    if not queries:
        raise UsageError(f"{what}, found no query")
    kinds = {_kind(path, name, lists) for name, lists in queries}
    if len(kinds) > 1:
        raise UsageError(
            f"{path}: expected the same kind of lists for all queries, found {' and '.join(sorted(kinds))}"
        )
    return GroundTruth(
        [_judged(path, name, lists, difficulty) for name, lists in queries],
        own_counts=kinds == {"ok"},
        outside=outside,
        revisited=kinds == {"easy, hard"},
    )


def read_boxes(path: str | os.PathLike[str]) -> GroundTruth:
    """Read where queries are from CSV: query,name,x1,y1,x2,y2, in pixels of the gallery's image, inclusive ends.

    The images named are those relevant to the query. Raises UsageError.
    """
    found: dict[str, dict[str, Box]] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if not set(BOX_COLUMNS) <= set(rows.fieldnames or ()):
                columns = ",".join(rows.fieldnames or ()) or "nothing"
                raise UsageError(f"{path}: expected the columns {','.join(BOX_COLUMNS)}, found {columns}")
            for row in rows:
                query, name, *edges = (row[column] for column in BOX_COLUMNS)
                box = _edges(edges)
                if box is None:
                    raise UsageError(
                        f"{path}, line {rows.line_num}: {query!r}: expected x1,y1,x2,y2 in pixels with x1 <= x2 and "
                        f"y1 <= y2, found {','.join(map(str, edges))[:100]}"
                    )
                if name in found.setdefault(query, {}):
                    raise UsageError(
                        f"{path}, line {rows.line_num}: {query!r}: expected one box in {name!r}, found two"
                    )
                found[query][name] = box
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: expected boxes in CSV, found: {one_line(error)}") from None
    if not found:
        raise UsageError(f"{path}: expected boxes, found none")
    return GroundTruth(
        [JudgedQuery(query, frozenset(boxes), frozenset(), boxes=boxes) for query, boxes in found.items()]
    )


def _edges(texts: list[str | None]) -> Box | None:
    try:
        x1, y1, x2, y2 = (float(text or "") for text in texts)
    except ValueError:
        return None
    good = all(map(math.isfinite, (x1, y1, x2, y2))) and 0 <= x1 <= x2 and 0 <= y1 <= y2
    return (x1, y1, x2, y2) if good else None


def write_query_windows(truth: GroundTruth, path: str | os.PathLike[str]) -> int:
    """Write the windows of all queries as a CSV file for `extract --windows`; returns how many.

    A name without an extension gets `.jpg`, which all images of Oxford and Paris have. Raises UsageError for a file
    that exists or cannot be written, and for ground truth in which a query has no window.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for query in truth.queries:
        if query.window is None:
            raise UsageError(f"query {query.image!r}: expected a box in the ground truth, found none")
        known = posixpath.splitext(query.image)[1].lower() in EXTENSIONS
        rows.writerow([query.image if known else f"{query.image}.jpg", *window_text(query.window).split(",")])
    try:
        with open(path, "x", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None
    return len(truth.queries)


def _named(path: str | os.PathLike[str], query: str, lists: _Lists[int], images: list[str]) -> _Lists[str]:
    """Lists of indices as lists of names."""

    def names(places: list[int] | None) -> list[str] | None:
        if places is None:
            return None
        if wrong := [at for at in places if not 0 <= at < len(images)]:
            raise UsageError(f"{path}: query {query!r}: expected indices below {len(images)}, found {wrong[0]}")
        return [images[at] for at in places]

    return _Lists(
        names(lists.relevant),
        names(lists.ok),
        names(lists.easy),
        names(lists.hard),
        names(lists.junk) or [],
        lists.bbx,
    )


def _kind(path: str | os.PathLike[str], query: str, lists: _Lists[str]) -> str:
    found = tuple(kind for kind in ("relevant", "ok", "easy", "hard") if getattr(lists, kind) is not None)
    if found not in (("relevant",), ("ok",), ("easy", "hard")):
        raise UsageError(
            f"{path}: query {query!r}: expected lists relevant and junk, or easy, hard and junk, found "
            f"{', '.join(found) or 'none of them'}"
        )
    return ", ".join(found)


def _judged(path: str | os.PathLike[str], query: str, lists: _Lists[str], difficulty: str) -> JudgedQuery:
    easy, hard, junk = (frozenset(names or ()) for names in (lists.easy, lists.hard, lists.junk))
    relevant = frozenset(lists.relevant or lists.ok or ())
    if lists.easy is not None:
        relevant = {"easy": easy, "medium": easy | hard, "hard": hard}[difficulty]
        junk |= {"easy": hard, "medium": frozenset(), "hard": easy}[difficulty]
    return _checked(JudgedQuery(query, relevant, junk, _window(path, query, lists.bbx)), path)


def _checked(query: JudgedQuery, path: str | os.PathLike[str]) -> JudgedQuery:
    if both := query.relevant & query.junk:
        raise UsageError(f"{path}: query {query.image!r}: {min(both)!r} is both relevant and junk")
    return query


def _window(path: str | os.PathLike[str], query: str, box: Box | None) -> Box | None:
    """The pixels that cropping to a box keeps, both ends inclusive."""
    if box is None:
        return None
    if all(map(math.isfinite, box)):
        x1, y1, x2, y2 = (max(round(edge), 0) for edge in box)
        if x1 < x2 and y1 < y2:
            return x1, y1, x2 - 1, y2 - 1
    raise UsageError(f"{path}: query {query!r}: expected a box x1, y1, x2, y2 in pixels, found {window_text(box)}")


def _read_oxford(folder: Path) -> GroundTruth:
    files = sorted(folder.glob("*_query.txt"))
    if not files:
        raise UsageError(f"{folder}: expected ground truth, files such as NAME_query.txt, found none")
    queries = []
    for file in files:
        lines = _lines(file)
        try:
            (line,) = lines
            image, *edges = line.split()
            x1, y1, x2, y2 = map(float, edges)
        except ValueError:
            raise UsageError(f"{file}: expected one line, an image and x1 y1 x2 y2, found {lines[:2]}") from None
        image = image.removeprefix(_OXFORD_PREFIX)
        lists: Mapping[str, frozenset[str]] = {
            kind: frozenset(_lines(folder / f"{file.name.removesuffix('_query.txt')}_{kind}.txt"))
            for kind in ("good", "ok", "junk")
        }
        window = _window(file, image, (x1, y1, x2, y2))
        queries.append(_checked(JudgedQuery(image, lists["good"] | lists["ok"], lists["junk"], window), file))
    return GroundTruth(queries, own_counts=True)


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected a list of images, found: {one_line(error)}") from None
