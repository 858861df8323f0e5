"""Read one object forward: in pieces as they arrive, resumed where a connection broke."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

from storage.errors import LabelfleetError, ObjectChanged, ShortRead, StorageUnavailable
from storage.objects.native_threads import interruptible

CHUNK_BYTES = 1 << 20

# (offset, etag) to obstore's GetResult; its errors are translated.
Open = Callable[[int, str | None], Any]


class CloudReader(io.RawIOBase):
    """An object as a forward-only file, in bounded memory; every byte once.

    Args:
        opener: asks for the object from an offset on.
        translate: an error of obstore in our words.
        where: for messages.
        etag: the version wanted; None: the one met first.
        attempts: tries in a row without a byte arriving.
    """

    def __init__(
        self,
        opener: Open,
        translate: Callable[[Exception], LabelfleetError],
        where: str,
        etag: str | None,
        attempts: int,
    ) -> None:
        self._opener, self._translate, self._where = opener, translate, where
        self._etag, self._attempts = etag, attempts
        self._position = 0
        self._left = memoryview(b"")
        self._pieces: Any = None
        self._open()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if not self._left and self._position < self._size:
            self._left = memoryview(self._piece())
        count = min(len(view), len(self._left))
        view[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def close(self) -> None:
        self._pieces = None
        super().close()

    def _open(self) -> None:
        found = self._opener(self._position, self._etag)
        etag = str(found.meta["e_tag"]).strip('"')
        if self._etag is not None and etag != self._etag:
            raise ObjectChanged(f"{self._where} is not the version expected")
        self._etag, self._size = etag, int(found.meta["size"])
        self._pieces = found.stream(min_chunk_size=CHUNK_BYTES)

    def _piece(self) -> bytes:
        for attempt in range(1, self._attempts + 1):
            try:
                if self._pieces is None:
                    self._open()
                piece = bytes(interruptible(partial(next, self._pieces, b"")))
            except LabelfleetError:
                raise
            # The border to obstore, whose errors of a broken body have no kind of their own.
            except Exception as exc:
                self._pieces = None
                if attempt == self._attempts:
                    raise self._translate(exc) from exc
                continue
            if piece:
                self._position += len(piece)
                return piece
            self._pieces = None
        raise ShortRead(f"{self._where}: {self._position} of {self._size} bytes arrived")


def whole(found: Any, where: str) -> bytes:
    """Return all bytes of a reply, verified against the length that it announced."""
    start, end = found.range
    body = bytes(found.bytes())
    if len(body) != end - start:
        raise StorageUnavailable(f"{where}: {len(body)} of {end - start} bytes arrived")
    return body
