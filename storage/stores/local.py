"""LocalStore: a folder as an object store, atomic where it matters."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from storage.errors import (
    AlreadyExists,
    BucketNotFound,
    NotAtomic,
    ObjectChanged,
    ShortRead,
    StorageError,
)
from storage.objects.os_errors import from_os_error, translating_os_errors
from storage.objects.protocols import Body
from storage.records import StoredObject
from storage.stores.local_files import (
    CHUNK_BYTES,
    SteadyFile,
    check_steady,
    etag_of,
    is_own_file,
    is_temporary,
    locked,
    move_clock_past,
    open_folder,
    open_regular,
    refuse_to_replace,
    temporary_copy,
)
from storage.stores.local_walk import leftovers, walk
from storage.urls import Location, check_key, readable

_NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})


class LocalStore:
    """The folder ``root`` as an object store.

    An object is a regular file. Links are listed (etag ``link``) but never followed; pipes,
    sockets and devices are listed with the etag ``special``; reading either is a StorageError.
    Our own temporary and lock files (``.labelfleet-…``) are not listed.

    Args:
        root: absolute path; need not exist yet.
    """

    atomic_create = True

    def __init__(self, root: str) -> None:
        self._root = root

    @property
    def url(self) -> str:
        return Location("file", "", self._root).url

    def __repr__(self) -> str:
        return f"LocalStore({self.url!r})"

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        if not Path(self._root).is_dir():
            raise self._no_root()
        return walk(self._root, prefix)

    def head(self, key: str) -> StoredObject:
        with self._reading(key) as descriptor:
            status = os.fstat(descriptor)
        return StoredObject(key, status.st_size, etag_of(status), status.st_mtime)

    def get(self, key: str, *, if_match: str | None = None) -> bytes:
        with self._reading(key, if_match) as descriptor:
            return self._read(descriptor, key, 0, os.fstat(descriptor).st_size)

    def get_range(
        self, key: str, offset: int, nbytes: int, *, if_match: str | None = None
    ) -> bytes:
        if offset < 0 or nbytes < 0:
            raise ValueError("offset and nbytes must not be negative")
        with self._reading(key, if_match) as descriptor:
            return self._read(descriptor, key, offset, nbytes)

    @contextmanager
    def stream(self, key: str, *, if_match: str | None = None) -> Iterator[BinaryIO]:
        with self._reading(key, if_match) as descriptor:
            raw = SteadyFile(descriptor, self._where(key))
            with io.BufferedReader(raw, CHUNK_BYTES) as reader:
                yield cast(BinaryIO, reader)

    def create(self, key: str, body: Body) -> str:
        with self._writing(key) as (folder, name):
            if _present(folder, name):
                raise self._taken(key)
            with temporary_copy(folder, body) as (temporary, descriptor):
                self._link(folder, temporary, name, descriptor, key)
                os.fsync(folder)
                return etag_of(os.fstat(descriptor))

    def put(self, key: str, body: Body) -> str:
        return self._overwrite(key, body, if_match=None)

    def replace(self, key: str, body: Body, *, if_match: str) -> str:
        return self._overwrite(key, body, if_match=if_match)

    def delete(self, key: str) -> None:
        try:
            with self._folder_of(key, own=True) as (folder, name):
                if _present(folder, name):
                    with locked(folder):
                        os.unlink(name, dir_fd=folder)
                        os.fsync(folder)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return  # no object under this key: what the caller wanted
        except OSError as exc:
            raise from_os_error(exc, self._where(key)) from exc

    def leftovers(self) -> Iterator[StoredObject]:
        return leftovers(self._root)

    def presign(self, key: str, *, expires_s: int) -> str:
        raise StorageError(
            f"files have no address that others could open ({self._where(key)})",
            hint="keep what others must open in an S3 bucket",
        )

    def _overwrite(self, key: str, body: Body, *, if_match: str | None) -> str:
        with (
            self._writing(key, create=if_match is None) as (folder, name),
            temporary_copy(folder, body) as (temporary, descriptor),
            locked(folder),
        ):
            old = _status(folder, name)
            if if_match is not None and (old is None or etag_of(old) != if_match):
                raise ObjectChanged(f"{self._where(key)} is not the version expected")
            if old is not None:
                refuse_to_replace(self._where(key), old)
                move_clock_past(descriptor, old)
            os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
            os.fsync(folder)
            return etag_of(os.fstat(descriptor))

    def _link(self, folder: int, temporary: str, name: str, descriptor: int, key: str) -> None:
        try:
            os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        except FileExistsError as exc:
            # On NFS the reply to a link that succeeded can be lost; the inode tells.
            status = _status(folder, name)
            if status is None or status.st_ino != os.fstat(descriptor).st_ino:
                raise self._taken(key) from exc
        except OSError as exc:
            if exc.errno not in _NO_HARD_LINKS:
                raise
            raise NotAtomic(
                f"the file system of {self.url} has no hard links, so nothing can be created "
                "atomically on it",
                hint="put the output on another disk, or into an S3 bucket",
            ) from exc

    def _read(self, descriptor: int, key: str, offset: int, nbytes: int) -> bytes:
        opened = os.fstat(descriptor)
        if offset + nbytes > opened.st_size:
            raise ShortRead(
                f"{self._where(key)} ends at byte {opened.st_size}; "
                f"{nbytes} bytes from {offset} were asked for"
            )
        parts = []
        with translating_os_errors(self._where(key)):
            while nbytes > 0 and (part := os.pread(descriptor, nbytes, offset)):
                parts.append(part)
                offset, nbytes = offset + len(part), nbytes - len(part)
        check_steady(descriptor, opened, self._where(key))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @contextmanager
    def _reading(self, key: str, if_match: str | None = None) -> Iterator[int]:
        # Only the opening is translated here: an OSError of the caller's own, raised inside
        # its `with store.stream(…)`, is not about this file.
        descriptor = self._open(key)
        try:
            if if_match is not None and etag_of(os.fstat(descriptor)) != if_match:
                raise ObjectChanged(f"{self._where(key)} is not the version expected")
            yield descriptor
        finally:
            os.close(descriptor)

    def _open(self, key: str) -> int:
        with translating_os_errors(self._where(key)), self._folder_of(key) as (folder, name):
            return open_regular(folder, name)

    @contextmanager
    def _writing(self, key: str, *, create: bool = True) -> Iterator[tuple[int, str]]:
        try:
            with self._folder_of(key, create=create) as (folder, name):
                yield folder, name
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError) as exc:
            if not create:  # replacing what has no folder
                raise ObjectChanged(f"{self._where(key)} does not exist any more") from exc
            raise StorageError(
                f"{self._where(key)} cannot be written: a file stands where a folder is needed, "
                "or a folder where the file belongs",
                hint="choose a place that is not below a file",
            ) from exc
        except OSError as exc:
            raise from_os_error(exc, self._where(key)) from exc

    @contextmanager
    def _folder_of(
        self, key: str, *, create: bool = False, own: bool = False
    ) -> Iterator[tuple[int, str]]:
        *parts, name = check_key(key).split("/")
        if "" in parts or (is_own_file(name) and not (own and is_temporary(name))):
            raise StorageError(f"'{readable(key)}' cannot be the key of a file")
        with open_folder(self._root, parts, create=create) as folder:
            yield folder, name

    def _where(self, key: str) -> str:
        return readable(f"{self._root.rstrip('/')}/{key}")

    def _taken(self, key: str) -> AlreadyExists:
        return AlreadyExists(f"{self._where(key)} exists already")

    def _no_root(self) -> StorageError:
        root = readable(self._root)
        if Path(self._root).exists():
            return BucketNotFound(
                f"{root} is a file, not a folder", hint="give the folder that holds it"
            )
        return BucketNotFound(f"the folder {root} does not exist", hint="check the spelling")


def _status(folder: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _present(folder: int, name: str) -> bool:
    return _status(folder, name) is not None
