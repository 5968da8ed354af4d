"""Draws docs/images/overview.png, the image in README and the guide, from a real photograph and the default recipe.

python docs/images/overview.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from sppfeat import Recipe
from sppfeat.backbones.backbone import load_backbone
from sppfeat.images.resizing import prepare_image
from sppfeat.pyramid.pooling import pool_pyramid

HERE = Path(__file__).parent
INK, SOFT, ACCENT = (28, 33, 40), (110, 118, 129), (9, 105, 218)
FONT = ImageFont.load_default(size=20)
SMALL = ImageFont.load_default(size=16)


def heat(values: np.ndarray, low: float, high: float) -> Image.Image:
    """Values as an image, dark blue at `low` to yellow at `high`."""
    span = ((values - low) / (high - low)).clip(0, 1)
    stops = np.array([[22, 27, 84], [60, 90, 170], [90, 170, 160], [200, 210, 90], [250, 240, 150]], float)
    place = span * (len(stops) - 1)
    below = np.minimum(place.astype(int), len(stops) - 2)
    mixed = stops[below] + (stops[below + 1] - stops[below]) * (place - below)[..., None]
    return Image.fromarray(mixed.astype(np.uint8))


def main() -> None:
    canvas = Image.new("RGB", (1320, 400), "white")
    draw = ImageDraw.Draw(canvas)

    def title(x: int, text: str, below: str) -> None:
        draw.text((x, 14), text, INK, FONT)
        draw.text((x, 40), below, SOFT, SMALL)

    def arrow(x: int, text: str) -> None:
        draw.line([(x, 215), (x + 46, 215)], ACCENT, 3)
        draw.polygon([(x + 46, 207), (x + 60, 215), (x + 46, 223)], ACCENT)
        draw.text((x + 30, 232), text, SOFT, SMALL, anchor="ma", align="center")

    title(20, "Images of any size", "whole, never padded or cropped")
    shown = ("animals/cat.jpg", "places/piazza_panorama.jpg", "people/astronaut.jpg")
    for name, box in zip(shown, ((20, 80, 240, 226), (20, 240, 240, 295), (20, 305, 240, 390)), strict=True):
        photo = Image.open(HERE.parents[1] / "photos" / name).convert("RGB")
        photo.thumbnail((box[2] - box[0], box[3] - box[1]))
        canvas.paste(photo, box[:2])
    backbone = load_backbone(Recipe(scales=(448,)))
    pixels = prepare_image(str(HERE.parents[1] / "photos" / shown[0]), backbone.descriptions[0].recipe).inputs[0]
    with torch.inference_mode():
        feature_map = backbone.feature_maps(torch.from_numpy(pixels.copy())[None])[0]
    energy = feature_map[0].clamp(min=0).pow(2).mean(0).sqrt().numpy()

    arrow(262, "backbone,\ncut at a layer")
    title(345, "Feature map", f"{energy.shape[0]} x {energy.shape[1]} cells x {feature_map.shape[1]} channels")
    canvas.paste(heat(energy, energy.min(), energy.max()).resize((255, 175), Image.Resampling.NEAREST), (345, 128))

    arrow(622, "pooling")
    title(705, "Pyramid", "levels 6, 3, 2, 1: always 50 bins")
    for place, level in enumerate((6, 3, 2, 1)):
        pooled = pool_pyramid(torch.from_numpy(energy)[None, None], [level]).view(level, level).numpy()
        x, y = 705 + place % 2 * 155, 85 + place // 2 * 160
        canvas.paste(heat(pooled, energy.min(), energy.max()).resize((138, 138), Image.Resampling.NEAREST), (x, y))
        for step in range(level + 1):
            at = round(step * 138 / level)
            draw.line([(x + at, y), (x + at, y + 138)], "white", 2)
            draw.line([(x, y + at), (x + 138, y + at)], "white", 2)

    arrow(1015, "rows")
    title(1098, "feats.h5", "16,000 values an image")
    recipe = backbone.descriptions[0].recipe
    with torch.inference_mode():
        for row, name in enumerate(shown):
            pixels = prepare_image(str(HERE.parents[1] / "photos" / name), recipe).inputs[0]
            values = pool_pyramid(backbone.feature_maps(torch.from_numpy(pixels.copy())[None])[0], recipe.levels)[0]
            some = values[:6000:60].numpy()[None]
            strip = heat(some, some.min(), some.max())
            canvas.paste(strip.resize((200, 40), Image.Resampling.NEAREST), (1098, 90 + 96 * row))
            draw.text((1098, 134 + 96 * row), Path(name).name, SOFT, SMALL)
    canvas.save(HERE / "overview.png", optimize=True)


if __name__ == "__main__":
    main()
