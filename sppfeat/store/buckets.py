"""The objects of a store in a bucket, read as a whole or in part, and written by conditional puts.

Nobody can lock a bucket. An object is put only if it is as its writer knows it: absent, or unchanged by its ETag. So of
two writers one ends with an error, and nothing is lost or doubled.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from sppfeat.errors import ImageError, SppFeatError, StoreBusyError, StoreError, UsageError
from sppfeat.files import os_reason
from sppfeat.images import file_system, leads_out, tried

# S3 takes at most this much in one put, and only a single put is conditional on every S3 there is.
MAX_OBJECT: Final = 5 << 30
# In the metadata of a shard's object: where its descriptors are, so that a writer can leave them out.
_VALUES: Final = "sppfeat-values"
_RANGE: Final = re.compile(r"(\d{1,15})\+(\d{1,15})", re.ASCII)
_PART: Final = 1 << 26
_ABSENT: Final = ("NoSuchKey", "404", "NotFound")
_REFUSED: Final = ("PreconditionFailed", "412")
_AGAIN: Final = (
    "BadDigest",
    "ConditionalRequestConflict",
    "409",
    "SlowDown",
    "InternalError",
    "ServiceUnavailable",
    "503",
)
Result = TypeVar("Result")


class _Absent(SppFeatError):
    """There is no such object."""


class _Refused(SppFeatError):
    """The object is not as a condition wants it."""


class Object(NamedTuple):
    """An object of a bucket; etag: as the server gives it, in quotes. size: in bytes."""

    etag: str
    size: int


class Span(NamedTuple):
    """Where the descriptors are in the file of a shard, in bytes."""

    offset: int
    size: int


class Bucket:
    """The objects below a URL such as s3://bucket/feats/. Every method raises StoreError, which names the object."""

    def __init__(self, url: str) -> None:
        place = url.partition("://")[2].strip("/")
        if not url.lower().startswith("s3://") or "/" not in place or leads_out(place):
            raise UsageError(f"{url}: expected s3://BUCKET/FOLDER/, a folder of its own, as a store in a bucket")
        self.url = f"s3://{place}/"
        self._bucket, _, self._prefix = place.partition("/")
        self._s3 = file_system("s3")

    def list(self) -> dict[str, Object]:
        """The objects by name; those further below as one name that ends with a slash."""
        found: dict[str, Object] = {}
        more: dict[str, str] = {}
        while True:
            page = self._call("", "list_objects_v2", Prefix=f"{self._prefix}/", Delimiter="/", **more)
            for entry in page.get("Contents", []):
                if name := str(entry["Key"])[len(self._prefix) + 1 :]:
                    found[name] = Object(_quoted(entry["ETag"]), int(entry["Size"]))
            for entry in page.get("CommonPrefixes", []):
                found[str(entry["Prefix"])[len(self._prefix) + 1 :]] = Object("", 0)
            if not page.get("IsTruncated"):
                return found
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def read(self, name: str) -> tuple[bytes, str] | None:
        """A small object and its ETag; None if there is none."""
        try:
            return self._get(name)
        except _Absent:
            return None

    def put(self, name: str, content: Path | bytes, *, replaces: str | None, values: Span | None = None) -> str:
        """Put an object that is absent, or whose ETag is `replaces`; returns its ETag.

        Raises StoreBusyError if it is as neither: another writer was here.
        """
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if size > MAX_OBJECT:
            raise StoreError(
                f"{self.url}{name}: expected at most {MAX_OBJECT:,} bytes in an object, found {size:,}; "
                "write smaller shards (--shard-rows)"
            )
        condition = {"IfNoneMatch": "*"} if replaces is None else {"IfMatch": replaces}
        metadata = {} if values is None else {"Metadata": {_VALUES: f"{values.offset}+{values.size}"}}
        # The server refuses anything else: s3fs, which tries again itself, would send a file from where it is then.
        md5 = base64.b64encode(_md5(content)).decode()

        def request() -> Any:
            with contextlib.ExitStack() as stack:
                body = content if isinstance(content, bytes) else stack.enter_context(open(content, "rb"))
                self._check_known(condition)
                place = {"Bucket": self._bucket, "Key": self._key(name)}
                return self._s3.call_s3("put_object", **place, Body=body, ContentMD5=md5, **condition, **metadata)

        try:
            return _quoted(self._asked(name, request)["ETag"])
        except (_Refused, _Absent):
            # The first try may have arrived although its answer did not.
            there = self.list().get(name)
            if there is not None and there.etag == etag_of(content):
                return there.etag
            raise self.busy(name) from None

    def busy(self, name: str) -> StoreBusyError:
        """The error of a run that finds an object of another run."""
        return StoreBusyError(
            f"{self.url}{name}: another run has written to this store meanwhile; let one at a time write to it, "
            "and run this one again to resume"
        )

    def fetch(self, name: str, target: Path, etag: str, *, hollow: bool = False) -> Span | None:
        """Write an object, which is still the one of this ETag, to a file.

        hollow: leave the descriptors of a shard out, as a hole of the file, where its metadata says where they are;
        the result is that place, which the caller checks.
        """
        about = self._call(name, "head_object", Key=self._key(name), IfMatch=etag)
        size = int(about["ContentLength"])
        values = _values_of(about.get("Metadata", {}).get(_VALUES, ""), size) if hollow else None
        parts = [(0, size)] if values is None else [(0, values.offset), (sum(values), size)]
        try:
            # Not `appearing`, whose partial file would have the same name for all readers.
            descriptor, partial = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".partial")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    for start, end in parts:
                        file.seek(start)
                        for at in range(start, end, _PART):
                            file.write(self._range(name, at, min(end, at + _PART), etag))
                    file.truncate(size)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, target)
            except BaseException:
                Path(partial).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise StoreError(f"{self.url}{name}: cannot be kept in the cache: {os_reason(error)}") from None
        return values

    def remove(self, name: str) -> None:
        """Remove an object; there may be none."""
        self._call(name, "delete_object", Key=self._key(name))

    def _check_known(self, condition: dict[str, str]) -> None:
        """Raise StoreError if botocore is too old for a condition: s3fs would leave it out and put anyway."""
        known = self._s3.s3.meta.service_model.operation_model("PutObject").input_shape.members
        for name in condition:
            if name not in known:
                found = import_module("botocore").__version__
                raise StoreError(
                    f"{self.url}: expected a botocore that can put conditionally ({name}), found {found}: "
                    "pip install --upgrade 'sppfeat[cloud]'"
                )

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def _range(self, name: str, start: int, end: int, etag: str) -> bytes:
        with self._unchanged(name):
            found, _ = self._get(name, Range=f"bytes={start}-{end - 1}", IfMatch=etag)
        if len(found) != end - start:
            raise StoreError(f"{self.url}{name}: expected {end - start} bytes at {start}, found {len(found)}")
        return found

    def _get(self, name: str, **arguments: Any) -> tuple[bytes, str]:
        async def get() -> tuple[bytes, str]:
            found = await self._s3._call_s3("get_object", Bucket=self._bucket, Key=self._key(name), **arguments)
            async with found["Body"] as body:
                return bytes(await body.read()), _quoted(found["ETag"])

        sync = import_module("fsspec.asyn").sync
        found: tuple[bytes, str] = self._asked(name, lambda: sync(self._s3.loop, get))
        return found

    def _call(self, name: str, method: str, **arguments: Any) -> Any:
        with self._unchanged(name):
            return self._asked(name, lambda: self._s3.call_s3(method, Bucket=self._bucket, **arguments))

    @contextlib.contextmanager
    def _unchanged(self, name: str) -> Iterator[None]:
        try:
            yield
        except _Refused:
            raise StoreError(f"{self.url}{name}: changed while it was read; run the command again") from None
        except _Absent:
            raise StoreError(f"{self.url}{name}: no such object") from None

    def _asked(self, name: str, request: Callable[[], Result]) -> Result:
        try:
            return tried(lambda: _told(request))
        except ImageError as error:
            raise StoreError(f"{self.url}{name}: {error}") from None


