"""Draws `detections.jpg`, an image of the guide: what a detector finds in the project's photographs.

    python docs/images/detections.py DETECTOR.h5 [THRESHOLD]

The detector is one of PASCAL VOC's classes: `sppfeat train detector VOC2007/ -o voc.h5 --split trainval`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from sppfeat.detection.detecting import DetectOptions, DetectorRunner, detected
from sppfeat.detection.detector import open_detector
from sppfeat.detection.drawing import draw_detections
from sppfeat.images import Item, read_image

PHOTOS = Path(__file__).parents[2] / "photos"
SHOWN = ("animals/cat.jpg", "people/photographer.jpg")
HEIGHT, GAP = 420, 12


def main() -> None:
    detector = open_detector(sys.argv[1])
    items = [Item.at(PHOTOS / name) for name in SHOWN]
    options = DetectOptions(threshold=float(sys.argv[2]) if len(sys.argv) > 2 else None)
    panels: dict[int, Image.Image] = {}
    for found in detected(DetectorRunner(detector), items, None, options):
        image = read_image(items[found.position].path).pixels
        small = image.resize((round(image.width * HEIGHT / image.height), HEIGHT), Image.Resampling.LANCZOS)
        panels[found.position] = draw_detections(small, found, detector.classes)
    width = sum(panel.width for panel in panels.values()) + GAP * (len(panels) - 1)
    strip = Image.new("RGB", (width, HEIGHT), (255, 255, 255))
    left = 0
    for _, panel in sorted(panels.items()):
        strip.paste(panel, (left, 0))
        left += panel.width + GAP
    strip.save(Path(__file__).with_name("detections.jpg"), quality=88)


if __name__ == "__main__":
    main()
