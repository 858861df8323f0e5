"""Check before a run that the store can hold its output, by trying it."""

from __future__ import annotations

import contextlib
import secrets

from storage.errors import AlreadyExists, LabelfleetError, NotAtomic
from storage.objects.protocols import ObjectStore

PROBE = "writable-"
_CONTENT = b"labelfleet checks that it can write here; this file can be deleted\n"


def check_output(store: ObjectStore) -> None:
    """Write an object, check that it cannot be created twice, and remove it.

    Servers that do not know If-None-Match accept the second create silently: with them two
    workers could both commit one shard.

    Raises:
        NotAtomic: the store cannot create atomically.
        AccessDenied, BucketNotFound, StorageFull, StorageUnavailable: it cannot be written.
    """
    if not store.atomic_create:
        raise _refused(store)
    key = f"{PROBE}{secrets.token_hex(8)}.probe"
    try:
        # A retried create may find its own object; all that matters is that it exists.
        with contextlib.suppress(AlreadyExists):
            store.create(key, _CONTENT)
        try:
            store.create(key, _CONTENT)
        except AlreadyExists:
            return
        raise _refused(store)
    finally:
        # The first error is the better message; a leftover probe is harmless.
        with contextlib.suppress(LabelfleetError):
            store.delete(key)


def _refused(store: ObjectStore) -> NotAtomic:
    return NotAtomic(
        f"{store.url} cannot create an object atomically, so it cannot hold a run's output",
        hint="use AWS S3, gs://, az://, a server with conditional writes, or a folder",
    )
