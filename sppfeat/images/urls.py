"""URLs as sources: listing, reading whole objects and parts of them, with retries, through fsspec."""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import io
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, BinaryIO, Final, TypeVar

from sppfeat.errors import ImageError, SppFeatError, one_line, require_extra
from sppfeat.images.items import Fingerprint

# Protocols, and what fsspec needs for them.
PROTOCOLS: Final = {
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
}
EXTRA: Final = "cloud"
# Seconds between tries: a server that restarts, or limits its rate, needs some.
WAITS: Final = (0.2, 1.0, 4.0)
TIMEOUT: Final = 60.0  # seconds for one request
# HTTP statuses that a second try may cure (RFC 9110, 15; RFC 6585, 4).
TEMPORARY_STATUSES: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_URL: Final = re.compile(rf"({'|'.join(PROTOCOLS)})://(?:[^/]|$)", re.IGNORECASE)
_OTHER_URL: Final = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
_BLOCK: Final = 1 << 20
Result = TypeVar("Result")


def is_url(place: str) -> bool:
    """Whether a source is a URL of a protocol that can be read, not a path."""
    return _URL.match(place) is not None


def absolute(place: str | os.PathLike[str]) -> str:
    """An absolute path; a URL as it is."""
    text = os.fspath(place)
    # abspath keeps two leading slashes, to which POSIX allows a special meaning; here they have none.
    return text if is_url(text) else "/" + os.path.abspath(text).lstrip("/")


def unknown_protocol(place: str) -> str | None:
    """The protocol of something that looks like a URL of another protocol."""
    found = _OTHER_URL.match(place)
    return None if found is None or is_url(place) else found[1]


def url_path(url: str) -> str:
    """A URL without its query and fragment where it is one of the web: what an extension is looked for in."""
    return re.split(r"[?#]", url, maxsplit=1)[0] if url[:4].lower() == "http" else url


def leads_out(name: str) -> bool:
    """Whether a name below a URL would be resolved to something above it."""
    return ".." in urllib.parse.unquote(name).split("/")


def protocol_of(url: str) -> str:
    """The protocol of a URL, in lower case."""
    return url.partition("://")[0].lower()


@functools.cache
def file_system(protocol: str) -> Any:
    """fsspec's file system of a protocol, with the user's own settings (environment, ~/.config/fsspec)."""
    fsspec = require_extra("fsspec", EXTRA, f"{protocol}://")
    require_extra(PROTOCOLS[protocol], EXTRA, f"{protocol}://")
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in ("http", "https"):
        options["client_kwargs"] = {"timeout": import_module("aiohttp").ClientTimeout(total=None, sock_read=TIMEOUT)}
    return fsspec.filesystem(protocol, **options)


def check_protocol(url: str) -> None:
    """Raise MissingExtraError if what a URL needs is not installed."""
    file_system(protocol_of(url))


def _origin(error: Exception) -> Exception:
    """What went wrong: fsspec says that a web page is not found, whatever the reason was."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception):
        from_web = type(cause).__module__.startswith("aiohttp") or isinstance(cause, OSError)
        return cause if from_web and not isinstance(cause, FileNotFoundError) else error
    return error


def _is_temporary(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, SppFeatError)):
        return False
    status = _status(error)
    if status is not None:
        return status in TEMPORARY_STATUSES
    name = type(error).__name__
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    # aiohttp's, botocore's, httpx's and fsspec's own classes, which are not imported here.
    return name in (
        "ClientPayloadError",
        "ClientOSError",
        "ClientConnectorError",
        "ServerDisconnectedError",
        "FSTimeoutError",
        "EndpointConnectionError",
        "ReadTimeoutError",
        "ConnectTimeoutError",
        "IncompleteReadError",
        "ResponseStreamingError",
        "HttpError",
        "ConnectError",
        "ReadError",
        "ConnectTimeout",
        "ReadTimeout",
        "RemoteProtocolError",
    )


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error, wherever its library keeps it."""
    for holder, name in ((error, "status"), (getattr(error, "response", None), "status_code"), (error, "code")):
        found = getattr(holder, name, None)
        if isinstance(found, int):
            return found if found >= 300 else None
    return None


def _reason(error: BaseException) -> str:
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status == 404:
        return "no such object"
    if isinstance(error, PermissionError) or status in (401, 403):
        return f"access refused ({one_line(error)})"
    if status is not None:
        return f"the server answers {status} {getattr(error, 'message', '')}".rstrip()
    return f"cannot be read: {type(error).__name__}: {one_line(error)}"


def tried(request: Callable[[], Result]) -> Result:
    """The result of a request, tried again after temporary errors. Raises ImageError."""
    for number, wait in enumerate((*WAITS, None), start=1):
        try:
            return request()
        except SppFeatError:
            raise
        except Exception as raised:  # each protocol's library has errors of its own
            error = _origin(raised)
            if wait is None or not _is_temporary(error):
                tries = f" ({number} tries)" if number > 1 else ""
                raise ImageError(_reason(error) + tries) from None
        time.sleep(wait)
    raise AssertionError("unreachable")


