"""Drawings of detections: labels, files that are never replaced, and pages."""

from __future__ import annotations

import errno
import html
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from packing import write_tar
from PIL import Image, ImageDraw

from sppfeat import ImageError, ReportError
from sppfeat.detection.detecting import Detections
from sppfeat.detection.detections_page import DetectionPage
from sppfeat.detection.detector import Detector, detection_recipe, save_detector
from sppfeat.detection.drawing import (
    DrawingFolder,
    class_color,
    draw_detections,
    drawing_files,
    layout_label,
    place_labels,
)
from sppfeat.images import find_images
from sppfeat.windows.selective_search import ProposalOptions

Blind = tuple[list[str | Path], Path]
SIZE = (160, 120)


def found_at(*boxes: tuple[float, float, float, float], label: int = 0, score: float = -0.25) -> Detections:
    count = len(boxes)
    scores = np.linspace(score, score - 0.2, count).astype(np.float32)
    return Detections(
        0, np.full(count, label), scores, scores, np.array(boxes, float).reshape(-1, 4), SIZE, count, 0, None
    )


FOUND = found_at((20, 30, 120, 100))


def detector_of(*classes: str) -> Detector:
    recipe = detection_recipe(backbone="timm:test_resnet", weights="random", scales=(64,), levels=(1,))
    return Detector(
        recipe=recipe,
        weights_sha256="0" * 64,
        classes=list(classes),
        weights=np.zeros((len(classes), 96), np.float32),
        biases=np.zeros(len(classes), np.float32),
        box_weights=None,
        box_biases=None,
        proposals=ProposalOptions(),
        training={},
        versions={},
    )


@pytest.fixture
def images(tmp_path: Path) -> Callable[..., Path]:
    """A folder `in` with images of these names."""

    def make(*names: str, folder: str = "in") -> Path:
        for number, name in enumerate(names):
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", SIZE, (number, 90, 90)).save(path, "PNG")
        return tmp_path / folder

    return make


def draw_all(source: Path, folder: Path, *, overwrite: bool = False) -> list[str]:
    """Draw on all images of a folder; the relative paths of the drawings."""
    listed = find_images([source])
    drawings = DrawingFolder(str(folder), [str(source)], overwrite=overwrite)
    drawings.plan(listed)
    for item in listed.items:
        drawings.draw(item, item.name, FOUND, ["cat"])
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_images_of_an_archive_are_drawn_on(images: Callable[..., Path], tmp_path: Path) -> None:
    content = (images("a.png") / "a.png").read_bytes()
    write_tar(tmp_path / "x.tar", [("b/c.png", content), ("../up.png", content), ("b/c.png", content)])
    drawn = draw_all(tmp_path / "x.tar", tmp_path / "out")
    assert drawn == [r"x.tar/\x2e./up.png.jpg", "x.tar/b/c.png.jpg", "x.tar/b/c.png~2.jpg"]


