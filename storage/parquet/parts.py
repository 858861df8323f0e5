"""Append-only Parquet parts: numbered objects below a prefix, each created once, never changed.

Parts are human-sized (a review queue, a day's answers); each carries one JSON in its file metadata
under the key ``labelfleet``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import AlreadyExists, StorageError
from storage.objects.protocols import SupportsCreate, SupportsGet, SupportsList
from storage.parquet.errors import reading_parquet
from storage.parquet.files import METADATA_KEY

_DIGITS = 6


def part_key(prefix: str, number: int) -> str:
    """Where part ``number`` lies."""
    return f"{prefix}{number:0{_DIGITS}d}.parquet"


def part_keys(store: SupportsList, prefix: str) -> list[str]:
    """Keys of all parts below ``prefix``, oldest first; other objects there are passed over."""
    numbered = []
    for listed in store.list(prefix):
        name = listed.key.removeprefix(prefix).removesuffix(".parquet")
        if name.isascii() and name.isdigit() and listed.key == f"{prefix}{name}.parquet":
            numbered.append((int(name), listed.key))
    return [key for _, key in sorted(numbered)]


def part_bytes(table: pa.Table, header: dict[str, Any]) -> bytes:
    """A table as a Parquet file with ``header`` as its metadata JSON."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as parquet:
        parquet.write_table(table)
        parquet.add_key_value_metadata({METADATA_KEY: json.dumps(header)})
    raw: bytes = sink.getvalue().to_pybytes()
    return raw


def create_part(store: SupportsCreate, prefix: str, number: int, body: bytes) -> str:
    """Create part ``number`` and return its key. Raises AlreadyExists when somebody else has."""
    key = part_key(prefix, number)
    store.create(key, body)
    return key


class SupportsParts(SupportsList, SupportsGet, Protocol):
    """What reading parts needs of a store."""


class SupportsAppend(SupportsParts, SupportsCreate, Protocol):
    """What ``append_part`` needs of a store."""


def append_part(store: SupportsAppend, prefix: str, table: pa.Table, header: dict[str, Any]) -> str:
    """Create the next free part and return its key; a rival's part just moves ours one further.

    A reply lost on the way makes our own part look like a rival's: the bytes tell.
    """
    body = part_bytes(table, header)
    keys = part_keys(store, prefix)
    number = 0 if not keys else int(keys[-1].removeprefix(prefix).removesuffix(".parquet")) + 1
    while True:
        try:
            return create_part(store, prefix, number, body)
        except AlreadyExists:
            if store.get(part_key(prefix, number)) == body:
                return part_key(prefix, number)
            number += 1


def read_header(store: SupportsGet, key: str) -> dict[str, Any]:
    """The metadata JSON of one part. Raises StorageError when it is not one of ours."""
    raw = store.get(key)
    with reading_parquet(key):
        metadata = pq.ParquetFile(pa.BufferReader(raw)).metadata.metadata or {}
    if METADATA_KEY not in metadata:
        raise StorageError(
            f"{key} is a Parquet file, but not one that labelfleet wrote",
            hint="something else put it there; move it away",
        )
    with reading_parquet(key):
        header: dict[str, Any] = json.loads(metadata[METADATA_KEY])
    return header


def read_parts(
    store: SupportsGet, keys: Sequence[str], schema: pa.Schema
) -> Iterator[dict[str, Any]]:
    """Rows of the parts as dicts, in order, a row group at a time.

    Nullable columns that a part of an older version lacks are null.
    """
    for key in keys:
        raw = store.get(key)
        with reading_parquet(key):
            file = pq.ParquetFile(pa.BufferReader(raw))
            for group in range(file.num_row_groups):
                table = with_missing_columns(file.read_row_group(group), schema)
                yield from table.select(schema.names).cast(schema).to_pylist()


def with_missing_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table, with nulls for those nullable columns of the schema that it lacks."""
    for column in schema:
        if column.nullable and column.name not in table.column_names:
            table = table.append_column(column, pa.nulls(table.num_rows, column.type))
    return table
