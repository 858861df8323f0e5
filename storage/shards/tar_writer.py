"""Tars that depend on nothing but names and bodies: same input, same bytes."""

from __future__ import annotations

import hashlib
import tarfile
from typing import BinaryIO

from storage.shards.tar_header import BLOCK

_END = bytes(2 * BLOCK)


class TarWriter:
    """Writes a PAX tar (plain ustar headers where the name fits) with all times and owners 0.

    Args:
        file: written from its start and closed with the writer.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._nbytes = 0

    def add(self, name: str, body: bytes) -> None:
        """Append one plain file. Raises OSError as the file does."""
        self._write(_header(name, len(body)))
        self._write(body)
        self._write(bytes(-len(body) % BLOCK))

    def nbytes_with(self, name: str, nbytes: int) -> int:
        """Return size of the finished tar if a body of ``nbytes`` were added and then it were
        closed."""
        padded = nbytes + -nbytes % BLOCK
        return self._nbytes + len(_header(name, nbytes)) + padded + len(_END)

    def close(self) -> None:
        """Write the end marker and close the file."""
        self._write(_END)
        self._file.close()

    def discard(self) -> None:
        """Close the file, finished or not."""
        self._file.close()

    def sha256(self) -> str:
        """Return hex digest of everything written so far."""
        return self._digest.hexdigest()

    def _write(self, part: bytes) -> None:
        self._file.write(part)
        self._digest.update(part)
        self._nbytes += len(part)


def _header(name: str, nbytes: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = nbytes
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
