"""An object as a seekable binary file, for readers that need random access (zipfile)."""

from __future__ import annotations

import io
from typing import Protocol

from storage.objects.protocols import SupportsGetRange, SupportsHead

_BUFFER_BYTES = 8 << 20  # object storage takes tens of milliseconds per request: read large blocks


class SupportsRanges(SupportsHead, SupportsGetRange, Protocol):
    """What a seekable file over an object needs of a store."""


class _RangedFile(io.RawIOBase):
    def __init__(self, store: SupportsGetRange, key: str, nbytes: int, etag: str) -> None:
        self._store, self._key, self._nbytes, self._etag = store, key, nbytes, etag
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._nbytes}[whence]
        if base + offset < 0:
            raise ValueError("a position before the start of the file")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview | bytearray) -> int:  # type: ignore[override]
        nbytes = max(0, min(len(buffer), self._nbytes - self._position))
        if nbytes:
            buffer[:nbytes] = self._store.get_range(
                self._key, self._position, nbytes, if_match=self._etag
            )
            self._position += nbytes
        return nbytes


def open_ranged(
    store: SupportsRanges, key: str, *, buffer_bytes: int = _BUFFER_BYTES
) -> io.BufferedReader:
    """Open the object in its current version; reads raise ObjectChanged once it changes.

    Buffers at most ``buffer_bytes``. Raises ObjectNotFound.
    """
    found = store.head(key)
    return io.BufferedReader(_RangedFile(store, key, found.nbytes, found.etag), buffer_bytes)
