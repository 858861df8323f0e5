"""Bodies for the stores that must know a body's length before they send it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from storage.objects.os_errors import temporary_folder, translating_os_errors
from storage.objects.protocols import AtRest, Body, SupportsStream

_CHUNK_BYTES = 1 << 20


@contextmanager
def at_rest(body: Body) -> Iterator[AtRest]:
    """Give a body as bytes or a file; one that pours goes to a temporary file.

    Raises:
        StorageFull: the temporary folder has no space for it.
        StorageError: there is none that can be written.
    """
    if isinstance(body, bytes | Path):
        yield body
        return
    with temporary_folder() as folder:
        spool = Path(folder) / "body"
        with translating_os_errors(str(spool)), spool.open("wb") as sink:
            body.pour(sink)
        yield spool


def has_body(store: SupportsStream, key: str, body: Body) -> bool:
    """Return whether an object holds just these bytes, as one whose own reply was lost does."""
    with at_rest(body) as resting, _opened(resting) as own, store.stream(key) as found:
        while True:
            with translating_os_errors(f"a copy of {key}"):
                some = own.read(_CHUNK_BYTES)
            if found.read(len(some) or 1) != some:
                return False
            if not some:
                return True


def _opened(body: AtRest) -> BinaryIO:
    if isinstance(body, bytes):
        return io.BytesIO(body)
    with translating_os_errors(str(body)):
        return body.open("rb")
