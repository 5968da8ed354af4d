"""Draws `located.jpg`, an image in README and the guide: a part of a photograph of the project, found where it is.

python docs/images/located.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

from sppfeat import Recipe, extract_folder, open_store
from sppfeat.retrieval import SearchOptions, create_gallery, open_gallery, search_images

PHOTOS = Path(__file__).parents[2] / "photos"
SHOWN = "people/photographer.jpg"
PART = (0.36, 0.1, 0.72, 0.55)  # of width and height
ENLARGED = 1.6
HEIGHT, GAP = 420, 12


def main() -> None:
    image = Image.open(PHOTOS / SHOWN).convert("RGB")
    box = [round(edge * side) for edge, side in zip(PART, image.size * 2, strict=True)]
    part = image.crop((box[0], box[1], box[2], box[3]))
    part = part.resize((round(part.width * ENLARGED), round(part.height * ENLARGED)), Image.Resampling.BICUBIC)
    with tempfile.TemporaryDirectory() as work:
        here = Path(work)
        part.save(here / "part.jpg", quality=70)
        extract_folder(PHOTOS, here / "photos.h5", Recipe(scales=(448,)))
        create_gallery(open_store(here / "photos.h5"), here / "gallery", keep_bins=True)
        options = SearchOptions(k=1, parts=True)
        hit = search_images(open_gallery(here / "gallery"), [here / "part.jpg"], options).answers[0].neighbors[0]
        query = Image.open(here / "part.jpg").convert("RGB")
    if hit.name != SHOWN or hit.box is None:
        raise SystemExit(f"expected a part of {SHOWN}, found {hit.name}")
    print(f"{hit.name}: score {hit.score:.3f}, box {hit.box}, true {box}")
    factor = HEIGHT / image.height
    found = image.resize((round(image.width * factor), HEIGHT), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(found)
    edges = [round(edge * factor) for edge in hit.box]
    for grow, color in ((3, "white"), (2, "#d6006c"), (1, "#d6006c"), (0, "#d6006c"), (-1, "white")):
        draw.rectangle((edges[0] - grow, edges[1] - grow, edges[2] + grow, edges[3] + grow), outline=color)
    query.thumbnail((HEIGHT, HEIGHT), Image.Resampling.LANCZOS)
    strip = Image.new("RGB", (query.width + GAP + found.width, HEIGHT), "white")
    strip.paste(query, (0, (HEIGHT - query.height) // 2))
    strip.paste(found, (query.width + GAP, 0))
    strip.save(Path(__file__).with_name("located.jpg"), quality=88)


if __name__ == "__main__":
    main()
