"""Small tars with the oddities that real and hostile ones have."""

from __future__ import annotations

import gzip
import io
import tarfile
from typing import Any

from storage.records import ImageRecord
from storage.shards.reading import read_shard
from storage.shards.selecting import tar_shards
from storage.stores.memory import MemoryStore

Member = tuple[str, bytes] | tuple[str, bytes, dict[str, Any]]


def tar_of(*members: Member, tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a plain tar; a member's third part sets fields of its TarInfo."""
    file = io.BytesIO()
    with tarfile.open(
        fileobj=file, mode="w", format=tar_format, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        for name, body, *fields in members:
            member = tarfile.TarInfo(name)
            member.size = len(body)
            for field, value in (fields[0] if fields else {}).items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(body))
    return file.getvalue()


def store_of(archive: bytes, key: str = "s/x.tar") -> MemoryStore:
    store = MemoryStore()
    store.put(key, archive)
    return store


def records_of(archive: bytes, key: str = "s/x.tar", **options: Any) -> list[ImageRecord]:
    """Return all records of one archive; errors pass through, with what came before as
    ``.records``."""
    store = store_of(archive, key)
    (shard,) = tar_shards(store.list())
    found: list[ImageRecord] = []
    try:
        for record in read_shard(store, shard, **({"max_image_bytes": 1 << 20} | options)):
            found.append(record)
    except Exception as exc:
        exc.records = found  # type: ignore[attr-defined]
        raise
    return found


def zipped(archive: bytes) -> bytes:
    return gzip.compress(archive, 1, mtime=0)
