"""One stored listing: what it added and dropped, as Parquet parts, read by column.

    source/<n>.parquet                  the last part; its creation commits the generation
    source/parts/<n>-<token>-<k>.parquet   the parts before it, which it names in its metadata
    source/moved-<m>/<n>.parquet        the same generations, after the source's m-th move
    source/moved-<m>.json               the new place; once written, earlier ones do not count

A part holds at most about 64 MiB, so that neither the writer's disk, a reader's memory nor an S3
PutObject limits a listing. Parts that no generation names were left by a writer that died.
"""

from __future__ import annotations

import re
import secrets
from collections import OrderedDict
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.errors import AlreadyExists, StorageError
from storage.objects.protocols import SupportsCreate, SupportsGet, SupportsList
from storage.parquet.files import METADATA_KEY, SealedWriter, metadata_of, opened
from storage.records import Shard, ShardKind, StoredObject

SOURCE = "source/"
PARTS = "source/parts/"
PART_NBYTES = 64 << 20
_CACHED_NBYTES = 64 << 20
_GROUP_SHARDS, _GROUP_OBJECTS = 4096, 65_536  # in a row group, about
_NAME = re.compile(rf"{SOURCE}(?:moved-(\d+)/)?(\d+)\.parquet")
_MOVE = re.compile(rf"{SOURCE}moved-(\d+)\.json")

Op = Literal["add", "drop"]
OPS: tuple[Op, ...] = ("add", "drop")

NO_LISTING = "the run's shards are unknown without it: restore it from a backup"

