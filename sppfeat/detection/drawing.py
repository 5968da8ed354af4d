"""Detections drawn on images."""

from __future__ import annotations

import colorsys
import contextlib
import errno
import functools
import io
import math
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from sppfeat.detection.detecting import Detections
from sppfeat.errors import ImageError, ReportError, one_line
from sppfeat.files import check_can_write, os_reason
from sppfeat.images import ImageList, Item, name_to_path, read_image

# More labels than any image has room for; those with the best scores are placed without overlap.
_LABELS_APART: Final = 500
# Characters of a class name: no image is wide enough for more.
_NAME_CHARACTERS: Final = 80
# Bytes of a file name on Linux file systems (NAME_MAX).
_NAME_BYTES: Final = 255
# The comment that marks a drawing, unlike an image that must not be replaced.
_MARK: Final = b"drawn by sppfeat detect"
# Pillow's own font has ASCII and little more. These are widespread, and Pillow searches for them.
_SYSTEM_FONTS: Final = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "arial.ttf", "malgun.ttf")
_NO_CHARACTER: Final = "\U0010ffff"  # not a character, so every font draws its missing-glyph box
# Turning by the golden angle keeps the colors of adjacent classes apart, whatever their number.
_FIRST_HUE, _HUE_STEP = 0.03, 0.381966
# Relative luminance (WCAG 2) of all colors: 4.6 to 1 against white text and light pages, 3.4 against dark ones.
_LUMINANCE: Final = 0.178
_WEAK_OPACITY: Final = 0.5


@functools.lru_cache(maxsize=4096)
def class_color(label: int) -> tuple[int, int, int]:
    """A distinct color per class, always the same: strong, dark enough for white text, and seen on dark pages."""
    hue, low, high = (_FIRST_HUE + label * _HUE_STEP) % 1, 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        if _luminance(colorsys.hls_to_rgb(hue, middle, 0.85)) < _LUMINANCE:
            low = middle
        else:
            high = middle
    red, green, blue = colorsys.hls_to_rgb(hue, low, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


def _luminance(color: tuple[float, float, float]) -> float:
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def draw_detections(
    image: Image.Image, found: Detections, classes: Sequence[str], *, weak: float | None = None
) -> Image.Image:
    """A copy of the image with boxes and labels, sized to be readable; the best detection is on top.

    image: the upright original, or a smaller copy; boxes are scaled to it. Labels do not overlap if there is room.
    weak: detections with a lower score are drawn half transparent.
    """
    few = np.zeros(len(found.scores), bool) if weak is None else found.scores < weak
    drawn = image.convert("RGB")
    if few.any():  # below all others, which they do not cover
        drawn = Image.blend(drawn, _drawn(drawn.copy(), found, classes, few), _WEAK_OPACITY)
    return _drawn(drawn, found, classes, ~few)


def _drawn(drawn: Image.Image, found: Detections, classes: Sequence[str], which: np.ndarray) -> Image.Image:
    """The image itself, with some of the detections drawn on it."""
    pen = ImageDraw.Draw(drawn)
    short, long = min(drawn.size), max(drawn.size)
    width = max(2, round(long / 180))
    size = max(11, round(min(long / 24, short / 9)))
    ratio = np.array([drawn.width / found.image_size[0], drawn.height / found.image_size[1]] * 2)
    boxes = np.rint((found.boxes + [0, 0, 1, 1]) * ratio - [0, 0, 1, 1]).astype(int)
    best_last = np.flatnonzero(which)[::-1].tolist()
    for at in best_last:
        x1, y1, x2, y2 = boxes[at].tolist()
        color = class_color(int(found.labels[at]))
        pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(255, 255, 255), width=width + 2)
        pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=color, width=width)
    # Labels come after all boxes, so that no line crosses one; the best ones choose their places first.
    labels = [
        layout_label(pen, classes[int(label)], float(score), size, drawn.width)
        for label, score in zip(found.labels, found.scores, strict=True)
    ]
    places = place_labels([label.size for label in labels], boxes, drawn.size)
    for at in best_last:
        (x, y), label = places[at].tolist(), labels[at]
        pen.rectangle((x, y, x + label.size[0], y + label.size[1]), fill=class_color(int(found.labels[at])))
        for left, text in label.texts:
            pen.text((x + left, y + label.top), text, fill=(255, 255, 255), font=label.font)
        if label.sign is not None:
            pen.rectangle([edge + (x, y)[axis % 2] for axis, edge in enumerate(label.sign)], fill=(255, 255, 255))
    return drawn


class Label(NamedTuple):
    """Name and score of a detection, laid out. All places are pixels from the label's upper left corner.

    size: width and height with its margin. texts: each with its left edge; top: of both. sign: a minus, as a rectangle.
    """

    font: ImageFont.ImageFont | ImageFont.FreeTypeFont
    size: tuple[int, int]
    top: int
    texts: tuple[tuple[int, str], tuple[int, str]]
    sign: tuple[int, int, int, int] | None


