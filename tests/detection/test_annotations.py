"""Annotations: VOC and COCO, and everything that can be wrong with them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from voc_xml import xml

from sppfeat import UsageError
from sppfeat.detection.annotations import (
    parse_xml,
    read_annotations,
    read_coco,
    read_voc,
    read_voc_files,
    select_classes,
)


@pytest.fixture
def make_pair(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Folders of images of 80 x 60 and of annotations, from XML by stem; None: the image is missing."""

    def make(annotations: dict[str, str], missing: tuple[str, ...] = ()) -> tuple[Path, Path]:
        images, texts = tmp_path / "images", tmp_path / "xml"
        images.mkdir()
        texts.mkdir()
        Image.new("RGB", (80, 60)).save(images / "sound.png")
        (texts / "sound.xml").write_text(xml(("cat", 1, 1, 80, 60)))
        for stem, text in annotations.items():
            (texts / f"{stem}.xml").write_text(text)
            if stem not in missing:
                Image.new("RGB", (80, 60)).save(images / f"{stem}.png")
        return images, texts

    return make


def test_boxes_count_from_zero(make_pair: Callable[..., tuple[Path, Path]]) -> None:
    images, texts = make_pair({"a": xml(("dog", 11, 21, 30, 40), ("cat", 1, 1, 80, 60)), "b": xml(difficult=1)})
    found = read_voc_files(images, texts)
    assert found.classes == ["cat", "dog"] and list(found.images) == ["a.png", "b.png", "sound.png"]
    one = found.images["a.png"]
    assert one.boxes.tolist() == [[10, 20, 29, 39], [0, 0, 79, 59]] and one.labels == ["dog", "cat"]
    assert one.size == (80, 60) and not one.difficult.any()
    assert found.notes == ["b.png: b.xml has no valid object; the image counts as empty"] and not found.problems


@pytest.mark.parametrize(
    ("text", "note", "left"),
    [
        (xml(("cat", 30, 10, 20, 40)), "x.png: box 0 (cat) 29,9,19,39: inverted; skipped", 0),
        (xml(("cat", 20, 10, 19, 40)), "x.png: box 0 (cat) 19,9,18,39: empty; skipped", 0),
        (xml(("cat", 20, 10, 20, 40)), None, 1),  # one pixel wide
        (xml(("cat", 80, 60, 80, 60)), None, 1),  # the last pixel
        (xml(("cat", 82, 10, 82, 40)), "x.png: box 0 (cat) 81,9,81,39: outside the image of 80 x 60; skipped", 0),
        (
            xml(("cat", 20, 10, 99, 40)),
            "x.png: box 0 (cat) 19,9,98,39: extends beyond the image of 80 x 60; clipped",
            1,
        ),
        (
            xml(("cat", 200, 10, 300, 40)),
            "x.png: box 0 (cat) 199,9,299,39: outside the image of 80 x 60; skipped",
            0,
        ),
        (xml(("", 20, 10, 30, 40)), "x.png: object 0 (unnamed): expected a name and a bndbox; skipped", 0),
        (xml(("cat", float("nan"), 1, 2, 3)), "x.png: object 0 (cat): expected a name and a bndbox; skipped", 0),
        ("<annotation><object><name>cat</name></object></annotation>", "x.png: object 0 (cat): expected a name", 0),
        (xml(), "x.png: x.xml has no valid object; the image counts as empty", 0),
        (xml(("cat", 0, 0, 80, 60)), None, 1),  # from 0: a pixel over the border is not an error
        (xml(("cat", 2, 2, 81, 61)), None, 1),
        (xml(("cat", 1, 1, 9, 9), size=None), None, 1),
        (xml(("cat", 1, 1, 9, 9), size=(0, 0)), None, 1),
    ],
)
def test_suspicious_boxes_are_named(
    make_pair: Callable[..., tuple[Path, Path]], text: str, note: str | None, left: int
) -> None:
    found = read_voc_files(*make_pair({"x": text}))
    assert len(found.images["x.png"].boxes) == left
    if note is None:
        assert not found.notes
    else:
        assert any(line.startswith(note) for line in found.notes), found.notes


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (xml(("cat", 1, 1, 9, 9), size=(60, 80)), "annotated as 60 x 80 pixels, found 80 x 60: its boxes may be for"),
        ("<annotation>", "expected an XML annotation, found: no element found"),
        ("", "expected an XML annotation, found"),
        ("<html></html>", "expected an <annotation>, found <html>"),
        (
            '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>',
            "without a document type",
        ),
        ("<!DOCTYPE annotation><annotation/>", "without a document type or entities"),
    ],
)
def test_unusable_annotations(make_pair: Callable[..., tuple[Path, Path]], text: str, problem: str) -> None:
    found = read_voc_files(*make_pair({"x": text}))
    assert list(found.images) == ["sound.png"] and problem in found.problems["x.png"]


