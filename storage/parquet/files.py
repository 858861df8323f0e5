"""A Parquet object of ours, opened: one footer JSON, one translation of errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import StorageError
from storage.parquet.errors import reading_parquet

SCHEMA_VERSION = 2


METADATA_KEY = b"labelfleet"


@contextmanager
def opened(source: pa.NativeFile, key: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file; what goes wrong with a damaged one becomes StorageError with the key."""
    with (
        reading_parquet(key),
        pq.ParquetFile(source, page_checksum_verification=True) as file,
    ):
        yield file


def metadata_of(file: pq.ParquetFile, key: str) -> dict[str, Any]:
    """The JSON that labelfleet put there. Raises StorageError: not one of ours, or a newer one."""
    # The footer's own key-value pairs; the Arrow schema inside it does not repeat them.
    raw = (file.metadata.metadata or {}).get(METADATA_KEY)
    if raw is None:
        raise StorageError(
            f"{key} is a Parquet file, but not one that labelfleet wrote",
            hint="something else put it below annotations/; move it away",
        )
    metadata: dict[str, Any] = json.loads(raw)
    if metadata["schema_version"] > SCHEMA_VERSION:
        raise StorageError(
            f"{key} has schema version {metadata['schema_version']}, "
            f"this labelfleet reads up to {SCHEMA_VERSION}",
            hint="update labelfleet",
        )
    return metadata
