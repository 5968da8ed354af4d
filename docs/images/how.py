"""Draws the images of the page "How it works", from the project's photographs and the default recipe: how_*.png.

python docs/images/how.py
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from overview import ACCENT, INK, SOFT, heat
from PIL import Image, ImageDraw, ImageFont

from sppfeat import Recipe, pool_pyramid
from sppfeat.backbones.backbone import load_backbone
from sppfeat.images.resizing import prepare_image
from sppfeat.windows.mapping import map_windows

HERE = Path(__file__).parent
PHOTOS = HERE.parents[1] / "photos"
SHOWN = "people/photographer.jpg"
WINDOW = (150, 30, 365, 330)  # the photographer, in pixels
PINK, WHITE = (214, 0, 108), (255, 255, 255)
WIDTH = 1320  # twice that of the guide's column
FONT = ImageFont.load_default(size=27)
SMALL = ImageFont.load_default(size=23)


def canvas(height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (WIDTH, height), "white")
    return image, ImageDraw.Draw(image)


def title(draw: ImageDraw.ImageDraw, x: int, text: str, below: str) -> None:
    draw.text((x, 6), text, INK, FONT)
    draw.text((x, 40), below, SOFT, SMALL)


def outline(draw: ImageDraw.ImageDraw, box: tuple[float, float, float, float]) -> None:
    for grow, color in ((3, WHITE), (2, PINK), (1, PINK), (0, PINK), (-1, WHITE)):
        draw.rectangle((box[0] - grow, box[1] - grow, box[2] + grow, box[3] + grow), outline=color)


def arrow(draw: ImageDraw.ImageDraw, x: int, y: int, length: int, text: str = "") -> None:
    draw.line([(x, y), (x + length - 12, y)], ACCENT, 3)
    draw.polygon([(x + length - 14, y - 8), (x + length, y), (x + length - 14, y + 8)], ACCENT)
    draw.text((x + length / 2, y + 14), text, SOFT, SMALL, anchor="ma", align="center")


def flow() -> None:
    """What travels, from a source to what is made of a store."""
    image, draw = canvas(340)

    def box(x: int, y: int, width: int, name: str, below: str, color: tuple[int, int, int] = INK) -> None:
        draw.rounded_rectangle((x, y, x + width, y + 94), 8, outline=color, width=2)
        draw.text((x + width / 2, y + 14), name, color, FONT, anchor="ma")
        draw.text((x + width / 2, y + 54), below, SOFT, SMALL, anchor="ma")

    steps = (
        ("source", "folder, tar, URL"),
        ("plan", "what is missing"),
        ("decode", "resize, never pad"),
        ("network", "in batches"),
        ("pyramid", "max over bins"),
        ("store", "rows and names"),
    )
    for number, (name, below) in enumerate(steps):
        box(2 + 224 * number, 46, 194, name, below, ACCENT if name == "store" else INK)
        if number:
            arrow(draw, 224 * number - 26, 93, 26)
    draw.text((2, 6), "An item travels: a name, a way to its bytes, a fingerprint, its windows.", SOFT, SMALL)
    uses = (
        ("classes", "evaluate, predict"),
        ("gallery", "index, search, serve"),
        ("duplicates", "groups of images"),
        ("files", "export, merge"),
    )
    for number, (name, below) in enumerate(uses):
        box(226 + 280 * number, 238, 250, name, below)
        x = 226 + 280 * number + 125
        draw.line([(x, 190), (x, 224)], ACCENT, 3)
        draw.polygon([(x - 8, 224), (x, 237), (x + 8, 224)], ACCENT)
    draw.line([(351, 190), (1219, 190)], ACCENT, 3)
    draw.line([(1219, 140), (1219, 190)], ACCENT, 3)
    image.save(HERE / "how_flow.png", optimize=True)


def pyramid(photo: Image.Image, energy: np.ndarray) -> None:
    """Bins of each level on the feature map: which cells they cover, overlaps included."""
    image, draw = canvas(380)
    height, width = energy.shape
    title(draw, 20, "Image", f"{photo.width} x {photo.height} pixels")
    shown = photo.resize((330, round(330 * photo.height / photo.width)), Image.Resampling.LANCZOS)
    image.paste(shown, (20, 85))
    low, high = energy.min(), energy.max()
    for place, level in enumerate((3, 2, 1)):
        cell, left = 29, 385 + 315 * place
        title(draw, left, f"Level {level}", f"{level} x {level} bins on {width} x {height} cells")
        map_image = heat(energy, low, high).resize((cell * width, cell * height), Image.Resampling.NEAREST)
        image.paste(map_image, (left, 85))
        for step in range(1, width):
            draw.line([(left + cell * step, 85), (left + cell * step, 85 + cell * height)], (70, 84, 120))
        for step in range(1, height):
            draw.line([(left, 85 + cell * step), (left + cell * width, 85 + cell * step)], (70, 84, 120))
        for row in range(level):
            for column in range(level):
                x1, x2 = math.floor(column * width / level), math.ceil((column + 1) * width / level)
                y1, y2 = math.floor(row * height / level), math.ceil((row + 1) * height / level)
                inset = 3 + 3 * ((row + column) % 2)
                edges = (left + cell * x1 + inset, 85 + cell * y1 + inset)
                ends = (left + cell * x2 - inset, 85 + cell * y2 - inset)
                draw.rectangle((*edges, *ends), outline=WHITE if (row + column) % 2 else PINK, width=2)
    draw.text(
        (385, 85 + 29 * height + 14),
        "Pink and white: bins and the cells that they cover. Neighbors overlap where n does\n"
        "not divide the side. Brightness: the energy of all 320 channels in a cell.",
        SOFT,
        SMALL,
    )
    image.save(HERE / "how_pyramid.png", optimize=True)


def geometry(photo: Image.Image, energy: np.ndarray, description: object, size: tuple[int, int]) -> None:
    """A window, the pixels that cells are centered on, and the roi."""
    image, draw = canvas(520)
    rows, columns = description.geometry(size[1], size[0])  # type: ignore[attr-defined]
    roi = map_windows(np.array([WINDOW]), photo.size, size, columns, rows)[0]
    factor = 570 / photo.width
    shown = photo.resize((570, round(photo.height * factor)), Image.Resampling.LANCZOS)
    title(
        draw, 20, "A window, and where cells are centered", f"stride {columns.stride}, offset {columns.offset:g} pixels"
    )
    image.paste(shown, (20, 85))
    across, down = photo.width / size[0], photo.height / size[1]
    for y in range(rows.size):
        for x in range(columns.size):
            at_x = 20 + ((columns.offset + columns.stride * x + 0.5) * across) * factor
            at_y = 85 + ((rows.offset + rows.stride * y + 0.5) * down) * factor
            inside = roi[0] <= x <= roi[2] and roi[1] <= y <= roi[3]
            radius = 6 if inside else 4
            color = PINK if inside else WHITE
            draw.ellipse((at_x - radius, at_y - radius, at_x + radius, at_y + radius), color, (28, 33, 40))
    outline(draw, tuple((20 if n % 2 == 0 else 85) + edge * factor for n, edge in enumerate(WINDOW)))  # type: ignore[arg-type]
    arrow(draw, 610, 250, 70, "mapping")
    cell = 52
    title(
        draw,
        700,
        "The roi on the feature map",
        f"cells {roi[0]},{roi[1]} to {roi[2]},{roi[3]} of {columns.size} x {rows.size}",
    )
    map_image = heat(energy, energy.min(), energy.max())
    image.paste(map_image.resize((cell * columns.size, cell * rows.size), Image.Resampling.NEAREST), (700, 85))
    outline(
        draw,
        (700 + cell * roi[0], 85 + cell * roi[1], 700 + cell * (roi[2] + 1), 85 + cell * (roi[3] + 1)),
    )
    image.save(HERE / "how_geometry.png", optimize=True)


def store(backbone: object, recipe: Recipe) -> None:
    """A store file, row by row, and a folder of shards."""
    image, draw = canvas(485)
    title(draw, 2, "feats.h5: rows and names", "allocated when it is created; then only rows are written")
    heads = ((116, "/names"), (434, "/descriptors"), (630, "/status"), (752, "/checksum"))
    for x, text in heads:
        draw.text((x, 80), text, ACCENT, SMALL)
    shown = (
        ("animals/cat.jpg", "1 done"),
        ("people/astronaut.jpg", "1 done"),
        ("places/piazza_panorama.jpg", "0 pending"),
        ("space/hubble.jpg", "0 pending"),
    )
    for number, (name, status) in enumerate(shown):
        y = 118 + 78 * number
        thumbnail = Image.open(PHOTOS / name).convert("RGB")
        thumbnail.thumbnail((100, 64))
        image.paste(thumbnail, (2, y + (64 - thumbnail.height) // 2))
        draw.text((116, y + 18), name, INK, SMALL)
        done = status.startswith("1")
        if done:
            pixels = prepare_image(str(PHOTOS / name), recipe).inputs[0]
            with torch.inference_mode():
                found = backbone.feature_maps(torch.from_numpy(pixels.copy())[None])[0]  # type: ignore[attr-defined]
            values = pool_pyramid(found, recipe.levels)[0][:6000:60].numpy()[None]
            strip = heat(values, values.min(), values.max()).resize((180, 44), Image.Resampling.NEAREST)
            image.paste(strip, (434, y + 10))
        else:
            draw.rectangle((434, y + 10, 614, y + 54), outline=(200, 204, 210))
        draw.text((630, y + 18), status, INK if done else SOFT, SMALL)
        draw.text((752, y + 18), "CRC-32" if done else "", SOFT, SMALL)
    title(draw, 890, "feats/: a folder of shards", "each shard is such a file")
    files = (
        ("manifest.json", "names the shards; the recipe"),
        ("shard-00000.h5", "65,536 rows; never changed"),
        ("shard-00001.h5", "65,536 rows"),
        (".building-00002.h5", "under work"),
        ("all.h5", "all rows, for any HDF5 program"),
        (".unfinished", "there while a run writes"),
    )
    for number, (name, text) in enumerate(files):
        y = 84 + 66 * number
        draw.rounded_rectangle(
            (890, y, 1318, y + 60), 6, outline=ACCENT if "shard" in name else (200, 204, 210), width=2
        )
        draw.text((904, y + 2), name, INK, SMALL)
        draw.text((904, y + 29), text, SOFT, SMALL)
    image.save(HERE / "how_store.png", optimize=True)


def main() -> None:
    photo = Image.open(PHOTOS / SHOWN).convert("RGB")
    backbone = load_backbone(Recipe())
    description = backbone.descriptions[0]
    pixels = prepare_image(str(PHOTOS / SHOWN), description.recipe).inputs[0]
    with torch.inference_mode():
        feature_map = backbone.feature_maps(torch.from_numpy(pixels.copy())[None])[0]
    energy = feature_map[0].clamp(min=0).pow(2).mean(0).sqrt().numpy()
    height, width = pixels.shape[:2]
    flow()
    pyramid(photo, energy)
    geometry(photo, energy, description, (width, height))
    store(backbone, description.recipe)


if __name__ == "__main__":
    main()
