"""Detections drawn on pictures, and the page that shows them."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sppfeat.detect import Detections, Detector
from sppfeat.detection_evaluation import ClassResult, DetectionEvaluation
from sppfeat.errors import ReportError
from sppfeat.files import os_reason
from sppfeat.images import read_image
from sppfeat.report import picture_address, write_page

# Long sides: of pictures in a page, twice the width they are shown at on a wide screen.
PAGE_SIDE: Final = 640
# A page with more pictures is slow to open; the ones with the best scores are shown.
MAX_PICTURES: Final = 200
# Turning by the golden angle keeps the colours of neighbours apart, whatever the number of classes.
_FIRST_HUE, _HUE_STEP = 0.03, 0.381966


def class_color(label: int) -> tuple[int, int, int]:
    """A colour of its own for each class: strong, and dark enough for white text."""
    red, green, blue = colorsys.hls_to_rgb((_FIRST_HUE + label * _HUE_STEP) % 1, 0.42, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(picture: Image.Image, found: Detections, classes: Sequence[str]) -> Image.Image:
    """A copy of the picture with boxes and labels, sized to be readable; the best detection lies on top.

    picture: the upright original, or smaller; boxes are scaled to it.
    """
    drawn = picture.convert("RGB")
    pen = ImageDraw.Draw(drawn)
    short, long = min(drawn.size), max(drawn.size)
    width = max(2, round(long / 180))
    font = ImageFont.load_default(size=max(11, round(min(long / 24, short / 9))))
    ratio = np.array([drawn.width / found.image_size[0], drawn.height / found.image_size[1]] * 2)
    boxes = (found.boxes + [0, 0, 1, 1]) * ratio - [0, 0, 1, 1]
    order = range(len(boxes) - 1, -1, -1)
    for at in order:
        x1, y1, x2, y2 = (round(edge) for edge in boxes[at])
        color = class_color(int(found.labels[at]))
        pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(255, 255, 255), width=width + 2)
        pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=color, width=width)
    for at in order:
        # Labels come after all boxes, so that no line crosses one.
        x1, y1, _, _ = (round(edge) for edge in boxes[at])
        text = f"{classes[int(found.labels[at])]} {found.scores[at]:.2f}"
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        pad = max(2, round((bottom - top) / 4))
        label_width, label_height = round(right - left) + 2 * pad, round(bottom - top) + 2 * pad
        # Above the box; inside it where there is no room above; always whole inside the picture.
        label_y = y1 - label_height if y1 >= label_height else y1
        label_x = max(0, min(x1, drawn.width - label_width))
        label_y = max(0, min(label_y, drawn.height - label_height))
        color = class_color(int(found.labels[at]))
        pen.rectangle((label_x, label_y, label_x + label_width, label_y + label_height), fill=color)
        pen.text((label_x + pad - left, label_y + pad - top), text, fill=(255, 255, 255), font=font)
    return drawn


def draw_to_folder(path: str, name: str, found: Detections, detector: Detector, folder: Path) -> Path:
    """Draw detections at full size into `folder`, as JPEG under the picture's own name: `a.jpg`, and `b.png.jpg`.

    Raises ReportError, also where the folder is the pictures' own.
    """
    target = folder / (name if name.lower().endswith((".jpg", ".jpeg")) else f"{name}.jpg")
    if target.parent.resolve() == Path(path).resolve().parent:
        raise ReportError(f"{target.parent}: would mix drawings with the pictures; draw into another folder")
    drawn = draw_detections(read_image(path).pixels, found, detector.classes)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        drawn.save(partial, "JPEG", quality=92)
        partial.replace(target)
    except OSError as error:
        raise ReportError(f"{target}: cannot be written: {os_reason(error)}") from None
    return target


@dataclass
class DetectionPage:
    """Pictures with their detections, gathered for one page. Only those with the best scores stay, `MAX_PICTURES`."""

    detector: Detector
    _entries: list[tuple[float, str, str, Detections]] = field(default_factory=list)
    _pictures: int = 0
    _found: int = 0

    def add(self, path: str, name: str, found: Detections) -> None:
        """Take one picture that was searched."""
        self._pictures += 1
        self._found += len(found.scores)
        if len(found.scores):
            self._entries.append((float(found.scores[0]), name, path, found))
            if len(self._entries) > 2 * MAX_PICTURES:
                self._prune()

    def write(self, output: Path, *, title: str, note: str) -> None:
        """Write the page. Raises ReportError."""
        self._prune()
        pictures = []
        for _, name, path, found in self._entries:
            pixels = read_image(path).pixels
            pixels.thumbnail((PAGE_SIDE, PAGE_SIDE))
            drawn = draw_detections(pixels, found, self.detector.classes)
            counts: dict[str, int] = {}
            for label in found.labels:
                counts[self.detector.classes[int(label)]] = counts.get(self.detector.classes[int(label)], 0) + 1
            about = ", ".join(f"{count} {label}" if count > 1 else label for label, count in counts.items())
            pictures.append({"address": picture_address(drawn, "JPEG"), "name": name, "about": about})
        write_page(
            output,
            "detections.html",
            {
                "title": title,
                "note": note,
                "pictures": pictures,
                "searched": self._pictures,
                "found": self._found,
                "classes": len(self.detector.classes),
                "shown": len(pictures),
            },
        )

    def _prune(self) -> None:
        self._entries.sort(key=lambda entry: (-entry[0], entry[1]))
        del self._entries[MAX_PICTURES:]


def write_evaluation(output: Path, done: DetectionEvaluation, *, title: str, note: str) -> None:
    """Write the page of an evaluation: figures, a table of the classes, and their curves. Raises ReportError."""
    classes = sorted(done.classes, key=lambda one: (np.isnan(one.eleven_point), -one.eleven_point, one.name))
    write_page(
        output,
        "detection_evaluation.html",
        {
            "title": title,
            "note": note,
            "done": done,
            "classes": [{"result": one, "curve": _curve(one)} for one in classes],
            "notes": done.notes[:50],
            "failed": dict(list(done.failed.items())[:50]),
        },
    )


def _curve(one: ClassResult) -> str:
    """Points of precision over recall for a polyline in a square of 100 x 100, the first upper left."""
    recall, precision = one.recall, one.precision
    if not len(recall):
        return ""
    # Where precision only falls between two hits, the end says it all: curves of many detections stay small.
    turns = np.flatnonzero(np.diff(recall, prepend=-1, append=2)[:-1] + np.diff(recall, prepend=-1, append=2)[1:] > 0)
    turns = turns[:: max(1, len(turns) // 400)]
    points = zip(100 * recall[turns], 100 - 100 * precision[turns], strict=True)
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
