"""FaultyStore does exactly the harm it is told to, and no other."""

from __future__ import annotations

import pickle

import pytest

from storage.errors import AccessDenied, AlreadyExists, ShortRead, StorageFull, StorageUnavailable
from storage.stores.memory import MemoryStore
from tests.support.faulty import Fault, FaultyStore, delay, drop_reply, fail, stale_list, truncate


def test_fails_so_many_times_where_told() -> None:
    store = FaultyStore(MemoryStore(), [fail("create", "annotations/", times=2, after=1)])
    outcomes = []
    for number in range(5):
        store.create(f"source/{number}", b"")
        try:
            store.create(f"annotations/{number}", b"")
            outcomes.append(True)
        except StorageUnavailable:
            outcomes.append(False)
    assert outcomes == [True, False, False, True, True]
    assert [o.key for o in store.list("annotations/")] == [f"annotations/{n}" for n in (0, 3, 4)]
    assert (store.calls["create"], store.hits["fail"]) == (10, 2)


def test_a_dropped_reply_leaves_the_object() -> None:
    store = FaultyStore(MemoryStore(), [drop_reply("create")])
    with pytest.raises(StorageUnavailable):
        store.create("part", b"attempt 7")
    with pytest.raises(AlreadyExists):
        store.create("part", b"attempt 8")
    assert store.get("part") == b"attempt 7"


def test_truncated_reads() -> None:
    store = FaultyStore(MemoryStore(), [truncate("stream", keep_bytes=4), truncate("get")])
    store.put("key", b"0123456789")
    with store.stream("key") as source:
        assert source.read(4) == b"0123"
        for _ in range(2):
            with pytest.raises(ShortRead):
                source.read(1)
    with pytest.raises(ShortRead):
        store.get("key")
    with store.stream("key") as source:
        assert source.read() == store.get("key") == b"0123456789"


def test_a_stream_no_longer_than_what_is_kept_is_whole() -> None:
    store = FaultyStore(MemoryStore(), [truncate("stream", keep_bytes=10)])
    store.put("key", b"0123456789")
    with store.stream("key") as source:
        assert source.read() == b"0123456789"


def test_stale_listings() -> None:
    inner = MemoryStore()
    inner.put("a/old", b"")
    store = FaultyStore(inner, [stale_list("a/")])
    store.create("a/new", b"")
    assert [[o.key for o in store.list("a/")] for _ in range(2)] == [["a/old"], ["a/new", "a/old"]]


def test_delays_use_the_clock_they_are_given() -> None:
    slept: list[float] = []
    store = FaultyStore(MemoryStore(), [delay("*", seconds=5, times=2)], sleep=slept.append)
    for _ in range(3):
        store.put("key", b"")
    assert slept == [5, 5]


def test_denied_from_some_moment_on() -> None:
    store = FaultyStore(MemoryStore(), [fail("*", error=AccessDenied, after=2, times=None)])
    store.put("a", b"")
    store.put("b", b"")
    for _ in range(5):
        with pytest.raises(AccessDenied):
            store.put("c", b"")


def test_a_share_depends_on_the_seed_alone() -> None:
    def pattern(seed: int) -> list[bool]:
        full = Fault("fail", "put", times=None, share=0.3, error=StorageFull)
        store = FaultyStore(MemoryStore(), [full], seed=seed)
        hit = []
        for number in range(200):
            try:
                store.put(str(number), b"")
                hit.append(False)
            except StorageFull:
                hit.append(True)
        return hit

    assert pattern(1) == pattern(1) != pattern(2)
    assert 30 < sum(pattern(1)) < 90


def test_its_counts_survive_pickling() -> None:
    store = FaultyStore(MemoryStore("pickled"), [fail("put", times=2)])
    with pytest.raises(StorageUnavailable):
        store.put("key", b"")
    copy = pickle.loads(pickle.dumps(store))
    with pytest.raises(StorageUnavailable):
        copy.put("key", b"")
    copy.put("key", b"1")
    assert store.get("key") == b"1"
