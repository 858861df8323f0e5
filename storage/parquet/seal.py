"""The seal: digests of a whole Parquet object, inside the object.

Page checksums cover the pages, but neither page headers nor the footer: names, offsets, counts and
our own JSON. So a finished file gets 72 bytes between its last page and its footer, where the
format allows arbitrary bytes and readers do not look:

    PAR1 | pages | "LFSEAL01" sha256(PAR1 | pages) sha256(footer | tail) | footer | tail

The footer's JSON says that there is a seal, so a rewritten file without one is noticed. A seal is
a checksum, not a signature: it does not detect a change that also forges the digests.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from storage.errors import StorageError
from storage.objects.protocols import SupportsGetRange
from storage.parquet.errors import MOVE_IT
from storage.records import StoredObject

SEAL_KIND = "sha256"  # what the footer's JSON calls it
_MAGIC = b"LFSEAL01"
_DIGEST_NBYTES = 32
_NBYTES = len(_MAGIC) + 2 * _DIGEST_NBYTES
_TAIL_NBYTES = 8  # length of the footer, and the format's magic
_READ_NBYTES = 64 << 10


def seal_file(path: Path) -> None:
    """Seal a finished Parquet file in place."""
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(size - _TAIL_NBYTES)
        end = size - _TAIL_NBYTES - int.from_bytes(file.read(4), "little")
        file.seek(end)
        footer = file.read()
        file.seek(0)
        body, left = hashlib.sha256(), end
        while left:
            chunk = file.read(min(left, 1 << 20))
            body.update(chunk)
            left -= len(chunk)
        file.seek(end)
        file.write(_MAGIC + body.digest() + hashlib.sha256(footer).digest() + footer)


def check_seal(raw: bytes, key: str, *, hint: str = MOVE_IT) -> bool:
    """Check every byte of an object; return False if it has no seal.

    Raises:
        StorageError: the object changed since it was written.
    """
    at = _footer_at(raw)
    seal = raw[max(0, at - _NBYTES) : at]
    if not _is_seal(seal):
        return False
    view = memoryview(raw)
    body, footer = _digests(seal)
    if hashlib.sha256(view[: at - _NBYTES]).digest() != body or not _matches(raw[at:], footer):
        raise _broken(key, hint)
    return True


def read_footer_bytes(store: SupportsGetRange, listed: StoredObject) -> tuple[bytes, bool]:
    """Return an object's bytes from its footer on, and whether it is sealed; check the footer.

    Raises:
        StorageError: the footer is missing or changed since it was written.
    """
    size = min(listed.nbytes, _READ_NBYTES)
    while True:
        raw = store.get_range(listed.key, listed.nbytes - size, size, if_match=listed.etag or None)
        wanted = size - _footer_at(raw) + _NBYTES
        if wanted <= size or size == listed.nbytes:
            break
        size = min(listed.nbytes, wanted)
    at = _footer_at(raw)
    if at < 0 or len(raw) < _TAIL_NBYTES:
        raise _broken(listed.key, MOVE_IT)
    seal = raw[max(0, at - _NBYTES) : at]
    if not _is_seal(seal):
        return raw[at:], False
    if not _matches(raw[at:], _digests(seal)[1]):
        raise _broken(listed.key, MOVE_IT)
    return raw[at:], True


def _footer_at(raw: bytes) -> int:
    return len(raw) - _TAIL_NBYTES - int.from_bytes(raw[-_TAIL_NBYTES:-4], "little")


def _is_seal(seal: bytes) -> bool:
    return len(seal) == _NBYTES and seal.startswith(_MAGIC)


def _digests(seal: bytes) -> tuple[bytes, bytes]:
    body_ends = len(_MAGIC) + _DIGEST_NBYTES
    return seal[len(_MAGIC) : body_ends], seal[body_ends:]


def _matches(footer: bytes, digest: bytes) -> bool:
    return hashlib.sha256(footer).digest() == digest


def _broken(key: str, hint: str) -> StorageError:
    return StorageError(
        f"{key} is not a readable Parquet file of labelfleet's: its checksum does not match",
        hint=hint,
    )