# Keys are binary: a file name need not be UTF-8 and must round-trip exactly.
_OBJECT_FIELDS = [("key", pa.binary()), ("nbytes", pa.int64()), ("etag", pa.string())]
_OBJECT = pa.struct(_OBJECT_FIELDS)
_SCHEMA = pa.schema(
    [
        pa.field("op", pa.string(), nullable=False),  # add | drop
        pa.field("shard_id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("objects", pa.list_(_OBJECT), nullable=False),
    ]
)


class SupportsGenerations(SupportsList, SupportsGet, SupportsCreate, Protocol):
    """The store verbs that listings need."""


def key_bytes(listed: StoredObject) -> bytes:
    """Return a key as the bytes it is ordered by."""
    return listed.key.encode("utf-8", "surrogateescape")


def generation_key(number: int, moves: int = 0) -> str:
    """Return the key of generation ``number`` after ``moves`` moves of the source."""
    return f"{SOURCE}moved-{moves}/{number}.parquet" if moves else f"{SOURCE}{number}.parquet"


def move_key(moves: int) -> str:
    """Return the key of the record of the source's n-th move."""
    return f"{SOURCE}moved-{moves}.json"


def moves_of(store: SupportsList) -> int:
    """Return the number of moves of a run's source."""
    found = (_MOVE.fullmatch(o.key) for o in store.list(f"{SOURCE}moved-"))
    return max((int(name[1]) for name in found if name), default=0)


def generation_keys(store: SupportsGenerations, url: str) -> list[str]:
    """Return the committed generations, oldest first. Raises StorageError if one is missing."""
    keys = [o.key for o in store.list(SOURCE)]
    moves = max((int(name[1]) for key in keys if (name := _MOVE.fullmatch(key))), default=0)
    named = (_NAME.fullmatch(key) for key in keys)
    numbers = sorted(int(name[2]) for name in named if name and int(name[1] or 0) == moves)
    for expected, number in enumerate(numbers):
        if number != expected:
            missing = f"{url}/{generation_key(expected, moves)}"
            raise StorageError(f"{missing} is missing, but not later ones", hint=NO_LISTING)
    return [generation_key(number, moves) for number in numbers]


class GenerationWriter:
    """Writes one generation; nothing counts before ``commit``.

    Args:
        store: the run's output.
        number: number of the generation.
        folder: local folder for the part being written.
        part_nbytes: size at which a part is uploaded and the next one started.
        moves: how often the source has moved.
    """

    def __init__(
        self,
        store: SupportsGenerations,
        number: int,
        folder: Path,
        *,
        part_nbytes: int = PART_NBYTES,
        moves: int = 0,
    ) -> None:
        self._store, self._number, self._part_nbytes = store, number, part_nbytes
        self._moves = moves
        self._spool = folder / "part.parquet"
        self._token = secrets.token_hex(8)
        self._parts: list[str] = []
        self._rows: list[tuple[Op, str, ShardKind, Sequence[StoredObject]]] = []
        self._objects = 0
        self.count = 0
        self._open()

    def write(
        self, op: Op, shard_id: str, kind: ShardKind, objects: Sequence[StoredObject]
    ) -> None:
        """Add a row."""
        self._rows.append((op, shard_id, kind, objects))
        self._objects += len(objects)
        self.count += 1
        if len(self._rows) >= _GROUP_SHARDS or self._objects >= _GROUP_OBJECTS:
            self._flush()
            if self._parquet.nbytes >= self._part_nbytes:
                self._end_part()

    def commit(self) -> str:
        """Write the buffered rows, publish the generation and return its key.

        Raises:
            AlreadyExists: another process has written this generation.
        """
        self._flush()
        key = generation_key(self._number, self._moves)
        self._parquet.finish({"key": key, "parts": self._parts})
        try:
            self._store.create(key, self._spool)
        except AlreadyExists:
            # Equal bytes: our own object, whose reply was lost.
            if self._store.get(key) != self._spool.read_bytes():
                raise
        return key

    def _open(self) -> None:
        self._parquet = SealedWriter(self._spool, _SCHEMA)

    def _end_part(self) -> None:
        key = f"{PARTS}{self._number}-{self._token}-{len(self._parts):05d}.parquet"
        self._parquet.finish({"key": key})
        with suppress(AlreadyExists):  # the token is unique to us: the reply was lost
            self._store.create(key, self._spool)
        self._parts.append(key)
        self._open()

    def _flush(self) -> None:
        if self._rows:
            self._parquet.write(_table(self._rows))
            self._rows.clear()
            self._objects = 0


def _table(rows: Sequence[tuple[Op, str, ShardKind, Sequence[StoredObject]]]) -> pa.Table:
    every = [o for row in rows for o in row[3]]
    ends = np.cumsum([0, *(len(row[3]) for row in rows)], dtype=np.int32)
    fields = [
        pa.array([key_bytes(o) for o in every], pa.binary()),
        pa.array([o.nbytes for o in every], pa.int64()),
        pa.array([o.etag for o in every], pa.string()),
    ]
    objects = pa.StructArray.from_arrays(fields, fields=_OBJECT.fields)
    columns = [pa.array([row[i] for row in rows], pa.string()) for i in range(3)]
    return pa.Table.from_arrays(
        [*columns, pa.ListArray.from_arrays(pa.array(ends), objects)], schema=_SCHEMA
    )


class Generations:
    """Reads generations, a row group at a time; caches the bytes of small ones.

    Args:
        store: the run's output.
        url: for messages.
    """

    def __init__(self, store: SupportsGet, url: str) -> None:
        self._store, self._url = store, url
        self._cache: OrderedDict[str, bytes] = OrderedDict()
        self._named: dict[str, list[str]] = {}

    def parts(self, key: str) -> list[str]:
        """Return the objects of a generation in order, ``key`` itself last."""
        if key not in self._named:
            with self._opened(key) as file:
                metadata = file.metadata.metadata or {}
                said = metadata_of(file, key) if METADATA_KEY in metadata else {}
                self._named[key] = [*said.get("parts", ()), key]
        return self._named[key]

    def ids(self, key: str, op: Op) -> Iterator[str]:
        """Yield the shard ids of the rows with this ``op``, in order."""
        for group in self._groups(key, op, None, ["op", "shard_id"]):
            yield from group.column("shard_id").to_pylist()

    def shards(
        self,
        key: str,
        op: Op,
        *,
        kind: ShardKind | None = None,
        skip: Set[str] = frozenset(),
    ) -> Iterator[Shard]:
        """Yield the rows with this ``op`` (and kind) as shards, in order, except those in
        ``skip``."""
        for group in self._groups(key, op, kind, None):
            yield from _shards(group, skip)

    def _groups(
        self, key: str, op: Op, kind: ShardKind | None, columns: list[str] | None
    ) -> Iterator[pa.Table]:
        wanted: dict[str, str] = {"op": op} if kind is None else {"op": op, "kind": kind}
        for part in self.parts(key):
            with self._opened(part) as file:
                for index in range(file.num_row_groups):
                    if _surely_without(file.metadata.row_group(index), wanted):
                        continue
                    group = file.read_row_group(index, columns=columns)
                    for name, value in wanted.items():
                        group = _where(group, name, value)
                    yield group

    @contextmanager
    def _opened(self, key: str) -> Iterator[pq.ParquetFile]:
        """Open one part; any damage becomes a StorageError that names it."""
        raw = self._cache.get(key)
        if raw is None:
            raw = self._store.get(key)
            self._keep(key, raw)
        with opened(raw, f"{self._url}/{key}", hint=NO_LISTING) as file:
            yield file

    def _keep(self, key: str, raw: bytes) -> None:
        """Cache a small listing: the start of a run reads it several times."""
        self._cache[key] = raw
        while sum(len(kept) for kept in self._cache.values()) > _CACHED_NBYTES:
            self._cache.popitem(last=False)


def _surely_without(group: Any, wanted: dict[str, str]) -> bool:
    """Return whether a row group's statistics rule out all wanted rows."""
    for index in range(group.num_columns):
        column = group.column(index)
        if column.path_in_schema in wanted and column.statistics is not None:
            low, high = column.statistics.min, column.statistics.max
            if low == high and low is not None and low != wanted[column.path_in_schema]:
                return True
    return False


def _where(group: pa.Table, name: str, value: str) -> pa.Table:
    mask = pc.equal(group.column(name), value)
    return group if pc.all(mask).as_py() else group.filter(mask)


def _shards(group: pa.Table, skip: Set[str]) -> Iterator[Shard]:
    ids = group.column("shard_id").to_pylist()
    if skip:
        wanted = [shard_id not in skip for shard_id in ids]
        group = group.filter(pa.array(wanted, pa.bool_()))
        ids = group.column("shard_id").to_pylist()
    kinds = group.column("kind").to_pylist()
    listed = group.column("objects").combine_chunks()
    fields = listed.flatten()
    keys = [key.decode("utf-8", "surrogateescape") for key in fields.field("key").to_pylist()]
    sizes, etags = fields.field("nbytes").to_pylist(), fields.field("etag").to_pylist()
    objects = tuple(map(StoredObject, keys, sizes, etags))
    begin = 0
    for shard_id, kind, length in zip(ids, kinds, listed.value_lengths().to_pylist(), strict=True):
        yield Shard(shard_id, kind, objects[begin : begin + length])
        begin += length
