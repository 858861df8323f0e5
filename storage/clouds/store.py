"""CloudStore: a bucket of Google Cloud Storage or a container of Azure, or a prefix of one."""

from __future__ import annotations

import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import obstore
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from storage.clouds.client import CloudPlace, endpoint_of, make_client
from storage.clouds.errors import (
    Busy,
    Lost,
    Torn,
    from_cloud_error,
    is_conflict,
    is_lost,
    status_of,
)
from storage.clouds.ordered import by_code_point, just_before
from storage.clouds.reading import CHUNK_BYTES, CloudReader, whole
from storage.errors import (
    AlreadyExists,
    BucketNotFound,
    LabelfleetError,
    ObjectChanged,
    ObjectNotFound,
    ShortRead,
    StorageError,
    StorageUnavailable,
)
from storage.objects.bodies import at_rest
from storage.objects.native_threads import interruptible, obstore_works_here
from storage.objects.os_errors import translating_os_errors
from storage.objects.protocols import AtRest, Body, StorageOptions
from storage.records import StoredObject
from storage.urls import Location, check_key, readable, shown_url

_T = TypeVar("_T")
_WAIT = wait_random_exponential(multiplier=0.2, max=10)
_PAGE = 1000
# Above it, a put goes up in parts. No condition holds for those, so conditional writes go up in one
# request, which decides; all but a create whose body is too large to be held (see CloudStore).
_PART_BYTES = 32 << 20
# What no XML can hold breaks every listing; an empty part is dropped; a backslash is Azure's slash.
_REFUSED = {
    "gs": re.compile("//|^/|[\x00-\x1f\x7f\ufffe\uffff]"),
    "az": re.compile(r"//|^/|\\|[\x00-\x1f\x7f\ufffe\uffff]"),
}


