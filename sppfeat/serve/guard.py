"""What a request must satisfy before anything is done for it, and what every answer says.

A web page elsewhere must not read a gallery or post to it through the user's browser. So the Host must be one that the
server was started with (DNS rebinding), and a request that a browser says comes from another site is refused (Origin,
Sec-Fetch-Site), unless the user opens the page itself. Where others can connect, every request carries a token.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from sppfeat.serve.options import ServeOptions, is_loopback

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

COOKIE: Final = "sppfeat_token"
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
)


class _RefusedBodyError(Exception):
    pass


class Guard:
    """The application behind these checks."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], options: ServeOptions) -> None:
        self._app, self._options = app, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}

        async def guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                known = {key.lower() for key, _ in message["headers"]}
                extra = [*_HEADERS, (b"content-security-policy", POLICY.encode()), (b"cache-control", b"no-store")]
                message["headers"] = [*message["headers"], *(one for one in extra if one[0] not in known)]
            await send(message)

        refused = self._refusal(scope, headers)
        if refused is not None:
            await _answer(guarded, *refused)
            return
        query = parse_qs(scope["query_string"].decode("latin-1"))
        if self._options.token is not None and scope["path"] == "/" and "token" in query:
            # Out of the address bar and of the history.
            # Lax, since a link in a mail leads here, too; requests that change anything are checked by their Origin.
            cookie = f"{_cookie_name(headers)}={self._options.token}; HttpOnly; SameSite=Lax; Path=/"
            start = {"type": "http.response.start", "status": 303}
            await guarded(start | {"headers": [(b"location", b"/"), (b"set-cookie", cookie.encode("latin-1"))]})
            await guarded({"type": "http.response.body", "body": b""})
            return
        left = self._options.max_upload
        begun = late = False
        deadline: float | None = asyncio.get_running_loop().time() + self._options.seconds

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal left, late, deadline
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                late = True
                raise _RefusedBodyError from None
            left -= len(message.get("body", b""))
            if left < 0:
                raise _RefusedBodyError
            if not message.get("more_body", False):
                deadline = None  # what follows is the end of the connection, whenever that is
            return message

        async def unless_refused(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            if begun or left >= 0 and not late:
                begun = True
                await guarded(message)

        # The application may make an answer of its own of a body that ends early.
        with contextlib.suppress(_RefusedBodyError):
            await self._app(scope, bounded, unless_refused)
        if left < 0 and not begun:
            await _answer(guarded, 413, self._too_large)
        elif late and not begun:
            await _answer(guarded, 408, f"expected the whole request within {self._options.seconds:g} s")

    @property
    def _too_large(self) -> str:
        return f"expected at most {self._options.max_upload:,} bytes, found more"

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and reason of a request that is refused."""
        host = headers.get("host", "")
        if (name := _host_name(host)) is None:
            return 400, "expected a Host"
        if self._options.token is None:
            if not is_loopback(name) and name != self._options.host:
                return 403, f"expected this machine's own name as Host, found {name!r}"
        elif not self._known(scope, headers):
            return 401, "expected the token that the server printed: open the address with ?token=..."
        opened = scope["method"] == "GET" and scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate"
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not opened:
            return 403, "expected a request of this page, found one of another site"
        origin = headers.get("origin")
        if origin is not None and _place(origin) != host.lower():
            return 403, f"expected a request of this page, found one of {origin!r}"
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            return 400, "expected a number as Content-Length"
        if int(length) > self._options.max_upload:
            return 413, self._too_large
        return None

    def _known(self, scope: Scope, headers: dict[str, str]) -> bool:
        """Whether a request carries the token."""
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", []) if scope["path"] == "/" else []
        if (bearer := headers.get("authorization", "")).startswith("Bearer "):
            given.append(bearer.removeprefix("Bearer "))
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            cookies = SimpleCookie()
        if (name := _cookie_name(headers)) in cookies:
            given.append(cookies[name].value)
        wanted = (self._options.token or "").encode()
        return any(hmac.compare_digest(one.encode("utf-8", "surrogateescape"), wanted) for one in given)


def _host_name(host: str) -> str | None:
    """The name or address in a Host, which must hold a port besides and nothing else."""
    if any(character in host for character in "/@?#\\ "):
        return None
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _cookie_name(headers: dict[str, str]) -> str:
    """Of the token: cookies are one for all ports of a host, and several servers may run."""
    port = headers.get("host", "").rpartition(":")[2]
    return f"{COOKIE}_{port}" if port.isascii() and port.isdigit() else COOKIE


def _place(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


async def _answer(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
