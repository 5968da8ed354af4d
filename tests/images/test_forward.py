"""Parts of a stream that is read forward."""

from __future__ import annotations

import io
import random

import pytest

from sppfeat.errors import ImageError
from sppfeat.images import forward
from sppfeat.images.forward import ForwardReader


@pytest.fixture
def content(monkeypatch: pytest.MonkeyPatch) -> bytes:
    monkeypatch.setattr(forward, "_BLOCK", 100)
    return random.Random(1).randbytes(10_000)


def test_parts_in_any_order_are_those_of_the_content(content: bytes) -> None:
    reader = ForwardReader(lambda: io.BytesIO(content), window=300)
    draw = random.Random(2)
    for _ in range(500):
        start = draw.randrange(10_000)
        size = draw.randrange(10_000 - start)
        assert reader.read(start, size) == content[start : start + size]


def test_a_pass_serves_what_lies_within_the_window(content: bytes) -> None:
    reader = ForwardReader(lambda: io.BytesIO(content), window=300)
    for start in (500, 300, 0, 200, 900, 700):
        assert reader.read(start, 90) == content[start : start + 90]
    assert reader.passes == 2  # only 0 was behind the window
    assert reader.read(100, 1) == content[100:101] and reader.passes == 3


def test_it_holds_the_window_and_the_part(content: bytes) -> None:
    reader = ForwardReader(lambda: io.BytesIO(content), window=300)
    for start in range(0, 9_000, 70):
        reader.read(start, 500)
        assert sum(len(block) for _, block in reader._blocks) <= 300 + 500 + 200


def test_the_end_and_damage_are_reasons_and_the_stream_is_closed(content: bytes) -> None:
    class Damaged(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() >= 400:
                raise ValueError("bad block\nand more")
            return super().read(size)

    reader = ForwardReader(lambda: io.BytesIO(content))
    with pytest.raises(ImageError, match="its archive ends before it"):
        reader.read(9_990, 11)
    streams: list[Damaged] = []
    damaged = ForwardReader(lambda: streams.append(Damaged(content)) or streams[-1])  # type: ignore[func-returns-value]
    assert damaged.read(300, 100) == content[300:400]
    with pytest.raises(ImageError, match="its archive is damaged: bad block$"):
        damaged.read(350, 100)
    assert streams[0].closed
    assert damaged.read(0, 10) == content[:10]
