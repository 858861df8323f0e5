"""Checkpoints and artefacts from any URL, in a per-user cache by the sha256 of their bytes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from storage.errors import CheckpointError, ObjectNotFound
from storage.objects.os_errors import translating_os_errors
from storage.objects.protocols import ObjectStore, StorageOptions
from storage.records import StoredObject
from storage.stores.open import open_object
from storage.urls import parse_url, shown_url
from workers.local_folders import cache_folder

MAX_CHECKPOINT_BYTES = 8 * 1024**3
SUFFIXES = (".pth", ".pt", ".ckpt", ".pth.tar", ".safetensors", ".onnx")
_CHUNK = 1 << 20
_CACHE = "the checkpoint cache {} (LABELFLEET_CACHE names another)"


def file_sha256(path: Path) -> str:
    """Return hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_checkpoint(url: str, options: StorageOptions, *, sha256: str | None = None) -> Path:
    """Return a checkpoint as a local file: the file itself, or a cached or downloaded copy.

    With several concurrent processes one downloads and the others wait. A cached file is hashed
    again before use. Remote files are recognised by URL and etag.

    Args:
        url: URL or path of a file that ends in one of ``SUFFIXES``.
        sha256: hex digest its bytes must have; None: any.

    Raises:
        CheckpointError: not there, another digest, another kind of file, or too large.
        StorageError: the store refused or failed, or the disk is full.
    """
    suffix = checkpoint_suffix(url)
    if suffix is None:
        raise CheckpointError(
            f"{shown_url(url)} is not a checkpoint by its name",
            hint=f"it should end in {', '.join(SUFFIXES)}",
        )
    if (place := parse_url(url)).scheme == "file":
        return _local(Path(place.path), sha256)
    folder = private_folder(cache_folder() / "checkpoints")
    if sha256 is not None and (cached := _intact(folder, sha256, suffix)):
        return cached
    store, key = open_object(url, options)
    try:
        return _remote(store, store.head(key), folder, suffix, sha256)
    except ObjectNotFound as exc:
        raise CheckpointError(f"there is no checkpoint at {shown_url(url)}") from exc


def checkpoint_suffix(url: str) -> str | None:
    """Return the ending of a checkpoint's URL or path that says what kind of file it is, or
    None."""
    name = PurePosixPath(url.partition("?")[0]).name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def fetch_file(url: str, options: StorageOptions, *, sha256: str) -> Path:
    """Return a file of known content as a local file, as ``fetch_checkpoint`` does it.

    Raises:
        CheckpointError: not there, another digest, or too large.
        StorageError: the store refused or failed, or the disk is full.
    """
    if (place := parse_url(url)).scheme == "file":
        if not Path(place.path).is_file():
            raise CheckpointError(f"there is nothing at {shown_url(url)}")
        return _local(Path(place.path), sha256)
    folder, suffix = private_folder(cache_folder() / "artefacts"), PurePosixPath(url).suffix
    with _locked(folder / f"{sha256[:32]}.lock"):
        if cached := _intact(folder, sha256, suffix):
            return cached
        store, key = open_object(url, options)
        try:
            digest, path = _download(store, store.head(key), folder, suffix)
        except ObjectNotFound as exc:
            raise CheckpointError(f"there is nothing at {shown_url(url)}") from exc
    _check_digest(shown_url(url), digest, sha256)
    return path


def private_folder(folder: Path) -> Path:
    """Create the folder if needed and return it. Its contents are trusted, so only this user may
    write there.

    Raises:
        CheckpointError: another user owns it, or everyone may write there.
    """
    with translating_os_errors(_CACHE.format(folder)):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    if found.st_uid not in (os.getuid(), 0) or found.st_mode & stat.S_IWOTH:
        raise CheckpointError(
            f"{folder} belongs to another user, or everyone may write there",
            hint="set LABELFLEET_CACHE to a folder of your own",
        )
    return folder


def _local(path: Path, sha256: str | None) -> Path:
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}")
    _check_size(str(path), path.stat().st_size)
    if sha256 is not None:
        _check_digest(str(path), file_sha256(path), sha256)
    return path


def _remote(
    store: ObjectStore, entry: StoredObject, folder: Path, suffix: str, sha256: str | None
) -> Path:
    name = f"{store.url.rstrip('/')}/{entry.key}"
    _check_size(name, entry.nbytes)
    identity = json.dumps([name, entry.nbytes, entry.etag])
    known = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.sha256"
    with _locked(known.with_suffix(".lock")):
        digest = known.read_text().strip() if known.is_file() else None
        cached = _intact(folder, digest, suffix) if digest else None
        if cached is None:
            digest, cached = _download(store, entry, folder, suffix)
            known.write_text(digest)
    if sha256 is not None:
        _check_digest(name, str(digest), sha256)
    return cached


def _intact(folder: Path, sha256: str, suffix: str) -> Path | None:
    """Return the cached file with that digest; delete it if its bytes have changed."""
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        return None  # it becomes the file name and must not lead elsewhere
    path = folder / f"{sha256.lower()}{suffix}"
    if not path.is_file():
        return None
    if file_sha256(path) == sha256.lower():
        return path
    path.unlink(missing_ok=True)
    return None


def _download(
    store: ObjectStore, entry: StoredObject, folder: Path, suffix: str
) -> tuple[str, Path]:
    """Download to a temporary file while hashing, then move it into place atomically."""
    with (
        translating_os_errors(_CACHE.format(folder)),
        tempfile.NamedTemporaryFile(dir=folder, prefix=".part-", delete=False) as part,
    ):
        temporary = Path(part.name)
        try:
            with store.stream(entry.key, if_match=entry.etag) as source:
                digest = _copy(source, part, MAX_CHECKPOINT_BYTES)
            part.flush()
            os.fsync(part.fileno())
            return digest, temporary.replace(folder / f"{digest}{suffix}")
        finally:
            temporary.unlink(missing_ok=True)


def _copy(source: IO[bytes], target: IO[bytes], limit: int) -> str:
    digest = hashlib.sha256()
    copied = 0
    while chunk := source.read(_CHUNK):
        copied += len(chunk)
        if copied > limit:
            raise CheckpointError(f"the checkpoint is larger than {limit >> 30} GiB")
        digest.update(chunk)
        target.write(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, or its process dies
        yield


def _check_size(name: str, nbytes: int) -> None:
    if nbytes == 0:
        raise CheckpointError(f"{name} is empty")
    if nbytes > MAX_CHECKPOINT_BYTES:
        raise CheckpointError(
            f"{name} has {nbytes / 1024**3:.1f} GiB; no YOLO-NAS checkpoint is that large"
        )


def _check_digest(name: str, found: str, wanted: str) -> None:
    if found != wanted.lower():
        raise CheckpointError(
            f"{name} has sha256 {found}, not {wanted.lower()}",
            hint="the file was replaced or damaged; fetch the right one, or change model.sha256",
        )
