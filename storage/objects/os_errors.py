"""Translate OSError into the error tree; shared by every store backed by a file system."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from storage.errors import AccessDenied, ObjectNotFound, StorageError, StorageFull
from storage.errors import StorageUnavailable as Unavailable
from storage.urls import readable

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR})
_TRANSIENT = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EAGAIN,
        errno.ECONNRESET,
        errno.ECONNREFUSED,
        errno.ECONNABORTED,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EPIPE,
    }
)


def no_room(exc: OSError) -> StorageError | None:
    """Return the labelfleet error for a full disk, or for the lack of a temporary folder, wherever
    it was met; None: ``exc`` is something else."""
    if exc.errno in _FULL:
        place = f" for {readable(str(exc.filename))}" if exc.filename else ""
        return StorageFull(
            f"no space left{place}: {exc.strerror}",
            hint="free some space, or point TMPDIR at a folder that has some; then run the same "
            "command again",
        )
    if (exc.strerror or "").startswith("No usable temporary directory"):  # tempfile's own words
        return _no_temporary_folder(exc)
    return None


def from_os_error(exc: OSError, where: str) -> StorageError:
    """Return the labelfleet error for ``exc`` at ``where``."""
    reason = exc.strerror or type(exc).__name__
    if exc.errno in _FULL:
        return StorageFull(
            f"no space left for {where}: {reason}",
            hint="free some space (or raise the quota) and run the same command again",
        )
    if exc.errno in _DENIED or isinstance(exc, PermissionError):
        return AccessDenied(
            f"{where}: {reason}", hint="check the owner and the permissions of that folder"
        )
    if exc.errno in _ABSENT or isinstance(exc, FileNotFoundError):
        return ObjectNotFound(f"{where} does not exist")
    if exc.errno in _TRANSIENT or isinstance(exc, ConnectionError | TimeoutError):
        return Unavailable(f"{where}: {reason}", hint="check the disk or the network behind it")
    return StorageError(f"{where}: {reason}")


@contextmanager
def translating_os_errors(where: str) -> Iterator[None]:
    """Turn any OSError inside into an error of the tree that names ``where``."""
    try:
        yield
    except OSError as exc:
        raise from_os_error(exc, where) from exc


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Make a folder for spool files.

    Raises:
        StorageError: there is no room for it, or no temporary folder that can be written.
    """
    try:
        return tempfile.TemporaryDirectory(prefix="labelfleet-")
    except OSError as exc:
        raise _no_temporary_folder(exc) from exc


def _no_temporary_folder(exc: OSError) -> StorageError:
    kind = StorageFull if exc.errno in _FULL else StorageError
    return kind(
        f"no temporary folder can be made: {exc.strerror or exc}",
        hint="free some space, or point TMPDIR at a folder that can be written",
    )
