"""What a process that decodes says, and what its parent makes of it: the same arrays, in memory that both share."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PHOTOS, TINY

from sppfeat.images import (
    DecodedImage,
    Decoder,
    Fingerprint,
    Item,
    PreparedImage,
    Unreadable,
    Unresized,
    heard_answer,
    resizing,
)
from sppfeat.images.decoder import _said

PHOTO = sorted(PHOTOS.rglob("*.jpg"))[0]
RECIPE = replace(TINY, interpolation="bilinear")
CENTER = replace(RECIPE, crop="center", interpolation="lanczos")


def sent(decoder: Decoder, item: Item, size: int = 4 << 20) -> tuple[Any, list[Any]]:
    """The parent's answer, and the line; memory that is not the item's stays as it is."""
    memory = np.full(size + 200, 9, np.uint8)
    line = json.loads(json.dumps([3, 0.5, *_said(decoder.decode(item), memory[100 : 100 + size])]))
    assert (memory[:100] == 9).all() and (memory[100 + size :] == 9).all()
    answer = heard_answer(line, memory[100 : 100 + size])
    assert (answer.number, answer.seconds) == (3, 0.5)
    assert (memory[100 + answer.used : 100 + size] == 9).all()
    return answer, line


@pytest.mark.parametrize("recipes", [(RECIPE,), (RECIPE, CENTER), (replace(RECIPE, scales=(64, 96, "native")),)])
@pytest.mark.parametrize("unresized", [True, False])
@pytest.mark.parametrize("most", [1 << 24, 100])
def test_an_image(recipes: Any, unresized: bool, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resizing, "MOST_UNRESIZED", most)
    decoder = Decoder(recipes, 1, unresized)
    expected = decoder.decode(Item.at(PHOTO))
    answer, _ = sent(decoder, Item.at(PHOTO))
    found = answer.decoded
    assert isinstance(expected, DecodedImage if unresized else PreparedImage) and type(found) is type(expected)
    assert (found.size, found.fingerprint) == (expected.size, expected.fingerprint)
    assert len(found.inputs) == len(expected.inputs) > 0
    for one, other in zip(found.inputs, expected.inputs, strict=True):
        if isinstance(other, Unresized):
            assert isinstance(one, Unresized)
            assert (one.size, one.interpolation, one.corner, one.shape) == (
                (other.size, other.interpolation, other.corner, other.shape)
            )
            one, other = one.pixels, other.pixels
        assert one.dtype == np.uint8 and one.flags.c_contiguous
        np.testing.assert_array_equal(one, other)
    pixels = {id(each.pixels) for each in found.inputs} if unresized else set()
    assert not unresized or (len(pixels) == 1) == (most > 100 or len(found.inputs) == 1)  # the whole image once


def test_an_image_that_has_no_room() -> None:
    decoder = Decoder((RECIPE,), 1, False)
    needed = sent(decoder, Item.at(PHOTO))[0].used
    assert sent(decoder, Item.at(PHOTO), needed)[0].decoded is not None
    assert sent(decoder, Item.at(PHOTO), needed - 1)[1] == [3, 0.5]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"text")
    decoder = Decoder((RECIPE,), 1, True)
    answer, _ = sent(decoder, Item.at(tmp_path / "x.png"))
    assert answer.decoded == decoder.decode(Item.at(tmp_path / "x.png")) and answer.used == 0
    assert isinstance(answer.decoded, Unreadable) and answer.decoded.reason.startswith("not an image")
    assert isinstance(answer.decoded.fingerprint, Fingerprint) and answer.decoded.fingerprint.file_size == 4


def test_an_image_that_takes_more_memory_is_left_to_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder((RECIPE,), 1, True)
    monkeypatch.setattr(resizing, "_most_lent", 1 << 30)
    assert isinstance(sent(decoder, Item.at(PHOTO))[0].decoded, DecodedImage)
    resizing.limit_decoding(100_000)
    with pytest.raises(MemoryError, match="bytes to decode: expected at most 100,000"):
        resizing.decode_image(Item.at(PHOTO), RECIPE)
    assert sent(decoder, Item.at(PHOTO))[1] == [3, 0.5]


def test_a_process_ends_with_its_input(tmp_path: Path) -> None:
    """It says that it is ready, nothing else, and has imported no network."""
    memory = tmp_path / "memory"
    memory.write_bytes(bytes(4096))
    code = (
        "import atexit, os, sys; from sppfeat.images import decoder; leave = os._exit\n"
        "sys.argv[2] = os.open(sys.argv[2], os.O_RDWR)\n"
        "heavy = lambda: [name for name in ('torch', 'h5py', 'openvino', 'timm', 'pyarrow') if name in sys.modules]\n"
        "os._exit = lambda code: (print(heavy(), file=sys.stderr, flush=True), leave(code))\n"
        "decoder.main()"
    )
    first = json.dumps(Decoder((RECIPE,), 1, True).told(1 << 20))
    run = subprocess.run(
        [sys.executable, "-c", code, "1", str(memory)], input=first + "\n", capture_output=True, text=True, timeout=60
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "[]\n", "[]\n")
