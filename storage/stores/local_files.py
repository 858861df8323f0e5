"""The file-system moves under LocalStore: folders by descriptor, never through a link."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from storage.errors import ObjectChanged, StorageError
from storage.objects.os_errors import translating_os_errors
from storage.objects.protocols import Body
from storage.urls import readable

TEMPORARY_PREFIX = ".labelfleet-tmp-"
LOCK_NAME = ".labelfleet-lock"
CHUNK_BYTES = 1 << 20
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO must not wait for a writer.
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def is_own_file(name: str) -> bool:
    """Return whether a file name is one of our temporary or lock files, which no listing shows."""
    return name.startswith(TEMPORARY_PREFIX) or name == LOCK_NAME


def is_temporary(name: str) -> bool:
    """Return whether a file name is that of a temporary file; a writer that was killed leaves
    it."""
    return name.startswith(TEMPORARY_PREFIX)


def etag_of(status: os.stat_result) -> str:
    """``<size>-<mtime_ns>``."""
    return f"{status.st_size}-{status.st_mtime_ns}"


@contextmanager
def open_folder(root: str, parts: Sequence[str], *, create: bool = False) -> Iterator[int]:
    """Descriptor of the folder ``parts`` below ``root``.

    Each step is opened from the one above it and refuses symbolic links, so that no key,
    whatever it says, leaves the root.
    """
    if create:
        Path(root).mkdir(parents=True, exist_ok=True)
    current = os.open(root, _FOLDER_FLAGS)
    try:
        for part in parts:
            above, current = current, _step(current, part, create)
            os.close(above)
        yield current
    finally:
        os.close(current)


def _step(folder: int, part: str, create: bool) -> int:
    try:
        return os.open(part, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=folder)
    except FileNotFoundError:
        if not create:
            raise
    except OSError as exc:
        if exc.errno in (errno.ENOTDIR, errno.ELOOP) and _is_link(folder, part):
            raise link_refused(part) from exc
        raise
    with contextlib.suppress(FileExistsError):
        os.mkdir(part, dir_fd=folder)
        os.fsync(folder)
    return os.open(part, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=folder)


def _is_link(folder: int, name: str) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:
        return False


def link_refused(name: str) -> StorageError:
    """Return the error for a key that is, or lies behind, a symbolic link."""
    return StorageError(
        f"{name!a} is a symbolic link; links inside a store are never followed",
        hint="copy the file or folder to where the link is, or use the real folder as the URL",
    )


def refuse_to_replace(where: str, status: os.stat_result) -> None:
    """Raise StorageError unless it is a regular file or a folder (which the system refuses).

    A device such as /dev/full, or /dev/stdout, which is a link, would be gone: root may do that.
    """
    if stat.S_ISLNK(status.st_mode):
        what = "a symbolic link"
    elif not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        what = "a pipe, a socket or a device"
    else:
        return
    raise StorageError(
        f"{where} is {what}, and is not replaced by a file",
        hint="name another place, or remove it first",
    )


def open_regular(folder: int, name: str) -> int:
    """Descriptor of a regular file for reading; FileNotFoundError for a folder."""
    try:
        descriptor = os.open(name, _READ_FLAGS, dir_fd=folder)
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.EMLINK):
            raise link_refused(name) from exc
        if exc.errno in (errno.ENXIO, errno.EOPNOTSUPP):
            raise _not_regular(name) from exc
        raise
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise FileNotFoundError(errno.ENOENT, "is a folder")
    raise _not_regular(name)


def _not_regular(name: str) -> StorageError:
    return StorageError(f"{name!a} is a pipe, a socket or a device, not a file")


@contextmanager
def temporary_copy(folder: int, body: Body) -> Iterator[tuple[str, int]]:
    """A fsynced temporary file in ``folder`` with the body in it, as (name, descriptor);
    gone afterwards unless it was renamed away."""
    name = f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(name, flags, 0o666, dir_fd=folder)
    try:
        _fill(descriptor, body)
        # The kernel stamps files with its tick, several milliseconds long; two versions of
        # one size within a tick would share an etag.
        now_ns = time.time_ns()
        os.utime(descriptor, ns=(now_ns, now_ns))
        os.fsync(descriptor)
        yield name, descriptor
    finally:
        os.close(descriptor)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)


def _fill(descriptor: int, body: Body) -> None:
    with open(descriptor, "wb", closefd=False) as sink:
        if isinstance(body, Path):
            with translating_os_errors(readable(str(body))):
                source = body.open("rb")
            with source:
                shutil.copyfileobj(source, sink)  # by 64 kB, which stay in a cache
        elif isinstance(body, bytes):
            sink.write(body)
        else:
            body.pour(sink)


@contextmanager
def locked(folder: int) -> Iterator[None]:
    """The writers' lock of one folder, across threads and processes (flock on a file of its
    own: a lock on the folder itself does not work on NFS)."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(LOCK_NAME, flags, 0o666, dir_fd=folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def move_clock_past(descriptor: int, other: os.stat_result) -> None:
    """Make this file's etag differ from ``other``'s, even where time stamps are coarse."""
    for step_ns in (1, 1_000_000, 2_000_000_000):
        if etag_of(os.fstat(descriptor)) != etag_of(other):
            return
        later_ns = other.st_mtime_ns + step_ns
        os.utime(descriptor, ns=(later_ns, later_ns))


class SteadyFile(io.RawIOBase):
    """Reads a file from its start to the size it had when opened, forward only.

    Raises ObjectChanged, and keeps raising it, as soon as size or mtime are not those any more.
    """

    def __init__(self, descriptor: int, where: str) -> None:
        self._descriptor = descriptor
        self._where = where
        self._opened = os.fstat(descriptor)
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        room = min(len(buffer), self._opened.st_size - self._position)
        with translating_os_errors(self._where):
            count = os.preadv(self._descriptor, [memoryview(buffer)[:room]], self._position)
        check_steady(self._descriptor, self._opened, self._where)
        self._position += count
        return count


def check_steady(descriptor: int, opened: os.stat_result, where: str) -> None:
    """Raise ObjectChanged if the open file is not what it was at ``opened``."""
    if etag_of(os.fstat(descriptor)) != etag_of(opened):
        raise ObjectChanged(
            f"{where} changed while it was read", hint="let the writer finish, then run again"
        )
