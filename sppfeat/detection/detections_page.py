"""The page of detections: images with their boxes, one color per class."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sppfeat.detection.detecting import Detections
from sppfeat.detection.detector import Detector
from sppfeat.detection.drawing import class_color, draw_detections
from sppfeat.errors import ImageError
from sppfeat.images import Item, read_image
from sppfeat.report import Origin, Shown, common_folder, image_address, image_link, write_page

# Long side of images on a page, which shows them 320 to 370 pixels wide, and their JPEG quality.
PAGE_SIDE: Final = 480
_QUALITY: Final = 75
# A page with more images is slow to open; those with the best scores are shown.
MAX_IMAGES: Final = 200
# Detections below are drawn half transparent: as likely wrong as right, or on the wrong side of an SVM's plane.
_WEAK_PROBABILITY, _WEAK_SCORE = 0.5, 0.0


@dataclass
class DetectionPage:
    """Images with their detections, gathered for one page. Only the `MAX_IMAGES` with the best scores stay."""

    detector: Detector
    _entries: list[tuple[float, str, Item | str, Detections]] = field(default_factory=list)
    _searched: int = 0
    _counts: Counter[int] = field(default_factory=Counter)
    _with: int = 0

    def add(self, source: Item | str, name: str, found: Detections) -> None:
        """Add a searched image."""
        self._searched += 1
        if len(found.scores):
            self._with += 1
            self._counts.update(found.labels.tolist())
            self._entries.append((float(found.scores[0]), name, source, found))
            if len(self._entries) > 2 * MAX_IMAGES:
                self._prune()

    def write(self, output: Path, *, title: str, note: str, command: str = "") -> None:
        """Write the page. command: what made it. Raises ReportError."""
        self._prune()
        model = self.detector
        images = []
        for _, name, source, found in self._entries:
            counts = Counter(model.classes[int(label)] for label in found.labels)
            about = ", ".join(f"{count} {label}" if count > 1 else label for label, count in counts.items())
            images.append({"image": self._shown(output, name, source, found), "about": about})
        write_page(
            output,
            "detections.html",
            {
                "title": title,
                "note": note,
                "images": images,
                "searched": self._searched,
                "found": self._counts.total(),
                "classes": len(model.classes),
                "legend": [
                    (model.classes[label], "#{:02x}{:02x}{:02x}".format(*class_color(label)), count)
                    for label, count in self._counts.most_common()
                ],
                "weak": f"{'probability' if model.probable else 'score'} below {self._weak:g}",
                "total": self._with,
                "folder": common_folder(name for _, name, _, _ in self._entries),
            },
            origins=[Origin("the detector", model.recipe, model.weights_sha256)],
            command=command,
        )

    @property
    def _weak(self) -> float:
        return _WEAK_PROBABILITY if self.detector.probable else _WEAK_SCORE

    def _shown(self, output: Path, name: str, source: Item | str, found: Detections) -> Shown:
        with contextlib.suppress(ImageError):  # the file may be gone by now, but its detections are not
            pixels = read_image(source).pixels
            pixels.thumbnail((PAGE_SIDE, PAGE_SIDE))
            drawn = draw_detections(pixels, found, self.detector.classes, weak=self._weak)
            item = source if isinstance(source, Item) else Item.at(source)
            return Shown(name, image_address(drawn, "JPEG", quality=_QUALITY), image_link(output, item))
        return Shown(name, None, None)

    def _prune(self) -> None:
        self._entries.sort(key=lambda entry: (-entry[0], entry[1]))
        del self._entries[MAX_IMAGES:]
