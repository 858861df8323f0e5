"""S3Store: an S3 bucket, or a prefix of one, through boto3."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard, TypeVar, cast

from boto3.s3.transfer import TransferConfig
from botocore import exceptions as boto
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from storage.errors import (
    AlreadyExists,
    LabelfleetError,
    ObjectChanged,
    ObjectNotFound,
    ShortRead,
    StorageError,
    StorageUnavailable,
)
from storage.objects.bodies import at_rest
from storage.objects.os_errors import translating_os_errors
from storage.objects.protocols import AtRest, Body, StorageOptions
from storage.records import StoredObject
from storage.s3.client import endpoint_of, make_client
from storage.s3.errors import from_s3_error, is_conflict, is_precondition_failure, is_range_failure
from storage.s3.ordered import ordered_entries
from storage.s3.quick_reads import MOST_BYTES, QuickReads
from storage.s3.resuming import CHUNK_BYTES, ResumingReader, Span
from storage.urls import Location, check_key, readable, shown_url

_T = TypeVar("_T")
_FOREIGN = (boto.BotoCoreError, boto.ClientError, ValueError)
_WAIT = wait_random_exponential(multiplier=0.2, max=10)
_ONE_PUT_BYTES = 5 << 30  # what AWS takes in one PutObject
_PARTS = TransferConfig(multipart_threshold=1, multipart_chunksize=64 << 20, max_concurrency=4)


class S3Store:
    """``s3://bucket/prefix`` as an object store.

    The client is made at the first request, once per process; pickling leaves it behind.
    Small reads of a known version go through obstore where it is installed: see quick_reads.py.
    botocore retries timeouts, resets and 5xx answers with jittered backoff. So a conditional
    write whose reply was lost is sent again and then loses against itself: AlreadyExists
    (ObjectChanged from ``replace``) may mean that our own object is there. Callers compare.

    Args:
        bucket: its name.
        prefix: keys are relative to it; '' or without a '/' at its end.
        options: endpoint, addressing, retries.
    """

    # Part of the protocol; preflight.py detects servers that ignore If-None-Match.
    atomic_create = True

    def __init__(self, bucket: str, prefix: str, options: StorageOptions) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._options = options
        self._forget_client()

    def __getstate__(self) -> dict[str, Any]:
        return {"bucket": self._bucket, "prefix": self._prefix, "options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._bucket, self._prefix = state["bucket"], state["prefix"]
        self._options = state["options"]
        self._forget_client()

    def __repr__(self) -> str:
        return f"S3Store({self.url!r})"

    @property
    def url(self) -> str:
        return Location("s3", self._bucket, self._prefix.removesuffix("/")).url

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        for entry in ordered_entries(self._pages, self._prefix + prefix, self._where(prefix)):
            key = entry["Key"][len(self._prefix) :]
            etag, modified = entry["ETag"].strip('"'), entry["LastModified"].timestamp()
            yield StoredObject(key, int(entry["Size"]), etag, modified)

    def head(self, key: str) -> StoredObject:
        reply = self._send("head_object", key)
        etag, modified = reply["ETag"].strip('"'), reply["LastModified"].timestamp()
        return StoredObject(key, int(reply["ContentLength"]), etag, modified)

    def get(self, key: str, *, if_match: str | None = None) -> bytes:
        return self._read(key, Span(etag=if_match))

    def get_range(
        self, key: str, offset: int, nbytes: int, *, if_match: str | None = None
    ) -> bytes:
        if offset < 0 or nbytes < 0:
            raise ValueError("offset and nbytes must not be negative")
        if nbytes == 0:
            return self._empty_range(key, offset, if_match)
        return self._read(key, Span(offset, offset + nbytes, if_match))

    @contextmanager
    def stream(self, key: str, *, if_match: str | None = None) -> Iterator[BinaryIO]:
        raw = self._reader(key, Span(etag=if_match))
        with io.BufferedReader(raw, CHUNK_BYTES) as reader:
            yield cast(BinaryIO, reader)

    def create(self, key: str, body: Body) -> str:
        """Send one PutObject with If-None-Match: *, not multipart: on two different servers
        conditional multipart uploads let several writers win. Only a body that pours more than
        5 GiB goes up in parts, where a head finds nothing."""
        taken = AlreadyExists(f"{self._where(key)} exists already")
        with at_rest(body) as resting:
            if resting is not body and _is_large(resting):
                with suppress(ObjectNotFound):
                    self.head(key)
                    raise taken
                return self._put_in_parts(key, resting)
            try:
                return self._put_at_rest(key, resting, {"IfNoneMatch": "*"})
            except _Lost as exc:
                raise taken from exc.__cause__

    def put(self, key: str, body: Body) -> str:
        with at_rest(body) as resting:
            if _is_large(resting):
                return self._put_in_parts(key, resting)
            return self._put_at_rest(key, resting, {})

    def replace(self, key: str, body: Body, *, if_match: str) -> str:
        try:
            with at_rest(body) as resting:
                return self._put_at_rest(key, resting, {"IfMatch": f'"{if_match}"'})
        except (_Lost, ObjectNotFound) as exc:
            raise ObjectChanged(f"{self._where(key)} is not the version expected") from exc

    def delete(self, key: str) -> None:
        self._send("delete_object", key)

    def leftovers(self) -> Iterator[StoredObject]:
        # A broken upload leaves no object; the parts of one above 5 GiB are aborted, or those of a
        # killed process by a lifecycle rule of the bucket.
        return iter(())

    def presign(self, key: str, *, expires_s: int) -> str:
        where, target = self._where(key), self._target(key)
        client = self._client(where)
        return str(
            self._translated(
                lambda: client.generate_presigned_url(
                    "get_object", Params=target, ExpiresIn=expires_s
                ),
                where,
            )
        )

    def _pages(self, prefix: str, delimiter: str) -> Iterator[Mapping[str, Any]]:
        where = self._where(prefix.removeprefix(self._prefix))
        paginator = self._client(where).get_paginator("list_objects_v2")
        parameters = {"Delimiter": delimiter} if delimiter else {}
        found = iter(paginator.paginate(Bucket=self._bucket, Prefix=prefix, **parameters))
        while (page := self._translated(lambda: next(found, None), where)) is not None:
            yield page

    def _put_at_rest(self, key: str, body: AtRest, condition: Mapping[str, str]) -> str:
        def once() -> str:
            if isinstance(body, Path):
                with translating_os_errors(str(body)):
                    source = body.open("rb")
                with source:
                    return self._put_once(key, source, condition)
            return self._put_once(key, body, condition)

        # 409: two conditional writes met on the server; neither won for certain.
        retrying = Retrying(
            stop=stop_after_attempt(self._options.attempts),
            wait=_WAIT,
            retry=retry_if_exception(lambda exc: isinstance(exc, _Conflict)),
            reraise=True,
        )
        return retrying(once)

    def _put_once(self, key: str, body: bytes | BinaryIO, condition: Mapping[str, str]) -> str:
        where, target = self._where(key), self._target(key)
        client = self._client(where)
        try:
            reply = client.put_object(**target, Body=body, **condition)
        except _FOREIGN as exc:
            if condition and is_precondition_failure(exc):
                raise _Lost from exc
            if condition and is_conflict(exc):
                raise _Conflict(f"{where}: conditional writes kept colliding") from exc
            raise self._translate(exc, where) from exc
        return str(reply["ETag"]).strip('"')

    def _put_in_parts(self, key: str, body: Path) -> str:
        where, target = self._where(key), self._target(key)
        client = self._client(where)
        with translating_os_errors(str(body)):
            source = body.open("rb")
        with source:
            self._translated(lambda: client.upload_fileobj(source, **target, Config=_PARTS), where)
        return self.head(key).etag

    def _read(self, key: str, span: Span) -> bytes:
        def by_boto3() -> bytes:
            with self._reader(key, span) as reader:
                return reader.readall()

        if span.etag is None or span.start + MOST_BYTES < (span.end or 0):
            return by_boto3()
        target = self._target(key)["Key"]
        self._client(self._where(key))
        return self._quick.read(target, span, by_boto3)

    def _reader(self, key: str, span: Span) -> ResumingReader:
        where = self._where(key)
        return ResumingReader(
            lambda parameters: self._get_object(key, parameters),
            lambda exc: self._translate(exc, where),
            where,
            span,
            attempts=self._options.attempts,
            wait=_WAIT,
        )

    def _get_object(self, key: str, parameters: Mapping[str, str]) -> Mapping[str, Any]:
        where, target = self._where(key), self._target(key)
        client = self._client(where)
        try:
            return cast("Mapping[str, Any]", client.get_object(**target, **parameters))
        except _FOREIGN as exc:
            if is_precondition_failure(exc):
                raise ObjectChanged(f"{where} is not the version expected") from exc
            if is_range_failure(exc):
                raise ShortRead(f"{where} ends before {parameters['Range']}") from exc
            raise self._translate(exc, where) from exc

    def _empty_range(self, key: str, offset: int, if_match: str | None) -> bytes:
        # HTTP has no empty range: check the contract on the object itself.
        found = self.head(key)
        if if_match is not None and found.etag != if_match:
            raise ObjectChanged(f"{self._where(key)} is not the version expected")
        if offset > found.nbytes:
            raise ShortRead(f"{self._where(key)} ends at byte {found.nbytes}, before {offset}")
        return b""

    def _send(self, operation: str, key: str) -> Mapping[str, Any]:
        where, target = self._where(key), self._target(key)
        client = self._client(where)
        return cast(
            "Mapping[str, Any]",
            self._translated(lambda: getattr(client, operation)(**target), where),
        )

    def _target(self, key: str) -> dict[str, str]:
        try:
            check_key(key).encode("utf-8")
        except UnicodeEncodeError as exc:
            raise StorageError(
                f"'{readable(key)}' is not UTF-8, so it cannot be a key in S3",
                hint="rename the file",
            ) from exc
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    def _translated(self, call: Callable[[], _T], where: str) -> _T:
        try:
            return call()
        except _FOREIGN as exc:
            raise self._translate(exc, where) from exc

    def _translate(self, exc: Exception, where: str) -> LabelfleetError:
        return from_s3_error(exc, where, self._bucket)

    def _where(self, key: str) -> str:
        place = readable(f"s3://{self._bucket}/{self._prefix}{key}")
        endpoint = endpoint_of(self._options)
        return f"{place} at {shown_url(endpoint)}" if endpoint else place

    def _forget_client(self) -> None:
        self._lock = threading.Lock()
        self._made: Any = None
        self._quick: QuickReads
        self._made_in = 0

    def _client(self, where: str) -> Any:
        with self._lock:
            # A fork must not share its parent's connections.
            if self._made is None or self._made_in != os.getpid():
                self._made = self._translated(self._make_client, where)
                self._made_in = os.getpid()
            return self._made

    def _make_client(self) -> Any:
        client, session = make_client(self._options)
        bundle = session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
        credentials = session.get_credentials()
        self._quick = QuickReads(self._bucket, client, credentials, bundle, self._options)
        return client


def _is_large(body: AtRest) -> TypeGuard[Path]:
    if not isinstance(body, Path):
        return False
    with translating_os_errors(str(body)):
        return body.stat().st_size > _ONE_PUT_BYTES


class _Lost(Exception):
    """The condition of a conditional write does not hold."""


class _Conflict(StorageUnavailable):
    """Two conditional writes met."""
