"""MemoryStore: objects in this process, for tests and trials."""

from __future__ import annotations

import io
import itertools
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from storage.errors import (
    AlreadyExists,
    ObjectChanged,
    ObjectNotFound,
    ShortRead,
    StorageError,
)
from storage.objects.protocols import Body
from storage.records import StoredObject
from storage.urls import Location, check_key, readable


class _Space:
    """What all stores of one name share."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.objects: dict[str, tuple[bytes, str, float]] = {}
        self.versions = itertools.count(1)


_spaces: dict[str, _Space] = {}
_spaces_lock = threading.Lock()


def _space(name: str) -> _Space:
    with _spaces_lock:
        return _spaces.setdefault(name, _Space())


class MemoryStore:
    """Objects under ``memory://name/prefix``; stores of one name in one process share them.

    A store pickled into another process finds that process's objects, not these.

    Args:
        name: None: a new, unshared space.
        prefix: path below it, without slashes around.
    """

    atomic_create = True

    def __init__(self, name: str | None = None, prefix: str = "") -> None:
        self._name = secrets.token_hex(8) if name is None else name
        self._prefix = f"{prefix}/" if prefix else ""

    @property
    def url(self) -> str:
        return Location("memory", self._name, self._prefix.rstrip("/")).url

    def __repr__(self) -> str:
        return f"MemoryStore({self.url!r})"

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        start = self._prefix + prefix
        space = self._space
        with space.lock:
            keys = [k for k in space.objects if k.startswith(start)]
        for key in sorted(keys, key=lambda k: k.encode("utf-8", "surrogateescape")):
            found = space.objects.get(key)
            if found is not None:
                yield StoredObject(key[len(self._prefix) :], len(found[0]), found[1], found[2])

    def head(self, key: str) -> StoredObject:
        content, etag, modified_at = self._find(key, None)
        return StoredObject(key, len(content), etag, modified_at)

    def get(self, key: str, *, if_match: str | None = None) -> bytes:
        return self._find(key, if_match)[0]

    def get_range(
        self, key: str, offset: int, nbytes: int, *, if_match: str | None = None
    ) -> bytes:
        if offset < 0 or nbytes < 0:
            raise ValueError("offset and nbytes must not be negative")
        content = self._find(key, if_match)[0]
        if offset + nbytes > len(content):
            raise ShortRead(
                f"{self._where(key)} ends at byte {len(content)}; "
                f"{nbytes} bytes from {offset} were asked for"
            )
        return content[offset : offset + nbytes]

    @contextmanager
    def stream(self, key: str, *, if_match: str | None = None) -> Iterator[BinaryIO]:
        yield io.BytesIO(self._find(key, if_match)[0])

    def create(self, key: str, body: Body) -> str:
        content = _content(body)
        with self._space.lock:
            if self._full(key) in self._space.objects:
                raise AlreadyExists(f"{self._where(key)} exists already")
            return self._store(key, content)

    def put(self, key: str, body: Body) -> str:
        content = _content(body)
        with self._space.lock:
            return self._store(key, content)

    def replace(self, key: str, body: Body, *, if_match: str) -> str:
        content = _content(body)
        with self._space.lock:
            found = self._space.objects.get(self._full(key))
            if found is None or found[1] != if_match:
                raise ObjectChanged(f"{self._where(key)} is not the version expected")
            return self._store(key, content)

    def delete(self, key: str) -> None:
        with self._space.lock:
            self._space.objects.pop(self._full(key), None)

    def leftovers(self) -> Iterator[StoredObject]:
        return iter(())

    def presign(self, key: str, *, expires_s: int) -> str:
        raise StorageError(f"objects in memory have no address ({self._where(key)})")

    @property
    def _space(self) -> _Space:
        return _space(self._name)

    def _full(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _find(self, key: str, if_match: str | None) -> tuple[bytes, str, float]:
        found = self._space.objects.get(self._full(key))
        if found is None:
            raise ObjectNotFound(f"{self._where(key)} does not exist")
        if if_match is not None and found[1] != if_match:
            raise ObjectChanged(f"{self._where(key)} is not the version expected")
        return found

    def _store(self, key: str, content: bytes) -> str:
        etag = f"v{next(self._space.versions)}"
        self._space.objects[self._full(key)] = (content, etag, time.time())
        return etag

    def _where(self, key: str) -> str:
        return readable(f"{self.url}/{key}")


def _content(body: Body) -> bytes:
    if isinstance(body, bytes | Path):
        return body.read_bytes() if isinstance(body, Path) else bytes(body)
    poured = io.BytesIO()
    body.pour(poured)
    return poured.getvalue()
