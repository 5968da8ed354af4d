"""JSON that comes from a file, checked once against a declared shape: nothing behind this door looks at it again.

msgspec checks: it is strict (a number in quotes is no number), refuses NaN, names the place that is wrong, has no
dependencies and loads in milliseconds, which pydantic does not.
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

    what: how the message names the document and says what was expected, such as `g/gallery.json: expected a gallery`.
    lenient: also take what Python's json writes beyond JSON: NaN, Infinity, and lone surrogates, of paths not in UTF-8.
    Raises `error` for text that is not JSON, and for a document of another shape, with the place that is wrong.
    """
    try:
        if lenient:
            return msgspec.convert(json.loads(content), shape, strict=True)
        return msgspec.json.decode(content, type=shape, strict=True)
    except (msgspec.MsgspecError, ValueError, RecursionError) as reason:
        raise error(f"{what}, found: {one_line(reason)}") from None
