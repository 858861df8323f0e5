"""Frames: the shards that each routing saw first, which determine every shard's stratum.

``review/frames/<token>.parquet`` holds shard ids; it counts only when the header of a queue part
names it, so that a routing that died half-way leaves no stratum without its sample. A shard takes
eight bytes in memory.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.objects.protocols import SupportsCreate, SupportsGet
from storage.parquet.files import opened
from storage.parquet.parts import part_bytes

FRAMES = "review/frames/"
_SCHEMA = pa.schema([pa.field("shard", pa.uint64(), nullable=False)])


def shard_numbers(shard_ids: Iterable[str]) -> NDArray[np.uint64]:
    """Return shard ids (16 hex digits) as uint64."""
    return np.fromiter((int(shard_id, 16) for shard_id in shard_ids), np.uint64)


def write_frame(store: SupportsCreate, shards: NDArray[np.uint64]) -> str:
    """Write a frame and return its key; nothing refers to it yet."""
    key = f"{FRAMES}{secrets.token_hex(8)}.parquet"
    table = pa.table([pa.array(np.sort(shards), pa.uint64())], schema=_SCHEMA)
    store.create(key, part_bytes(table, {"key": key, "shards": len(shards)}))
    return key


def read_frame(store: SupportsGet, key: str) -> NDArray[np.uint64]:
    """Return the shards of one frame, sorted."""
    with opened(store.get(key), key) as file:
        table = file.read().cast(_SCHEMA)
        shards: NDArray[np.uint64] = table.column("shard").to_numpy()
    return shards


class Frames:
    """The stratum of every shard routed so far.

    Args:
        frames: (stratum, its shards) pairs; the earlier one wins where two contain a shard.
    """

    def __init__(self, frames: Sequence[tuple[str, NDArray[np.uint64]]]) -> None:
        self._names = [name for name, _ in frames]
        self._shards = [np.sort(shards) for _, shards in frames]

    def stratum_of(self, shard_id: str) -> str | None:
        """Return the stratum, or None if no routing has seen the shard."""
        number = np.uint64(int(shard_id, 16))
        for name, shards in zip(self._names, self._shards, strict=True):
            at = int(np.searchsorted(shards, number))
            if at < len(shards) and shards[at] == number:
                return name
        return None
