"""What every kind of archive has: members with names, and the name that each of them goes by."""

from __future__ import annotations

import hashlib
from typing import Final, NamedTuple

import numpy as np

from sppfeat.images.items import Content, member_to_name

# The row that stands for what cannot be listed of an archive.
REST: Final = "(rest)"
_RECENT: Final = 1 << 14


class Member(NamedTuple):
    """A member of an archive: its name as the archive has it, and its content, or why it has none."""

    name: str
    content: Content | None = None
    problem: str | None = None


class MemberNames:
    """Distinct names for the members of one archive, in their order; holds 8 bytes for each, not the names.

    A name that occurred before gets `~2`, `~3`, ... at its end, the first that is free.
    """

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._older = np.zeros(0, np.uint64)  # ascending
        self._last: dict[str, int] = {}  # of names that occurred before

    def name(self, member: str) -> str:
        """The name of the next member."""
        name = member_to_name(member) or "\\x2e."
        if self._is_new(name):
            return name
        number = self._last.get(name, 1) + 1
        while not self._is_new(f"{name}~{number}"):
            number += 1
        self._last[name] = number
        return f"{name}~{number}"

    def _is_new(self, name: str) -> bool:
        digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        key = int.from_bytes(digest, "big")
        at = int(np.searchsorted(self._older, np.uint64(key))) if len(self._older) else 0
        if key in self._recent or (at < len(self._older) and int(self._older[at]) == key):
            return False
        self._recent.add(key)
        if len(self._recent) >= _RECENT:
            self._older = np.union1d(self._older, np.fromiter(self._recent, np.uint64, len(self._recent)))
            self._recent = set()
        return True