def _number(text: str) -> int:
    """A checksum or ETag as a positive number of 63 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def fingerprint_from(info: dict[str, Any]) -> Fingerprint:
    """Size, and ETag or modification time, of what a file system says about an object."""
    size = int(info.get("size") or 0)
    for key in ("ETag", "etag", "blob_id", "md5Hash", "crc32c"):
        if info.get(key):
            return Fingerprint(size, _number(str(info[key])))
    for key in ("LastModified", "Last-Modified", "mtime", "updated", "last_commit"):
        found = info.get(key)
        if isinstance(found, str):
            with contextlib.suppress(ValueError, TypeError):
                found = import_module("email.utils").parsedate_to_datetime(found)
        if isinstance(found, datetime.datetime):
            return Fingerprint(size, int(found.timestamp() * 1e9))
        if isinstance(found, (int, float)):
            return Fingerprint(size, int(found * 1e9))
        if found:
            return Fingerprint(size, _number(str(found)))
    return Fingerprint(size, 1)


def info_of(url: str) -> Fingerprint:
    """The fingerprint of an object as it is now. Raises ImageError."""
    return fingerprint_from(tried(lambda: file_system(protocol_of(url)).info(url)))


def read_part(url: str, start: int, size: int) -> bytes:
    """A part of an object. Raises ImageError."""
    if not size:
        return b""

    def request() -> bytes:
        found = bytes(file_system(protocol_of(url)).cat_file(url, start=start, end=start + size))
        if len(found) > size:
            raise ImageError("the server sends whole objects only, expected support of parts (Range)")
        return found

    return tried(request)


def read_object(url: str, *, most: int) -> tuple[bytes | None, Fingerprint]:
    """An object and its fingerprint, from one request where the protocol allows that.

    No bytes are returned of an object that is larger than `most`. Raises ImageError.
    """
    if protocol_of(url) in ("http", "https"):
        return tried(lambda: _read_web(url, most))
    found = info_of(url)
    if found.file_size > most:
        return None, found
    return read_part(url, 0, found.file_size), found


def _read_web(url: str, most: int) -> tuple[bytes | None, Fingerprint]:
    # A size makes fsspec skip its own HEAD; no block size gives one plain GET.
    with file_system(protocol_of(url)).open(url, block_size=0, size=1, headers={"Accept-Encoding": "identity"}) as file:
        headers = file.r.headers
        file.r.raise_for_status()
        declared = headers.get("Content-Length", "")
        info = {key: headers[key] for key in ("ETag", "Last-Modified") if key in headers}
        if declared.isdigit() and int(declared) > most:
            return None, fingerprint_from({"size": int(declared), **info})
        blocks: list[bytes] = []
        size = 0
        while block := file.read(_BLOCK):
            size += len(block)
            if size > most:
                return None, fingerprint_from({"size": size, **info})
            blocks.append(block)
        return b"".join(blocks), fingerprint_from({"size": size if not declared.isdigit() else int(declared), **info})


def open_url(url: str, *, size: int, block: int) -> BinaryIO:
    """An object as a seekable file, fetched in blocks of `block` bytes. Opening and reading raise ImageError."""
    file: BinaryIO = tried(
        lambda: file_system(protocol_of(url)).open(url, "rb", block_size=block, size=size, cache_type="readahead")
    )
    return io.BufferedReader(_PatientFile(file), 1 << 16)


class _PatientFile(io.RawIOBase):
    """A remote file; reading is tried again after temporary errors."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        found = tried(lambda: self._file.read(len(buffer)))
        buffer[: len(found)] = found
        return len(found)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def list_prefix(url: str) -> list[tuple[str, bool, Fingerprint]]:
    """The entries of a prefix in name order: URL, whether it is a prefix itself, and fingerprint. Raises ImageError."""
    protocol = protocol_of(url)
    entries = tried(lambda: file_system(protocol).ls(url, detail=True))
    own = url.partition("://")[2].rstrip("/")
    found: list[tuple[str, bool, Fingerprint]] = []
    for entry in entries:
        path = str(entry["name"]).partition("://")[2] if "://" in str(entry["name"]) else str(entry["name"])
        if path.rstrip("/") != own:  # some stores keep an empty object for the prefix itself
            is_prefix = entry.get("type") == "directory"
            place = f"{protocol}://{path.rstrip('/') if is_prefix else path}"
            found.append((place, is_prefix, Fingerprint(0, 0) if is_prefix else fingerprint_from(entry)))
    return sorted(found, key=lambda entry: entry[0].encode("utf-8", "surrogateescape"))


def walk_url(top: str) -> Iterator[tuple[str, Fingerprint | None, str | None]]:
    """Every object below a prefix, with its fingerprint, listed prefix by prefix; or a prefix that cannot be listed,
    with the reason. Raises ImageError for `top` itself."""
    stack = [iter(list_prefix(top))]
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
            continue
        url, is_prefix, fingerprint = entry
        if not is_prefix:
            yield url, fingerprint, None
            continue
        try:
            stack.append(iter(list_prefix(url)))
        except ImageError as error:
            yield url, None, str(error)
