"""Read a list of keys that narrows a source: one column of a CSV or Parquet file."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from storage.errors import ConfigError
from storage.objects.protocols import StorageOptions
from storage.shards.selecting import classify
from storage.stores.open import open_object
from storage.urls import shown_url

COLUMN = "key"


def read_keys(url: str, options: StorageOptions) -> frozenset[str]:
    """Return the keys in ``url``'s column ``key``, or in its only column.

    A file whose first line is the name of an image or tar has one key per line, commas included.

    Raises:
        ConfigError: no such column, or neither CSV nor Parquet.
    """
    store, key = open_object(url, options)
    raw, shown = store.get(key), shown_url(url)
    try:
        table = _parquet(raw) if key.partition("?")[0].endswith(".parquet") else _csv(raw)
        return _keys(table, shown)
    except (pa.ArrowException, OSError, ValueError) as exc:
        said = " ".join(str(exc).split())[:200]
        raise ConfigError(f"{shown} is neither CSV nor Parquet: {said}") from exc


def _keys(table: pa.Table, shown: str) -> frozenset[str]:
    if COLUMN in table.column_names:
        column = table.column(COLUMN)
    elif table.num_columns == 1:
        column = table.column(0)
    else:
        raise ConfigError(
            f"{shown} has the columns {', '.join(table.column_names)}, and none named `{COLUMN}`"
        )
    return frozenset(str(value) for value in column.to_pylist() if value is not None)


def _unquoted(line: str) -> str:
    if len(line) > 1 and line.startswith('"') and line.endswith('"'):
        return line[1:-1].replace('""', '"')
    return line


def _parquet(raw: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(raw))


def _csv(raw: bytes) -> pa.Table:
    raw = raw.removeprefix(b"\xef\xbb\xbf")  # the mark that spreadsheets put before UTF-8
    # Read every column as text: a key such as 000123 is not a number.
    header = raw.split(b"\n", 1)[0].decode("utf-8", "replace").strip()
    if "," in header and classify(header.strip('"')) != "other":  # a name with commas, no header
        lines = (_unquoted(line.strip("\r")) for line in raw.decode("utf-8").split("\n"))
        return pa.table({COLUMN: [line for line in lines if line]})
    names = [name.strip().strip('"') for name in header.split(",")]
    convert = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
    if COLUMN in names or len(names) > 1:
        return pyarrow.csv.read_csv(io.BytesIO(raw), convert_options=convert)
    # A bare list without a header line.
    read = pyarrow.csv.ReadOptions(column_names=[COLUMN])
    convert = pyarrow.csv.ConvertOptions(column_types={COLUMN: pa.string()})
    return pyarrow.csv.read_csv(io.BytesIO(raw), read_options=read, convert_options=convert)
