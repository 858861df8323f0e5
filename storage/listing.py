"""Which shards a run has: frozen listings under source/, in generations.

``source/<n>.parquet`` holds what the n-th listing added and dropped. What an earlier listing
grouped is never regrouped: new images form new shards, a changed image is dropped from its old
shard and joins a new one, a deleted one is dropped. Live is what was added and not dropped since.
An image that comes back as it was can make the same shard again: it is then added a second time,
which takes the drop back, and what was labelled under that id counts again.

Both the store's listing and each generation are ordered by key, so a later listing is compared
with all earlier ones by a merge join, in memory that does not grow with the source.
"""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.errors import StorageError
from storage.objects import ObjectStore
from storage.records import SHARD_KINDS, Shard, ShardKind, StoredObject

SOURCE = "source/"
_SHARDS_PER_GROUP = 256

# Keys are binary: a file name need not be UTF-8, and must come back as it was.
_OBJECT = pa.struct([("key", pa.binary()), ("nbytes", pa.int64()), ("etag", pa.string())])
_SCHEMA = pa.schema(
    [
        pa.field("op", pa.string(), nullable=False),  # add | drop
        pa.field("shard_id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("objects", pa.list_(_OBJECT), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class ListingChange:
    """What one listing found against the earlier ones, in objects."""

    generation: int
    shards_added: int
    added: int
    changed: int
    deleted: int


@dataclass(frozen=True, slots=True)
class _Known:
    """A live object and the shard it is in; orders by key."""

    key_bytes: bytes
    shard_id: str
    kind: ShardKind
    listed: StoredObject


def _key_bytes(listed: StoredObject) -> bytes:
    return listed.key.encode("utf-8", "surrogateescape")


class Listing:
    """The generations of one run's source."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._generations: list[str] | None = None
        self._dropped: dict[str, set[str]] | None = None
        self._added_again: set[str] = set()  # shard ids that were added, dropped and added

    def generations(self) -> list[str]:
        """Keys of the listings, oldest first."""
        if self._generations is None:
            keys = [o.key for o in self._store.list(SOURCE) if o.key.endswith(".parquet")]
            self._generations = sorted(keys, key=_generation_number)
            self._refuse_holes(self._generations)
        return self._generations

    def _refuse_holes(self, keys: list[str]) -> None:
        for number, key in enumerate(keys):
            if _generation_number(key) != number:
                raise StorageError(
                    f"{self._store.url}/{SOURCE}{number}.parquet is missing, but not later ones",
                    hint="without it nobody knows what the run holds: bring it back from a backup",
                )

    def dropped(self) -> dict[str, set[str]]:
        """Tombstoned object keys by shard id."""
        if self._dropped is None:
            self._dropped, self._added_again = {}, set()
            for key in self.generations():
                self._apply_drops(key, self._dropped, self._added_again)
        return self._dropped

    def _apply_drops(self, key: str, dropped: dict[str, set[str]], again: set[str]) -> None:
        if dropped:
            for row in self._rows("add", only=key, columns=["op", "shard_id"]):
                if dropped.pop(row["shard_id"], None) is not None:
                    again.add(row["shard_id"])
        for row in self._rows("drop", only=key):
            keys = (o.key for o in _shard(row).objects)
            dropped.setdefault(row["shard_id"], set()).update(keys)

    def all_shards(self) -> Iterator[Shard]:
        """Every shard that was ever listed, oldest generation first, as it was listed."""
        for row in self._added():
            yield _shard(row)

    def _added(self, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows that added a shard, each shard once."""
        self.dropped()
        repeats: set[str] = set()
        for row in self._rows("add", columns=columns):
            if row["shard_id"] in self._added_again:
                if row["shard_id"] in repeats:
                    continue
                repeats.add(row["shard_id"])
            yield row

    def all_ids(self) -> Iterator[str]:
        """Ids of every shard that was ever listed."""
        for row in self._added(columns=["op", "shard_id"]):
            yield row["shard_id"]

    def returned(self, shard_id: str) -> bool:
        """Whether a shard was dropped whole once and is live again."""
        self.dropped()
        return shard_id in self._added_again

    def live_shards(self) -> Iterator[Shard]:
        """Shards with at least one live object, as they were listed (the id covers all objects)."""
        dropped = self.dropped()
        for shard in self.all_shards():
            gone = dropped.get(shard.shard_id)
            if gone is None or any(o.key not in gone for o in shard.objects):
                yield shard

    def count(self) -> int:
        """Live shards."""
        return sum(1 for _ in self.live_ids())

    def live_ids(self) -> Iterator[str]:
        """Ids of live shards, without their objects where nothing was dropped from them."""
        if self.dropped():
            yield from (shard.shard_id for shard in self.live_shards())
            return
        for row in self._added(columns=["op", "shard_id"]):
            yield row["shard_id"]

    def refresh(
        self,
        listed: Iterable[StoredObject],
        group: Callable[[Iterable[StoredObject]], Iterator[Shard]],
    ) -> ListingChange:
        """Compare a fresh listing with what is known; write the difference as a new generation.

        Args:
            listed: every object to label, ordered by key (UTF-8 bytes).
            group: turns objects, in that order, into shards.

        Returns:
            What changed; ``generation`` is the last one, new only if something changed.
        """
        with tempfile.TemporaryDirectory(prefix="labelfleet-") as folder:
            spool = Path(folder) / "generation.parquet"
            with pq.ParquetWriter(
                spool, _SCHEMA, compression="zstd", write_page_checksum=True
            ) as parquet:
                counts = self._write_difference(parquet, listed, group)
            number = len(self.generations())
            if counts["rows"]:
                key = f"{SOURCE}{number}.parquet"
                self._store.create(key, spool)
                self.generations().append(key)
                self._dropped = None
                number += 1
        return ListingChange(
            number - 1, counts["shards"], counts["added"], counts["changed"], counts["deleted"]
        )

    def _write_difference(
        self,
        parquet: pq.ParquetWriter,
        listed: Iterable[StoredObject],
        group: Callable[[Iterable[StoredObject]], Iterator[Shard]],
    ) -> dict[str, int]:
        counts = {"rows": 0, "shards": 0, "added": 0, "changed": 0, "deleted": 0}
        drops: dict[tuple[str, ShardKind], list[StoredObject]] = {}

        def fresh() -> Iterator[StoredObject]:
            for new, old in _join(iter(listed), self._known()):
                if old is not None and (new is None or _version(new) != _version(old.listed)):
                    drops.setdefault((old.shard_id, old.kind), []).append(old.listed)
                    counts["deleted" if new is None else "changed"] += 1
                    old = None
                elif old is None:
                    counts["added"] += 1
                if new is not None and old is None:
                    yield new

        buffer: list[dict[str, Any]] = []
        for shard in group(fresh()):
            counts["shards"] += 1
            buffer.append(_row("add", shard.shard_id, shard.kind, shard.objects))
            counts["rows"] += _flush(parquet, buffer, _SHARDS_PER_GROUP)
        for (shard_id, kind), objects in drops.items():
            buffer.append(_row("drop", shard_id, kind, tuple(objects)))
        counts["rows"] += _flush(parquet, buffer, 1)
        return counts

    def doubled(self) -> Iterator[tuple[str, str, str]]:
        """(key, shard id, other shard id) of objects that are live in two shards: a damage."""
        before: _Known | None = None
        for known in self._live_by_key():
            same = before is not None and known.key_bytes == before.key_bytes
            if same and before is not None and known.shard_id != before.shard_id:
                yield known.listed.key, before.shard_id, known.shard_id
            before = known

    def _known(self) -> Iterator[_Known]:
        before: bytes | None = None
        for known in self._live_by_key():
            if known.key_bytes != before:  # a shard that was added again is in two generations
                yield known
            before = known.key_bytes

    def _live_by_key(self) -> Iterator[_Known]:
        """Live objects ordered by key; those of a shard that was added again are repeated."""
        dropped = self.dropped()

        def one(key: str, kind: ShardKind) -> Iterator[_Known]:
            for row in self._rows("add", only=key):
                if row["kind"] != kind:
                    continue
                shard = _shard(row)
                gone = dropped.get(shard.shard_id, set())
                for o in shard.objects:
                    if o.key not in gone:
                        yield _Known(_key_bytes(o), shard.shard_id, shard.kind, o)

        # Within a generation tars and groups of images interleave; each kind alone is ordered.
        streams = [one(key, kind) for key in self.generations() for kind in SHARD_KINDS]
        yield from heapq.merge(*streams, key=lambda known: known.key_bytes)

    def _rows(
        self, op: str, *, only: str | None = None, columns: list[str] | None = None
    ) -> Iterator[dict[str, Any]]:
        for key in self.generations() if only is None else [only]:
            raw = self._store.get(key)
            try:
                file = pq.ParquetFile(pa.BufferReader(raw), page_checksum_verification=True)
                for batch in file.iter_batches(batch_size=_SHARDS_PER_GROUP, columns=columns):
                    yield from batch.filter(pc.equal(batch.column("op"), op)).to_pylist()
            except (pa.ArrowException, OSError, KeyError) as exc:
                raise StorageError(
                    f"{self._store.url}/{key} is not a readable listing: {exc}",
                    hint="without it nobody knows what the run holds: bring it back from a backup",
                ) from exc


def _generation_number(key: str) -> int:
    return int(key.removeprefix(SOURCE).removesuffix(".parquet"))


def _version(listed: StoredObject) -> tuple[int, str]:
    return listed.nbytes, listed.etag


def _shard(row: dict[str, Any]) -> Shard:
    objects = (
        StoredObject(o["key"].decode("utf-8", "surrogateescape"), o["nbytes"], o["etag"])
        for o in row["objects"]
    )
    return Shard(row["shard_id"], row["kind"], tuple(objects))


def _row(
    op: str, shard_id: str, kind: ShardKind, objects: tuple[StoredObject, ...]
) -> dict[str, Any]:
    plain = [{"key": _key_bytes(o), "nbytes": o.nbytes, "etag": o.etag} for o in objects]
    return {"op": op, "shard_id": shard_id, "kind": kind, "objects": plain}


def _flush(parquet: pq.ParquetWriter, buffer: list[dict[str, Any]], at_least: int) -> int:
    if len(buffer) < at_least:
        return 0
    parquet.write_table(pa.Table.from_pylist(buffer, schema=_SCHEMA))
    written = len(buffer)
    buffer.clear()
    return written


def _join(
    listed: Iterator[StoredObject], known: Iterator[_Known]
) -> Iterator[tuple[StoredObject | None, _Known | None]]:
    """Outer merge join of two streams ordered by key."""
    new, old = next(listed, None), next(known, None)
    while new is not None or old is not None:
        if old is None or (new is not None and _key_bytes(new) < old.key_bytes):
            yield new, None
            new = next(listed, None)
        elif new is None or _key_bytes(new) > old.key_bytes:
            yield None, old
            old = next(known, None)
        else:
            yield new, old
            new, old = next(listed, None), next(known, None)
