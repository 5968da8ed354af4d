"""JSON from a file, checked once against a declared shape; no other code checks it again.

msgspec does the checking: it is strict (a quoted number is not a number), rejects NaN, names the place of an error, has
no dependencies and, unlike pydantic, loads in milliseconds.
"""

from __future__ import annotations

import json
from typing import TypeVar

import msgspec

from sppfeat.errors import SppFeatError, one_line

T = TypeVar("T")


def decode_document(
    content: bytes | str, shape: type[T], *, what: str, error: type[SppFeatError], lenient: bool = False
) -> T:
    """The JSON document `content` as an instance of `shape`, a msgspec.Struct or any type that msgspec knows.

    what: how the message names the document and what was expected, such as `g/gallery.json: expected a gallery`.
    lenient: also accept what Python's json writes beyond JSON: NaN, Infinity, and lone surrogates (non-UTF-8 paths).
    Raises `error`, with the place that is wrong, for text that is not JSON or a document of another shape.
    """
    try:
        if lenient:
            return msgspec.convert(json.loads(content), shape, strict=True)
        return msgspec.json.decode(content, type=shape, strict=True)
    except (msgspec.MsgspecError, ValueError, RecursionError) as reason:
        raise error(f"{what}, found: {one_line(reason)}") from None
