"""Write and open our Parquet objects: page checksums, a seal, one JSON in the footer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import StorageError
from storage.objects.protocols import SupportsGetRange
from storage.parquet.errors import MOVE_IT, reading_parquet
from storage.parquet.seal import SEAL_KIND, check_seal, read_footer_bytes, seal_file
from storage.records import StoredObject

SCHEMA_VERSION = 3


METADATA_KEY = b"labelfleet"


class SealedWriter:
    """Writes one Parquet file; ``finish`` adds the JSON and the seal.

    Args:
        path: a local file, overwritten.
        schema: of every table.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        self._sink = pa.OSFile(str(path), "wb")
        # Checksums of pages too, for readers that fetch some columns alone.
        self._parquet = pq.ParquetWriter(
            self._sink, schema, compression="zstd", write_page_checksum=True
        )

    @property
    def nbytes(self) -> int:
        """Bytes written so far."""
        return int(self._sink.tell())

    def write(self, table: pa.Table) -> None:
        """Add a table as separate row groups."""
        self._parquet.write_table(table)

    def finish(self, metadata: Mapping[str, Any]) -> None:
        """Write the footer with ``metadata`` as its JSON; the file is complete afterwards.

        A ``key`` in the metadata is the object's key: readers refuse it under any other.
        """
        said = json.dumps({"schema_version": SCHEMA_VERSION, **metadata, "seal": SEAL_KIND})
        self._parquet.add_key_value_metadata({METADATA_KEY: said})
        self.abandon()
        seal_file(self._path)

    def abandon(self) -> None:
        """Close without the JSON and the seal; the file must not be used."""
        self._parquet.close()
        self._sink.close()


@contextmanager
def opened(raw: bytes, key: str, *, hint: str = MOVE_IT) -> Iterator[pq.ParquetFile]:
    """Open a whole object after verifying its checksums.

    Raises:
        StorageError: names ``key``; for any damage, found here or while reading.
    """
    with reading_parquet(key, hint=hint):
        is_sealed = check_seal(raw, key, hint=hint)
        with pq.ParquetFile(pa.BufferReader(raw), page_checksum_verification=True) as file:
            _check_claim(file.metadata, key, is_sealed=is_sealed, hint=hint)
            yield file


def metadata_of(file: pq.ParquetFile, key: str) -> dict[str, Any]:
    """Return the JSON in the footer. Raises StorageError: not one of ours, or a newer one."""
    return _parsed(file.metadata, key)


def read_metadata(
    store: SupportsGetRange, listed: StoredObject, *, required: bool = True
) -> tuple[dict[str, Any], bool]:
    """Return the footer's JSON by a ranged read of the object's end, and whether the object is
    sealed.

    Args:
        required: a footer without our JSON is an error; else its JSON is empty (parts of old
            listings have none).

    Raises:
        StorageError: the footer is damaged, or not one of ours.
    """
    raw, sealed = read_footer_bytes(store, listed)
    with reading_parquet(listed.key):
        # A footer is complete in itself; pyarrow only wants the format's magic before it.
        metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + raw))
        _check_claim(metadata, listed.key, is_sealed=sealed, hint=MOVE_IT)
        if not required and METADATA_KEY not in (metadata.metadata or {}):
            return {}, sealed
        return _parsed(metadata, listed.key), sealed


def _check_claim(metadata: pq.FileMetaData, key: str, *, is_sealed: bool, hint: str) -> None:
    """Refuse a file that lost its seal, or that is stored under a different key."""
    raw = (metadata.metadata or {}).get(METADATA_KEY)
    said = {} if raw is None else json.loads(raw)
    if ("seal" in said) != is_sealed:
        raise StorageError(f"{key} was rewritten: its checksum is gone", hint=hint)
    if "key" in said and not f"/{key}".endswith(f"/{said['key']}"):
        raise StorageError(f"{key} is a copy of {said['key']}", hint=hint)


def _parsed(file: pq.FileMetaData, key: str) -> dict[str, Any]:
    # The footer's own key-value pairs; the Arrow schema inside it does not repeat them.
    raw = (file.metadata or {}).get(METADATA_KEY)
    if raw is None:
        raise StorageError(
            f"{key} is a Parquet file, but not one that labelfleet wrote",
            hint="something else put it there; move it away",
        )
    metadata: dict[str, Any] = json.loads(raw)
    if metadata.get("schema_version", 1) > SCHEMA_VERSION:
        raise StorageError(
            f"{key} has schema version {metadata['schema_version']}, "
            f"this labelfleet reads up to {SCHEMA_VERSION}",
            hint="update labelfleet",
        )
    return metadata