def layout_label(pen: ImageDraw.ImageDraw, name: str, score: float, size: int, room: int) -> Label:
    """Lay out a label no wider than `room` by cutting the name, if the score fits. What no font can draw is escaped."""
    name = name[:_NAME_CHARACTERS]
    # The first of the fonts that can draw the most of it.
    which = max(range(1 + len(_SYSTEM_FONTS)), key=lambda n: sum(_can_draw(n, c) for c in name))
    name = "".join(c if _can_draw(which, c) else c.encode("unicode_escape").decode() for c in name)
    font = _font(which, size)
    assert font is not None
    number = f"{abs(score):.2f}"
    _, top, _, bottom = (round(edge) for edge in pen.textbbox((0, 0), f"{name}{number}", font=font))
    margin = max(2, round((bottom - top) / 4))
    gap = math.ceil(size / 4)
    # The minus is a rectangle: hyphens are faint in small type, and not every font has a minus sign.
    sign_width = math.ceil(size / 2) if score < 0 else 0
    number_width = math.ceil(pen.textlength(number, font=font))
    for end in range(len(name), -1, -1):
        text = name if end == len(name) else f"{name[:end].rstrip()}\u2026"
        sign_left = margin + math.ceil(pen.textlength(text, font=font)) + gap
        number_left = sign_left + (sign_width + max(1, gap // 2) if sign_width else 0)
        width = number_left + number_width + margin
        if width <= room:
            break
    _, digits_top, _, digits_bottom = pen.textbbox((0, margin - top), "0", font=font)
    middle, thick = round((digits_top + digits_bottom) / 2), max(2, round(size / 10))
    sign = (sign_left, middle - thick // 2, sign_left + sign_width - 1, middle - thick // 2 + thick - 1)
    return Label(
        font=font,
        size=(width, bottom - top + 2 * margin),
        top=margin - top,
        texts=((margin, text), (number_left, number)),
        sign=sign if sign_width else None,
    )


def place_labels(sizes: Sequence[tuple[int, int]], boxes: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    """[n, 2] upper left corners of labels on a canvas, one per box [n, 4], in order of importance.

    A label is above its box, or at another edge of it, or further down beside it: at the first place where it covers no
    earlier one; failing that, where it covers least. It is entirely on the canvas, if it fits at all.
    """
    places = np.zeros((len(sizes), 2), int)
    ends = np.zeros((len(sizes), 2), int)
    for at, ((width, height), (x1, y1, x2, y2)) in enumerate(zip(sizes, boxes.tolist(), strict=True)):
        step = height + 1
        above = y1 - step if y1 >= step else y1
        tops = [above, y1, y2 + 2, y2 - height, *(y1 + step * n for n in range(1, 7)), above - step, above - 2 * step]
        corners = np.array([(x, y) for y in tops for x in (x1, x2 - width + 1)])
        corners = np.clip(corners, 0, np.maximum([canvas[0] - width - 1, canvas[1] - height - 1], 0))
        best = slice(min(at, _LABELS_APART))
        low = np.maximum(corners[:, None], places[None, best])
        common = np.minimum(corners[:, None] + [width, height], ends[None, best]) - low
        covered = np.clip(common + 1, 0, None).prod(2).sum(1)
        places[at] = corners[covered.argmin()]
        ends[at] = places[at] + [width, height]
    return places


@functools.lru_cache(maxsize=64)
def _font(which: int, size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont | None:
    """Pillow's own font, or a system font by number; None if it is not found."""
    if which == 0:
        return ImageFont.load_default(size=size)
    try:
        return ImageFont.truetype(_SYSTEM_FONTS[which - 1], size)
    except OSError:
        return None


@functools.lru_cache(maxsize=1 << 14)
def _can_draw(which: int, character: str) -> bool:
    """Whether a font exists and has a glyph for a character."""
    font = _font(which, 16)
    if font is None or not character.isprintable():
        return False
    if unicodedata.bidirectional(character) in ("R", "AL") and not features.check("raqm"):
        return False  # would be drawn left to right, with unjoined letters
    return character.isspace() or bytes(font.getmask(character)) != bytes(font.getmask(_NO_CHARACTER))


class DrawingFolder:
    """A folder for drawings. They never replace a file that is not a drawing, and never follow a link.

    sources: where the images come from. overwrite: earlier drawings may be replaced.
    """

    def __init__(self, folder: str, sources: Sequence[str], *, overwrite: bool) -> None:
        self._root = Path(os.path.realpath(folder))
        self._sources, self._overwrite = sources, overwrite
        self._files: dict[str, str] = {}
        self._replaced: set[Path] = set()

    def plan(self, images: ImageList) -> None:
        """Choose a file for each image and create the folder; call this before the work starts.

        Raises ReportError for a folder of images, one that is not writable, and for existing files in the way.
        """
        self._files = drawing_files([name for name in images.names if name not in images.problems])
        targets = {self._root / os.path.dirname(file) for file in self._files.values()}
        self._check_apart(images, targets)
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ReportError(f"{self._root}: expected a folder to draw into: {os_reason(error)}") from None
        check_can_write(self._root / "drawing", ReportError)
        for folder in targets:
            if Path(os.path.realpath(folder)) != folder:
                raise ReportError(f"{folder}: expected a folder to draw into, found a link; it is not followed")
        present = [path for file in self._files.values() if os.path.lexists(path := self._root / file)]
        if present and not self._overwrite:
            more = f", and {len(present) - 1:,} more" * (len(present) > 1)
            raise ReportError(f"{present[0]}: already exists{more}; choose another folder, or --overwrite")
        for path in present:
            if not _is_drawing(path):
                raise ReportError(f"{path}: expected a drawing or no file, found another file; it is left as it is")
        self._replaced = set(present)

    def _check_apart(self, images: ImageList, targets: set[Path]) -> None:
        """Raise ReportError if drawings would be mixed with the images, and become images of the next run."""
        folders = {os.path.dirname(name_to_path(images.root, name)) for name in self._files}
        own = {os.path.realpath(folder) for folder in folders}
        mixed = [str(folder) for folder in sorted(targets) if str(folder) in own]
        mixed += [
            source
            for source in self._sources
            if os.path.isdir(source) and self._root.is_relative_to(os.path.realpath(source))
        ]
        if mixed:
            raise ReportError(f"{self._root}: would mix drawings with the images in {mixed[0]}; choose another folder")

    def draw(self, source: Item | str, name: str, found: Detections, classes: Sequence[str]) -> None:
        """Draw the detections on an image, at its full size.

        Raises ImageError for an image that cannot be drawn, ReportError if nothing more can be written.
        """
        target = self._root / self._files[name]
        drawn = draw_detections(read_image(source).pixels, found, classes)
        content = io.BytesIO()
        try:
            drawn.save(content, "JPEG", quality=92, comment=_MARK)
        except (OSError, ValueError) as error:
            raise ImageError(f"cannot be drawn: {one_line(error)}") from None
        # Short, because the name may already have the maximum length.
        partial = target.with_name(f".{os.getpid()}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(target) and target not in self._replaced:
                raise ImageError(f"cannot be drawn: {target} exists by now; it is left as it is")
            partial.unlink(missing_ok=True)
            with open(partial, "xb") as file:
                file.write(content.getbuffer())
            partial.replace(target)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            if error.errno == errno.ENAMETOOLONG:
                raise ImageError(f"cannot be drawn: {os_reason(error)}") from None
            raise ReportError(f"{target}: cannot be written: {os_reason(error)}") from None


def drawing_files(names: Sequence[str]) -> dict[str, str]:
    """The relative path of each image's drawing, by its name: `a.jpg` for a.jpg, `b.png.jpg` for b.png.

    No two are equal, even on a case-insensitive file system, and none is the folder of another: such names
    become `b.png~2.jpg`. Names that are too long for a file system are cut.
    """
    paths = {name: name_to_path("", name) for name in names}
    taken = {_folded(str(folder)) for path in set(map(os.path.dirname, paths.values())) for folder in _and_above(path)}
    files: dict[str, str] = {}
    tries: Counter[str] = Counter()  # thousands of names may start the same
    for name, path in paths.items():
        folder, file = os.path.split(path)
        stem, suffix = os.path.splitext(file)
        if suffix.lower() not in (".jpg", ".jpeg"):
            stem, suffix = file, ".jpg"
        base = _folded(os.path.join(folder, _cut(stem, _NAME_BYTES - len(suffix)) + suffix))
        while True:
            tries[base] += 1
            ending = suffix if tries[base] == 1 else f"~{tries[base]}{suffix}"
            files[name] = os.path.join(folder, _cut(stem, _NAME_BYTES - len(ending)) + ending)
            if (key := _folded(files[name])) not in taken:
                taken.add(key)
                break
    return files


def _and_above(folder: str) -> list[PurePosixPath]:
    return [PurePosixPath(folder), *PurePosixPath(folder).parents]


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()


def _cut(text: str, count: int) -> str:
    """The text, or as many whole characters of it as fit into this many bytes."""
    content = os.fsencode(text)
    return text if len(content) <= count else content[:count].decode("utf-8", "ignore")


def _is_drawing(path: Path) -> bool:
    """Whether a file, not a link to one, is one of our drawings."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return False
    try:
        with open(path, "rb") as file:
            return _MARK in file.read(4096)
    except OSError:
        return False