def test_an_image_that_is_missing_and_images_without_annotation(make_pair: Callable[..., tuple[Path, Path]]) -> None:
    images, texts = make_pair({"gone": xml(("cat", 1, 1, 9, 9))}, missing=("gone",))
    Image.new("RGB", (9, 9)).save(images / "extra.png")
    found = read_voc_files(images, texts)
    assert found.problems == {"gone.jpg": "no such file"}
    assert found.notes == ["images without an annotation are skipped: 1, such as extra.png"]


def test_a_rotated_image_whose_annotation_is_not(make_pair: Callable[..., tuple[Path, Path]]) -> None:
    images, texts = make_pair({})
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 60)).save(images / "t.jpg", exif=exif)
    (texts / "t.xml").write_text(xml(("cat", 1, 1, 9, 9)))
    assert "(its EXIF rotates it)" in read_voc_files(images, texts).problems["t.jpg"]


def test_an_expanding_document_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    path.write_text(f'<!DOCTYPE a [<!ENTITY e0 "lol">{entities}]><annotation>&e11;</annotation>')
    with pytest.raises(UsageError, match="expected XML without a document type"):
        parse_xml(str(path))


def test_the_voc_layout(tmp_path: Path) -> None:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for number in (1, 2, 3):
        Image.new("RGB", (80, 60)).save(tmp_path / f"JPEGImages/{number}.jpg")
        (tmp_path / f"Annotations/{number}.xml").write_text(
            xml(("cat", 1, 1, 9 + number, 9), difficult=int(number == 2))
        )
    (tmp_path / "ImageSets/Main/train.txt").write_text("3\n1 -1\n\n9\n")
    (tmp_path / "ImageSets/Main/test.txt").write_text("2\n")
    (tmp_path / "ImageSets/Main/cat_test.txt").write_text("2 1\n")
    (tmp_path / "ImageSets/Main/empty.txt").write_text("\n")
    found = read_voc(tmp_path, "train")
    assert list(found.images) == ["3.jpg", "1.jpg"] and "9.jpg" in found.problems
    assert read_annotations(str(tmp_path), split="test").images["2.jpg"].difficult.tolist() == [True]
    with pytest.raises(UsageError, match="split 'val', found none; available: empty, test, train"):
        read_voc(tmp_path, "val")
    with pytest.raises(UsageError, match="expected images, found an empty list"):
        read_voc(tmp_path, "empty")
    with pytest.raises(UsageError, match="expected a VOC folder such as VOC2007, .* pass --images and --annotations"):
        read_voc(tmp_path / "ImageSets", "train")


def coco(**changes: object) -> str:
    document = {
        "images": [{"id": 7, "file_name": "sub/a.png", "width": 80, "height": 60}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
        "annotations": [
            {"image_id": 7, "category_id": 5, "bbox": [10, 20, 5.5, 8], "iscrowd": 0},
            {"image_id": 7, "category_id": 3, "bbox": [0, 0, 80, 60], "iscrowd": 1},
        ],
    }
    return json.dumps(document | changes)


def test_coco(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (80, 60)).save(tmp_path / "sub/a.png")
    (tmp_path / "c.json").write_text(coco())
    found = read_annotations(images=str(tmp_path), annotations=str(tmp_path / "c.json"))
    one = found.images["sub/a.png"]
    assert one.boxes.tolist() == [[10, 20, 14.5, 27], [0, 0, 79, 59]] and one.labels == ["dog", "cat"]
    assert one.crowd.tolist() == [False, True] == one.difficult.tolist() and found.classes == ["cat", "dog"]
    assert not found.notes and not found.problems
    odd = [
        {"image_id": 7, "category_id": 4, "bbox": [1, 2, 3, 4]},
        {"image_id": 7, "category_id": 3, "bbox": [1, 2, 0, 4]},
        {"image_id": 7, "category_id": 3, "bbox": [1, 2, 3]},
        {"image_id": 8, "category_id": 3, "bbox": [1, 2, 3, 4]},
        {"image_id": 7, "category_id": 3},
    ]
    (tmp_path / "c.json").write_text(coco(annotations=odd))
    found = read_coco(tmp_path / "c.json", tmp_path)
    assert not len(found.images["sub/a.png"].boxes) and len(found.notes) == 5
    assert "annotation 0: unknown category_id 4; skipped" in found.notes[1]


def test_coco_classes_may_have_numbers_for_names(tmp_path: Path) -> None:
    """A name is never mistaken for a category id, or for a number: `01` is another class than `1`."""
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (80, 60)).save(tmp_path / "sub/a.png")
    categories = [{"id": 1, "name": "2"}, {"id": 2, "name": "1"}, {"id": 3, "name": "01"}, {"id": 4, "name": 7}]
    boxes = [{"image_id": 7, "category_id": number, "bbox": [number, 0, 9, 9]} for number in (1, 2, 3, 4)]
    (tmp_path / "c.json").write_text(coco(categories=categories, annotations=boxes))
    found = read_coco(tmp_path / "c.json", tmp_path)
    one = found.images["sub/a.png"]
    assert found.classes == ["2", "1", "01", "7"] and one.labels == ["2", "1", "01", "7"] and not found.notes
    assert one.boxes[:, 0].tolist() == [1, 2, 3, 4]
    chosen = select_classes(found, ["1"])
    assert chosen.images["sub/a.png"].boxes[:, 0].tolist() == [2] and chosen.classes == ["1"]
    assert [note.split(":")[0] for note in chosen.notes] == [
        f"class '{name}' is not selected" for name in ("01", "2", "7")
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a COCO file with images, annotations, categories"),
        ("[]", "expected a COCO file with images, annotations, categories"),
        ('{"images": []}', "expected a COCO file with images, annotations, categories"),
        (coco(categories=[{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]), "unique category names"),
        (coco(images=[{"id": 7, "file_name": "../a.png"}]), "file names relative to the images, found '../a.png'"),
        (
            coco(images=[{"id": 7, "file_name": "no.png"}]),
            "found none that is usable; the first: no.png: no such file",
        ),
        (coco(images=[]), "found none that is usable"),
    ],
)
def test_bad_coco(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)):
        read_coco(tmp_path / "c.json", tmp_path)


