"""Listing a folder tree lazily, in the order of the full keys."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from storage.errors import BucketNotFound
from storage.objects.os_errors import from_os_error
from storage.records import FOLDER_LINK_ETAG, LINK_ETAG, SPECIAL_ETAG, StoredObject
from storage.stores.local_files import etag_of, is_own_file, is_temporary
from storage.urls import readable


def walk(root: str, prefix: str) -> Iterator[StoredObject]:
    """Yield all objects below ``root`` whose key starts with ``prefix``, ordered by their UTF-8
    bytes.

    Holds the names of the folders on the way to the present one, not the whole tree. What
    vanishes meanwhile is left out; a folder that may not be read is an AccessDenied.
    """
    start = prefix.rpartition("/")[0]
    if not {"", ".", ".."}.isdisjoint(start.split("/")) and start:
        return  # no key looks like this
    if start and not _is_real_folder(root, start):
        return
    # An explicit stack: a hostile tree can be deeper than Python's recursion limit.
    pending = [_entries(root, start + "/" if start else "", prefix)]
    while pending:
        entry = next(pending[-1], None)
        if entry is None:
            pending.pop()
            continue
        key, is_folder = entry
        if is_folder:
            pending.append(_entries(root, key, prefix))
        elif (found := _stored(root, key)) is not None:
            yield found


def leftovers(root: str) -> Iterator[StoredObject]:
    """Temporary files below ``root`` that their writers did not live to rename or remove."""
    for folder, _, names in os.walk(root):
        for name in filter(is_temporary, names):
            path = f"{folder}/{name}"
            with contextlib.suppress(FileNotFoundError):  # its writer lives, and is done with it
                status = os.lstat(path)
                key = os.path.relpath(path, root)
                yield StoredObject(key, status.st_size, etag_of(status), status.st_mtime)


def _is_real_folder(root: str, below: str) -> bool:
    path = Path(root)
    for part in below.split("/"):
        path = path / part
        if path.is_symlink() or not path.is_dir():
            return False
    return True


def _entries(root: str, folder_key: str, prefix: str) -> Iterator[tuple[str, bool]]:
    """(key, is a folder) of those of one folder's entries that start with the prefix; a folder's
    key ends in '/', so that sorting these keys sorts everything below them too ('a.txt' before
    'a/…')."""
    path = f"{root}/{folder_key}"
    # A folder of a million entries may be listed by sixteen threads, a sixteenth each.
    wanted = prefix[len(folder_key) :]
    try:
        with os.scandir(path) as found:
            keys = [
                (folder_key + e.name + "/", True)
                if e.is_dir(follow_symlinks=False)
                else (folder_key + e.name, False)
                for e in found
                if e.name.startswith(wanted) and not is_own_file(e.name)
            ]
    except (FileNotFoundError, NotADirectoryError) as exc:
        if folder_key:
            return iter(())
        raise BucketNotFound(f"the folder {readable(root)} does not exist") from exc
    except OSError as exc:
        raise from_os_error(exc, readable(path)) from exc
    keys.sort(key=lambda entry: entry[0].encode("utf-8", "surrogateescape"))
    return iter(keys)


def _stored(root: str, key: str) -> StoredObject | None:
    """Return None: it has vanished, or is a folder now."""
    path = f"{root}/{key}"
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise from_os_error(exc, readable(path)) from exc
    if stat.S_ISREG(status.st_mode):
        return StoredObject(key, status.st_size, etag_of(status), status.st_mtime)
    if stat.S_ISDIR(status.st_mode):
        return None
    if not stat.S_ISLNK(status.st_mode):
        return StoredObject(key, 0, SPECIAL_ETAG)
    return StoredObject(key, 0, FOLDER_LINK_ETAG if Path(path).is_dir() else LINK_ETAG)
