"""A listing in parts: it is there whole or not at all, and reads as if it were one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.runs.gc import collect_garbage
from storage.errors import AlreadyExists, StorageError, StorageUnavailable
from storage.objects.protocols import ObjectStore
from storage.records import Shard, StoredObject, shard_id_of
from storage.runs.generations import PARTS, Generations, GenerationWriter
from storage.runs.listing import Listing
from storage.runs.manifest import Manifest
from storage.stores.memory import MemoryStore
from tests.support.faulty import FaultyStore, drop_reply, fail
from tests.support.samples.synthetic_run import record

SHARDS = 9000  # three row groups


def objects(count: int = SHARDS) -> list[StoredObject]:
    return [StoredObject(f"{n:06}.tar", 10 + n, "v1") for n in range(count)]


def tars(listed: Iterable[StoredObject]) -> Iterator[Shard]:
    return (Shard(shard_id_of([o]), "tar", (o,)) for o in listed)


def listed_in_parts(store: ObjectStore, count: int = SHARDS) -> Listing:
    listing = Listing(store, part_nbytes=1)
    listing.refresh(objects(count), tars)
    return listing


@pytest.fixture(scope="module")
def in_parts() -> MemoryStore:
    store = MemoryStore()
    listed_in_parts(store)
    return store


@pytest.mark.slow
def test_a_listing_in_parts_reads_like_one_object(in_parts: MemoryStore) -> None:
    whole = MemoryStore()
    Listing(whole).refresh(objects(), tars)
    assert [o.key for o in whole.list()] == ["source/0.parquet"]
    parts = Listing(in_parts).parts()
    assert len(parts) == 3
    assert parts[-1] == "source/0.parquet"
    assert sorted(parts) == sorted(o.key for o in in_parts.list())
    assert list(Listing(in_parts).live_shards()) == list(Listing(whole).live_shards())
    assert list(Listing(in_parts).live_ids()) == [s.shard_id for s in tars(objects())]


def test_what_is_skipped_is_left_out_and_nothing_else(in_parts: MemoryStore) -> None:
    ids = [s.shard_id for s in tars(objects())]
    skip = set(ids[::3])
    found = [s.shard_id for s in Listing(in_parts).live_shards(skip=skip)]
    assert found == [i for i in ids if i not in skip]


def test_the_next_listing_is_compared_with_all_parts() -> None:
    store = MemoryStore()
    listed_in_parts(store)
    now = objects()[1:] + [StoredObject("new.tar", 1, "v1")]
    now[5] = StoredObject(now[5].key, 1, "v2")
    change = Listing(store, part_nbytes=1).refresh(now, tars)
    assert (change.generation, change.shards_added) == (1, 2)
    assert (change.added, change.changed, change.deleted) == (1, 1, 1)
    assert sorted(s.shard_id for s in Listing(store).live_shards()) == sorted(
        s.shard_id for s in tars(now)
    )


def test_a_writer_that_dies_leaves_no_generation_and_gc_removes_its_parts() -> None:
    store = MemoryStore()
    broken = FaultyStore(store, [fail("create", "source/0.parquet")])
    with pytest.raises(StorageUnavailable):
        listed_in_parts(broken)
    left = [o.key for o in store.list(PARTS)]
    assert len(left) == 2
    assert list(Listing(store).live_ids()) == []
    listed_in_parts(store)
    assert Listing(store).count() == SHARDS
    manifest = Manifest.create_or_continue(store, record())
    garbage = collect_garbage(manifest, older_than_s=0).garbage
    assert [g.key for g in garbage] == left
    assert Listing(store).count() == SHARDS


@pytest.mark.parametrize("lost", ["source/0.parquet", PARTS])
def test_a_lost_reply_is_not_a_rival(lost: str) -> None:
    store = MemoryStore()
    with_losses = FaultyStore(store, [drop_reply("create", lost)])
    once_more = Retrying(with_losses)
    listed_in_parts(once_more)  # type: ignore[arg-type]  # it has what is needed
    assert Listing(store).count() == SHARDS
    assert once_more.retried == 1


class Retrying:
    """A store that sends a put again whose reply was lost, as botocore does."""

    def __init__(self, store: ObjectStore) -> None:
        self.store, self.retried = store, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.store, name)

    def create(self, key: str, body: bytes | Path) -> str:
        try:
            return self.store.create(key, body)
        except StorageUnavailable:
            self.retried += 1
            return self.store.create(key, body)


def test_a_rival_s_generation_is_not_taken_for_ours(tmp_path: Path) -> None:
    store = MemoryStore()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    ours, theirs = (GenerationWriter(store, 0, tmp_path / name) for name in ("a", "b"))
    (one, other) = objects(2)
    theirs.write("add", shard_id_of([one]), "tar", [one])
    ours.write("add", shard_id_of([other]), "tar", [other])
    theirs.commit()
    with pytest.raises(AlreadyExists):
        ours.commit()
    (found,) = Generations(store, store.url).shards("source/0.parquet", "add")
    assert found.objects == (one,)


def test_a_part_that_is_gone_is_not_a_smaller_run() -> None:
    store = MemoryStore()
    listed_in_parts(store)
    store.delete(Listing(store).parts()[0])
    with pytest.raises(StorageError):
        list(Listing(store).live_ids())


def test_what_was_dropped_is_all_of_it_or_an_error() -> None:
    store = MemoryStore()
    for n in (3, 2, 1):
        Listing(store).refresh(objects(n), tars)
    failing = FaultyStore(store, [fail("get", "source/2.parquet")])
    listing = Listing(failing)
    with pytest.raises(StorageUnavailable):
        listing.dropped()
    assert list(listing.live_shards()) == list(tars(objects(1)))


def test_listings_of_before_there_were_parts_are_read() -> None:
    """One object of row groups of 256, without metadata or checksums; adds and drops in one."""
    first, second = objects(600), objects(600)[1:] + [StoredObject("z/\udcff.jpg", 1, "v1")]
    second[5] = StoredObject(second[5].key, 1, "v2")
    new = MemoryStore()
    Listing(new).refresh(first, tars)
    Listing(new).refresh(second, tars)
    old = MemoryStore()
    for key in Listing(new).generations():
        rows = pq.read_table(pa.BufferReader(new.get(key))).replace_schema_metadata(None)
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, rows.schema, compression="zstd") as parquet:
            for begin in range(0, rows.num_rows, 256):
                parquet.write_table(rows.slice(begin, 256))
        old.create(key, sink.getvalue().to_pybytes())
    assert pq.ParquetFile(pa.BufferReader(old.get("source/0.parquet"))).num_row_groups == 3
    assert Listing(old).parts() == ["source/0.parquet", "source/1.parquet"]
    assert list(Listing(old).live_shards()) == list(Listing(new).live_shards())
    assert Listing(old).dropped() == Listing(new).dropped() != {}
    assert Listing(old).refresh(second, tars).generation == 1  # nothing is new


def test_a_hole_between_generations_is_not_a_smaller_run() -> None:
    store = MemoryStore()
    for n in range(1, 4):
        Listing(store).refresh(objects(n), tars)
    store.delete("source/1.parquet")
    with pytest.raises(StorageError, match=r"source/1\.parquet is missing"):
        Listing(store).count()
