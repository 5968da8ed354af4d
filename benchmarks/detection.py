"""SPP-net detection against R-CNN, and between its variants: time and accuracy, with the same windows and SVMs.

    python benchmarks/detection.py DATA --work FOLDER [PART...]

DATA holds `raccoon` and `voc2007-subset`. FOLDER keeps windows, R-CNN's descriptors and the figures of finished parts,
so that a stopped part resumes and the tables show all finished parts. Parts: windows, segmentation, rcnn, pooling,
time, raccoon, voc, thresholds, stages; all of them by default.

R-CNN: each window is cut out, warped to 224 x 224 and sent through the same network on the same engine; its map is
pooled over the same levels, and the SVMs and box regression are trained by the same code. raccoon: the first 160 files
in name order train, the last 40 test, the first 1,000 windows of selective search in each. voc2007-subset: 400 images
train, 200 test, 20 classes, all windows of selective search.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from extract import processor
from PIL import Image

from sppfeat import Described, Describer, Recipe, RunOptions, pool_pyramid, pool_rois
from sppfeat.detection.annotations import AnnotatedImages, read_voc, read_voc_files
from sppfeat.detection.average_precision import Objects, voc_ranking
from sppfeat.detection.detecting import DetectOptions, DetectorRunner
from sppfeat.detection.detector import detection_recipe, open_detector
from sppfeat.detection.evaluation import evaluate_detector
from sppfeat.detection.train_detector import TrainingOptions, train_detector
from sppfeat.images import Fingerprint, Item
from sppfeat.images.reading import read_image
from sppfeat.machine import available_cores
from sppfeat.windows.boxes import overlaps
from sppfeat.windows.proposals import open_windows, propose_folder
from sppfeat.windows.selective_search import ProposalOptions, propose

SIDE = 224
RACCOON_WINDOWS = 1000
SCALE_SETS: dict[str, tuple[int | str, ...]] = {
    "1 scale (480)": (480,),
    "1 scale (688)": (688,),
    "2 scales (480, 688)": (480, 688),
    "3 scales (480, 688, 1200)": (480, 688, 1200),
    "5 scales (480, 576, 688, 864, 1200)": (480, 576, 688, 864, 1200),
}
# All with levels 3,2,1 on the last block (stride 32), unless they say otherwise.
FORMS: dict[str, dict[str, Any]] = {
    **{name: {"scales": scales} for name, scales in list(SCALE_SETS.items())[:4]},
    "1 scale (480), levels 1": {"scales": (480,), "levels": (1,)},
    "1 scale (480), levels 6,3,2,1": {"scales": (480,), "levels": (6, 3, 2, 1)},
    "1 scale (480), stride 16": {"scales": (480,), "layer": "blocks.4"},
    "1 scale (480), stride 16, levels 6,3,2,1": {"scales": (480,), "layer": "blocks.4", "levels": (6, 3, 2, 1)},
}
# Of the finest segmentation: OpenCV's default, and ours.
BASE_KS = (150, 50)
VOC_FORMS = ("1 scale (480)", "2 scales (480, 688)", "1 scale (688)")


class WarpingDescriber(Describer):
    """R-CNN: every window is warped to 224 x 224 and goes through the network by itself.

    folder: where descriptors are kept by image, since training reads the images several times; None: not kept.
    """

    BATCH = 4

    def __init__(self, recipe: Recipe, options: RunOptions | None = None, folder: Path | None = None) -> None:
        super().__init__(recipe, options)
        self._folder = folder

    def describe(
        self, items: Iterable[Item | str], *, scales: str = "all", stop: Callable[[], bool] = lambda: False
    ) -> Iterator[Described]:
        for position, item in enumerate(items):
            if stop():
                return
            assert isinstance(item, Item) and item.windows is not None
            path, windows = item.path, item.windows
            kept = self._folder / f"{Path(path).stem}.npz" if self._folder is not None else None
            known, rows = np.zeros((0, 4)), np.zeros((0, 0), np.float32)
            if kept is not None and kept.exists():
                with np.load(kept) as held:
                    known, rows = held["windows"], held["rows"]
            places = {tuple(window): at for at, window in enumerate(known.tolist())}
            new = [window for window in windows.tolist() if tuple(window) not in places]
            if new:
                fresh = self.warped(path, np.array(new)).astype(np.float16)
                rows = np.concatenate([rows, fresh]) if len(known) else fresh
                known = np.concatenate([known, new])
                places = {tuple(window): at for at, window in enumerate(known.tolist())}
                if kept is not None:
                    np.savez(kept.with_suffix(".partial.npz"), windows=known, rows=rows)
                    kept.with_suffix(".partial.npz").replace(kept)
            chosen = rows[[places[tuple(window)] for window in windows.tolist()]].astype(np.float32)
            yield Described(position, chosen, Image.open(path).size, Fingerprint(0, 0), None, {})

    def warped(self, path: str, windows: np.ndarray) -> np.ndarray:
        """[K, D] descriptors of windows [K, 4]."""
        image = read_image(path).pixels

        def forward(part: np.ndarray) -> np.ndarray:
            crops = [
                np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (x1, y1, x2 + 1, y2 + 1)))
                for x1, y1, x2, y2 in part
            ]
            with torch.inference_mode():
                maps = self._engine.feature_maps(torch.from_numpy(np.stack(crops)))[0]
                return pool_pyramid(maps, self.recipe.levels, pooling=self.recipe.pooling).float().numpy()

        before = torch.get_num_threads()
        with ThreadPoolExecutor(
            self._engine.streams, initializer=torch.set_num_threads, initargs=(self._engine.threads,)
        ) as threads:
            rows = list(threads.map(forward, np.split(windows, range(self.BATCH, len(windows), self.BATCH))))
        torch.set_num_threads(before)
        return np.concatenate(rows)


class Data:
    """The data sets, with windows proposed once."""

    def __init__(self, data: Path, work: Path) -> None:
        self.data, self.work = data, work

    def windows(self, name: str, images: Path) -> dict[str, np.ndarray]:
        path = self.work / f"{name}.windows.h5"
        propose_folder(images, path)
        found = open_windows(path)
        return {key: found[key] for key in found}

    def raccoon(self) -> tuple[AnnotatedImages, AnnotatedImages, dict[str, np.ndarray]]:
        folder = self.data / "raccoon"
        annotated = read_voc_files(folder / "images", folder / "annotations")
        names = sorted(annotated.images)
        windows = self.windows("raccoon", folder / "images")
        cut = {name: boxes[:RACCOON_WINDOWS] for name, boxes in windows.items()}
        return annotated.subset(names[:160]), annotated.subset(names[160:]), cut

    def listed_voc(self) -> tuple[AnnotatedImages, AnnotatedImages, Path]:
        root = self.data / "voc2007-subset" / "VOC2007"
        return read_voc(root, "trainval"), read_voc(root, "test"), root / "JPEGImages"

    def voc(self) -> tuple[AnnotatedImages, AnnotatedImages, dict[str, np.ndarray]]:
        train, test, images = self.listed_voc()
        return train, test, self.windows("voc", images)


def part_windows(data: Data) -> dict[str, Any]:
    """Windows, and the share of objects that they can reach."""
    result = {}
    for name, (train, test, windows) in (("raccoon", data.raccoon()), ("voc", data.voc())):
        best = [
            overlaps(one.boxes, windows[key]).max(1, initial=0) for key, one in test.images.items() if len(one.boxes)
        ]
        result[name] = {
            "train": len(train.images),
            "test": len(test.images),
            "mean": statistics.fmean(len(windows[key]) for key in [*train.images, *test.images]),
            "recall": 100 * float((np.concatenate(best) >= 0.5).mean()),
        }
    return result


def part_segmentation(data: Data) -> dict[str, Any]:
    """Windows by the scale of the finest segmentation: objects found, windows and processor time per image."""
    train, test, _ = data.listed_voc()
    names = [*list(train.images)[:30], *list(test.images)[:30]]
    annotations = {**train.images, **test.images}
    result: dict[str, Any] = {"images": len(names)}
    found: dict[int, list[Any]] = {k: [] for k in BASE_KS}
    for name in names:
        for base_k in BASE_KS:  # one after the other on each image, so that other work slows down both
            start = time.process_time()
            windows = propose(train.item(name).path, ProposalOptions(base_k=base_k)).windows
            seconds = time.process_time() - start
            one = annotations[name]
            best = overlaps(windows.astype(float), one.boxes).max(0, initial=0)[~one.difficult]
            found[base_k].append((len(windows), seconds, best))
    for base_k, images in found.items():
        best = np.concatenate([overlap for _, _, overlap in images])
        result[str(base_k)] = {
            "objects": len(best),
            "recall": 100 * float((best >= 0.5).mean()),
            "recall 0.7": 100 * float((best >= 0.7).mean()),
            "windows": statistics.mean(count for count, _, _ in images),
            "seconds": statistics.mean(seconds for _, seconds, _ in images),
        }
    return result


def part_rcnn(data: Data) -> dict[str, Any]:
    """R-CNN's descriptors of the raccoon windows and objects, kept for its training."""
    train, test, windows = data.raccoon()
    folder = data.work / "rcnn"
    folder.mkdir(exist_ok=True)
    describer = WarpingDescriber(detection_recipe(scales=(SIDE,)), folder=folder)
    tasks = [
        each.item(name, np.concatenate([one.boxes if each is train else np.zeros((0, 4)), windows[name]]))
        for each in (train, test)
        for name, one in each.images.items()
    ]
    start = time.perf_counter()
    count = 0
    for done in describer.describe(tasks):
        count += len(done.rows) if done.rows is not None else 0
        if done.position % 10 == 9:
            print(f"rcnn: {done.position + 1} of {len(tasks)}, {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return {"windows": count}


def part_pooling(data: Data) -> dict[str, Any]:
    """2,000 windows of a 43 x 64 map of 256 channels over levels 6,3,2,1."""
    from torchvision.ops import roi_pool

    generator = np.random.default_rng(0)
    feature_map = torch.randn(256, 43, 64, generator=torch.Generator().manual_seed(0))
    first = generator.integers(0, (60, 39), (2000, 2))
    last = np.minimum(first + generator.integers(0, (40, 30), (2000, 2)), (63, 42))
    rois = torch.from_numpy(np.concatenate([first, last], 1))
    boxes = torch.cat([torch.zeros(2000, 1), rois.float()], 1)
    levels = (6, 3, 2, 1)
    channels_last = feature_map.permute(1, 2, 0).contiguous().permute(2, 0, 1)

    def theirs() -> torch.Tensor:
        pooled = [roi_pool(feature_map[None], boxes, level).permute(0, 2, 3, 1).flatten(1) for level in levels]
        return torch.cat(pooled, 1)

    if not torch.equal(theirs(), pool_rois(feature_map, rois, levels)):
        raise SystemExit("pool_rois and roi_pool differ")
    start = time.perf_counter()
    pool_rois(channels_last, rois, levels)
    first_call = time.perf_counter() - start
    return {
        "roi_pool": _median(theirs, 5),
        "pool_rois": _median(lambda: pool_rois(channels_last, rois, levels), 9),
        "first call": first_call,
        "threads": torch.get_num_threads(),
    }


def part_time(data: Data) -> dict[str, Any]:
    """Seconds for the descriptors of 2,000 windows of an image, from its pixels on disk."""
    path = sorted((data.data / "voc2007-subset" / "VOC2007" / "JPEGImages").glob("*.jpg"))[0]
    width, height = Image.open(path).size
    generator = np.random.default_rng(0)
    corners = np.sort(generator.integers(0, (width, height), (8000, 2, 2)), axis=1)
    windows = np.concatenate([corners[:, 0], corners[:, 1]], 1).astype(float)
    windows = windows[(windows[:, 2] - windows[:, 0] >= 20) & (windows[:, 3] - windows[:, 1] >= 20)][:2000]
    result: dict[str, Any] = {"image": [width, height], "windows": len(windows)}
    rcnn = WarpingDescriber(detection_recipe(scales=(SIDE,)))
    result["engine"] = rcnn.engine
    sides = {name: Describer(detection_recipe(scales=scales)) for name, scales in SCALE_SETS.items()}
    few = windows[:200]
    rcnn.warped(str(path), few[:8])
    for describer in sides.values():
        list(describer.describe([Item.at(path, windows)], scales="nearest"))
    taken: dict[str, list[float]] = {name: [] for name in (*sides, "rcnn")}
    for _ in range(3):
        for name, describer in sides.items():
            start = time.perf_counter()
            for _ in range(4):  # images one after the other, as for a user with one image
                list(describer.describe([Item.at(path, windows)], scales="nearest"))
            taken[name].append((time.perf_counter() - start) / 4)
        start = time.perf_counter()
        rcnn.warped(str(path), few)
        taken["rcnn"].append((time.perf_counter() - start) * len(windows) / len(few))
    result["rcnn"] = statistics.median(taken.pop("rcnn"))
    result["alone"] = {name: statistics.median(times) for name, times in taken.items()}
    many = {}  # several images at once keep all cores busy to the end of each
    for name, describer in sides.items():
        start = time.perf_counter()
        list(describer.describe([Item.at(path, windows)] * 8, scales="nearest"))
        many[name] = (time.perf_counter() - start) / 8
    result["in a row"] = many
    return result


def part_raccoon(data: Data) -> dict[str, Any]:
    """Accuracy on raccoon of several variants of SPP-net, and of R-CNN."""
    train, test, windows = data.raccoon()
    forms = {name: _describer(name) for name in FORMS}
    if len(list((data.work / "rcnn").glob("*.npz"))) >= len(train.images) + len(test.images):
        forms["R-CNN"] = lambda: WarpingDescriber(detection_recipe(scales=(SIDE,)), folder=data.work / "rcnn")
    return _accuracies(data, "raccoon", forms, train, test, windows)


def part_voc(data: Data) -> dict[str, Any]:
    """Accuracy on voc2007-subset."""
    train, test, windows = data.voc()
    return _accuracies(data, "voc", {name: _describer(name) for name in VOC_FORMS}, train, test, windows)


def _describer(form: str) -> Callable[[], Describer]:
    return lambda: Describer(detection_recipe(**FORMS[form]))


def _accuracies(
    data: Data,
    kind: str,
    forms: dict[str, Callable[[], Describer]],
    train: AnnotatedImages,
    test: AnnotatedImages,
    windows: dict[str, np.ndarray],
) -> dict[str, Any]:
    kept = data.work / f"{kind}.forms.json"
    result: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for name, make in forms.items():
        if name in result:
            continue
        describer = make()
        path = data.work / f"{kind} {name}.h5"
        start = time.perf_counter()
        done = train_detector(train, windows, path, describer=describer, options=TrainingOptions(), overwrite=True)
        trained = time.perf_counter() - start
        detector = open_detector(path)
        bare = detector.__class__(**{**vars(detector), "box_weights": None, "box_biases": None})
        figures = {}
        for what, model in (("with", detector), ("without", bare)):
            found = evaluate_detector(model, test, windows, describer=make())
            figures[what] = {"11-point": found.eleven_point, "area": found.area, "coco": found.coco}
            seconds = found.seconds
        result[name] = {**figures, "rows": done.rows, "hard": done.hard, "train": trained, "test": seconds}
        kept.write_text(json.dumps(result))
        print(f"{kind}: {name}: {json.dumps(result[name])}", file=sys.stderr)
    return result


def part_thresholds(data: Data) -> dict[str, Any]:
    """Precision and recall at the default threshold, before and after calibration, and whether probabilities are true.

    The expected calibration error is the distance of mean probability and share of correct detections, over ten bins of
    the detections of at least 0.05.
    """
    result: dict[str, Any] = {}
    for kind, (train, test, windows) in (("raccoon", data.raccoon()), ("voc", data.voc())):
        path = data.work / f"{kind} 1 scale (480).h5"
        if not path.exists():
            train_detector(train, windows, path, detection_recipe(scales=(480,)))
        calibrated = open_detector(path)
        runner = DetectorRunner(calibrated)
        one: dict[str, Any] = {}
        for what, detector in (("before", replace(calibrated, calibration=None)), ("after", calibrated)):
            done = evaluate_detector(detector, test, windows)
            one[what] = {
                "threshold": done.threshold,
                "precision": done.kept_precision,
                "recall": done.kept_recall,
                "11-point": done.eleven_point,
                "area": done.area,
                "coco": done.coco,
            }
        items = [test.item(name, windows[name]) for name in test.images]
        ranked: list[tuple[np.ndarray, np.ndarray]] = []
        gathered: list[list[Objects]] = [[] for _ in calibrated.classes]
        for found in runner.detect(items, DetectOptions(threshold=0.05)):
            each = test.images[items[found.position].name]
            for label, name in enumerate(calibrated.classes):
                of, mine = np.array([known == name for known in each.labels], bool), found.labels == label
                gathered[label].append(
                    Objects(each.boxes[of], each.difficult[of], each.crowd[of], found.boxes[mine], found.scores[mine])
                )
        for images in gathered:
            targets, scores, _ = voc_ranking(images)
            ranked.append((targets[targets != 0] > 0, scores[targets != 0]))
        correct, scores = (np.concatenate(values) for values in zip(*ranked, strict=True))
        bins = np.minimum((10 * scores).astype(int), 9)
        apart = sum(abs(scores[bins == at].sum() - correct[bins == at].sum()) for at in range(10))
        one |= {"detections": len(scores), "probability": scores.mean(), "correct": correct.mean()}
        one["calibration error"] = apart / len(scores)
        result[kind] = one
    return result


def part_stages(data: Data) -> dict[str, Any]:
    """Time and memory of detection by stage: 40 images of raccoon, in a separate process."""
    if os.environ.get("SPPFEAT_BENCHMARK_CHILD"):
        _, test, windows = data.raccoon()
        detector = open_detector(data.work / "raccoon 1 scale (480).h5")
        runner = DetectorRunner(detector)
        names = list(test.images)
        start = time.perf_counter()
        list(runner.detect([test.item(name, windows[name]) for name in names]))
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        print(json.dumps({"images": len(names), "seconds": seconds, "stages": runner.seconds, "peak": peak}))
        return {}
    _, test, windows = data.raccoon()
    names = list(test.images)[:8]
    start = time.perf_counter()
    for name in names:
        propose(test.item(name).path)
    search = (time.perf_counter() - start) / len(names)
    command = [sys.executable, __file__, str(data.data), "--work", str(data.work), "stages"]
    child = subprocess.run(
        command, env={**os.environ, "SPPFEAT_BENCHMARK_CHILD": "1"}, capture_output=True, text=True, check=True
    )
    return {**json.loads(child.stdout.splitlines()[-1]), "search": search}


def version_of_opencv() -> str:
    import cv2

    return str(cv2.__version__)


def _median(call: Callable[[], object], times: int) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


PARTS: dict[str, Callable[[Data], dict[str, Any]]] = {
    "windows": part_windows,
    "segmentation": part_segmentation,
    "rcnn": part_rcnn,
    "pooling": part_pooling,
    "time": part_time,
    "raccoon": part_raccoon,
    "voc": part_voc,
    "thresholds": part_thresholds,
    "stages": part_stages,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    arguments = parser.parse_intermixed_args()
    arguments.work.mkdir(exist_ok=True)
    data = Data(arguments.data, arguments.work)
    for name in arguments.parts:
        result = PARTS[name](data)
        if result:
            (arguments.work / f"{name}.json").write_text(json.dumps(result))
    if not os.environ.get("SPPFEAT_BENCHMARK_CHILD"):
        print_tables(arguments.work)


def print_tables(work: Path) -> None:
    """Everything measured so far, as Markdown."""
    found = {
        name: json.loads((work / f"{name}.json").read_text()) for name in PARTS if (work / f"{name}.json").exists()
    }
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "openvino"))
    print(f"{processor()}, {available_cores()} cores, Python {platform.python_version()}, {libraries}\n")
    if "pooling" in found:
        one = found["pooling"]
        print("| pooling of 2,000 windows | ms | |\n|---|---|---|")
        print(f"| torchvision roi_pool, one call per level | {1e3 * one['roi_pool']:.0f} | 1 |")
        ratio = one["roi_pool"] / one["pool_rois"]
        print(f"| pool_rois | {1e3 * one['pool_rois']:.0f} | {ratio:.1f} x |")
        print(f"\nfirst call {1e3 * one['first call']:.0f} ms, {one['threads']} threads\n")
    if "time" in found:
        one = found["time"]
        print(f"| descriptors of {one['windows']} windows, one image ({one['engine']}) | s | times R-CNN's speed |")
        print("|---|---|---|")
        print(f"| R-CNN (200 windows, scaled up to all) | {one['rcnn']:.2f} | 1 |")
        for name in one["alone"]:
            for how in ("alone", "in a row"):
                seconds = one[how][name]
                print(f"| SPP-net, {name}, images {how} | {seconds:.3f} | {one['rcnn'] / seconds:.0f} |")
        print()
    for kind in ("raccoon", "voc"):
        if kind in found:
            print(f"| {kind} | mAP 11-point | area | COCO | without box regression | train, s | test, s |")
            print("|---|---|---|---|---|---|---|")
            for name, one in found[kind].items():
                with_, without = one["with"], one["without"]
                print(
                    f"| {name} | {with_['11-point']:.1f} | {with_['area']:.1f} | {with_['coco']:.1f} | "
                    f"{without['11-point']:.1f} | {one['train']:.0f} | {one['test']:.0f} |"
                )
            print()
    if "segmentation" in found:
        one = found["segmentation"]
        print(f"{one['images']} images of VOC 2007, {one['150']['objects']} objects, OpenCV {version_of_opencv()}\n")
        print("| base_k | recall at 0.5, % | at 0.7, % | windows per image | s per image |\n|---|---|---|---|---|")
        for base_k in map(str, BASE_KS):
            each = one[base_k]
            print(
                f"| {base_k} | {each['recall']:.1f} | {each['recall 0.7']:.1f} | {each['windows']:.0f} | "
                f"{each['seconds']:.2f} |"
            )
        print()
    if "thresholds" in found:
        print("| | threshold | precision, % | recall, % | mAP 11-point | area | COCO |\n|---|---|---|---|---|---|---|")
        for kind, one in found["thresholds"].items():
            for what, meaning in (("before", "SVM score"), ("after", "probability")):
                each = one[what]
                print(
                    f"| {kind} | {meaning} {each['threshold']:g} | {each['precision']:.1f} | {each['recall']:.1f} | "
                    f"{each['11-point']:.1f} | {each['area']:.1f} | {each['coco']:.1f} |"
                )
        for kind, one in found["thresholds"].items():
            print(
                f"\n{kind}: {one['detections']} detections of at least 0.05, probability {one['probability']:.3f}, "
                f"correct {one['correct']:.3f}, expected calibration error {one['calibration error']:.3f}"
            )
        print()
    if "windows" in found:
        for kind, one in found["windows"].items():
            print(
                f"{kind}: {one['mean']:.0f} windows per image; {one['recall']:.1f} % of the test objects are overlapped"
            )
    if "stages" in found:
        one = found["stages"]
        print(f"\nDetecting on {one['images']} images of raccoon, 1 scale (480):")
        print("\n| stage | ms per image |\n|---|---|")
        print(f"| selective search, one process | {1e3 * one['search']:.0f} |")
        for name, seconds in one["stages"].items():
            print(f"| {name} | {1e3 * seconds / one['images']:.1f} |")
        print(f"\nwhole: {1e3 * one['seconds'] / one['images']:.0f} ms per image; peak memory {one['peak']:.0f} MB")


if __name__ == "__main__":
    main()