def cover(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((np.minimum(a[2:], b[2:]) >= np.maximum(a[:2], b[:2])).all())


@pytest.mark.parametrize("seed", range(5))
def test_labels_do_not_cover_each_other_where_there_is_room(seed: int) -> None:
    """Twelve objects in nearly the same place, and one at each edge."""
    generator = np.random.default_rng(seed)
    near = np.array([200, 150, 420, 330]) + generator.integers(-12, 13, (8, 4))
    edges = np.array([[0, 0, 90, 70], [560, 0, 639, 90], [0, 400, 100, 479], [500, 410, 639, 479]])
    boxes = np.concatenate([near, edges])
    sizes = [(int(width), int(height)) for width, height in generator.integers((70, 20), (150, 30), (len(boxes), 2))]
    places = place_labels(sizes, boxes, (640, 480))
    labels = np.concatenate([places, places + np.array(sizes)], 1)
    assert not [(a, b) for a in range(len(labels)) for b in range(a) if cover(labels[a], labels[b])]
    assert (labels >= 0).all() and (labels[:, 2:] < [640, 480]).all()
    # The best one has the place above its box, where it has always been.
    assert places[0].tolist() == [boxes[0, 0], boxes[0, 1] - sizes[0][1] - 1]


def test_labels_without_room_are_still_on_the_image() -> None:
    places = place_labels([(90, 30)] * 40, np.tile([0, 0, 99, 49], (40, 1)), (100, 50))
    assert len(np.unique(places, axis=0)) > 1 and (places >= 0).all() and (places + [90, 30] < [100, 50]).all()


def test_a_label_keeps_its_score_and_what_a_font_lacks() -> None:
    pen = ImageDraw.Draw(Image.new("RGB", (9, 9)))
    # No font has these: they are escaped rather than lost.
    label = layout_label(pen, "a\U0010fffe\x1b[31m\udc80", 0.5, 16, 900)
    assert [text for _, text in label.texts] == [r"a\U0010fffe\x1b[31m\udc80", "0.50"] and label.sign is None
    for room in (200, 90, 80):
        label = layout_label(pen, "a very long name of a class, " * 1000, -1.5, 16, room)
        (_, name), (left, score) = label.texts
        assert label.size[0] <= room and name.endswith("\u2026") and score == "1.50"
        assert label.sign is not None and label.sign[2] < left < room


@pytest.mark.parametrize("side", [60, 160, 640, 3000])
def test_a_negative_score_has_a_sign_that_can_be_seen(side: int) -> None:
    """A white bar in the label's color, of two rows or more, and about half as wide as the type is high."""
    box = np.array([[1, side / 2, side - 2, side - 2]])
    score = np.array([-0.25], np.float32)
    found = Detections(0, np.zeros(1, int), score, score, box, (side, side), 1, 0, None)
    plain = Image.new("RGB", (side, side))
    size = max(11, round(min(side / 24, side / 9)))
    label = layout_label(ImageDraw.Draw(plain), "cat", -0.25, size, side)
    ((x, y),) = place_labels([label.size], np.rint(box).astype(int), (side, side)).tolist()
    assert label.sign is not None
    left, top, right, bottom = np.add(label.sign, [x, y, x, y]).tolist()
    drawn = np.asarray(draw_detections(plain, found, ["cat"]))
    assert (drawn[top : bottom + 1, left : right + 1] == 255).all() and bottom > top and 2 * (right - left) > size - 4
    for above_or_below in (top - 1, bottom + 1):
        assert (drawn[above_or_below, left : right + 1] == class_color(0)).all()


def test_drawings_have_unique_names() -> None:
    names = ["a.png", "a.png.jpg", "a.jpg", "A.jpg", "b/a.jpg", "c.gif", "c.png", "d.png", "d.png.jpg/e.png"]
    names += ["é" * 125 + ".png", "é" * 126 + ".png", *("x" * 251 + end for end in (".jpg", ".png", ".gif"))]
    names += [r"q\\.jpg"]
    files = drawing_files(names)
    assert files["a.jpg"] == "a.jpg" and files["b/a.jpg"] == "b/a.jpg" and files[r"q\\.jpg"] == "q\\.jpg"
    assert (files["c.gif"], files["c.png"]) == ("c.gif.jpg", "c.png.jpg")
    assert files["a.png"] == "a.png.jpg" and files["a.png.jpg"] == "a.png~2.jpg"
    assert files["d.png"] == "d.png~2.jpg"  # `d.png.jpg` is the folder of other drawings
    assert len({file.casefold() for file in files.values()}) == len(names)
    assert max(len(os.fsencode(os.path.basename(file))) for file in files.values()) == 255


def test_names_with_the_same_start_take_linear_time() -> None:
    files = drawing_files(["x" * 250 + f"{number:05}.png" for number in range(20_000)])
    assert len(set(files.values())) == 20_000


def test_drawing_into_a_folder(images: Callable[..., Path], tmp_path: Path) -> None:
    long = "n" * 250 + ".png"
    source = images("a/IMG_1.jpg", "b/IMG_1.jpg", "c.png", "c.jpg", long)
    drawn = draw_all(source, tmp_path / "out")
    assert drawn == ["a/IMG_1.jpg", "b/IMG_1.jpg", "c.jpg", "c.png.jpg", "n" * 250 + "..jpg"]
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.jpg")}
    with pytest.raises(ReportError, match=r"already exists, and 4 more; choose another folder, or --overwrite"):
        draw_all(source, tmp_path / "out")
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.jpg")}
    draw_all(source, tmp_path / "out", overwrite=True)
    assert len(list((tmp_path / "out").rglob("*"))) == 5 + 2  # and their two folders; nothing partial


def test_nothing_but_a_drawing_is_ever_replaced(images: Callable[..., Path], tmp_path: Path) -> None:
    source, other, out = images("a.jpg", "b/c.jpg"), tmp_path / "private.jpg", tmp_path / "out"
    Image.new("RGB", (8, 8)).save(other)
    content = other.read_bytes()
    out.mkdir()
    (out / "a.jpg").write_bytes(content)
    with pytest.raises(ReportError, match=r"a\.jpg: expected a drawing or no file, found another file; it is left"):
        draw_all(source, out, overwrite=True)
    (out / "a.jpg").unlink()
    (out / "a.jpg").symlink_to(other)
    for overwrite, message in ((False, "already exists"), (True, "expected a drawing or no file")):
        with pytest.raises(ReportError, match=message):
            draw_all(source, out, overwrite=overwrite)
    (out / "a.jpg").unlink()
    (out / "b").symlink_to(source / "b")
    inside = (source / "b/c.jpg").read_bytes()
    for overwrite in (False, True):
        with pytest.raises(ReportError, match="expected a folder to draw into, found a link; it is not followed"):
            draw_all(source, out, overwrite=overwrite)
    assert other.read_bytes() == content and (source / "b/c.jpg").read_bytes() == inside


def test_drawings_are_never_among_the_images(images: Callable[..., Path], tmp_path: Path) -> None:
    """Not in their own folder, not below it, and not from above: `in/in/a.jpg` would be drawn onto `in/a.jpg`."""
    source = images("a.jpg", "in/a.jpg")
    (tmp_path / "link").symlink_to(source)
    folders = [source, source / "drawn", source / "in", tmp_path, tmp_path / "link", tmp_path / "link/drawn"]
    before = sorted(tmp_path.rglob("*"))
    for overwrite in (False, True):
        for folder in folders:
            with pytest.raises(ReportError, match="would mix drawings with the images in .*; choose another folder"):
                draw_all(source, folder, overwrite=overwrite)
        one = str(source / "a.jpg")
        with pytest.raises(ReportError, match="would mix drawings with the images in"):
            DrawingFolder(str(source), [one], overwrite=overwrite).plan(find_images([one]))
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_that_cannot_be_drawn_into(images: Callable[..., Path], tmp_path: Path) -> None:
    source = images("a.jpg")
    (tmp_path / "file").write_text("")
    for folder, message in ((tmp_path / "file", "expected a folder to draw into"), (Path("/proc/x"), "/proc/x: ")):
        with pytest.raises(ReportError, match=message):
            draw_all(source, folder)
    with pytest.raises(ReportError, match=r"/proc/drawing: cannot be written"):
        draw_all(source, Path("/proc"))


def test_one_image_that_cannot_be_drawn(
    images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = images("a.jpg", "b.jpg")
    listed = find_images([source])
    drawings = DrawingFolder(str(tmp_path / "out"), [str(source)], overwrite=False)
    drawings.plan(listed)
    (source / "a.jpg").unlink()
    with pytest.raises(ImageError, match="no such file"):
        drawings.draw(str(source / "a.jpg"), "a.jpg", FOUND, ["cat"])
    (tmp_path / "out/b.jpg").write_text("of another program")
    with pytest.raises(ImageError, match="exists by now; it is left as it is"):
        drawings.draw(str(source / "b.jpg"), "b.jpg", FOUND, ["cat"])
    (tmp_path / "out/b.jpg").unlink()
    wide = tmp_path / "wide.png"
    Image.new("L", (66_000, 2)).save(wide)
    with pytest.raises(ImageError, match="cannot be drawn"):  # JPEG ends at 65,535
        drawings.draw(str(wide), "b.jpg", FOUND, ["cat"])

    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ReportError, match=r"b\.jpg: cannot be written: the disk is full"):
        drawings.draw(str(source / "b.jpg"), "b.jpg", FOUND, ["cat"])
    assert not list((tmp_path / "out").iterdir())


HOSTILE = '<script>alert("x")</script>\x1b[31m\'&'


def test_a_page_of_detections(images: Callable[..., Path], tmp_path: Path) -> None:
    """Names are escaped, and a missing image leaves a placeholder."""
    source = images("there.jpg", "gone.jpg", "none.jpg")
    page = DetectionPage(detector_of(HOSTILE, "größe"))
    page.add(str(source / "there.jpg"), "there.jpg", FOUND)
    page.add(str(source / "gone.jpg"), "<b>gone.jpg", found_at((20, 30, 120, 100), label=1, score=-0.4))
    page.add(str(source / "none.jpg"), "none.jpg", found_at())
    (source / "gone.jpg").unlink()
    page.write(tmp_path / "page.html", title=f"Detections of {HOSTILE}", note="score at least -0.5")
    text = (tmp_path / "page.html").read_text()
    assert text.count("<figure") == 2 and text.count("data:image/jpeg") == 1 and text.count("image not available") == 1
    assert "<script" not in text and "<b>gone" not in text and html.escape("<b>gone.jpg") in text
    assert "größe" in text and text.count("&lt;script&gt;") == 5  # title, heading, legend, alternative text, caption


@pytest.fixture
def blind(tmp_path: Path, images: Callable[..., Path]) -> Blind:
    """Arguments that detect in three images with a detector that scores every window -0.25, and the images' folder."""
    from dataclasses import replace

    from sppfeat.extraction.pipeline import Describer

    source = images("a.jpg", "b.jpg", "c/a.jpg")
    model = detector_of("red <b>")
    weights = Describer(model.recipe).weights_sha256
    save_detector(replace(model, weights_sha256=weights, biases=np.full(1, -0.25, np.float32)), tmp_path / "d.h5")
    (tmp_path / "w.json").write_text(json.dumps({n: [[10, 10, 80, 80]] for n in ("a.jpg", "b.jpg", "c/a.jpg")}))
    return ["detect", tmp_path / "d.h5", source, "--windows", tmp_path / "w.json"], source


def test_results_come_before_what_is_written(
    blind: Blind, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full when drawings and the page are written costs only these."""
    arguments, _ = blind

    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    real_replace = os.replace

    def full_too(source: str | Path, target: str | Path) -> None:
        if str(target).endswith(".html"):
            full(Path(source), Path(target))
        real_replace(source, target)

    monkeypatch.setattr(Path, "replace", full)
    monkeypatch.setattr(os, "replace", full_too)
    page, out = tmp_path / "p.html", tmp_path / "out"
    assert call([*arguments, "--draw", out, "--html", page, "--json"], monkeypatch) == 1
    shown = capsys.readouterr()
    results = json.loads(shown.out)["results"]
    assert [one["image"] for one in results] == ["a.jpg", "b.jpg", "c/a.jpg"]
    assert results[0]["detections"] == [{"label": "red <b>", "score": -0.25, "box": [10.0, 10.0, 80.0, 80.0]}]
    lines = [line for line in shown.err.splitlines() if line.startswith("sppfeat: ")]
    assert len(lines) == 2
    assert all(re.search(r"(a\.jpg|p\.html): cannot be written: the disk is full", line) for line in lines)
    assert not page.exists() and not [path for path in out.rglob("*") if path.is_file()]


def call(arguments: list[str | Path], monkeypatch: pytest.MonkeyPatch) -> int:
    """The command line in this process; its exit code."""
    import sys

    from sppfeat_cli import main

    monkeypatch.setattr(sys, "argv", ["sppfeat", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_detect_refuses_before_it_works(
    blind: Blind, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, source = blind
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.html").mkdir()
    for more, message in (
        (["--draw", tmp_path / "file"], "file: expected a folder to draw into"),
        (["--draw", "/proc"], "/proc/drawing: cannot be written"),
        (["--draw", source / "a"], "would mix drawings with the images"),
        (["--html", tmp_path / "none/p.html"], "p.html: its folder .*none does not exist"),
        (["--html", tmp_path / "folder.html"], "folder.html: expected a file to write to, found a folder"),
        (["--html", source / "a.jpg", "--overwrite"], "a.jpg: expected an HTML page or a new file, found another file"),
        (["--html", tmp_path / "d.h5", "--overwrite"], "d.h5: expected an HTML page or a new file, found another file"),
        (["--html", "/proc/p.html"], "/proc/p.html: cannot be written"),
        (["--html", tmp_path / ("p" * 250 + ".html")], "cannot be written: File name too long"),
    ):
        assert call([*arguments, *more], monkeypatch) == 1
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.count("\n") == 1 and re.match("sppfeat: .*" + message, shown.err), (
            shown.err
        )


def test_drawing_by_command_line(
    blind: Blind, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn twice only with --overwrite; an image that vanished is named, and the others are drawn."""
    from sppfeat.detection import drawing

    (arguments, source), out = blind, tmp_path / "out"
    assert call([*arguments, "--draw", out], monkeypatch) == 0
    assert capsys.readouterr().out.splitlines()[0] == "a.jpg\tred <b>\t-0.250\t10,10,80,80"
    assert call([*arguments, "--draw", out], monkeypatch) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and "out/a.jpg: already exists, and 2 more" in shown.err
    real = drawing.read_image

    def vanishing(path: str) -> object:
        (source / "b.jpg").unlink(missing_ok=True)
        return real(path)

    monkeypatch.setattr(drawing, "read_image", vanishing)
    page = tmp_path / "p.html"
    assert call([*arguments, "--draw", out, "--overwrite", "--html", page, "--json"], monkeypatch) == 3
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert document["not_drawn"] == {"b.jpg": "no such file"} and len(document["results"]) == 3
    assert "not drawn: b.jpg: no such file" in shown.err and "image not available" in page.read_text()


def luminance(color: tuple[int, ...]) -> float:
    """Relative luminance, by WCAG 2."""
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_colors_of_classes_are_distinct_and_readable() -> None:
    """White text on them, and boxes of them on light and dark pages (WCAG: 4.5 and 3 to 1)."""
    colors = [class_color(label) for label in range(80)]
    assert len(set(colors)) == 80
    for color in colors:
        light = luminance(color) + 0.05
        assert 1.05 / light > 4.5 and light / (luminance((0x1C, 0x22, 0x29)) + 0.05) > 3
    for one, other in zip(colors[:20], colors[1:21], strict=True):
        assert np.abs(np.subtract(one, other)).max() > 60


def test_weak_detections_are_dimmed() -> None:
    """Drawn as any other, half as strong; the others stay."""
    plain = Image.new("RGB", SIZE)
    found = found_at((10, 40, 60, 100), (90, 40, 140, 100), score=0.6)  # scores 0.6 and 0.4
    full, dimmed = (np.asarray(draw_detections(plain, found, ["cat"], weak=weak)).astype(int) for weak in (None, 0.5))
    assert (full[:, :75] == dimmed[:, :75]).all() and full[70, 91].max() > 90
    assert np.abs(dimmed[:, 80:] - full[:, 80:] / 2).max() <= 1
    only = np.asarray(draw_detections(plain, found, ["cat"], weak=0.1)).astype(int)
    assert (only == full).all()


def test_the_page_of_detections_says_what_is_cut_and_which_color_is_whose(
    images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sppfeat.detection.detections_page.MAX_IMAGES", 2)
    names = ["x/a.jpg", "x/b.jpg", "x/c.jpg"]
    source = images(*names)
    page = DetectionPage(detector_of("cat", "dog"))
    for at, name in enumerate(names):
        page.add(str(source / name), name, found_at((20, 30, 120, 100), label=at % 2, score=0.9 - at / 10))
    page.write(tmp_path / "page.html", title="t", note="n", command="sppfeat detect d.h5")
    text = (tmp_path / "page.html").read_text()
    assert "2 of 3 images shown, the best scores first" in text and text.count("<figure") == 2
    assert [re.findall(r"background: (#\w+)", text)[at] for at in (0, 1)] == [
        "#{:02x}{:02x}{:02x}".format(*class_color(label)) for label in (0, 1)
    ]
    assert re.findall(r'title="(x/\w\.jpg)">(\w\.jpg)<', text) == [("x/a.jpg", "a.jpg"), ("x/b.jpg", "b.jpg")]
    assert re.findall(r'href="(.*?)"', text)[0] == f"./{(source / names[0]).relative_to(tmp_path)}"
    assert "<code>sppfeat detect d.h5</code>" in text and "score below 0" in text
