"""The object store: one small Protocol per verb; functions ask for exactly what they use.

Object storage is not a file system: there are keys and bytes, no folders, no rename, and an
object appears whole or not at all. ``open_store(url)`` gives the store for a URL.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from storage.records import StoredObject

Body = bytes | Path  # what is written: bytes, or a spool file that is read while sending


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """How to reach object stores; small and picklable, it travels to every worker.

    Credentials are never here: boto3's own chain (environment, profile, instance role) finds
    them on each machine.

    Attributes:
        endpoint_url: for S3-compatible servers; None: AWS, or AWS_ENDPOINT_URL(_S3).
        path_style: bucket in the path, not the host; None: exactly when an endpoint is set.
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
        """Return all objects whose key starts with ``prefix``, ordered by key (UTF-8 bytes).

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
        """Size and etag of one object. Raises ObjectNotFound."""
        ...


class SupportsGet(Protocol):
    def get(self, key: str, *, if_match: str | None = None) -> bytes:
        """Return the whole object.

        Raises:
            ObjectNotFound: no such object.
            ObjectChanged: ``if_match`` is given and the object's etag is another.
        """
        ...


class SupportsGetRange(Protocol):
    def get_range(
        self, key: str, offset: int, nbytes: int, *, if_match: str | None = None
    ) -> bytes:
        """Exactly ``nbytes`` bytes from ``offset``; ShortRead when the object ends before."""
        ...


class SupportsStream(Protocol):
    def stream(self, key: str, *, if_match: str | None = None) -> AbstractContextManager[BinaryIO]:
        """Return the object from its start as a forward-only binary file, in bounded memory.

        A connection that breaks in the middle is resumed from where it broke (If-Match on the
        etag seen first); bytes never repeat and never go missing silently (ShortRead).
        """
        ...


class SupportsCreate(Protocol):
    def create(self, key: str, body: Body) -> str:
        """Write a new object atomically: whole, once, by exactly one of any racing writers.

        Returns:
            The new etag.

        Raises:
            AlreadyExists: another writer's object is there. A put whose reply was lost may
                look like that too: the caller compares its attempt id with the winner's.
        """
        ...


class SupportsPut(Protocol):
    def put(self, key: str, body: Body) -> str:
        """Write or overwrite, atomically: readers see the old or the new object. Returns the
        new etag."""
        ...


class SupportsReplace(Protocol):
    def replace(self, key: str, body: Body, *, if_match: str) -> str:
        """Overwrite only if the etag still is ``if_match``; ObjectChanged otherwise (also when
        the object no longer exists). Returns the new etag.

        A put whose reply was lost may look like ObjectChanged too: the caller compares.
        """
        ...


class SupportsDelete(Protocol):
    def delete(self, key: str) -> None:
        """Delete an object; a missing one is not an error."""
        ...


class SupportsLeftovers(Protocol):
    def leftovers(self) -> Iterator[StoredObject]:
        """What writers that died left beside the objects: no listing shows it, ``delete`` takes it.

        A writer that is alive may be in the middle of one: look at ``modified_at``.
        """
        ...


class SupportsPresign(Protocol):
    def presign(self, key: str, *, expires_s: int) -> str:
        """Return a GET URL anyone can use until it expires: a secret.

        StorageError where unsupported.
        """
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
        """The root this store was opened at, without credentials; keys are relative to it."""
        ...

    @property
    def atomic_create(self) -> bool:
        """Whether ``create`` is known to let exactly one racing writer win."""
        ...
