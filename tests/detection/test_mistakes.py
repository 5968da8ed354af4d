"""The mistakes of a detector: each of one kind, the most confident and the largest first, and on the page."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sppfeat.detection.annotations import AnnotatedImages, Annotation
from sppfeat.detection.average_precision import Objects, rank_detections, voc_ranking
from sppfeat.detection.mistakes import BACKGROUND, CONFUSED, MISPLACED, REPEATED, SHOWN, Mistakes, find_mistakes

CLASSES = ["cat", "dog"]


def annotation(*objects: tuple[str, list[float]], difficult: tuple[bool, ...] | None = None) -> Annotation:
    return Annotation(
        boxes=np.array([box for _, box in objects], float).reshape(-1, 4),
        labels=[label for label, _ in objects],
        difficult=np.array(difficult or [False] * len(objects), bool),
        crowd=np.zeros(len(objects), bool),
        size=(200, 100),
    )


def mistakes(
    images: dict[str, Annotation],
    found: dict[str, list[tuple[str, list[float], float]]],
    least: float,
    root: str = "/x",
) -> Mistakes:
    objects: list[list[Objects]] = []
    for label in CLASSES:
        of_class = []
        for name, one in images.items():
            own = np.array([known == label for known in one.labels], bool)
            mine = [(box, score) for what, box, score in found.get(name, []) if what == label]
            boxes = np.array([box for box, _ in mine], float).reshape(-1, 4)
            scores = np.array([score for _, score in mine])
            of_class.append(
                Objects(one.boxes[own], one.difficult[own], one.crowd[own], boxes, 10 * scores, None, scores)
            )
        objects.append(of_class)
    rankings = [rank_detections(each) for each in objects]
    kept = [int((each.scores >= 10 * least).sum()) for each in rankings]
    return find_mistakes(AnnotatedImages(root, images, CLASSES), CLASSES, objects, rankings, kept, 0.5)


def test_kinds_of_wrong_detections() -> None:
    images = {"a.jpg": annotation(("cat", [0, 0, 49, 49]), ("dog", [100, 0, 149, 49]))}
    found = [
        ("cat", [0, 0, 49, 49], 0.95),  # correct
        ("cat", [0, 0, 49, 45], 0.9),
        ("cat", [20, 0, 69, 49], 0.8),  # 30 of 70 columns
        ("cat", [100, 0, 149, 49], 0.7),
        ("dog", [120, 60, 199, 99], 0.6),
        ("dog", [100, 0, 149, 49], 0.2),  # below the threshold: the dog is missed
    ]
    done = mistakes(images, {"a.jpg": [(label, list(map(float, box)), score) for label, box, score in found]}, 0.5)
    assert [(one.label, one.score, one.kind, one.other) for one in done.wrong] == [
        ("cat", 0.9, REPEATED, "cat"),
        ("cat", 0.8, MISPLACED, "cat"),
        ("cat", 0.7, CONFUSED, "dog"),
        ("dog", 0.6, BACKGROUND, None),
    ]
    assert done.kinds == {REPEATED: 1, MISPLACED: 1, CONFUSED: 1, BACKGROUND: 1} and done.wrong_count == 4
    assert [one.overlap for one in done.wrong] == pytest.approx([0.92, 3 / 7, 1, 0])
    (missed,) = done.missed
    assert (missed.label, done.missing, missed.overlap, missed.score) == ("dog", 1, 1, 0.2)
    assert missed.box.tolist() == [100, 0, 149, 49]
    assert mistakes(images, {}, 0.5).missing == 2 and mistakes(images, {}, 0.5).missed[0].near is None


def test_difficult_objects_are_no_mistakes() -> None:
    """Neither what is found on one is wrong, nor is one missed."""
    images = {"a.jpg": annotation(("cat", [0, 0, 49, 49]), ("cat", [100, 0, 149, 49]), difficult=(True, True))}
    done = mistakes(images, {"a.jpg": [("cat", [0, 0, 49, 49], 0.9)]}, 0.5)
    assert (done.wrong, done.missed, done.missing, done.wrong_count) == ([], [], 0, 0)


def test_the_most_confident_and_the_largest_come_first() -> None:
    """And no more than a page shows; all are counted."""
    count = SHOWN + 5
    images = {f"{n:02}.jpg": annotation(("cat", [0, 0, n + 1, 9])) for n in range(count)}
    found = {f"{n:02}.jpg": [("dog", [100.0, 50, 120, 70], 0.5 + n / 100)] for n in range(count)}
    done = mistakes(images, found, 0.5)
    assert [one.item.name for one in done.wrong] == [f"{n:02}.jpg" for n in reversed(range(5, count))]
    assert [one.item.name for one in done.missed] == [f"{n:02}.jpg" for n in reversed(range(5, count))]
    assert done.wrong_count == done.missing == count


def test_takers_are_the_correct_detections() -> None:
    rng = np.random.default_rng(0)
    images = []
    for _ in range(6):
        corners = rng.integers(0, 60, (12, 2))
        boxes = np.concatenate([corners, corners + rng.integers(10, 40, (12, 2))], 1).astype(float)
        images.append(Objects(boxes[:4], rng.random(4) < 0.2, np.zeros(4, bool), boxes[2:], rng.random(10)))
    ranking = rank_detections(images, 0.3)
    targets, scores, objects = voc_ranking(images, 0.3)
    assert (ranking.targets == targets).all() and (ranking.scores == scores).all() and ranking.objects == objects
    taken = np.concatenate(ranking.takers)
    assert sorted(taken[taken >= 0]) == np.flatnonzero(targets == 1).tolist() and len(taken[taken >= 0]) > 5
    for image, takers in enumerate(ranking.takers):
        for rank in takers[takers >= 0]:
            assert ranking.images[rank] == image
            assert images[image].scores[ranking.rows[rank]] == ranking.scores[rank]


def test_mistakes_on_the_page(tmp_path: Path) -> None:
    """As images with the boxes, and counted by kind; classes at 100 % are behind one line."""
    from test_drawing import detector_of

    from sppfeat.detection.average_precision import CocoFigures
    from sppfeat.detection.evaluation import ClassResult, DetectionEvaluation
    from sppfeat.detection.evaluation_page import write_evaluation

    root = tmp_path / "images"
    root.mkdir()
    Image.new("RGB", (200, 100)).save(root / "<a>.jpg")
    images = {"<a>.jpg": annotation(("cat", [0, 0, 49, 49]), ("dog", [100, 0, 149, 49]))}
    found = {"<a>.jpg": [("cat", [100.0, 0, 149, 49], 0.7), ("dog", [20.0, 60, 90, 99], 0.6)]}
    done = mistakes(images, found, 0.5, str(root))
    figures = CocoFigures(*[0.5] * 12)
    curve = np.ones(1)
    results = [
        ClassResult(name, 1, 1, ap, ap, 50.0, figures, curve, curve, 1)
        for name, ap in (("good <b>", 100.0), ("cat", 40.0))
    ]
    evaluation = DetectionEvaluation(results, 0.5, 0.25, 1, 9, done, {}, [f"note {n}" for n in range(60)], 1.0, {})
    page = tmp_path / "p.html"
    write_evaluation(page, evaluation, detector_of("cat", "dog"), title="Detection: d.h5", note="", command="sppfeat x")
    text = page.read_text()
    assert text.count("data:image/jpeg") == 4 and text.count('href="./images/%3Ca%3E.jpg"') == 4
    assert "cat 0.70, on another class (dog, IoU 1.00)" in text and "dog 0.60, on background" in text
    assert "2 detections are wrong: 1 on another class, 1 on background" in re.sub(r"\s+", " ", text)
    assert "2 of 2 objects are not found" in text and "cat: nothing near" in text
    assert "50 of 60 notes shown" in text and "<a>" not in text
    summary = text.index("1 class at 100 %")
    assert text.index("cat</span>") < summary < text.index("good &lt;b&gt;</span>")
