"""Annotated images: boxes with class names, from PASCAL VOC (XML) and COCO (JSON), checked against the images.

Boxes are windows, as `sppfeat.windows` has them. VOC counts pixels from 1; COCO's x, y, width,
height become the pixels x .. x + width - 1.
"""

from __future__ import annotations

import os
import posixpath
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from xml.parsers import expat

import msgspec
import numpy as np

from sppfeat.errors import ImageError, UsageError, one_line, unknown_name
from sppfeat.files import decode_document, unsafe_name
from sppfeat.images import EXTENSIONS, Item, find_images, name_to_path, open_image, path_to_name, upright_size, voc_root
from sppfeat.store import window_text

_MAX_XML_BYTES: Final = 1 << 24
# VOC's fullest image has 56 objects of about 10 elements; a tree of everything that fits into 16 MB takes gigabytes.
_MAX_XML_OBJECTS: Final = 10_000
_MAX_XML_ELEMENTS: Final = 300_000
_MAX_XML_DEPTH: Final = 32
# Annotation tools disagree on whether the first pixel is 0 or 1; one pixel over the border is not an error.
_SLACK: Final = 1.0


@dataclass(frozen=True)
class Annotation:
    """The objects in one image.

    boxes: [G, 4] float64 windows, inside the image. labels: [G] class names. difficult: [G] bool, ignored whether found
    or not (VOC's "difficult", COCO's crowds). crowd: [G] bool, difficult ones that hold many objects.
    areas: [G] pixels of the objects themselves, as COCO files tell; None: those of the boxes.
    size: width and height of the upright image.
    """

    boxes: np.ndarray
    labels: list[str]
    difficult: np.ndarray
    crowd: np.ndarray
    size: tuple[int, int]
    areas: np.ndarray | None = None


@dataclass
class AnnotatedImages:
    """Annotations by image name, in order; names are relative to `root`, see `sppfeat.images.path_to_name`.

    classes: the class names that occur, or that COCO lists, in order. problems: skipped images, and why.
    notes: what is skipped, changed or suspicious in images that are used, one line each.
    """

    root: str
    images: dict[str, Annotation]
    classes: list[str]
    problems: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def item(self, name: str, windows: np.ndarray | None = None) -> Item:
        """An image, with windows [K, 4] in it."""
        return Item(self.root, name, windows)

    def subset(self, names: Iterable[str]) -> AnnotatedImages:
        """Only some of the images; the classes stay."""
        return replace(self, images={name: self.images[name] for name in names}, problems={}, notes=[])

    def count_positives(self) -> dict[str, int]:
        """Objects of each class, without the difficult ones."""
        counts = dict.fromkeys(self.classes, 0)
        for one in self.images.values():
            for label, difficult in zip(one.labels, one.difficult, strict=True):
                if label in counts and not difficult:
                    counts[label] += 1
        return counts


