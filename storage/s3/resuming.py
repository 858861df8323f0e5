"""Reading an S3 object in bounded memory, resuming where a connection broke."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from botocore import exceptions as boto
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt
from tenacity.wait import wait_base

from storage.errors import ObjectChanged, ShortRead, StorageError

CHUNK_BYTES = 1 << 20

# GetObject with these parameters; translates its own errors.
GetObject = Callable[[Mapping[str, str]], Mapping[str, Any]]


class _Broken(Exception):
    """The connection broke in the middle of a body."""


@dataclass(frozen=True, slots=True)
class Span:
    """Which bytes of which version of an object.

    Attributes:
        start: first byte.
        end: byte after the last, or None: the object's end.
        etag: expected version, or None: the one found first.
    """

    start: int = 0
    end: int | None = None
    etag: str | None = None


class ResumingReader(io.RawIOBase):
    """The bytes of one span, forward only.

    A body that breaks off is asked for again from the byte where it broke, If-Match on the
    etag seen first, up to ``attempts`` times in a row without a byte arriving.

    Raises (while reading; then on every later read too): ShortRead, ObjectChanged,
    StorageUnavailable.

    Args:
        get_object: sends one GetObject.
        translate: botocore's error to one of ours.
        where: for messages.
        span: what is read.
        attempts: tries per read.
        wait: tenacity's pause between them.
    """

    def __init__(
        self,
        get_object: GetObject,
        translate: Callable[[Exception], Exception],
        where: str,
        span: Span,
        *,
        attempts: int,
        wait: wait_base,
    ) -> None:
        self._get_object = get_object
        self._translate = translate
        self._where = where
        self._position = span.start
        self._end = span.end
        self._etag = span.etag
        self._retrying = Retrying(
            stop=stop_after_attempt(attempts),
            wait=wait,
            retry=retry_if_exception_type(_Broken),
            reraise=True,
        )
        self._failure: Exception | None = None
        self._body: Any = None
        self._open()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._failure is not None:
            raise self._failure
        if self._end is not None and self._position >= self._end:
            return 0
        try:
            return self._retrying(self._read_some, memoryview(buffer).cast("B"))
        except _Broken as exc:
            self._failure = self._translate(_cause(exc))
            raise self._failure from exc.__cause__
        except StorageError as exc:
            self._failure = exc
            raise

    def readall(self) -> bytes:
        whole = io.BytesIO()
        buffer = bytearray(CHUNK_BYTES)
        while count := self.readinto(buffer):
            whole.write(memoryview(buffer)[:count])
        return whole.getvalue()

    def close(self) -> None:
        self._drop_body()
        super().close()

    def _read_some(self, view: memoryview) -> int:
        if self._body is None:
            self._open()
        room = len(view) if self._end is None else min(len(view), self._end - self._position)
        try:
            count = int(self._body.readinto(view[:room]))
            if count == 0:
                raise boto.IncompleteReadError(
                    actual_bytes=self._position, expected_bytes=self._end
                )
        except (boto.BotoCoreError, OSError) as exc:
            self._drop_body()
            raise _Broken from exc
        self._position += count
        return count

    def _open(self) -> None:
        asked = self._end is not None or self._position > 0
        last = "" if self._end is None else str(self._end - 1)
        parameters = {"Range": f"bytes={self._position}-{last}"} if asked else {}
        if self._etag is not None:
            parameters["IfMatch"] = f'"{self._etag}"'
        reply = self._get_object(parameters)
        self._body = reply["Body"]
        try:
            self._check(reply, asked)
        except StorageError:
            self._drop_body()
            raise

    def _check(self, reply: Mapping[str, Any], asked: bool) -> None:
        etag = str(reply.get("ETag", "")).strip('"')
        if self._etag is not None and etag != self._etag:
            raise ObjectChanged(f"{self._where} is not the version expected")
        self._etag = etag
        length = int(reply["ContentLength"])
        if asked and not _starts_at(reply, self._position):
            raise StorageError(
                f"{self._where}: the server ignores ranges",
                hint="labelfleet needs a server with ranged reads",
            )
        if self._end is None:
            self._end = self._position + length
        if self._position + length < self._end:
            raise ShortRead(
                f"{self._where} ends at byte {self._position + length}; "
                f"it was asked for up to byte {self._end}"
            )

    def _drop_body(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            body.close()


def _starts_at(reply: Mapping[str, Any], position: int) -> bool:
    found = re.match(r"bytes (\d+)-", str(reply.get("ContentRange", "")))
    return found is not None and int(found[1]) == position


def _cause(exc: _Broken) -> Exception:
    return exc.__cause__ if isinstance(exc.__cause__, Exception) else exc
