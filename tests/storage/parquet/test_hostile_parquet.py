"""Parquet that was damaged or swapped for another: one error that names it, never a bare one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.errors import StorageError
from storage.parquet.files import METADATA_KEY
from storage.records import StoredObject
from storage.review.answers import read_answers
from storage.review.frames import read_frame
from storage.review.queue import read_head, read_queue
from storage.runs.annotations import read_footer, read_identity, read_rows
from storage.runs.listing import Listing
from storage.stores.memory import MemoryStore
from tests.support.fuzz import seeds as fuzz_seeds

KEYS = sorted(key for key in fuzz_seeds.run_objects() if key.endswith(".parquet"))


def parquet(metadata: bytes = b"{}") -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"image_id": [1, 2], "op": [1, 2]})
    with pq.ParquetWriter(sink, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({METADATA_KEY: metadata})
    raw: bytes = sink.getvalue().to_pybytes()
    return raw


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "cut": lambda raw: raw[: len(raw) // 2],
    "footer": lambda raw: raw[:-300] + bytes(292) + raw[-8:],
    "pages": lambda raw: raw[:4] + bytes(200) + raw[204:],
    "another's": lambda raw: parquet(),
    "metadata no JSON": lambda raw: parquet(b"{"),
    "metadata nested": lambda raw: parquet(b"[" * 100_000),
    "metadata a list": lambda raw: parquet(b"[]"),
    "metadata a version": lambda raw: parquet(b'{"schema_version": "x", "queue": 1, "shard": 2}'),
}


def read(store: MemoryStore, key: str) -> None:
    if key.startswith("annotations/"):
        size = len(store.get(key))
        read_footer(store, StoredObject(key, size, ""))
        read_identity(store, key)
        list(read_rows(store, key))
    elif key.startswith("source/"):
        list(Listing(store).live_shards())
    elif key.startswith("review/queue/"):
        read_head(store, key)
        list(read_queue(store))
    elif key.startswith("review/answers/"):
        list(read_answers(store))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("key", KEYS)
def test_one_error_that_names_the_object(key: str, damage: str) -> None:
    store = MemoryStore()
    for other, raw in fuzz_seeds.run_objects().items():
        store.put(other, raw)
    read(store, key)
    store.put(key, DAMAGE[damage](store.get(key)))
    with pytest.raises(StorageError) as caught:
        read(store, key)
    assert key in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("raw", [b"", b"PAR1" * 9, parquet()])
def test_a_damaged_frame_is_named(raw: bytes) -> None:
    store = MemoryStore()
    store.put("review/frames/x.parquet", raw)
    with pytest.raises(StorageError, match=r"review/frames/x\.parquet"):
        read_frame(store, "review/frames/x.parquet")


def test_the_keys_cover_every_kind() -> None:
    kinds: Any = {key.rpartition("/")[0] for key in KEYS}
    assert kinds == {"annotations", "source", "review/queue", "review/answers"}