def _told(request: Callable[[], Result]) -> Result:
    """The result of a request; what the server says of its condition as errors of ours."""
    try:
        return request()
    except Exception as error:  # s3fs raises OSErrors of many kinds from botocore's errors
        response = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
        code = str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""
        if code in _REFUSED:
            raise _Refused(code) from None
        if code in _ABSENT:
            raise _Absent("no such object") from None
        if code == "NoSuchBucket":
            raise ImageError("no such bucket") from None
        if code in _AGAIN:
            raise ConnectionError(code) from None
        raise


def _values_of(text: str, size: int) -> Span | None:
    match = _RANGE.fullmatch(text)
    values = None if match is None else Span(int(match[1]), int(match[2]))
    return values if values is not None and sum(values) <= size else None


def _quoted(etag: str) -> str:
    """An ETag as a condition wants it: some servers list them without quotes."""
    return '"' + etag.strip('"') + '"'


def etag_of(content: Path | bytes) -> str:
    """The ETag of an object that is put at once: its MD5 in quotes, except in a bucket with keys of its own (KMS)."""
    return f'"{_md5(content).hex()}"'


def _md5(content: Path | bytes) -> bytes:
    if isinstance(content, bytes):
        return hashlib.md5(content, usedforsecurity=False).digest()
    with open(content, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).digest()