def read_voc(root: str | os.PathLike[str], split: str) -> AnnotatedImages:
    """Read the VOC layout below `root`: ImageSets/Main/SPLIT.txt, Annotations/ID.xml, JPEGImages/ID.jpg.

    root: VOC2007, or the folder that holds it.
    Raises UsageError if the layout or the split is not found. A listed image without a file, or without a valid
    annotation, is recorded as a problem.
    """
    try:
        root = os.fspath(voc_root(root))
    except UsageError as error:
        raise UsageError(f"{error}; for another layout, pass --images and --annotations") from None
    for folder in ("JPEGImages", "Annotations"):
        if not os.path.isdir(os.path.join(root, folder)):
            raise UsageError(f"{root}: expected a VOC folder with {folder}, found none in it")
    lists = os.path.join(root, "ImageSets", "Main")
    path = os.path.join(lists, f"{split}.txt")
    if not os.path.isfile(path):
        valid = sorted(f[:-4] for f in os.listdir(lists) if f.endswith(".txt") and "_" not in f)
        raise UsageError(
            f"{path}: expected a list for split {split!r}, found none; available: {', '.join(valid) or 'none'}"
        )
    try:
        ids = [line.split()[0] for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected a list of images, found: {one_line(error)}") from None
    if not ids:
        raise UsageError(f"{path}: expected images, found an empty list")
    for one in ids:
        if unsafe_name(path_to_name(one)) is not None:
            raise UsageError(f"{path}: expected image ids, found {one!r}")
    folder = os.path.abspath(os.path.join(root, "JPEGImages"))
    files = {os.path.splitext(f)[0]: f for f in sorted(os.listdir(folder)) if _is_image(f)}
    sources = {files.get(i, f"{i}.jpg"): os.path.join(root, "Annotations", f"{i}.xml") for i in ids}
    return _read_xml(folder, {path_to_name(name): xml for name, xml in sources.items()})


def read_voc_files(images: str | os.PathLike[str], annotations: str | os.PathLike[str]) -> AnnotatedImages:
    """Read the XML files of a folder, one for each image with the same relative path and another extension.

    An annotation without an image is a problem; images without an annotation are skipped, and counted in a note.
    """
    found = find_images([images])
    stems = {posixpath.splitext(name)[0]: name for name in reversed(found.names)}
    folder = os.path.abspath(annotations)
    if not os.path.isdir(folder):
        raise UsageError(f"{os.fspath(annotations)}: expected a folder of XML files, found none")
    sources: dict[str, str] = {}
    for place, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            if file.lower().endswith(".xml"):
                path = os.path.join(place, file)
                stem = path_to_name(os.path.splitext(os.path.relpath(path, folder))[0])
                sources[stems.get(stem, f"{stem}.jpg")] = path
    if not sources:
        raise UsageError(f"{os.fspath(annotations)}: expected XML files, found none")
    if not set(sources) & set(found.names):
        raise UsageError(
            f"{os.fspath(annotations)}: its {len(sources)} XML files match none of the {len(found.names)} images in "
            f"{os.fspath(images)}"
        )
    annotated = _read_xml(found.root, dict(sorted(sources.items())))
    if bare := [name for name in found.names if name not in sources]:
        annotated.notes.append(f"images without an annotation are skipped: {len(bare)}, such as {bare[0]}")
    return annotated


def read_coco(annotations: str | os.PathLike[str], images: str | os.PathLike[str]) -> AnnotatedImages:
    """Read a COCO `instances` file; its file names are relative to the folder `images`. Crowds count as difficult."""
    path, root = os.fspath(annotations), os.path.abspath(images)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: expected a COCO JSON file, found: {one_line(error)}") from None
    if not os.path.isdir(root):
        raise UsageError(f"{os.fspath(images)}: expected the image folder, found none")
    what = f"{path}: expected a COCO file with images, annotations, categories"
    document = decode_document(content, _Coco, what=what, error=UsageError, lenient=True)
    classes = {category.id: str(category.name) for category in document.categories}
    listed = {image.id: image for image in document.images}
    names = {key: _safe_name(path, image.file_name) for key, image in listed.items()}
    entries: dict[int | str, list[dict[str, Any]]] = {key: [] for key in listed}
    strays = 0
    for entry in document.annotations:
        key = entry.get("image_id")
        if isinstance(key, int | str) and key in entries:
            entries[key].append(entry)
        else:
            strays += 1
    if len(set(classes.values())) != len(classes):
        raise UsageError(f"{path}: expected unique category names, found duplicates")
    result = AnnotatedImages(root, {}, list(classes.values()))
    if strays:
        result.notes.append(f"{strays} annotations are for images that {path} does not list, and are skipped")
    for key, name in names.items():
        raw = _Raw(_size_of({"width": listed[key].width, "height": listed[key].height}))
        for at, entry in enumerate(entries[key]):
            try:
                label = classes.get(entry["category_id"])
                x, y, width, height = (float(value) for value in entry["bbox"])
                if not np.isfinite([x, y, width, height]).all():
                    raise ValueError(f"found {entry['bbox']}")
                crowd = bool(entry.get("iscrowd", 0))
                told = entry.get("area")
                known = isinstance(told, (int, float)) and 0 <= told < float("inf")
                area = float(told) if known else width * height  # type: ignore[arg-type]
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                result.notes.append(f"{name}: annotation {at}: expected bbox and category_id: {one_line(error)}")
                continue
            if label is None:
                result.notes.append(f"{name}: annotation {at}: unknown category_id {entry['category_id']!r}; skipped")
                continue
            raw.add((x, y, x + width - 1, y + height - 1), label, difficult=crowd, crowd=crowd, area=area)
        _add(result, name, raw)
    return _checked_result(result)


def read_annotations(
    root: str | None = None, *, split: str | None = None, images: str | None = None, annotations: str | None = None
) -> AnnotatedImages:
    """Read the VOC layout at `root`, or `annotations` (a folder of XML, or a COCO file) of `images`.

    Raises UsageError for anything else, and whatever `read_voc`, `read_voc_files` and `read_coco` raise.
    """
    if root is not None and images is None and annotations is None:
        return read_voc(root, split or "trainval")
    if root is not None or images is None or annotations is None:
        raise UsageError("expected the root of a VOC layout, or both --images DIR and --annotations DIR_OR_JSON")
    if split is not None:
        raise UsageError("--split requires a VOC layout; --images and --annotations select the images themselves")
    if os.path.isdir(annotations):
        return read_voc_files(images, annotations)
    return read_coco(annotations, images)


def select_classes(annotated: AnnotatedImages, classes: Collection[str]) -> AnnotatedImages:
    """The same images with boxes of only some classes, in that order; a note names each other class. Raises UsageError
    for a duplicate or empty class name, and if none of the classes is annotated."""
    if len(set(classes)) != len(classes) or "" in classes:
        raise UsageError(f"expected unique class names, found {','.join(classes)!r}")
    if not set(classes) & set(annotated.classes):
        raise UsageError(unknown_name("class", next(iter(classes)), annotated.classes))
    others: dict[str, int] = {}
    images: dict[str, Annotation] = {}
    for name, one in annotated.images.items():
        kept = np.array([label in classes for label in one.labels], bool)
        for label in one.labels:
            if label not in classes:
                others[label] = others.get(label, 0) + 1
        images[name] = Annotation(
            one.boxes[kept],
            [label for label in one.labels if label in classes],
            one.difficult[kept],
            one.crowd[kept],
            one.size,
            None if one.areas is None else one.areas[kept],
        )
    notes = [f"class {name!r} is not selected: {count} of its boxes skipped" for name, count in sorted(others.items())]
    return replace(annotated, images=images, classes=list(classes), notes=[*annotated.notes, *notes])


class _CocoImage(msgspec.Struct):
    id: int | str
    file_name: str
    width: Any = None
    height: Any = None


class _CocoCategory(msgspec.Struct):
    id: int | str
    name: str | int | float


class _Coco(msgspec.Struct):
    """What is read of a COCO file. An invalid annotation is skipped alone, so its fields are checked later."""

    images: list[_CocoImage]
    annotations: list[dict[str, Any]]
    categories: list[_CocoCategory]


class _Raw:
    """One image's annotation as in the file. size: as the file says, or None."""

    def __init__(self, size: tuple[int, int] | None) -> None:
        self.size = size
        self.boxes: list[tuple[float, ...]] = []
        self.labels: list[str] = []
        self.difficult: list[bool] = []
        self.crowd: list[bool] = []
        self.areas: list[float | None] = []

    def add(
        self, box: tuple[float, ...], label: str, *, difficult: bool, crowd: bool = False, area: float | None = None
    ) -> None:
        self.boxes.append(box)
        self.labels.append(label)
        self.difficult.append(difficult)
        self.crowd.append(crowd)
        self.areas.append(area)


def _read_xml(root: str, sources: Mapping[str, str]) -> AnnotatedImages:
    result = AnnotatedImages(root, {}, [])
    for name, path in sources.items():
        try:
            raw = _parse_voc(path, name, result.notes)
        except UsageError as error:
            result.problems[name] = str(error)
            continue
        if not raw.boxes:
            result.notes.append(f"{name}: {os.path.basename(path)} has no valid object; the image counts as empty")
        _add(result, name, raw)
    result.classes = sorted({label for one in result.images.values() for label in one.labels})
    return _checked_result(result)


def _checked_result(result: AnnotatedImages) -> AnnotatedImages:
    if not result.images:
        name, reason = next(iter(result.problems.items()), (result.root, "no image is listed"))
        raise UsageError(f"expected annotated images, found none that is usable; the first: {name}: {reason}")
    return result


def _parse_voc(path: str, name: str, notes: list[str]) -> _Raw:
    root = parse_xml(path)
    size = root.find("size")
    raw = _Raw(_size_of({key: size.findtext(key) for key in ("width", "height")}) if size is not None else None)
    for at, entry in enumerate(root.iter("object")):
        label = (entry.findtext("name") or "").strip()
        box = entry.find("bndbox")
        try:
            edges = [float(box.findtext(key, "")) - 1 for key in ("xmin", "ymin", "xmax", "ymax")]  # type: ignore[union-attr]
            if not label or not np.isfinite(edges).all():
                raise ValueError
        except (AttributeError, ValueError):
            notes.append(f"{name}: object {at} ({label or 'unnamed'}): expected a name and a bndbox; skipped")
            continue
        raw.add(tuple(edges), label, difficult=(entry.findtext("difficult") or "0").strip() == "1")
    return raw


def parse_xml(path: str) -> ElementTree.Element:
    """The root of an XML file without a document type: entities cannot read files or expand. Raises UsageError."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_XML_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: expected an annotation, found: {error.strerror}") from None
    if len(content) > _MAX_XML_BYTES:
        raise UsageError(f"{path}: expected an annotation of at most {_MAX_XML_BYTES} bytes, found a larger one")

    def refuse(*_: object) -> None:
        raise UsageError(f"{path}: expected XML without a document type or entities, found some")

    counts = {"elements": 0, "objects": 0, "levels": 0}

    def begin(tag: str, _: object) -> None:
        counts["elements"] += 1
        counts["objects"] += tag == "object"
        counts["levels"] += 1
        for what, most in (
            ("objects", _MAX_XML_OBJECTS),
            ("elements", _MAX_XML_ELEMENTS),
            ("levels", _MAX_XML_DEPTH),
        ):
            if counts[what] > most:
                raise UsageError(f"{path}: expected an annotation with at most {most} {what}, found more")

    def end(_: str) -> None:
        counts["levels"] -= 1

    parser = expat.ParserCreate()
    parser.StartElementHandler = begin
    parser.EndElementHandler = end
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(content, True)
        root = ElementTree.fromstring(content)
    except (expat.ExpatError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise UsageError(f"{path}: expected an XML annotation, found: {one_line(error)}") from None
    if root.tag != "annotation":
        raise UsageError(f"{path}: expected an <annotation>, found <{root.tag}>")
    return root


def _add(result: AnnotatedImages, name: str, raw: _Raw) -> None:
    """Check one image's boxes against the image, and keep the valid ones."""
    try:
        image, _ = open_image(name_to_path(result.root, name))
        with image:
            size, turn = upright_size(image, orientation="exif")
    except ImageError as error:
        result.problems[name] = str(error)
        return
    if raw.size is not None and raw.size != size:
        turned = " (its EXIF rotates it)" if turn >= 5 and raw.size == size[::-1] else ""
        result.problems[name] = (
            f"annotated as {raw.size[0]} x {raw.size[1]} pixels, found {size[0]} x {size[1]}{turned}: "
            "its boxes may be for another image"
        )
        return
    boxes = np.array(raw.boxes, np.float64).reshape(-1, 4)
    clipped = np.clip(boxes, 0, [size[0] - 1, size[1] - 1] * 2)
    kept = []
    for at, (box, inside) in enumerate(zip(boxes, clipped, strict=True)):
        what = f"{name}: box {at} ({raw.labels[at]}) {window_text(box)}"
        # Both ends are inclusive: a box of one pixel ends where it begins; one that ends a pixel earlier is empty.
        if (pixels := box[2:] - box[:2] + 1).min() < 1:
            result.notes.append(f"{what}: {'inverted' if pixels.min() < 0 else 'empty'}; skipped")
        elif (box[2:] < 0).any() or (box[:2] > np.array(size) - 1).any():
            result.notes.append(f"{what}: outside the image of {size[0]} x {size[1]}; skipped")
        else:
            if np.abs(box - inside).max() > _SLACK:
                result.notes.append(f"{what}: extends beyond the image of {size[0]} x {size[1]}; clipped")
            kept.append(at)
    result.images[name] = Annotation(
        clipped[kept],
        [raw.labels[at] for at in kept],
        np.array([raw.difficult[at] for at in kept], bool),
        np.array([raw.crowd[at] for at in kept], bool),
        size,
        None if None in raw.areas else np.array([raw.areas[at] for at in kept], np.float64),
    )


def _size_of(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    """The size that an annotation gives; None if it gives none (some tools write 0)."""
    try:
        width, height = int(float(entry["width"])), int(float(entry["height"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return (width, height) if width > 0 and height > 0 else None


def _safe_name(path: str, name: Any) -> str:
    if not isinstance(name, str) or not name or unsafe_name(path_to_name(name)) is not None:
        raise UsageError(f"{path}: expected file names relative to the images, found {name!r}")
    return path_to_name(posixpath.normpath(name))


def _is_image(file: str) -> bool:
    return os.path.splitext(file)[1].lower() in EXTENSIONS
