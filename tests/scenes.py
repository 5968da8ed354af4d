"""Small images of colored blocks, annotated, with windows: something that detectors can learn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from voc_xml import xml

COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


def draw_scene(generator: np.random.Generator) -> tuple[np.ndarray, list[tuple[str, float, float, float, float]]]:
    """Pixels of 160 x 120, and its blocks in VOC's coordinates, which start at 1."""
    pixels = generator.integers(100, 150, (120, 160, 3)).astype(np.uint8)
    objects = []
    for name, left in (("red", 0), ("blue", 80)):
        if generator.random() < 0.75:
            width, height = generator.integers(36, 60, 2)
            x, y = left + int(generator.integers(2, 78 - width)), int(generator.integers(2, 118 - height))
            pixels[y : y + height, x : x + width] = COLORS[name]
            objects.append((name, x + 1, y + 1, x + width, y + height))
    return pixels, objects


def propose_around(objects: list[tuple[str, float, float, float, float]], generator: np.random.Generator) -> np.ndarray:
    """Windows near the objects, and elsewhere."""
    corner = generator.integers(0, (110, 80), (60, 2))
    windows = [np.concatenate([corner, np.minimum(corner + generator.integers(30, 60, (60, 2)), (159, 119))], 1)]
    for _, *box in objects:
        near = np.array(box) - 1 + generator.integers(-7, 8, (12, 4))
        windows.append(np.clip(near, 0, [159, 119, 159, 119]))
    return np.concatenate(windows).astype(float)


def make_voc(root: Path) -> Path:
    """A VOC layout of 24 training and 12 test scenes below `root`, with windows.json beside."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    generator = np.random.default_rng(0)
    windows, names = {}, [f"{n:03}" for n in range(36)]
    for name in names:
        pixels, objects = draw_scene(generator)
        Image.fromarray(pixels).save(root / f"JPEGImages/{name}.png")
        (root / f"Annotations/{name}.xml").write_text(xml(*objects, size=(160, 120)))
        windows[f"{name}.png"] = propose_around(objects, generator).tolist()
    (root / "ImageSets/Main/trainval.txt").write_text("\n".join(names[:24]))
    (root / "ImageSets/Main/test.txt").write_text("\n".join(names[24:]))
    (root / "windows.json").write_text(json.dumps(windows))
    return root
