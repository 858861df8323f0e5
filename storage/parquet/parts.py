"""Append-only Parquet parts: numbered objects below a prefix, each created once, never changed.

Parts are small (a review queue, a day's answers); each carries one JSON in its footer, which
includes the key under which the part was written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from storage.errors import AlreadyExists
from storage.objects.protocols import SupportsCreate, SupportsGet, SupportsList
from storage.parquet.files import SealedWriter, metadata_of, opened

T = TypeVar("T")
_DIGITS = 6


def part_key(prefix: str, number: int) -> str:
    """Return the key of part ``number``."""
    return f"{prefix}{number:0{_DIGITS}d}.parquet"


def part_keys(store: SupportsList, prefix: str) -> list[str]:
    """Return the keys of all parts below ``prefix``, oldest first; other objects are skipped."""
    numbered = []
    for listed in store.list(prefix):
        name = listed.key.removeprefix(prefix).removesuffix(".parquet")
        if name.isascii() and name.isdigit() and listed.key == f"{prefix}{name}.parquet":
            numbered.append((int(name), listed.key))
    return [key for _, key in sorted(numbered)]


def part_bytes(table: pa.Table, header: dict[str, Any]) -> bytes:
    """Return a table as a Parquet file with ``header`` as its footer's JSON."""
    with tempfile.TemporaryDirectory(prefix="labelfleet-") as folder:
        path = Path(folder) / "part.parquet"
        writer = SealedWriter(path, table.schema)
        writer.write(table)
        writer.finish(header)
        return path.read_bytes()


def create_part(
    store: SupportsCreate, prefix: str, number: int, table: pa.Table, header: dict[str, Any]
) -> str:
    """Create part ``number`` and return its key. Raises AlreadyExists: another writer did."""
    key = part_key(prefix, number)
    store.create(key, part_bytes(table, {"key": key, **header}))
    return key


class SupportsParts(SupportsList, SupportsGet, Protocol):
    """What reading parts needs of a store."""


class SupportsAppend(SupportsParts, SupportsCreate, Protocol):
    """What ``append_part`` needs of a store."""


def append_part(store: SupportsAppend, prefix: str, table: pa.Table, header: dict[str, Any]) -> str:
    """Create the next free part and return its key; skip numbers taken by other writers.

    After a lost reply our own part looks like a rival's; comparing the bytes tells.
    """
    keys = part_keys(store, prefix)
    number = 0 if not keys else int(keys[-1].removeprefix(prefix).removesuffix(".parquet")) + 1
    while True:
        key = part_key(prefix, number)
        body = part_bytes(table, {"key": key, **header})
        try:
            store.create(key, body)
            return key
        except AlreadyExists:
            if store.get(key) == body:
                return key
            number += 1


def read_header(store: SupportsGet, key: str) -> dict[str, Any]:
    """Return the footer's JSON of one part. Raises StorageError when it is not one of ours."""
    with opened(store.get(key), key) as file:
        return metadata_of(file, key)


def read_parts(
    store: SupportsGet,
    keys: Sequence[str],
    schema: pa.Schema,
    make: Callable[[dict[str, Any]], T],
) -> Iterator[T]:
    """Yield the parts' rows as converted by ``make``, in order, a row group at a time.

    Nullable columns missing from parts of older versions are null.
    """
    for key in keys:
        with opened(store.get(key), key) as file:
            metadata_of(file, key)
            for group in range(file.num_row_groups):
                table = with_missing_columns(file.read_row_group(group), schema)
                for row in table.select(schema.names).cast(schema).to_pylist():
                    yield make(row)


def with_missing_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the table with its missing nullable columns added as nulls."""
    for column in schema:
        if column.nullable and column.name not in table.column_names:
            table = table.append_column(column, pa.nulls(table.num_rows, column.type))
    return table
