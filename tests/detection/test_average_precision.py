"""Average precision of detections, against plain loops and against pycocotools."""

from __future__ import annotations

import contextlib
import io
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from sppfeat.detection.average_precision import (
    COCO_OVERLAPS,
    Objects,
    coco_average_precision,
    coco_figures,
    coco_means,
    voc_average_precision,
    voc_ranking,
)
from sppfeat.windows.boxes import box_targets, fit_ridge, moved_boxes, overlaps, suppress


def random_boxes(generator: np.random.Generator, count: int, side: int = 60) -> np.ndarray:
    corner = generator.integers(0, side, (count, 2))
    return np.concatenate([corner, corner + generator.integers(0, side, (count, 2))], 1).astype(float)


def random_images(seed: int, *, crowds: bool = False) -> list[Objects]:
    """Detections near the objects and elsewhere, with many equal scores."""
    generator = np.random.default_rng(seed)
    images = []
    for _ in range(generator.integers(1, 8)):
        boxes = random_boxes(generator, int(generator.integers(0, 5)))
        near = boxes.repeat(generator.integers(0, 4), 0)
        near += generator.integers(-6, 7, near.shape)
        near[:, 2:] = np.maximum(near[:, :2], near[:, 2:])
        found = np.concatenate([near, random_boxes(generator, int(generator.integers(0, 4)))])
        difficult = generator.random(len(boxes)) < 0.25
        crowd = difficult & (generator.random(len(boxes)) < 0.5) if crowds else np.zeros(len(boxes), bool)
        if crowds:
            difficult = crowd
        scores = generator.integers(0, 20, len(found)) / 20 + generator.random() * 0.01
        images.append(Objects(boxes, difficult, crowd, found, scores))
    return images


@pytest.mark.parametrize("method", ["11-point", "area"])
@given(st.integers(0, 1 << 30), st.sampled_from([0.3, 0.5, 0.75]))
@settings(max_examples=60, deadline=None)
def test_voc_equals_plain_loops(method: str, seed: int, overlap: float) -> None:
    images = random_images(seed)
    if not sum((~one.difficult).sum() for one in images):
        assert np.isnan(voc_average_precision(images, overlap=overlap, method=method))
        return
    plain = [
        {
            "boxes": p.boxes.tolist(),
            "difficult": p.difficult.tolist(),
            "found": p.found.tolist(),
            "scores": p.scores.tolist(),
        }
        for p in images
    ]
    expected = reference.voc_eval(plain, overlap, method)
    assert voc_average_precision(images, overlap=overlap, method=method) == pytest.approx(expected, abs=1e-12)


def test_duplicates_are_wrong_and_difficult_ones_do_not_count() -> None:
    box = np.array([[0.0, 0, 9, 9], [50, 50, 59, 59]])
    found = np.array([[0.0, 0, 9, 9], [0, 0, 9, 8], [50, 50, 59, 59], [90, 90, 99, 99]])
    one = Objects(box, np.array([False, True]), np.zeros(2, bool), found, np.array([0.9, 0.8, 0.7, 0.6]))
    targets, scores, objects = voc_ranking([one])
    assert targets.tolist() == [1, -1, 0, -1] and objects == 1 and scores.tolist() == [0.9, 0.8, 0.7, 0.6]


