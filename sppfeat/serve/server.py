"""The server: a port, and the application behind its guard."""

from __future__ import annotations

import atexit
import contextlib
import errno
import html
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Final

from sppfeat.errors import UsageError, require_extra
from sppfeat.files import os_reason
from sppfeat.recipe import RunOptions
from sppfeat.serve.options import ServeOptions

_TRIED: Final = 100


def listen(options: ServeOptions) -> socket.socket:
    """A socket on the port asked for. Raises UsageError, naming the next free port if it is in use."""
    try:
        return _bound(options.host, options.port)
    except UnicodeError:
        raise UsageError(f"host {options.host}: expected a name or an address") from None
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            reason = os_reason(error)
            raise UsageError(f"host {options.host}, port {options.port}: cannot listen there: {reason}") from None
    for port in range(options.port + 1, min(options.port + _TRIED, 65536)):
        with contextlib.suppress(OSError):
            _bound(options.host, port).close()
            raise UsageError(f"port {options.port} is in use; {port} is free: --port {port}")
    raise UsageError(f"port {options.port} is in use, and so are the {_TRIED} after it; --port 0 takes any")


def _bound(host: str, port: int) -> socket.socket:
    family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    found = socket.socket(family, kind, number)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)
    except BaseException:
        found.close()
        raise
    return found


def address_of(options: ServeOptions, listening: socket.socket) -> str:
    """Where a browser on this machine finds the page, the token included."""
    host = "localhost" if options.everywhere else options.host
    text = f"[{host}]" if ":" in host else host
    token = "" if options.token is None else f"?token={options.token}"
    return f"http://{text}:{listening.getsockname()[1]}/{token}"


def open_in_browser(address: str) -> None:
    """Open a page in the user's browser, without waiting for it."""
    if "token=" in address:
        # Every user of a machine sees the arguments of all programs: the browser reads the token from a file instead.
        with tempfile.NamedTemporaryFile("w", prefix="sppfeat-", suffix=".html", delete=False) as file:
            file.write(f'<!doctype html><meta http-equiv="refresh" content="0; url={html.escape(address)}">')
        atexit.register(lambda: Path(file.name).unlink(missing_ok=True))
        address = Path(file.name).as_uri()
    # In a thread: some browsers of terminals are waited for, and ask for the page meanwhile.
    threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()


def serve_gallery(
    gallery: str,
    options: ServeOptions | None = None,
    run_options: RunOptions | None = None,
    *,
    detector: str | None = None,
    classifier: str | None = None,
    weights: str | None = None,
    ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve a gallery until the process is interrupted. ready: called with the page's address once it can be opened.

    Raises GalleryError, ModelError, UsageError, MissingExtraError.
    """
    options = options or ServeOptions()
    uvicorn = require_extra("uvicorn", "serve", "a page over a gallery")
    require_extra("fastapi", "serve", "a page over a gallery")
    require_extra("python_multipart", "serve", "a page over a gallery")
    from sppfeat.serve.app import create_app
    from sppfeat.serve.collection import Collection
    from sppfeat.serve.guard import Guard
    from sppfeat.serve.models import Models

    with contextlib.closing(listen(options)) as listening:
        address = address_of(options, listening)
        collection = Collection(
            gallery, run_options, images=options.images, weights=weights, max_pixels=options.max_pixels
        )
        app = create_app(collection, Models(detector, classifier, run_options), options)

        class Server(uvicorn.Server):  # type: ignore[name-defined, misc]
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                if self.started:
                    ready(address)

        config = uvicorn.Config(
            Guard(app, options),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=3,
            limit_concurrency=1000,
        )
        Server(config).run(sockets=[listening])
