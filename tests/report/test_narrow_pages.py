"""Pages on a phone, in a real browser: nothing sticks out, and nothing is asked of anyone else."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeStore
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from sppfeat import Store
from sppfeat.retrieval import (
    RetrievalOptions,
    SearchOptions,
    create_gallery,
    evaluate_retrieval,
    find_duplicates,
    open_gallery,
    search_store,
    write_duplicates_page,
    write_hits_page,
    write_retrieval_page,
)
from sppfeat.transfer import TransferOptions
from sppfeat.transfer.evaluation import evaluate_transfer
from sppfeat.transfer.page import write_transfer_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
LONG = "a_very_long_name_without_a_single_space_or_slash_in_it_" * 3
COMMAND = f"sppfeat command {LONG} --report r.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def store(make_store: MakeStore, tmp_path: Path) -> Store:
    """60 images with long names, of three classes with long names."""
    rng = np.random.default_rng(0)
    names = sorted(f"{LONG}{n % 3}/{LONG}{n:02}.jpg" for n in range(60))
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (90, 60), "green").save(tmp_path / name)
    rows = np.repeat(rng.normal(size=(3, 16)), 20, 0) + 1.5 * rng.normal(size=(60, 16))
    return make_store(rows, names=names, root=str(tmp_path))


def transfer(path: Path, store: Store) -> None:
    done = evaluate_transfer([store, store], TransferOptions(trials=2, per_class=5, costs=(0.1, 1.0)))
    write_transfer_report(path, [replace(one, store=f"/x/{n}{LONG}") for n, one in enumerate(done)], command=COMMAND)


def retrieval(path: Path, store: Store) -> None:
    write_retrieval_page(path, evaluate_retrieval(store, None, RetrievalOptions()), command=COMMAND)


def duplicates(path: Path, store: Store) -> None:
    write_duplicates_page(path, find_duplicates(store, 0.5), command=COMMAND)


def hits(path: Path, store: Store) -> None:
    create_gallery(store, path.parent / "g")
    gallery = open_gallery(path.parent / "g")
    few = search_store(gallery, store, SearchOptions(k=2))
    many = search_store(gallery, store, SearchOptions(k=30))
    answers = [*few.answers[:2], *many.answers[:2]]
    write_hits_page(path, gallery, replace(few, answers=answers), command=COMMAND)


@pytest.mark.parametrize("write", [transfer, retrieval, duplicates, hits])
def test_nothing_sticks_out(
    write: Callable[[Path, Store], None], store: Store, browser: Browser, tmp_path: Path
) -> None:
    """Of 400 pixels, and of a wide window; wide tables scroll inside their own frame. With dark colors, too."""
    page = tmp_path / "p.html"
    write(page, store)
    for width, scheme in ((400, "light"), (1280, "dark")):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
        asked: list[str] = []
        tab = context.new_page()
        tab.on("request", lambda one, asked=asked: asked.append(one.url))  # type: ignore[misc]
        tab.goto(page.as_uri())
        tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        tab.evaluate("Promise.all([...document.images].map(one => { one.loading = 'eager'; return one.decode() }))")
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        out = tab.evaluate(
            """() => [...document.querySelectorAll('main *')].filter(one => !one.closest('.scroll, svg')
                && one.getBoundingClientRect().right > innerWidth + 1
                && !one.parentElement.closest('.name')).map(one => one.outerHTML.slice(0, 200))"""
        )
        assert out == []
        assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
        without = tab.evaluate("[...document.images].filter(one => !one.alt || !one.naturalWidth).length")
        assert without == 0 and tab.evaluate("document.images.length") > 3
        context.close()
