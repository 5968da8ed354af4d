"""Damages one file of a gallery again and again, opens and searches the gallery each time: `fuzz_gallery.py COUNT
FOLDER:KIND ...`. A kind is `json`, a file of the gallery, or one of its added rows, such as `added-index`. Runs in a
separate process, which a crash or a hang ends; prints what it does before it does it.

An answer must be a clear error or right. Where checksums are made to match the damage, which is then no accident, any
rows with finite scores will do.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import random
import shutil
import signal
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from sppfeat.errors import SppFeatError
from sppfeat.retrieval.gallery import open_gallery
from sppfeat.retrieval.search import SearchOptions, search_descriptors
from sppfeat_cli.inspect import _inspect_gallery

SECONDS = 10
ODD: list[Any] = [None, [], {}, "", -1, 0, 1.5, 10**30, True, "\x1b[2Jx", "../x", "x" * 5000, [[]], {"": None}]


def damage(content: bytes, generator: random.Random) -> bytes:
    """Flipped, cut, doubled and set bytes, most of them near the beginning or the end, where structure is."""
    changed = bytearray(content)
    for _ in range(generator.choice([1, 1, 2, 5])):
        near = min(400, len(changed))
        at = generator.choice(
            [generator.randrange(near), len(changed) - 1 - generator.randrange(near), generator.randrange(len(changed))]
        )
        change = generator.randrange(5)
        if change == 0:
            changed[at] ^= 1 << generator.randrange(8)
        elif change == 1:
            changed[at : at + 1] = generator.choice([b"\0", b"\xff", b"\x7f", b"\x80"])
        elif change == 2:
            wide = generator.choice([b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f", b"\0\0\0\0\1\0\0\0"])
            changed[at : at + len(wide)] = wide[: len(changed) - at]
        elif change == 3:
            del changed[at : at + generator.randrange(1, 60)]
        else:
            changed[at:at] = changed[at : at + generator.randrange(1, 60)]
        if not changed:
            changed += b"\0"
    return bytes(changed)


def damage_document(content: bytes, generator: random.Random) -> bytes:
    """A key less, or more, or with an odd value, anywhere in a JSON document."""
    document = json.loads(content)
    place = document
    while True:
        key = generator.choice(list(place) if isinstance(place, dict) else list(range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or generator.random() < 0.2:
            break
        place = place[key]
    change = generator.randrange(4)
    if change == 0:
        del place[key]
    elif change == 1 and isinstance(place, dict):
        place["odd\0"] = place.pop(key)
    else:
        place[key] = generator.choice(ODD)
    return json.dumps(document).encode()


def fuzz(folder: Path, kind: str, count: int) -> dict[str, int]:
    """How often the gallery was refused, and opened."""
    generator = random.Random(0)
    found = open_gallery(folder)
    asked = np.random.default_rng(0).normal(size=(4, found.dim))
    options = SearchOptions(k=5, rerank="expand")
    expected = search_descriptors(found, asked, options)
    about = json.loads((folder / "gallery.json").read_text())
    files = about["files"]["added"] if kind.startswith("added-") else about["files"]
    entry = files.get(kind.removeprefix("added-"), {"file": "gallery.json"})
    name = entry["file"]
    whole = (folder / name).read_bytes()
    copy = folder.with_name(f"{folder.name}-{kind}")
    outcomes: collections.Counter[str] = collections.Counter()
    shutil.copytree(folder, copy)
    for number in range(count):
        print(folder.name, kind, number, flush=True)
        signal.alarm(SECONDS)
        signed = kind != "json" and number % 3 > 0
        content = (damage_document if kind == "json" and number % 3 else damage)(whole, generator)
        (copy / name).write_bytes(content)
        if signed:
            entry |= {"bytes": len(content), "crc32": zlib.crc32(content)}
            (copy / "gallery.json").write_text(json.dumps(about))
        elif kind != "json":
            shutil.copy(folder / "gallery.json", copy)
        shown = io.StringIO()
        try:
            gallery = open_gallery(copy)
            rows, scores = search_descriptors(gallery, asked, options)
            with contextlib.redirect_stdout(shown):
                _inspect_gallery(str(copy), False, False)
        except SppFeatError as error:
            assert "\n" not in str(error), str(error)
            outcomes["refused"] += 1
            continue
        text = shown.getvalue()
        assert text.count("\n") > 20 and all(line.isprintable() for line in text.splitlines()), text
        if signed:
            assert rows.max() < len(gallery.rows.names) and np.isfinite(scores[rows >= 0]).all()
        else:
            assert np.array_equal(rows, expected[0]) and np.allclose(scores, expected[1])
        outcomes["opened"] += 1
    signal.alarm(0)
    return outcomes


if __name__ == "__main__":
    outcomes = {}
    for argument in sys.argv[2:]:
        path, _, what = argument.rpartition(":")
        outcomes[f"{Path(path).name}:{what}"] = fuzz(Path(path), what, int(sys.argv[1]))
    print(json.dumps(outcomes))
