"""How a gallery is served."""

from __future__ import annotations

import ipaddress
import secrets
from dataclasses import dataclass
from typing import Final

from sppfeat.errors import UsageError

DEFAULT_PORT: Final = 8000
LOOPBACK: Final = "127.0.0.1"
MAX_HITS: Final = 200


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Where a gallery is served, and within which bounds.

    host, port: where the server listens. token: what every request must carry; None: nothing, or something that nobody
    guesses where others can connect. images: a folder instead of source folders that are gone. max_upload:
    bytes of a request. max_pixels: of an image. seconds: that a search may take. workers: images read or described at
    once; others wait. waiting: requests that may wait; more are refused. uploads: bytes of query images kept in memory.
    thumbnails: bytes of thumbnails kept on disk.
    Raises UsageError, naming the field, for an invalid value.
    """

    host: str = LOOPBACK
    port: int = DEFAULT_PORT
    token: str | None = None
    images: str | None = None
    max_upload: int = 32 << 20
    max_pixels: int = 100_000_000
    seconds: float = 60.0
    workers: int = 4
    waiting: int = 64
    uploads: int = 128 << 20
    thumbnails: int = 256 << 20

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"port must be from 0 to 65535, found {self.port}")
        if self.token is not None and not (len(self.token) >= 8 and self.token.isascii() and self.token.isalnum()):
            raise UsageError("token must be 8 or more letters and digits")
        if self.token is None and not is_loopback(self.host):
            object.__setattr__(self, "token", secrets.token_hex(16))

    @property
    def everywhere(self) -> bool:
        """Whether the server listens on all addresses of this machine."""
        try:
            return ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return False


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