def coco_reference(images: list[Objects]) -> tuple[list[float], list[float]]:
    """Average precision at each overlap, and the twelve figures, by pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def as_box(box: np.ndarray) -> list[float]:
        return [box[0], box[1], box[2] - box[0] + 1, box[3] - box[1] + 1]

    truth: dict[str, Any] = {
        "info": {},
        "images": [{"id": i + 1} for i in range(len(images))],
        "categories": [{"id": 1, "name": "x"}],
        "annotations": [],
    }
    results = []
    for number, one in enumerate(images):
        areas = [None] * len(one.boxes) if one.areas is None else one.areas.tolist()
        for box, crowd, area in zip(one.boxes, one.crowd, areas, strict=True):
            entry = as_box(box)
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": number + 1,
                    "category_id": 1,
                    "bbox": entry,
                    "area": entry[2] * entry[3] if area is None else area,
                    "iscrowd": int(crowd),
                }
            )
        for box, score in zip(one.found, one.scores, strict=True):
            results.append({"image_id": number + 1, "category_id": 1, "bbox": as_box(box), "score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO()
        ground.dataset = truth
        ground.createIndex()
        evaluation = COCOeval(ground, ground.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, 0, 0, -1]
    return [float(one.mean()) for one in precision], [float(one) for one in evaluation.stats]


@pytest.mark.parametrize("seed", range(25))
def test_coco_equals_pycocotools(seed: int) -> None:
    images = random_images(seed, crowds=True)
    if not sum(len(one.found) for one in images) or not sum((~one.difficult).sum() for one in images):
        pytest.skip("pycocotools needs objects and detections")
    ours = [coco_average_precision(images, overlap) for overlap in COCO_OVERLAPS]
    expected, figures = coco_reference(images)
    assert ours == pytest.approx(expected, abs=1e-9)
    # pycocotools says -1 where there is no object of a size.
    told = [-1 if np.isnan(one) else one for one in astuple(coco_figures(images))]
    assert told == pytest.approx(figures, abs=1e-9)


@pytest.mark.parametrize("seed", range(25))
def test_coco_figures_by_the_areas_of_objects(seed: int) -> None:
    """Boxes of all sizes, and objects that fill only a part of theirs."""
    generator = np.random.default_rng(seed)
    images = []
    for _ in range(6):
        count, found = generator.integers(0, 6), generator.integers(1, 140)
        corners = generator.uniform(0, 300, (count, 2))
        boxes = np.concatenate([corners, corners + generator.choice([10, 40, 120], (count, 1))], 1)
        near = np.concatenate([boxes, np.zeros((1, 4))])[generator.integers(0, count + 1, found)]
        near = near + generator.normal(0, 6, (found, 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        crowd = generator.random(count) < 0.2
        areas = (boxes[:, 2:] - boxes[:, :2] + 1).prod(1) * generator.uniform(0.3, 1, count)
        images.append(Objects(boxes, crowd, crowd, near, generator.permutation(found) / 10, areas))
    if not sum((~one.difficult).sum() for one in images):
        pytest.skip("pycocotools needs objects")
    told = [-1 if np.isnan(one) else one for one in astuple(coco_figures(images))]
    assert told == pytest.approx(coco_reference(images)[1], abs=1e-9)
    twice = coco_means([coco_figures(images), coco_figures(images)])
    assert astuple(twice) == pytest.approx(astuple(coco_figures(images)), nan_ok=True)


def test_coco_takes_the_100_best_of_an_image() -> None:
    boxes = np.array([[0.0, 0, 9, 9]])
    found = np.concatenate([random_boxes(np.random.default_rng(0), 100) + 200, boxes])
    one = Objects(boxes, np.zeros(1, bool), np.zeros(1, bool), found, np.linspace(1, 0.5, 101))
    assert coco_average_precision([one], 0.5) == 0
    assert voc_average_precision([one]) > 0


def test_no_objects_and_no_detections() -> None:
    empty = Objects(np.zeros((0, 4)), np.zeros(0, bool), np.zeros(0, bool), np.zeros((0, 4)), np.zeros(0))
    some = Objects(np.array([[0.0, 0, 5, 5]]), np.zeros(1, bool), np.zeros(1, bool), np.zeros((0, 4)), np.zeros(0))
    assert np.isnan(coco_average_precision([empty], 0.5)) and np.isnan(voc_average_precision([empty]))
    assert coco_average_precision([some, empty], 0.5) == 0 == voc_average_precision([some, empty])


@given(st.integers(0, 1 << 30))
@settings(max_examples=40, deadline=None)
def test_overlaps_equal_plain_loops(seed: int) -> None:
    generator = np.random.default_rng(seed)
    a, b = random_boxes(generator, 5), random_boxes(generator, 4)
    expected = [[reference.box_overlap(x, y) for y in b] for x in a]
    np.testing.assert_allclose(overlaps(a, b), expected, rtol=1e-12)


@given(st.integers(0, 1 << 30), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
@settings(max_examples=60, deadline=None)
def test_suppression_equals_plain_loops(seed: int, overlap: float) -> None:
    generator = np.random.default_rng(seed)
    boxes, labels = random_boxes(generator, 30), generator.integers(0, 3, 30)
    scores = generator.permutation(30) / 30
    expected = reference.suppress(boxes.tolist(), scores.tolist(), labels.tolist(), overlap)
    assert suppress(boxes, scores, labels, overlap).tolist() == expected


def test_suppression_of_nothing() -> None:
    assert len(suppress(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int), 0.3)) == 0


def test_targets_lead_back_to_their_boxes() -> None:
    generator = np.random.default_rng(0)
    windows, boxes = random_boxes(generator, 50), random_boxes(generator, 50)
    np.testing.assert_allclose(moved_boxes(windows, box_targets(windows, boxes), (500, 500)), boxes, atol=1e-9)
    # One window worked out by hand: 10 x 20 pixels, moved by half its width, twice as high.
    window, box = np.array([[0.0, 0, 9, 19]]), np.array([[5.0, 10, 14, 49]])
    np.testing.assert_allclose(box_targets(window, box), [[0.5, 1.0, 0.0, np.log(2)]])
    assert moved_boxes(window, np.array([[-5.0, 0, 90, 90]]), (30, 20)).tolist() == [[0, 0, 29, 19]]
    # A shrinking box keeps at least one pixel, and so does one that leaves the image.
    pixel, shrunk = np.array([[7.0, 7, 7, 7]]), np.array([[0.0, 0, -3, -3]])
    assert moved_boxes(pixel, shrunk, (30, 20)).tolist() == [[7, 7, 7, 7]]
    assert moved_boxes(pixel, np.array([[40.0, 0, 0, 0]]), (30, 20)).tolist() == [[29, 7, 29, 7]]


@pytest.mark.parametrize("count", [6, 40])
def test_ridge_equals_scikit_learn(count: int) -> None:
    from sklearn.linear_model import Ridge

    generator = np.random.default_rng(0)
    rows, targets = generator.normal(size=(count, 12)).astype(np.float32), generator.normal(size=(count, 4))
    weights, biases = fit_ridge(rows, targets, 3.0)
    expected = Ridge(alpha=3.0).fit(rows.astype(float), targets)
    np.testing.assert_allclose(weights, expected.coef_, atol=1e-5)
    np.testing.assert_allclose(biases, expected.intercept_, atol=1e-5)
