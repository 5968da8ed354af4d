"""Documents are checked once, and named if they are invalid."""

import msgspec
import pytest

from sppfeat.errors import GalleryError
from sppfeat.files.documents import decode_document


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rows: int
    names: list[str] = []


def test_a_sound_document_becomes_the_shape() -> None:
    assert decode_document(b'{"rows": 3}', Shape, what="f", error=GalleryError) == Shape(3, [])


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[]", b'{"rows": "3"}', b'{"rows": 1.5}', b'{"rows": NaN}', b'{"rows": 1, "odd": 2}', b"{}"]
    + [b"[" * 100_000, b'{"rows": 1, "names": [1]}', b'{"rows": 1, "names": ["\xff"]}'],
)
def test_a_wrong_one_is_named_on_one_line(content: bytes) -> None:
    with pytest.raises(GalleryError, match=r"^f: expected a thing, found: \S") as caught:
        decode_document(content, Shape, what="f: expected a thing", error=GalleryError)
    assert "\n" not in str(caught.value)


def test_what_pythons_json_writes_beyond_json_is_taken_where_it_is_expected() -> None:
    assert decode_document(b'"\\udcff"', str, what="f", error=GalleryError, lenient=True) == "\udcff"
    with pytest.raises(GalleryError, match="^f, found: "):
        decode_document(b'"\\udcff"', str, what="f", error=GalleryError)
    found = decode_document(b"[NaN, -Infinity, 1]", list[float], what="f", error=GalleryError, lenient=True)
    assert found[0] != found[0] and found[1:] == [float("-inf"), 1.0]
    with pytest.raises(GalleryError, match="^f, found: "):
        decode_document(b'[NaN, "1"]', list[float], what="f", error=GalleryError, lenient=True)
    with pytest.raises(GalleryError, match="^f, found: "):
        decode_document(b"[NaN", list[float], what="f", error=GalleryError, lenient=True)