class CloudStore:
    """``gs://bucket/prefix`` or ``az://container/prefix`` as an object store.

    ``create`` is a put under the condition that no object exists (generation 0 on Google,
    If-None-Match on Azure), ``replace`` one under the version's generation or etag. As with S3, a
    conditional write whose reply was lost may lose against itself: callers compare.

    A ``create`` whose body pours more than 32 MiB is the exception: it goes up in parts, so as not
    to be held in memory, and Google takes no condition on parts, nor does obstore on Azure's. It
    is refused where an object exists when the upload begins; one that another writer creates before
    the upload ends is replaced. So a claim, or anything else that must be won, is bytes or a Path.

    The client is made at the first request, once per process; pickling leaves it behind.

    Args:
        place: the root, of the scheme gs or az.
        options: endpoint, retries, timeouts.

    Raises:
        ConfigError: the URL names no bucket.
    """

    # Part of the protocol; preflight.py detects servers that ignore the condition.
    atomic_create = True

    def __init__(self, place: Location, options: StorageOptions) -> None:
        self._root, self._options = place, options
        self._place = CloudPlace.of(place)
        self._prefix = f"{place.path}/" if place.path else ""
        self._forget_client()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self._root, "options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        CloudStore.__init__(self, state["root"], state["options"])

    def __repr__(self) -> str:
        return f"CloudStore({self.url!r})"

    @property
    def url(self) -> str:
        return self._root.url

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        full, where = self._prefix + prefix, self._where(prefix)
        for found in by_code_point(self._listed(full, where), where):
            key = found["path"][len(self._prefix) :]
            yield _stored(key, found)

    def head(self, key: str) -> StoredObject:
        return _stored(key, self._head(key))

    def get(self, key: str, *, if_match: str | None = None) -> bytes:
        where = self._where(key)

        def once(client: Any, path: str) -> bytes:
            return whole(self._asked(client, path, where, if_match), where)

        return self._reading(key, once)

    def get_range(
        self, key: str, offset: int, nbytes: int, *, if_match: str | None = None
    ) -> bytes:
        if offset < 0 or nbytes < 0:
            raise ValueError("offset and nbytes must not be negative")
        where, span = self._where(key), (offset, offset + nbytes)
        if nbytes == 0:
            self._check_range(key, offset, if_match)
            return b""

        def once(client: Any, path: str) -> bytes:
            return whole(self._asked(client, path, where, if_match, span), where)

        try:
            part = self._reading(key, once)
        except (ObjectNotFound, ObjectChanged, StorageUnavailable):
            raise
        except StorageError:
            self._check_range(key, offset + nbytes, if_match)  # the likeliest reason
            raise
        if len(part) != nbytes:
            raise ShortRead(f"{where} ends before byte {offset + nbytes}")
        return part

    @contextmanager
    def stream(self, key: str, *, if_match: str | None = None) -> Iterator[BinaryIO]:
        where = self._where(key)

        def opener(position: int, etag: str | None) -> Any:
            span = {"offset": position} if position else None
            return self._reading(key, lambda c, path: self._asked(c, path, where, etag, span))

        raw = CloudReader(
            opener, lambda exc: self._translate(exc, where), where, if_match, self._options.attempts
        )
        with io.BufferedReader(raw, CHUNK_BYTES) as reader:
            yield cast(BinaryIO, reader)

    def create(self, key: str, body: Body) -> str:
        taken = AlreadyExists(f"{self._where(key)} exists already")
        with at_rest(body) as resting:
            if resting is not body and _is_large(resting):
                with suppress(ObjectNotFound):
                    self._head(key)
                    raise taken
                return self._put(key, resting, "overwrite")
            try:
                return self._put(key, resting, "create")
            except Lost as exc:
                raise taken from exc.__cause__

    def put(self, key: str, body: Body) -> str:
        return self._put(key, body, "overwrite")

    def replace(self, key: str, body: Body, *, if_match: str) -> str:
        changed = ObjectChanged(f"{self._where(key)} is not the version expected")
        try:
            found = self._head(key)
        except ObjectNotFound:
            raise changed from None
        if _etag(found) != if_match:
            raise changed
        # Google's condition is the generation, which only a head tells; Azure's the etag.
        version = {n: found[n] for n in ("e_tag", "version") if found[n] is not None}
        try:
            return self._put(key, body, version)
        except (Lost, ObjectNotFound) as exc:
            raise changed from exc

    def delete(self, key: str) -> None:
        with suppress(ObjectNotFound):  # what the caller wanted
            self._call(key, obstore.delete)

    def leftovers(self) -> Iterator[StoredObject]:
        # Parts of a broken upload are no objects. Azure drops them after a week; Google keeps (and
        # bills) them until they are aborted, which a lifecycle rule of the bucket can do.
        return iter(())

    def presign(self, key: str, *, expires_s: int) -> str:
        lasting = timedelta(seconds=expires_s)
        return str(self._call(key, lambda c, path: obstore.sign(c, "GET", path, lasting)))

    def _listed(self, full: str, where: str) -> Iterator[dict[str, Any]]:
        """Yield what the server lists under a prefix of any kind; obstore knows folders only."""
        folder = full.rpartition("/")[0]
        client = self._client(where)
        before = just_before(full) if full != f"{folder}/" else None
        try:
            pages = iter(obstore.list(client, folder or None, offset=before, chunk_size=_PAGE))
            while (page := interruptible(partial(next, pages, None))) is not None:
                for found in page:
                    if found["path"].startswith(full):
                        yield cast("dict[str, Any]", found)
                if page and found["path"] > full and not found["path"].startswith(full):
                    return
        # The border to obstore.
        except Exception as exc:
            error = self._translate(exc, where)
            if isinstance(error, ObjectNotFound):
                error = BucketNotFound(f"the bucket or container of {where} does not exist")
            raise error from exc

    def _asked(self, client: Any, path: str, where: str, etag: str | None, span: Any = None) -> Any:
        """Send one GET; its reply is of the version asked for."""
        options: dict[str, Any] = {} if span is None else {"range": span}
        if etag is not None:
            options["if_match"] = f'"{etag}"'
        try:
            found = obstore.get(client, path, options=cast(Any, options))
        except Exception as exc:  # obstore's; all others pass through untouched
            if etag is not None and is_lost(exc):
                raise ObjectChanged(f"{where} is not the version expected") from exc
            raise
        if etag is not None and _etag(found.meta) != etag:
            raise ObjectChanged(f"{where} is not the version expected")
        return found

    def _check_range(self, key: str, end: int, if_match: str | None) -> None:
        found = self.head(key)
        if if_match is not None and found.etag != if_match:
            raise ObjectChanged(f"{self._where(key)} is not the version expected")
        if end > found.nbytes:
            raise ShortRead(f"{self._where(key)} ends at byte {found.nbytes}, before {end}")

    def _head(self, key: str) -> Any:
        return self._reading(key, obstore.head)

    def _put(self, key: str, body: Body, mode: Any) -> str:
        with at_rest(body) as resting:
            return self._put_at_rest(key, resting, mode)

    def _put_at_rest(self, key: str, body: AtRest, mode: Any) -> str:
        def once(client: Any, path: str) -> str:
            source: Any = body
            if isinstance(body, Path):
                with translating_os_errors(str(body)):
                    large = mode == "overwrite" and _is_large(body)
                    source = body if large else body.read_bytes()
            try:
                reply = obstore.put(
                    client, path, source, mode=mode,
                    use_multipart=isinstance(source, Path), chunk_size=_PART_BYTES // 4,
                )  # fmt: skip
            except Exception as exc:  # obstore's; all others pass through untouched
                if mode != "overwrite" and is_lost(exc):
                    raise Lost from exc
                if is_conflict(exc):
                    raise Busy(f"{self._where(key)}: writes kept colliding") from exc
                raise
            if reply["e_tag"] is None:  # the reply to the last part of an upload may lack it
                return self.head(key).etag
            return _etag(reply)

        return self._retried(key, once, Busy)

    def _reading(self, key: str, action: Callable[[Any, str], _T]) -> _T:
        return self._retried(key, action, Torn)

    def _retried(self, key: str, action: Callable[[Any, str], _T], kind: type[Exception]) -> _T:
        """Run ``action`` again where obstore itself does not: a body that broke, a collision."""
        retrying = Retrying(
            stop=stop_after_attempt(self._options.attempts),
            wait=_WAIT,
            retry=retry_if_exception_type(kind),
            reraise=True,
        )
        result: _T = retrying(self._call, key, action)
        return result

    def _call(self, key: str, action: Callable[[Any, str], _T]) -> _T:
        where, path = self._where(key), self._path(key)
        client = self._client(where)
        try:
            return interruptible(lambda: action(client, path))
        except (LabelfleetError, Lost):
            raise
        # The border to obstore.
        except Exception as exc:
            error = self._translate(exc, where)
            if isinstance(error, StorageUnavailable) and not status_of(exc):
                raise Torn(error.message, hint=error.hint) from exc
            raise error from exc

    def _path(self, key: str) -> str:
        try:
            check_key(key).encode("utf-8")
        except UnicodeEncodeError as exc:
            raise StorageError(
                f"'{readable(key)}' is not UTF-8, so it cannot be a key in {self._place.scheme}://",
                hint="rename the file",
            ) from exc
        refused = _REFUSED[self._place.scheme].search(key)
        if refused:
            raise StorageError(
                f"'{readable(key)}' has {_named(refused[0])}, which {self._place.scheme}:// "
                "does not keep apart or cannot list",
                hint="rename the object",
            )
        return self._prefix + key

    def _translate(self, exc: Exception, where: str) -> LabelfleetError:
        return from_cloud_error(exc, where, self._place.scheme)

    def _where(self, key: str) -> str:
        place = readable(f"{self._place.scheme}://{self._root.authority}/{self._prefix}{key}")
        endpoint = endpoint_of(self._place.scheme, self._options)
        return f"{place} at {shown_url(endpoint)}" if endpoint else place

    def _forget_client(self) -> None:
        self._lock = threading.Lock()
        self._made: Any = None
        self._made_in = 0

    def _client(self, where: str) -> Any:
        with self._lock:
            if self._made is None or self._made_in != os.getpid():
                if not obstore_works_here():
                    raise StorageError(
                        f"{where} cannot be read or written in a forked process whose parent has "
                        "used such a store",
                        hint="start processes by 'spawn' or 'forkserver': "
                        "multiprocessing.set_start_method('spawn')",
                    )
                try:
                    self._made = make_client(self._place, self._options)
                except LabelfleetError:
                    raise
                except Exception as exc:  # the border to obstore
                    raise self._translate(exc, where) from exc
                self._made_in = os.getpid()
            return self._made


def _is_large(body: AtRest) -> bool:
    return isinstance(body, Path) and body.stat().st_size > _PART_BYTES


def _etag(found: Any) -> str:
    return str(found["e_tag"]).removeprefix("W/").strip('"')


def _named(refused: str) -> str:
    return {"\\": "a backslash", "//": "two slashes in a row", "/": "a slash at its start"}.get(
        refused, "a control character"
    )


def _stored(key: str, found: Any) -> StoredObject:
    return StoredObject(key, int(found["size"]), _etag(found), found["last_modified"].timestamp())