def test_classes_are_selected_and_the_others_named(make_pair: Callable[..., tuple[Path, Path]]) -> None:
    found = read_voc_files(*make_pair({"a": xml(("dog", 1, 1, 9, 9), ("cat", 1, 1, 9, 9), ("dog", 3, 3, 9, 9))}))
    chosen = select_classes(found, ["cat", "cow"])
    assert chosen.images["a.png"].labels == ["cat"] and len(chosen.images["a.png"].boxes) == 1
    with pytest.raises(UsageError, match="unknown class 'do': expected one of .*dog"):
        select_classes(found, ["do"])
    assert chosen.classes == ["cat", "cow"] and chosen.notes == ["class 'dog' is not selected: 2 of its boxes skipped"]
    assert found.images["a.png"].labels == ["dog", "cat", "dog"]


def test_what_is_asked_for_must_be_clear(tmp_path: Path) -> None:
    for arguments in ({}, {"images": "x"}, {"annotations": "x"}, {"root": "a", "images": "b", "annotations": "c"}):
        with pytest.raises(UsageError, match="expected the root of a VOC layout, or both"):
            read_annotations(**arguments)
    with pytest.raises(UsageError, match="--split requires a VOC layout"):
        read_annotations(images=str(tmp_path), annotations=str(tmp_path), split="test")


def test_real_annotations(shared: Path) -> None:
    raccoon = shared / "data" / "raccoon"
    found = read_voc_files(raccoon / "images", raccoon / "annotations")
    assert len(found.images) == 200 and found.classes == ["raccoon"] and not found.problems
    assert sum(len(one.boxes) for one in found.images.values()) == 217
    test = read_voc(shared / "data" / "voc2007-subset" / "VOC2007", "test")
    assert len(test.images) == 200 and len(test.classes) == 20
    assert any(one.difficult.any() for one in test.images.values())
    assert np.isfinite(np.concatenate([one.boxes for one in test.images.values()])).all()


@pytest.mark.parametrize(
    ("inside", "what"),
    [("<object/>" * 10_001, "objects"), ("<part/>" * 300_001, "elements"), ("<a>" * 40 + "</a>" * 40, "levels")],
)
def test_an_xml_file_that_would_expand_is_refused(tmp_path: Path, inside: str, what: str) -> None:
    (tmp_path / "a.xml").write_text(f"<annotation>{inside}</annotation>")
    with pytest.raises(UsageError, match=f"at most [0-9]+ {what}, found more"):
        parse_xml(str(tmp_path / "a.xml"))


@pytest.mark.parametrize("one", ["a\0b", "../../a", "/etc/passwd"])
def test_a_list_of_ids_that_lead_elsewhere_is_refused(tmp_path: Path, one: str) -> None:
    for place in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text(f"{one}\n")
    with pytest.raises(UsageError, match="expected image ids"):
        read_voc(tmp_path, "train")
