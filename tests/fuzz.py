"""Damage every kind of file that sppfeat reads, and open it: anything but an SppFeatError is a finding.

    python tests/fuzz.py --count 10000 [--kind store] [--seed 0]

Files are opened in child processes, each many. A crash, a hang over 20 s, any other exception and memory above 1.5 GB
are findings; the damaged file is kept. To fuzz another kind, add a line to `kinds`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from PIL import Image
from safetensors.numpy import save_file
from textures import save_random

from sppfeat import Recipe, SppFeatError, open_store, verify_store
from sppfeat.backbones import open_vocabulary
from sppfeat.detection.annotations import read_coco, read_voc, read_voc_files
from sppfeat.detection.detector import Detector, open_detector, save_detector
from sppfeat.detection.row_cache import read_state, save_state
from sppfeat.files import hdf5_check
from sppfeat.files.cache import read_entry, write_entry
from sppfeat.files.formats import SVM, WINDOWS, format_of
from sppfeat.files.hdf5_check import DEADLINE_SECONDS
from sppfeat.images import Fingerprint, find_images
from sppfeat.retrieval.changes import read_names
from sppfeat.retrieval.gallery_files import read_rows
from sppfeat.retrieval.ground_truth import read_ground_truth
from sppfeat.store.locking import lock_store
from sppfeat.store.reading import open_file
from sppfeat.store.shards import create_folder, open_folder
from sppfeat.store.writing import StoreWriter, create_store
from sppfeat.transfer.classifier import open_classifier
from sppfeat.transfer.labels import read_labels, read_voc_labels
from sppfeat.windows.proposals import _Journal, _write, open_windows
from sppfeat.windows.reading import read_windows
from sppfeat.windows.selective_search import ProposalOptions, Proposed

# A store is opened twice, and a file that hangs HDF5 is given up only after a while.
SECONDS = 2 * DEADLINE_SECONDS + 4
MEMORY_BYTES = 1536 << 20
NAMES = [f"f/{number}.jpg" for number in range(5)]


class Kind(NamedTuple):
    """A sound file, and how a command opens it."""

    path: Path
    read: Callable[[Path], object]


def kinds(folder: Path) -> dict[str, Kind]:
    """Sound files of every kind, written below a folder."""
    recipe, sha, text = Recipe(levels=(1,)), "0" * 64, h5py.string_dtype()
    rows = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    store = folder / "store.h5"
    create_store(store, NAMES, recipe=recipe, weights_sha256=sha, dim=4, source_root="/nowhere")
    with StoreWriter(open_store(store)) as writer:
        for row, values in enumerate(rows):
            writer.write(row, values, (10, 10), Fingerprint(1, 1))
    with lock_store(folder / "shards", folder=True):
        shards = create_folder(folder / "shards", recipe=recipe, weights_sha256=sha, dim=4, source_root="/nowhere")
        for number in (1, 2):
            with StoreWriter(shard := shards.begin_shard([f"{number}/{name}" for name in NAMES])) as writer:
                for row, values in enumerate(rows):
                    writer.write(row, values, (10, 10), Fingerprint(1, 1))
                writer.fail(4, "broken")
            shards.publish(shard)
        shards.finish()
    manifest = folder / "shards" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text())))  # in one line
    with h5py.File(folder / "svm.h5", "w") as file:
        file.attrs.update({"format": SVM, "format_version": 1, "recipe": recipe.to_json(), "weights_sha256": sha})
        file.attrs.update({"images": 5, "positive_weight": 1.0, "route": "gram"})
        file["weights"], file["biases"], file["costs"], file["gaps"] = rows[:2], rows[0, :2], np.ones(2), np.ones(2)
        file.create_dataset("classes", data=["a", "b"], dtype=text)
    detector = Detector(
        recipe=recipe,
        weights_sha256=sha,
        classes=["a", "b"],
        weights=rows[:2],
        biases=rows[0, :2],
        box_weights=np.zeros((2, 4, 4), np.float32),
        box_biases=np.zeros((2, 4), np.float32),
        proposals=ProposalOptions(),
        training={"images": 5, "positives": {"a": 1}, "hard": [1], "c": 0.1, "positive_weight": 1.0},
        versions={"sppfeat": "0"},
        calibration=np.array([[2.0, -1.0], [3.0, 0.5]]),
    )
    save_detector(detector, folder / "detector.h5")
    save_random(folder / "vocabulary.h5")
    with h5py.File(folder / "windows.h5", "w") as file:
        file.attrs.update({"format": WINDOWS, "format_version": 1, "source_root": np.void(b"/nowhere")})
        file.attrs.update({"options": json.dumps({"seed": 1}), "versions": json.dumps({"sppfeat": "0"})})
        file.create_dataset("names", data=NAMES, dtype=text)
        file.create_dataset("error", data=[""] * 5, dtype=text)
        file["start"], file["windows"] = np.arange(6), np.tile(np.int32([0, 0, 5, 5]), (5, 1))
        file["image_size"] = np.full((5, 2), 9, np.int32)
        file["file_size"] = file["file_mtime_ns"] = np.ones(5, np.int64)
    save_state(folder / "state.h5", "id", {"rows": rows, "origin": np.ones(5)}, {"next": 1, "hard": [1, 2]})
    with h5py.File(folder / "rows.h5", "w") as file:
        file.create_dataset("names", data=NAMES, dtype=text)
        table = file.create_dataset("roots", (1,), dtype=h5py.vlen_dtype(np.uint8))
        table[0] = np.frombuffer(b"/nowhere", np.uint8)
        file["root"], file["checksum"] = np.zeros(5, np.int32), np.zeros(5, np.uint32)
    (folder / "windows.csv").write_text("name,x1,y1,x2,y2\n" + "".join(f"{n},1,2,30,4.5\n" for n in NAMES))
    (folder / "windows.json").write_text(json.dumps({n: [[1, 2, 30, 4.5]] for n in NAMES}))
    (folder / "labels.csv").write_text("name,label,split\n" + "".join(f"{n},a,train\n" for n in NAMES))
    (folder / "list.txt").write_text("".join(f"/nowhere/{n}\n" for n in NAMES))
    box = {"bbox": [1, 2, 30, 4], "image_id": 1, "category_id": 1, "iscrowd": 0}
    image = {"id": 1, "file_name": "a.jpg", "width": 40, "height": 40}
    coco = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "a"}]}
    (folder / "coco.json").write_text(json.dumps(coco))
    (folder / "truth.json").write_text(json.dumps({"a.jpg": {"relevant": ["b.jpg", "c.jpg"], "junk": ["d.jpg"]}}))
    (folder / "xml").mkdir()
    corners = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>9</ymax></bndbox>"
    annotation = (
        f"<annotation><size><width>40</width><height>40</height></size><object><name>a</name>{corners}</object>"
        "</annotation>"
    )
    (folder / "xml" / "a.xml").write_text(annotation)
    (folder / "images").mkdir()
    Image.new("RGB", (40, 40)).save(folder / "images" / "a.jpg")
    for place in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / "voc" / place).mkdir(parents=True)
    main = folder / "voc" / "ImageSets" / "Main"
    for split in ("trainval", "test"):
        (main / f"a_{split}.txt").write_text(f"{split}1 1\n{split}2 -1\n")
    (folder / "voc" / "Annotations" / "a.xml").write_text(annotation)
    Image.new("RGB", (40, 40)).save(folder / "voc" / "JPEGImages" / "a.jpg")
    (main / "train.txt").write_text("a\nb\n")
    save_file({"a.weight": np.ones((3, 4), np.float32), "a.bias": np.ones(3, np.float32)}, folder / "w.safetensors")
    # In another process: every damaged HDF5 file is looked at in a fork of this one, which torch would make slow.
    code = "import sys, torch; torch.save({'a.weight': torch.ones(3, 4), 'a.bias': torch.ones(3)}, sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, folder / "w.pth"], check=True)

    journal = _Journal(folder / "j.h5", ProposalOptions(), "/nowhere", fresh=True)
    with contextlib.closing(journal._file):
        for name in NAMES:
            journal.add(name, Proposed(np.tile([[1, 2, 3, 4]], (3, 1)), (9, 9), Fingerprint(1, 1), None))
    (folder / "gone.txt").write_text("".join(f"{name}\n" for name in NAMES))
    (folder / "oxford").mkdir()
    (folder / "oxford" / "a_1_query.txt").write_text("oxc1_a 1.5 2 30 40\n")
    for kind, listed in (("good", "b\nc\n"), ("ok", "d\n"), ("junk", "e\n")):
        (folder / "oxford" / f"a_1_{kind}.txt").write_text(listed)
    entry = folder / "cache" / "network.json"
    write_entry(entry, b'{"channels": 320}' * 50, kept=9)
    kept = entry.read_bytes()

    def store_of(path: Path) -> object:
        format_of(path)
        list(open_file(path, names=False).names)  # as a shard is opened
        return verify_store(open_store(path))

    def folder_of(path: Path) -> object:
        format_of(path.parent)
        opened = open_store(path.parent)
        with contextlib.suppress(SppFeatError):  # the rest must be clean, too
            opened.descriptors[::3], opened.errors(), list(opened.names)
        with contextlib.suppress(SppFeatError):
            list(open_folder(path.parent).iter_shards())
        return verify_store(opened)

    def journal_of(path: Path) -> object:
        found = _Journal(folder / "j.h5", ProposalOptions(), "/nowhere", fresh=False)
        with contextlib.closing(found._file):
            return _write(folder / "of-journal.h5", None, found, ProposalOptions(), "/nowhere")

    def weights_of(path: Path) -> object:
        from sppfeat.backbones.backbone import read_weights

        return read_weights(str(path))

    def entry_of(path: Path) -> None:
        # A damaged entry is ignored and recreated.
        taken = read_entry(path) is not None
        assert taken == (path.read_bytes() == kept), "a damaged entry is taken"

    images = str(folder / "images")
    found = {
        "store": ("store.h5", store_of),
        "manifest": ("shards/manifest.json", folder_of),
        "svm": ("svm.h5", open_classifier),
        "detector": ("detector.h5", open_detector),
        "vocabulary": ("vocabulary.h5", open_vocabulary),
        "windows-h5": ("windows.h5", lambda path: dict(open_windows(path))),
        "training-state": ("state.h5", lambda path: read_state(path, "id")),
        "gallery-rows": ("rows.h5", lambda path: read_rows(path, 5)),
        "windows-csv": ("windows.csv", read_windows),
        "windows-json": ("windows.json", read_windows),
        "labels": ("labels.csv", read_labels),
        "image-list": ("list.txt", lambda path: find_images([path])),
        "coco": ("coco.json", lambda path: read_coco(path, images)),
        "ground-truth": ("truth.json", read_ground_truth),
        "voc-xml": ("xml/a.xml", lambda path: read_voc_files(images, path.parent)),
        "voc-labels": ("voc/ImageSets/Main/a_test.txt", lambda path: read_voc_labels(path.parents[2])),
        "voc-list": ("voc/ImageSets/Main/train.txt", lambda path: read_voc(path.parents[2], "train")),
        "windows-journal": (".j.h5.journal", journal_of),
        "gone-names": ("gone.txt", read_names),
        "oxford-query": ("oxford/a_1_query.txt", lambda path: read_ground_truth(path.parent)),
        "oxford-list": ("oxford/a_1_good.txt", lambda path: read_ground_truth(path.parent)),
        "cache-entry": ("cache/network.json", entry_of),
        "safetensors": ("w.safetensors", weights_of),
        "pth": ("w.pth", weights_of),
    }
    return {name: Kind(folder / file, read) for name, (file, read) in found.items()}


def damaged(content: bytes, chance: random.Random, *, document: bool) -> bytes:
    """A damaged copy: bytes flipped, zeroed, spliced or cut, odd lengths, or another structure in a line of JSON."""
    if document and chance.random() < 0.5:
        lines = content.splitlines()
        at = chance.randrange(len(lines))
        mutated = _mutated(json.loads(lines[at]), chance)
        lines[at] = ("[" * 50_000 if chance.random() < 0.02 else json.dumps(mutated)).encode()
        return b"\n".join(lines) + b"\n"
    found = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(len(found))
        end = min(len(found), at + chance.choice((1, 4, 16, 200)))
        way = chance.randrange(6)
        if way == 0:
            found[at] ^= 1 << chance.randrange(8)
        elif way == 1:
            found[at:end] = bytes(end - at)
        elif way == 2:
            found[at:end] = chance.randbytes(end - at)
        elif way == 3:
            other = chance.randrange(len(found))
            found[at:end] = found[other : other + end - at]
        elif way == 4:
            size = chance.choice((1, 2, 4, 8))
            length = chance.choice((0, 1, 127, 1 << 31, 1 << 40, 1 << 62)) % (1 << 8 * size)
            found[at : at + size] = length.to_bytes(size, "little")
        else:
            del found[max(1, at) :]
    return bytes(found)


def _mutated(value: Any, chance: random.Random) -> Any:
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(list(value))
        changed = {k: v for k, v in value.items() if k != key}
        if chance.random() < 0.7:
            changed[key if chance.random() < 0.8 else "odd"] = _mutated(value[key], chance)
        return changed
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        return [*value[:at], _mutated(value[at], chance), *value[at + 1 :]]
    return chance.choice(
        (None, True, -1, 0.5, 1e308, 10**30, float("nan"), "", "\0", "\ud800", "../x", [], {}, [[]], "x")
    )


def fuzz(name: str, kind: Kind, count: int, seed: int) -> list[str]:
    """Open `count` damaged files of one kind; a line for each finding."""
    content, findings, start = kind.path.read_bytes(), list[str](), 0
    document = kind.path.suffix in (".json", ".journal")
    kind.read(kind.path)
    while start < count:
        receiver, sender = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            _work(kind, content, document, range(start, count), f"{seed}-{name}", sender)
        os.close(sender)
        reason, heard = "", b""
        while True:
            if not select.select([receiver], [], [], SECONDS)[0]:
                os.kill(child, signal.SIGKILL)
                reason = f"hangs for more than {SECONDS} s"
                break
            if not (block := os.read(receiver, 1 << 16)):
                break
            heard += block
            *lines, heard = heard.split(b"\n")
            for line in lines:
                number, _, text = line.decode("utf-8", "replace").partition(" ")
                start = int(number)
                if text:
                    findings.append(f"{name} seed {seed} number {start}: {text}")
                    _keep(kind, content, document, start, f"{seed}-{name}")
        os.close(receiver)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status) and not reason:
            reason = f"crash by signal {os.WTERMSIG(status)}"
        if reason:
            findings.append(f"{name} seed {seed} number {start}: {reason}")
            _keep(kind, content, document, start, f"{seed}-{name}")
        start += 1
    kind.path.write_bytes(content)
    return findings


def _case(content: bytes, document: bool, number: int, seed: str) -> bytes:
    return damaged(content, random.Random(f"{seed}-{number}"), document=document)


def _keep(kind: Kind, content: bytes, document: bool, number: int, seed: str) -> None:
    folder = Path(tempfile.gettempdir()) / "sppfeat-fuzz"
    folder.mkdir(exist_ok=True)
    (folder / f"{seed}-{number}{kind.path.suffix}").write_bytes(_case(content, document, number, seed))


def _work(kind: Kind, content: bytes, document: bool, numbers: range, seed: str, sender: int) -> None:
    warnings.simplefilter("ignore")
    try:
        for number in numbers:
            text = ""
            os.write(sender, f"{number}\n".encode())
            kind.path.unlink()  # otherwise a file of the same size and time might be taken for the last one
            kind.path.write_bytes(_case(content, document, number, seed))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                kind.read(kind.path)
            except SppFeatError as error:
                text = "" if "\n" not in str(error) else "message of several lines"
            except BaseException as error:
                place = error.__traceback__
                while place and place.tb_next:
                    place = place.tb_next
                where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else ""
                text = f"{type(error).__name__}: {' '.join(str(error).split())[:150]} ({where})"
            if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 > MEMORY_BYTES:
                text = "takes more than 1.5 GB"
            if text:
                os.write(sender, f"{number} {text}\n".encode("utf-8", "replace"))
    finally:
        os._exit(0)


def main() -> int:
    """Run the long form; returns 1 if there are findings."""
    parser = argparse.ArgumentParser(description="Damage every kind of file that sppfeat reads, and open it.")
    parser.add_argument("--count", type=int, default=300, help="Files of each kind.")
    parser.add_argument("--kind", help="One kind alone.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--impatient", action="store_true", help="Give files that hang HDF5 up after one second.")
    options = parser.parse_args()
    if options.impatient:
        hdf5_check.DEADLINE_SECONDS = 1  # type: ignore[misc]
    findings: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in kinds(Path(folder)).items():
            if options.kind in (None, name):
                found = fuzz(name, kind, options.count, options.seed)
                print(f"{name}: {options.count} files, {len(found)} findings", flush=True)
                findings += found
    print(*findings, sep="\n")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
