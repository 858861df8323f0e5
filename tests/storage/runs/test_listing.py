"""The frozen listings: whatever happens to a source, the live set is the source, once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import SourceError
from storage.records import Shard, StoredObject, shard_id_of
from storage.runs.listing import Listing
from storage.runs.listing_changes import ListingChange, ListingDrop
from storage.stores.memory import MemoryStore

GROUP = 3
HOSTILE = ["../u.jpg", "a b.jpg", "ü.jpg", "\udcff\udc80.jpg", "<b>.jpg", "'\"\n.jpg", "日本.tar"]


def by_key(keys: Iterable[str]) -> list[str]:
    return sorted(keys, key=lambda k: k.encode("utf-8", "surrogateescape"))


def group(objects: Iterable[StoredObject]) -> Iterator[Shard]:
    """Tars alone, images in threes; a group is emitted when full, among the tars."""
    waiting: list[StoredObject] = []
    for one in objects:
        if one.key.endswith(".tar"):
            yield Shard(shard_id_of([one]), "tar", (one,))
            continue
        waiting.append(one)
        if len(waiting) == GROUP:
            yield Shard(shard_id_of(waiting), "images", tuple(waiting))
            waiting = []
    if waiting:
        yield Shard(shard_id_of(waiting), "images", tuple(waiting))


def listed(source: dict[str, int]) -> list[StoredObject]:
    return [StoredObject(key, 10 + source[key], f"v{source[key]}") for key in by_key(source)]


def refresh(store: MemoryStore, source: dict[str, int]) -> ListingChange:
    return Listing(store).refresh(listed(source), group)


def live_objects(listing: Listing) -> list[tuple[str, str]]:
    """(key, etag) of every live object, with repeats if there are any."""
    dropped = listing.dropped()
    return [
        (o.key, o.etag)
        for shard in listing.live_shards()
        for o in shard.objects
        if o.key not in dropped.get(shard.shard_id, ())
    ]


keys = st.sampled_from([*(f"{c}{n}.jpg" for c in "abc" for n in range(5)), *HOSTILE]) | (
    st.sampled_from([f"s{n}.tar" for n in range(4)])
)
sources = st.dictionaries(keys, st.integers(0, 3), max_size=18)


@pytest.mark.slow
@settings(max_examples=60)
@given(steps=st.lists(sources, min_size=1, max_size=5))
def test_live_is_the_source_whatever_happened_to_it(steps: list[dict[str, int]]) -> None:
    store = MemoryStore()
    before: dict[str, int] = {}
    ever: dict[str, tuple[StoredObject, ...]] = {}
    for source in steps:
        change = refresh(store, source)
        added, changed, deleted = difference(before, source)
        assert (change.added, change.changed, change.deleted) == (added, changed, deleted)
        listing = Listing(store)
        live = live_objects(listing)
        # All of the source, none twice, nothing else.
        assert sorted(live) == sorted((o.key, o.etag) for o in listed(source))
        now = {s.shard_id: s.objects for s in listing.all_shards()}
        # What was grouped once stays grouped like that.
        assert all(now[shard_id] == objects for shard_id, objects in ever.items())
        assert sorted(listing.live_ids()) == sorted(s.shard_id for s in listing.live_shards())
        assert listing.count() == len(list(listing.live_shards()))
        ever, before = now, source


def difference(before: dict[str, int], now: dict[str, int]) -> tuple[int, int, int]:
    both = before.keys() & now.keys()
    changed = sum(before[k] != now[k] for k in both)
    return len(now.keys() - before.keys()), changed, len(before.keys() - now.keys())


@pytest.mark.slow
@settings(max_examples=30)
@given(steps=st.lists(st.booleans(), min_size=1, max_size=5), source=sources)
def test_a_source_that_comes_and_goes(steps: list[bool], source: dict[str, int]) -> None:
    store = MemoryStore()
    for there in steps:
        refresh(store, source if there else {})
        assert sorted(live_objects(Listing(store))) == sorted(
            (o.key, o.etag) for o in (listed(source) if there else ())
        )
        ids = [s.shard_id for s in Listing(store).all_shards()]
        assert len(ids) == len(set(ids))


@settings(max_examples=20)
@given(source=sources)
def test_an_unchanged_source_writes_nothing(source: dict[str, int]) -> None:
    store = MemoryStore()
    first = refresh(store, source)
    objects = {o.key: o.etag for o in store.list()}
    second = refresh(store, source)
    assert second == ListingChange(first.generation, 0, 0, 0, 0)
    assert {o.key: o.etag for o in store.list()} == objects


def test_one_listing_object_sees_its_own_refresh() -> None:
    listing = Listing(MemoryStore())
    assert listing.count() == 0
    listing.refresh(listed({"a.jpg": 0, "b.jpg": 0}), group)
    assert listing.dropped() == {}
    listing.refresh(listed({"b.jpg": 0}), group)
    assert live_objects(listing) == [("b.jpg", "v0")]
    assert len(listing.generations()) == 2


def test_an_image_that_comes_back_unchanged_is_live_again() -> None:
    """Deleted, then restored with the same bytes and time: the same shard id would result."""
    store = MemoryStore()
    refresh(store, {"a.jpg": 0})
    refresh(store, {})
    assert live_objects(Listing(store)) == []
    refresh(store, {"a.jpg": 0})
    assert live_objects(Listing(store)) == [("a.jpg", "v0")]


def test_more_shards_than_a_row_group_stay_in_order() -> None:
    source = {f"{n:05}.jpg": 0 for n in range(2000)}
    store = MemoryStore()
    change = refresh(store, source)
    assert change.shards_added == -(-2000 // GROUP)
    assert [k for k, _ in live_objects(Listing(store))] == by_key(source)
    more = source | {f"{n:05}x.jpg": 0 for n in range(0, 2000, 7)}
    del more["00010.jpg"]
    change = refresh(store, more)
    assert (change.added, change.deleted) == (286, 1)
    assert sorted(k for k, _ in live_objects(Listing(store))) == sorted(more)


def test_generations_count_like_numbers() -> None:
    store = MemoryStore()
    for n in range(12):
        refresh(store, {"a.jpg": n})
    assert Listing(store).generations() == [f"source/{n}.parquet" for n in range(12)]
    assert live_objects(Listing(store)) == [("a.jpg", "v11")]


@pytest.mark.parametrize("key", HOSTILE)
def test_any_key_comes_back_as_it_was(key: str) -> None:
    store = MemoryStore()
    refresh(store, {key: 1})
    assert live_objects(Listing(store)) == [(key, "v1")]


def test_a_refresh_reads_the_source_lazily() -> None:
    """Grouping starts before the listing is complete, so a large source need not fit in memory."""
    pulled: list[str] = []

    def slow() -> Iterator[StoredObject]:
        for one in listed({f"{n:03}.jpg": 0 for n in range(30)}):
            pulled.append(one.key)
            yield one

    def noting(objects: Iterable[StoredObject]) -> Iterator[Shard]:
        first = tuple(islice(objects, 2))
        assert len(pulled) <= 3
        yield Shard(shard_id_of(first), "images", first)
        yield from group(objects)

    Listing(MemoryStore()).refresh(slow(), noting)
    assert len(pulled) == 30


def test_images_that_come_back_as_they_were_return_to_their_shards() -> None:
    store = MemoryStore()
    source = {f"a{n}.jpg": 0 for n in range(5)} | {"b.tar": 0}
    refresh(store, source)
    before = {s.shard_id: s.objects for s in Listing(store).live_shards()}
    refresh(store, {"a0.jpg": 0, "new.jpg": 0})
    # All but one come back, one of them changed, beside another new one: no old shard is remade.
    change = refresh(store, source | {"a4.jpg": 1, "new.jpg": 0, "new2.jpg": 0})
    assert (change.added, change.changed, change.deleted, change.returned) == (6, 0, 0, 4)
    listing = Listing(store)
    live = {s.shard_id: s.objects for s in listing.live_shards()}
    assert before.items() <= live.items()
    of_key = {
        o.key: shard.shard_id
        for shard in listing.live_shards()
        for o in shard.objects
        if o.key not in listing.dropped().get(shard.shard_id, ())
    }
    old = {o.key: shard_id for shard_id, objects in before.items() for o in objects}
    same = {"a0.jpg", "a1.jpg", "a2.jpg", "a3.jpg", "b.tar"}
    assert {key: of_key[key] for key in same} == {key: old[key] for key in same}
    assert of_key["a4.jpg"] not in before


def drop_of(before: dict[str, int], now: dict[str, int]) -> ListingDrop:
    store = MemoryStore()
    refresh(store, before)
    seen: list[ListingDrop] = []
    Listing(store).refresh(listed(now), group, check_drop=seen.append)
    (drop,) = seen
    return drop


def test_a_drop_is_counted_and_its_whole_folders_are_named() -> None:
    before = {f"{folder}/{n}.jpg": 0 for folder in ("a", "b", "c") for n in range(4)} | {"x.jpg": 0}
    assert drop_of(before, before) == ListingDrop(13, 0, 0, ())
    gone = {k: v for k, v in before.items() if not k.startswith("b/") and k != "c/0.jpg"}
    assert drop_of(before, gone) == ListingDrop(13, 5, 1, ("b",))
    # Other images in a folder are not the folder gone.
    assert drop_of(before, {**gone, "b/new.jpg": 0}) == ListingDrop(13, 5, 0, ())
    assert drop_of(before, {"x.jpg": 1}) == ListingDrop(13, 12, 3, ("a", "b", "c"))


def test_a_refused_drop_changes_nothing() -> None:
    store = MemoryStore()
    refresh(store, {"a.jpg": 0, "b.jpg": 0})
    objects = {o.key: store.get(o.key) for o in store.list()}

    def refuse(drop: ListingDrop) -> None:
        raise SourceError(f"{drop.deleted} are gone")

    with pytest.raises(SourceError, match="1 are gone"):
        Listing(store).refresh(listed({"a.jpg": 0, "c.jpg": 0}), group, check_drop=refuse)
    assert {o.key: store.get(o.key) for o in store.list()} == objects
