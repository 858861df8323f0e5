"""The object store: one small Protocol per verb; functions require only the verbs they use.

Object storage is not a file system: it has keys and bytes, no folders, no rename, and an object
appears whole or not at all. ``open_store(url)`` gives the store for a URL.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from storage.records import StoredObject


class SupportsPour(Protocol):
    """A body that is made while it is written, so that it need not lie in a file before."""

    def pour(self, sink: BinaryIO) -> None:
        """Write all of it to ``sink``, from its start, whenever it is called.

        ``sink`` is the store's own, whose OSErrors may pass; those of other files are translated.
        What it raises leaves no object behind.
        """
        ...


AtRest = bytes | Path  # bytes, or a spool file that is read while sending
Body = AtRest | SupportsPour


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """How to reach object stores; small and picklable, sent to every worker.

    Never contains credentials: each cloud's own chain (environment, profile, role of the
    machine) finds them on each machine.

    Attributes:
        endpoint_url: for S3-compatible servers and emulators; None: AWS, or AWS_ENDPOINT_URL(_S3).
        path_style: bucket in the path, not the host; None: only when an endpoint is set.
        region: None: boto3's own chain.
        attempts: tries per request, first one included.
        connect_timeout_s, read_timeout_s: seconds.
    """

    endpoint_url: str | None = None
    path_style: bool | None = None
    region: str | None = None
    attempts: int = 5
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 60.0


class SupportsList(Protocol):
    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """Yield all objects whose key starts with ``prefix``, ordered by key (UTF-8 bytes).

        Lazy: a page at a time. Zero-byte "folder" markers (keys ending in '/') are left out.
        In a folder, symbolic links are listed with the etag ``link``, and pipes, sockets and
        devices with ``special``; they cannot be read.

        Raises:
            BucketNotFound: the bucket or root folder does not exist.
            AccessDenied: credentials are missing, wrong, or lack the permission.
        """
        ...


class SupportsHead(Protocol):
    def head(self, key: str) -> StoredObject:
        """Return size and etag of one object. Raises ObjectNotFound."""
        ...


class SupportsGet(Protocol):
    def get(self, key: str, *, if_match: str | None = None) -> bytes:
        """Return the whole object.

        Raises:
            ObjectNotFound: no such object.
            ObjectChanged: ``if_match`` is given and the object's etag differs.
        """
        ...


class SupportsGetRange(Protocol):
    def get_range(
        self, key: str, offset: int, nbytes: int, *, if_match: str | None = None
    ) -> bytes:
        """Return exactly ``nbytes`` bytes from ``offset``; ShortRead if the object ends earlier."""
        ...


class SupportsStream(Protocol):
    def stream(self, key: str, *, if_match: str | None = None) -> AbstractContextManager[BinaryIO]:
        """Open the object as a forward-only binary file, in bounded memory.

        A broken connection is resumed where it broke (If-Match on the etag seen first); bytes
        are never repeated and never silently lost (ShortRead).
        """
        ...


class SupportsCreate(Protocol):
    def create(self, key: str, body: Body) -> str:
        """Create a new object atomically; exactly one of several racing writers succeeds.

        In a race, bodies that pour may replace one another where they are too large for one
        request: above 5 GiB in ``S3Store``, above 32 MiB in ``CloudStore``.

        Returns:
            The new etag.

        Raises:
            AlreadyExists: the key is taken. A put whose reply was lost may look the same: the
                caller compares its attempt id with the winner's.
        """
        ...


class SupportsPut(Protocol):
    def put(self, key: str, body: Body) -> str:
        """Write or overwrite atomically: readers see the old or the new object. Return the new
        etag."""
        ...


class SupportsReplace(Protocol):
    def replace(self, key: str, body: Body, *, if_match: str) -> str:
        """Overwrite only if the etag still is ``if_match``; ObjectChanged otherwise (also when
        the object is gone). Return the new etag.

        A put whose reply was lost may look like ObjectChanged too; the caller compares.
        """
        ...


class SupportsDelete(Protocol):
    def delete(self, key: str) -> None:
        """Delete the object; a missing object is not an error."""
        ...


class SupportsLeftovers(Protocol):
    def leftovers(self) -> Iterator[StoredObject]:
        """Yield files that dead writers left behind: not listed, but ``delete`` removes them.

        A live writer may still be writing one: check ``modified_at``.
        """
        ...


class SupportsPresign(Protocol):
    def presign(self, key: str, *, expires_s: int) -> str:
        """Return a GET URL that works for anyone until it expires: a secret. StorageError where
        unsupported."""
        ...


class ObjectStore(
    SupportsList,
    SupportsHead,
    SupportsGet,
    SupportsGetRange,
    SupportsStream,
    SupportsCreate,
    SupportsPut,
    SupportsReplace,
    SupportsDelete,
    SupportsLeftovers,
    SupportsPresign,
    Protocol,
):
    """Everything a run's output needs. Instances are thread-safe and survive pickling."""

    @property
    def url(self) -> str:
        """Root URL of the store, without credentials; keys are relative to it."""
        ...

    @property
    def atomic_create(self) -> bool:
        """Whether ``create`` is known to let exactly one racing writer win."""
        ...
