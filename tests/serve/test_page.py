"""The page, driven in a real browser as people drive it: mouse, touch and keys."""

from __future__ import annotations

import base64
import contextlib
import io
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import PHOTOS
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Error, Page, Response, expect, sync_playwright
from serving import make_models, running

from sppfeat import Recipe, RunOptions, extract_folder, open_store
from sppfeat.retrieval import add_map, create_gallery

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

expect.set_options(timeout=20_000)

CPU = RunOptions(device="cpu")
BUDGET = 150_000  # bytes of the page without thumbnails
HOSTILE = "<img src=x onerror=alert(1)>.jpg"
VIEWS = ("#/search", "#/map", "#/duplicates")
# x1, y1, x2, y2 as parts of width and height
HEAD = (0.36, 0.1, 0.72, 0.55)
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs, a smaller copy of one of them, and one with a hostile name; their store and gallery beside."""
    work = tmp_path_factory.mktemp("page")
    shutil.copytree(PHOTOS, work / "photos", ignore=shutil.ignore_patterns("places", "rooms"))  # fewer than 24
    with Image.open(PHOTOS / "space/hubble.jpg") as image:
        image.resize((image.width * 3 // 4, image.height * 3 // 4)).save(work / "photos/space/hubble_small.jpg")
    shutil.copy(PHOTOS / "textures/bricks.jpg", work / "photos" / HOSTILE)
    extract_folder(work / "photos", work / "f.h5", Recipe(scales=(448,)), CPU)
    create_gallery(open_store(work / "f.h5"), work / "photographs", keep_bins=True)
    add_map(work / "photographs")
    return work


@pytest.fixture(scope="module")
def address(library: Path) -> Iterator[str]:
    with running(library / "photographs") as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser: Browser, address: str) -> Iterator[Open]:
    """Open the page; each call is a browser of its own. No script may fail, and nothing may come from elsewhere."""
    contexts: list[BrowserContext] = []
    faults: list[str] = []

    def open_page(hash: str = "", *, at: str = address, **options: Any) -> Page:
        contexts.append(browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options)))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda line: faults.append(line.text) if line.type in ("error", "warning") else None)
        page.on(
            "request",
            lambda asked: faults.append(asked.url) if not asked.url.startswith((at, "blob:", "data:")) else None,
        )
        page.goto(at + hash)
        expect(page.locator("#gallery-size")).to_contain_text("images")
        return page

    yield open_page
    for context in contexts:
        context.close()
    # The browser itself tells of an answer that is an error, which some tests bring about.
    assert [fault for fault in faults if not fault.startswith("Failed to load resource")] == []


def drop(page: Page, name: str, data: bytes, kind: str = "image/jpeg") -> None:
    files = page.evaluate_handle(
        """([name, kind, data]) => {
            const held = new DataTransfer();
            held.items.add(new File([Uint8Array.from(atob(data), (one) => one.charCodeAt(0))], name, {type: kind}));
            return held;
        }""",
        [name, kind, base64.b64encode(data).decode()],
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event("main", event, {"dataTransfer": files})


def photo(name: str) -> bytes:
    return (PHOTOS / name).read_bytes()


def found(page: Page) -> list[str]:
    """The names of hits, once they are there."""
    expect(page.locator("#status")).to_contain_text("hits in")
    return page.locator("#hits .name").all_text_contents()


def box_of(page: Page) -> list[int]:
    """The box that the address holds."""
    told = re.search(r"box=([\d,]+)", page.url)
    assert told is not None, page.url
    return [int(edge) for edge in told[1].split(",")]


def draw(page: Page, part: tuple[float, float, float, float]) -> None:
    area = page.locator("#stage").bounding_box()
    assert area is not None
    x1, y1, x2, y2 = (
        area["x" if at % 2 == 0 else "y"] + edge * area["width" if at % 2 == 0 else "height"]
        for at, edge in enumerate(part)
    )
    page.mouse.move(x1, y1)
    page.mouse.down()
    page.mouse.move((x1 + x2) / 2, (y1 + y2) / 2)
    page.mouse.move(x2, y2)
    page.mouse.up()


def overlap(one: list[float], other: list[float]) -> float:
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (sum(areas) - width * height)


def test_an_image_is_dropped_and_its_hits_are_read(opened: Open) -> None:
    page = opened()
    expect(page.get_by_role("heading", name="Or start with an image of the gallery")).to_be_visible()
    drop(page, "mine.jpg", photo("people/astronaut.jpg"))
    names = found(page)
    assert names[0] == "people/astronaut.jpg" and len(names) == 17 and HOSTILE in names
    assert page.locator("#query-name").inner_text() == "mine.jpg" and "query=u-" in page.url
    scores = [float(text) for text in page.locator("#hits .score").all_text_contents()]
    assert scores[0] > 0.999 and scores == sorted(scores, reverse=True)
    assert page.title() == "mine.jpg · photographs"
    assert page.locator("#hits > li").first.get_by_role("button").first.get_attribute("aria-label") == (
        "Hit 1: people/astronaut.jpg, score 1.000. Space compares it with the query, Enter searches with it."
    )


def test_an_image_is_pasted_and_one_is_chosen(opened: Open) -> None:
    page = opened("#/duplicates")
    page.evaluate(
        """(data) => {
            const held = new DataTransfer();
            const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
            held.items.add(new File([bytes], "", {type: "image/jpeg"}));
            document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: held, bubbles: true}));
        }""",
        base64.b64encode(photo("animals/cat.jpg")).decode(),
    )
    assert found(page)[0] == "animals/cat.jpg"
    with page.expect_file_chooser() as chosen:
        page.get_by_role("button", name="Other image").click()
    chosen.value.set_files(PHOTOS / "objects/coins.png")
    expect(page.locator("#query-name")).to_have_text("coins.png")
    expect(page.locator("#hits .name").first).to_have_text("objects/coins.png")


def test_a_box_is_drawn_and_found(opened: Open) -> None:
    page = opened()
    drop(page, "mine.jpg", photo("people/photographer.jpg"))
    found(page)
    draw(page, HEAD)
    page.wait_for_url("**box=**")
    expect(page.get_by_label("Also find it as a part of an image")).to_be_checked()
    expect(page.locator("#rerank")).to_be_disabled()
    with Image.open(PHOTOS / "people/photographer.jpg") as image:
        sides = image.size * 2
    drawn = [edge * side for edge, side in zip(HEAD, sides, strict=True)]
    assert box_of(page) == pytest.approx(drawn, abs=3) and "parts=1" in page.url
    assert found(page)[0] == "people/photographer.jpg"
    frame, shown = (page.locator(f"#hits > li:first-child {part}").bounding_box() for part in (".frame", ".outline"))
    assert frame is not None and shown is not None
    left, top = (shown["x"] - frame["x"]) / frame["width"], (shown["y"] - frame["y"]) / frame["height"]
    located = [left, top, left + shown["width"] / frame["width"], top + shown["height"] / frame["height"]]
    assert overlap(located, list(HEAD)) > 0.4, located
    # The box is moved, resized by a corner, and removed.
    handle = page.locator("#stage .box")
    area = handle.bounding_box()
    assert area is not None
    page.mouse.move(area["x"] + area["width"] / 2, area["y"] + area["height"] / 2)
    page.mouse.down()
    page.mouse.move(area["x"] + area["width"] / 2 + 20, area["y"] + area["height"] / 2 + 10)
    page.mouse.up()
    before = [int(edge) for edge in drawn]
    page.wait_for_function("(x) => Number(location.hash.match(/box=(\\d+)/)[1]) > x", arg=before[0] + 10)
    moved = box_of(page)
    assert moved[2] - moved[0] == pytest.approx(before[2] - before[0], abs=4)
    page.get_by_role("button", name="Remove box").click()
    page.wait_for_url(lambda url: "box=" not in url)
    expect(page.get_by_role("button", name="Add box")).to_be_focused()


def test_the_heat_map_of_a_hit(opened: Open) -> None:
    page = opened("#/search?query=r-1&rerank=bins")
    found(page)
    first = page.locator("#hits > li").first
    first.hover()
    for place in (first, page.locator("#stage")):
        expect(place.locator(".heat canvas")).to_have_count(1)
        expect(place.locator(".heat .mark").first).to_have_text("1")
    page.mouse.move(5, 5)
    expect(page.locator(".heat")).to_have_count(0)
    first.get_by_role("button").first.click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("heading")).to_contain_text("Hit 1 of 16, score ")
    expect(dialog.locator(".heat canvas")).to_have_count(2)
    links = dialog.get_by_role("list", name="Linked bins and what they add to the score").get_by_role("listitem")
    assert links.count() > 0
    told = links.first.text_content() or ""
    assert re.search(r"Row \d, column \d of the query; row \d, column \d of the hit: \+0\.\d+", told), told
    dialog.get_by_label("Heat map and links").uncheck()
    expect(dialog.locator(".heat")).to_have_count(0)
    page.keyboard.press("ArrowRight")
    expect(dialog.get_by_role("heading")).to_contain_text("Hit 2 of 16")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(page.locator("#hits > li").nth(1).get_by_role("button").first).to_be_focused()
    page.locator("#rerank").select_option("none")
    expect(page.locator("#hits > li").first).to_be_visible()
    page.wait_for_url(lambda url: "rerank" not in url)
    found(page)
    page.locator("#hits > li").first.get_by_role("button").first.click()
    hint = "To see where a score comes from, search for parts or re-rank with bins."
    expect(page.locator("#compare-why")).to_have_text(hint)  # this gallery keeps bins already


def test_the_state_is_in_the_address(opened: Open) -> None:
    page = opened("#/search?query=r-1&k=5&rerank=bins&box=20,20,150,140")
    names = found(page)
    assert len(names) == 5 and page.locator("#k").input_value() == "5"
    assert page.locator("#rerank").input_value() == "bins"
    expect(page.locator("#stage .box")).to_be_visible()
    first = page.url
    page.locator("#hits > li").nth(1).get_by_role("button", name="Search with").click()
    expect(page.locator("#query-name")).to_have_text(names[1])
    second, others = page.url, found(page)
    assert second != first and "box" not in second and "k=5" in second
    page.go_back()
    expect(page.locator("#hits .name").first).to_have_text(names[0])
    assert page.url == first and found(page) == names
    page.go_forward()
    expect(page.locator("#query-name")).to_have_text(names[1])
    assert found(page) == others
    page.reload()
    expect(page.locator("#query-name")).to_have_text(names[1])
    assert found(page) == others
    for wrong in (
        "#/search?query=r-99999",
        "#/search?query=u-gone",
        "#/nothing?k=x&box=1",
        "#/search?query=r-1&box=9,9,1,1",
    ):
        other = opened(wrong)
        expect(other.locator("#hits .name, #sample-list .name, #search-fault .fault").first).to_be_visible()


def test_the_keyboard_alone(opened: Open) -> None:
    page = opened()
    expect(page.locator("#sample-list .name").first).to_be_visible()

    def press_until(key: str, selector: str) -> None:
        for _ in range(60):
            page.keyboard.press(key)
            if page.evaluate("(wanted) => document.activeElement.matches(wanted)", selector):
                return
        raise AssertionError(f"{selector} was not reached by {key}")

    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    press_until("Tab", "#sample-list a")
    page.keyboard.press("Enter")
    found(page)
    press_until("Shift+Tab", "#add-box")
    page.keyboard.press("Enter")
    expect(page.locator("#stage .box")).to_be_focused()
    page.wait_for_url("**box=**")
    before = box_of(page)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Control+ArrowDown")
    page.keyboard.press("Shift+ArrowLeft")
    page.wait_for_url(lambda url: "box=" in url and box_of(page)[0] > before[0])
    after = box_of(page)
    step = after[0] - before[0]
    assert after == [before[0] + step, before[1] + 1, before[2], before[3] + 1] and step > 1
    page.keyboard.press("Escape")
    page.wait_for_url(lambda url: "box=" not in url)
    names = found(page)
    press_until("Tab", "#hits .view")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    expect(page.get_by_role("dialog").get_by_role("heading")).to_contain_text("Hit 2 of")
    page.keyboard.press("Escape")
    page.keyboard.press("Enter")
    expect(page.locator("#query-name")).to_have_text(names[1])
    found(page)
    expect(page.locator("#hits .view").first).to_be_focused()


@pytest.mark.parametrize("width", [360, 400])
def test_a_phone(opened: Open, width: int) -> None:
    page = opened(viewport={"width": width, "height": 740}, has_touch=True, is_mobile=True, device_scale_factor=2)
    page.locator("#sample-list a").first.tap()
    found(page)
    area = page.locator("#stage").bounding_box()
    assert area is not None and area["width"] > width / 4
    # A finger draws a box; the page does not scroll meanwhile.
    touch = page.context.new_cdp_session(page)
    for kind, part in (("touchStart", 0.2), ("touchMove", 0.5), ("touchMove", 0.8), ("touchEnd", None)):
        points = (
            [] if part is None else [{"x": area["x"] + part * area["width"], "y": area["y"] + part * area["height"]}]
        )
        page.wait_for_timeout(120)  # a finger that flings would swallow the next tap
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    page.wait_for_url("**box=**")
    assert page.evaluate("scrollY") == 0
    second = found(page)[1]
    page.locator("#hits .view").nth(1).tap()
    expect(page.get_by_role("dialog")).to_be_visible()
    page.get_by_role("button", name="Search with this image").tap()
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.wait_for_url(lambda url: "box=" not in url)
    expect(page.locator("#query-name")).to_have_text(second)
    for view in VIEWS:
        page.goto(page.url.partition("#")[0] + view)
        expect(page.locator(f"#view-{view[2:]}")).to_be_visible()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, view


def test_what_is_no_image(opened: Open) -> None:
    page = opened()
    truncated = photo("space/rocket.jpg")[:4000]
    for name, data, kind in (
        ("notes.txt", b"no image at all", "text/plain"),
        ("empty.jpg", b"", "image/jpeg"),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "image/svg+xml"),
        ("truncated.jpg", truncated, "image/jpeg"),
    ):
        drop(page, name, data, kind)
        fault = page.locator("#search-fault .fault")
        expect(fault).to_be_visible()
        assert "Traceback" not in fault.inner_text() and "\n" not in fault.inner_text().strip()
        assert page.locator("#hits > li").count() == 0
    drop(page, "good.jpg", photo("space/rocket.jpg"))
    assert found(page)[0] == "space/rocket.jpg"
    expect(page.locator("#search-fault .fault")).to_have_count(0)


def test_large_uploads(opened: Open) -> None:
    page = opened()
    noise = np.random.default_rng(0).integers(0, 255, (1700, 2100, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, "PNG", compress_level=0)
    assert len(content.getvalue()) > 10 << 20
    drop(page, "large.png", content.getvalue(), "image/png")
    assert len(found(page)) == 17
    expect(page.locator("#query-size")).to_have_text("2100 × 1700")
    asked: list[str] = []
    page.on("request", lambda one: asked.append(one.url) if "/api/search" in one.url else None)
    page.evaluate(
        """() => {
            const held = new DataTransfer();
            held.items.add(new File([new Uint8Array(40 * 2 ** 20)], "vast.jpg", {type: "image/jpeg"}));
            document.dispatchEvent(new DragEvent("drop", {dataTransfer: held, bubbles: true, cancelable: true}));
        }"""
    )
    expect(page.locator("#search-fault")).to_have_text("vast.jpg: expected at most 32 MB, found 40 MB.")
    assert asked == []


def test_options_changed_while_an_answer_is_on_its_way(opened: Open) -> None:
    page = opened()
    waiting: list[Any] = []
    page.route("**/api/search", lambda route: waiting.append(route) if not waiting else route.continue_())
    drop(page, "mine.jpg", photo("animals/cat.jpg"))
    expect(page.locator("#query-name")).to_have_text("mine.jpg")
    expect(page.get_by_role("button", name="Add box")).to_be_disabled()
    page.locator("#k").fill("3")
    page.locator("#k").press("Enter")
    waiting[0].continue_()
    page.wait_for_url("**k=3**")
    expect(page.locator("#hits > li")).to_have_count(3)
    page.go_back()
    page.go_forward()
    expect(page.locator("#hits > li")).to_have_count(3)


def test_two_tabs_at_once(opened: Open) -> None:
    wanted = ("people/astronaut.jpg", "space/rocket.jpg", "animals/cat.jpg")
    pages = [opened(), opened()]
    for turn in range(2):
        for at, page in enumerate(pages):
            drop(page, f"{turn}-{at}.jpg", photo(wanted[turn + at]))
        for at, page in enumerate(pages):
            expect(page.locator("#query-name")).to_have_text(f"{turn}-{at}.jpg")
            expect(page.locator("#hits .name").first).to_have_text(wanted[turn + at])


def test_the_map(opened: Open) -> None:
    page = opened("#/map")
    with contextlib.suppress(Error):
        page.get_by_role("button", name="Compute the map").click(timeout=2000)
    expect(page.locator("#map-status")).to_contain_text("17 images in view")
    canvas = page.locator("#map-canvas")
    page.get_by_role("button", name="Zoom in").click()
    page.wait_for_url("**at=**")
    place = page.url
    canvas.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#query-name")).not_to_have_text("")
    assert "query=r-" in page.url
    page.go_back()
    assert page.url == place
    expect(canvas).to_be_visible()
    page.reload()
    page.wait_for_timeout(700)
    assert page.url == place
    page.get_by_role("button", name="Fit").click()
    expect(page.locator("#map-status")).to_contain_text("17 images in view")
    assert "at=" not in page.url
    # A lasso around everything.
    page.get_by_role("button", name="Lasso").click()
    area = canvas.bounding_box()
    assert area is not None
    corners = [(0.01, 0.01), (0.99, 0.01), (0.99, 0.99), (0.01, 0.99)]
    for at, (x, y) in enumerate(corners):
        page.mouse.move(area["x"] + x * area["width"], area["y"] + y * area["height"])
        if at == 0:
            page.mouse.down()
    page.mouse.up()
    expect(page.locator("#selection-count")).to_have_text("17 images selected")
    expect(page.locator("#selection-list img")).to_have_count(17)
    with page.expect_download() as saved:
        page.get_by_role("button", name="Download names").click()
    names = Path(saved.value.path()).read_text().splitlines()
    assert len(names) == 17 and "people/astronaut.jpg" in names and HOSTILE in names
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#selection")).to_be_hidden()


def test_duplicates(opened: Open) -> None:
    page = opened("#/duplicates?threshold=0.9")
    expect(page.locator("#duplicates-status")).to_contain_text(
        "2 groups: one of each is kept, 2 images marked to remove"
    )
    groups = page.get_by_role("group")
    hubble = groups.filter(has_text="hubble_small.jpg")
    hubble.locator(".twin", has_text="hubble_small.jpg").get_by_role("radio").check()
    with page.expect_download() as saved:
        page.get_by_role("button", name="Export list (CSV)").click()
    lines = Path(saved.value.path()).read_text().splitlines()
    assert lines[0] == "group,action,name" and len(lines) == 5
    actions = {line.split(",", 2)[2]: line.split(",")[1] for line in lines[1:]}
    assert actions["space/hubble_small.jpg"] == "keep" and actions["space/hubble.jpg"] == "remove"
    hubble.get_by_role("link", name="Search with space/hubble.jpg").click()
    assert found(page)[0] == "space/hubble_small.jpg"


def test_duplicates_by_images_and_by_descriptors(opened: Open) -> None:
    page = opened("#/duplicates")
    status, slider = page.locator("#duplicates-status"), page.get_by_label("Least similarity (cosine)", exact=True)
    expect(status).to_contain_text("2 groups: one of each is kept")
    expect(page.get_by_label("Compare", exact=True)).to_have_value("images")
    expect(slider).to_be_hidden()
    page.get_by_label("Compare", exact=True).select_option("descriptors")
    page.wait_for_url("**threshold=0.95")
    expect(slider).to_have_value("0.95")
    expect(status).to_contain_text("group")
    page.get_by_label("Compare", exact=True).select_option("images")
    page.wait_for_url("**#/duplicates")
    expect(status).to_contain_text("2 groups: one of each is kept")
    assert page.locator("#duplicates-notes p").count() == 0


def test_objects_and_classes(opened: Open, make_images: Callable[..., Path], tmp_path: Path) -> None:
    gallery, detector, classifier = make_models(make_images, tmp_path)
    with running(gallery, "--detector", detector, "--classifier", classifier) as at:
        page = opened(at=at)
        drop(page, "cat.jpg", photo("animals/cat.jpg"))
        found(page)
        page.get_by_role("button", name="Classify").click()
        expect(page.locator("#models-status")).to_have_text(re.compile("Best class: (left|right)"))
        page.get_by_role("button", name="Find objects").click()
        expect(page.locator("#models-status")).to_contain_text("objects found")
        objects = page.locator("#models-found button")
        expect(page.locator("#stage .outline.object")).to_have_count(objects.count())
        objects.first.click()
        page.wait_for_url("**box=**")
        found(page)
        x1, y1, x2, y2 = box_of(page)
        assert 0 <= x1 < x2 and 0 <= y1 < y2


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_no_serious_fault_of_accessibility(opened: Open, scheme: str, width: int) -> None:
    page = opened(color_scheme=scheme, viewport={"width": width, "height": 900})
    axe = Axe()

    def check(state: str) -> None:
        found = [one for one in axe.run(page).response["violations"] if one["impact"] in ("serious", "critical")]
        told = [f"{state}: {one['id']}: {one['help']}: {one['nodes'][0]['html'][:200]}" for one in found]
        assert told == []

    expect(page.locator("#sample-list img").first).to_be_visible()
    check("empty")
    drop(page, "mine.jpg", photo("people/astronaut.jpg"))
    found(page)
    page.get_by_label("Also find it as a part of an image").check()
    page.get_by_role("button", name="Add box").click()
    page.wait_for_url("**box=**")
    found(page)
    check("hits")
    page.locator("#hits .view").first.click()
    expect(page.get_by_role("dialog").locator(".heat").first).to_be_visible()
    check("compare")
    page.keyboard.press("Escape")
    drop(page, "x", b"no image", "text/plain")
    expect(page.locator("#search-fault .fault")).to_be_visible()
    check("fault")
    for view in VIEWS[1:]:
        page.goto(page.url.partition("#")[0] + view)
        page.wait_for_timeout(1000)
        check(view)


def test_the_page_is_small(opened: Open, browser: Browser, address: str) -> None:
    context = browser.new_context()
    page = context.new_page()
    answers: list[Response] = []
    page.on("response", lambda answer: answers.append(answer))
    for view in VIEWS:
        page.goto(address + view)
        page.wait_for_load_state("networkidle")
    # Answers on data and thumbnails, sprite sheets among them, grow with the gallery; what is left is the page itself.
    own = [one for one in answers if "/api/" not in one.url and one.headers["content-type"] != "image/jpeg"]
    sizes = {one.url: len(one.body()) for one in own}
    context.close()
    assert len(sizes) > 10 and sum(sizes.values()) < BUDGET, sizes


def test_a_gallery_that_is_replaced_or_moved(library: Path, opened: Open, tmp_path: Path) -> None:
    shutil.copytree(library / "photos", tmp_path / "photos")
    extract_folder(tmp_path / "photos", tmp_path / "f.h5", Recipe(), CPU)
    create_gallery(open_store(tmp_path / "f.h5"), tmp_path / "g")
    with running(tmp_path / "g") as at:
        page = opened("#/search?query=r-0", at=at)
        assert len(found(page)) == 16
        expect(page.locator("#box-help")).to_contain_text("keeps no bins (sppfeat index --keep-bins)")
        shutil.rmtree(tmp_path / "photos" / "space")
        shutil.rmtree(tmp_path / "photos" / "textures")
        shutil.copy(tmp_path / "photos/objects/coins.png", tmp_path / "photos/objects/coins_again.png")
        (tmp_path / "f.h5").unlink()
        extract_folder(tmp_path / "photos", tmp_path / "f.h5", Recipe(), CPU)
        create_gallery(open_store(tmp_path / "f.h5"), tmp_path / "g", overwrite=True)
        page.wait_for_timeout(2500)  # the server looks at the folder every two seconds
        page.locator("#k").fill("20")
        page.locator("#k").press("Enter")
        expect(page.locator("#changed")).to_contain_text("The gallery was changed on disk.")
        expect(page.locator("#gallery-size")).to_have_text("12 images")
        drop(page, "mine.jpg", photo("objects/coins.png"), "image/png")
        page.wait_for_url(lambda url: "query=r-0" not in url)
        expect(page.locator("#hits .name").first).to_have_text(re.compile(r"objects/coins"))
        (tmp_path / "photos").rename(tmp_path / "elsewhere")
        page.reload()
        expect(page.locator("#notes")).to_contain_text("--images DIR")
        expect(page.locator(".gone").first).to_have_text("Image not found")
    with running(tmp_path / "g", "--images", tmp_path / "elsewhere") as at:
        page = opened("#/duplicates?threshold=0.95", at=at)
        expect(page.locator("#groups img").first).to_be_visible()
        expect(page.locator(".gone")).to_have_count(0)
        page = opened("#/search?query=r-0", at=at)
        assert len(found(page)) == 11
        expect(page.locator(".gone")).to_have_count(0)
        expect(page.locator("#notes p")).to_have_count(0)
