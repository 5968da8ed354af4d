"""Downloads of pretrained weights: without a network they fail at once, instead of after a minute of retries."""

from __future__ import annotations

import contextlib
import socket
import urllib.request
from collections.abc import Iterator
from typing import Final
from urllib.parse import urlsplit

# A handshake takes well below a second, and a network that loses packets would be slow to download from.
_SECONDS: Final = 3.0


@contextlib.contextmanager
def hub_if_reachable() -> Iterator[str | None]:
    """Let the Hugging Face Hub look only into its cache while its server cannot be reached; the name of that server,
    or None if it can be.
    """
    from huggingface_hub import constants

    url = urlsplit(constants.ENDPOINT)
    host = url.hostname or ""
    port = url.port or (80 if url.scheme == "http" else 443)
    if constants.HF_HUB_OFFLINE or url.scheme in urllib.request.getproxies() or _answers(host, port):
        yield None
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield host
    finally:
        constants.HF_HUB_OFFLINE = False


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_SECONDS).close()
    except OSError:
        return False
    return True
