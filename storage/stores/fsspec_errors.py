"""What fsspec's drivers say, in our words: errors to the error tree, versions to etags."""

from __future__ import annotations

from typing import Any

from storage.errors import AccessDenied, ObjectNotFound, StorageError, StorageUnavailable
from storage.objects.os_errors import from_os_error


def etag_of(found: dict[str, Any]) -> str:
    """Return a version from what the driver tells: etag, generation or checksum, else size and
    time."""
    for name in ("ETag", "etag", "generation", "md5Hash", "content_md5"):
        if found.get(name):
            return str(found[name]).removeprefix("W/").strip('"')
    times = (found.get(n) for n in ("mtime", "last_modified", "modified", "LastModified"))
    return f"{found.get('size')}-{next((t for t in times if t is not None), '')}"


def from_driver_error(exc: Exception, where: str) -> StorageError:
    """Any driver's error in our words. Its text is left out: it may hold signed URLs."""
    if isinstance(exc, StorageError):  # ours, wrapped by the driver
        return exc
    if isinstance(exc, FileNotFoundError) and isinstance(exc.__cause__, Exception):
        # HTTP's driver calls everything that goes wrong "not found"; the cause says what it was.
        return from_driver_error(exc.__cause__, where)
    numbers = (getattr(exc, name, None) for name in ("status", "status_code", "code"))
    status = next((number for number in numbers if isinstance(number, int)), 0)
    if status in (401, 403):
        return AccessDenied(
            f"access to {where} was refused (HTTP {status})",
            hint="check the credentials that this machine has for it",
        )
    if status in (404, 410):
        return ObjectNotFound(f"{where} does not exist")
    if isinstance(exc, NotImplementedError):
        return StorageError(f"{where}: this kind of store cannot do that")
    if isinstance(exc, OSError) and (exc.errno or isinstance(exc, FileNotFoundError)):
        return from_os_error(exc, where)
    return StorageUnavailable(
        f"{where} could not be used ({type(exc).__name__})",
        hint="check the network and the credentials; --debug shows the driver's own words",
    )
