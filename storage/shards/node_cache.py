"""A bounded folder of copies on one machine, shared by all processes there.

    <folder>/<2 hex>/<60 hex>          a copy; its modification time is when it was last used
    <folder>/<2 hex>/<60 hex>.*.part   one that is being written
    <folder>/locks/                    one lock for each large copy, one for making room

A copy appears whole or not at all. Room is made by removing what was not used for the longest.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

_TOUCH_S = 60.0  # a copy's last use is noted at most this often
_PROCESSES = 8  # that may fill a folder at once and still keep to its size
_SPARE = 16  # part of the size that is freed beyond what is needed, so that it is done seldom
_ABANDONED_S = 6 * 3600.0  # a partial file that was not written to for so long has no writer


class NodeCache:
    """Copies below ``folder``, of at most ``nbytes`` together."""

    def __init__(self, folder: Path, nbytes: int) -> None:
        self.folder, self.nbytes = folder, nbytes
        self._allowed = 0  # bytes to write before the folder is looked at again
        self._counting = threading.Lock()

    def read(self, name: str, offset: int, nbytes: int) -> bytes | None:
        """Return a part of a copy, or None where there is none, or a shorter one."""
        path = self._path(name)
        try:
            with path.open("rb") as file:
                if time.time() - os.fstat(file.fileno()).st_mtime > _TOUCH_S:
                    os.utime(path)
                file.seek(offset)
                found = file.read(nbytes)
        except OSError:
            return None
        return found if len(found) == nbytes else None

    def has(self, name: str) -> bool:
        """Return whether there is a copy of that name."""
        return self._path(name).exists()

    def drop(self, name: str) -> None:
        """Remove a copy, as one whose bytes proved wrong."""
        self._path(name).unlink(missing_ok=True)

    def fill(
        self, name: str, nbytes: int, write: Callable[[BinaryIO], None], *, wait: bool = False
    ) -> bool:
        """Make a copy unless there is one; return whether there is one now.

        Args:
            name: any text that names the content.
            nbytes: its size; room is made for it first.
            write: writes it to the file.
            wait: for another process that is making the same copy; else return False then.

        Raises:
            OSError: the folder cannot be written. What ``write`` raises passes through.
        """
        with self._lock(_digest(name)[:16], wait=wait) as mine:
            if not mine:
                return False
            if not self.has(name):
                self._write(name, nbytes, write)
            return self.has(name)

    @contextlib.contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Let those that ask for the same name, of all processes, pass the block one by one.

        Raises OSError: the folder cannot be written.
        """
        with self._lock(_digest(name)[:16], wait=True):
            yield

    def keep(self, name: str, body: bytes) -> None:
        """Keep small bytes, without a lock: of two writers one wins, both wrote the same.

        Raises OSError.
        """

        def write(file: BinaryIO) -> None:
            file.write(body)

        self._write(name, len(body), write)

    def _write(self, name: str, nbytes: int, write: Callable[[BinaryIO], None]) -> None:
        if nbytes > self.nbytes:
            return
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._make_room(nbytes)
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        try:
            with partial.open("wb") as file:
                write(file)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, nbytes: int) -> None:
        with self._counting:
            if nbytes <= self._allowed:
                self._allowed -= nbytes
                return
            with self._lock("room", wait=True):
                free = self.nbytes - nbytes - self._evicted(nbytes)
            self._allowed = max(0, free) // _PROCESSES

    def _evicted(self, nbytes: int) -> int:
        """Remove copies until ``nbytes`` more fit; return what the others take."""
        copies = sorted(self._copies())
        total = sum(size for _, size, _ in copies)
        if total + nbytes <= self.nbytes:
            return total
        wanted = self.nbytes - nbytes - self.nbytes // _SPARE
        for _, size, path in copies:
            if total <= wanted:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def _copies(self) -> list[tuple[float, int, Path]]:
        """Return (last used, size, path) of all copies; abandoned partial files come first."""
        found = []
        for path in self.folder.glob("??/*"):
            try:
                facts = path.stat()
            except FileNotFoundError:
                continue
            used = facts.st_mtime
            if path.suffix == ".part":
                if time.time() - used < _ABANDONED_S:
                    continue
                used = 0.0
            found.append((used, facts.st_size, path))
        return found

    @contextlib.contextmanager
    def _lock(self, name: str, *, wait: bool) -> Iterator[bool]:
        folder = self.folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True  # closing the file releases the lock

    def _path(self, name: str) -> Path:
        digest = _digest(name)
        return self.folder / digest[:2] / digest[2:62]


def _digest(name: str) -> str:
    # A file's name that is not UTF-8 holds surrogates.
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
