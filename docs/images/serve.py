"""Takes the screenshots of `sppfeat serve` over the project's photographs and parts of them: serve*.jpg.

python docs/images/serve.py
"""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from sppfeat import Recipe, extract_folder, open_store
from sppfeat.retrieval import add_map, create_gallery

HERE = Path(__file__).parent
PHOTOS = HERE.parents[1] / "photos"
QUERY = "people/astronaut.jpg"
BOX = (0.15, 0.66, 0.46, 0.87)  # of width and height: the badge
PARTS, SEED = 4, 3
SIZE = {"width": 1180, "height": 780}


def library(folder: Path) -> None:
    """The photographs, and some large parts of each, as from a walk around what they show."""
    dice = random.Random(SEED)
    for path in sorted(path for path in PHOTOS.rglob("*") if path.suffix in (".jpg", ".png", ".webp")):
        (target := folder / path.relative_to(PHOTOS)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        image = Image.open(path).convert("RGB")
        for number in range(1, PARTS + 1):
            side = dice.uniform(0.55, 0.8)
            width, height = round(side * image.width), round(side * image.height)
            left, top = dice.randint(0, image.width - width), dice.randint(0, image.height - height)
            part = image.crop((left, top, left + width, top + height))
            part.save(target.with_name(f"{path.stem}_{number}.jpg"), quality=90)


def take(page: Page, name: str) -> None:
    page.wait_for_load_state("networkidle")
    page.screenshot(path=HERE / name, type="jpeg", quality=85)


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        here = Path(work)
        library(here / "images")
        extract_folder(here / "images", here / "f.h5", Recipe(scales=(448,)))
        create_gallery(open_store(here / "f.h5"), here / "photographs", keep_bins=True)
        add_map(here / "photographs")
        command = ["sppfeat", "serve", str(here / "photographs"), "--port", "0"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert server.stdout is not None
        address = server.stdout.readline().split()[1]
        try:
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
                page = browser.new_page(viewport=SIZE)
                width, height = Image.open(PHOTOS / QUERY).size
                box = ",".join(str(round(edge * side)) for edge, side in zip(BOX, (width, height) * 2, strict=True))
                row = open_store(here / "f.h5").names.index(QUERY)
                page.goto(f"{address}#/search?query=r-{row}&box={box}&parts=1")
                expect(page.locator("#status")).to_contain_text("hits in")
                take(page, "serve.jpg")
                page.locator("#hits .view").first.click()
                take(page, "serve_compare.jpg")
                page.goto(f"{address}#/map")
                page.get_by_role("button", name="Compute the map").click()
                expect(page.locator("#map-status")).to_contain_text("images in view")
                page.wait_for_timeout(1000)
                take(page, "serve_map.jpg")
                browser.close()
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
