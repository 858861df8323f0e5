"""The ledger: what was written is read back, in order, in few objects."""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from storage.runs.ledger import LedgerEntry, LedgerWriter, invocations, new_invocation, read_ledger
from storage.stores.memory import MemoryStore

entries = st.builds(
    LedgerEntry,
    event=st.sampled_from(["start", "shard", "beat", "end"]),
    at=st.floats(0, 2e9),
    shard_id=st.none() | st.just("0" * 16),
    counts=st.dictionaries(st.sampled_from(["ok", "missing"]), st.integers(0, 99)),
    detections=st.integers(0, 10**9),
    seconds=st.dictionaries(st.sampled_from(["infer", "fetch"]), st.floats(0, 1e6)),
    note=st.dictionaries(st.text(), st.none() | st.text() | st.integers()),
)


@given(written=st.lists(entries, max_size=30), max_lines=st.integers(1, 10))
def test_read_back_in_order(written: list[LedgerEntry], max_lines: int) -> None:
    store = MemoryStore()
    writer = LedgerWriter(store, "i", max_lines=max_lines)
    for entry in written:
        writer.write(entry)
    writer.flush()
    writer.flush()
    assert list(read_ledger(store, "i")) == written


def test_parts_are_few_while_the_clock_stands_still() -> None:
    store = MemoryStore()
    writer = LedgerWriter(store, "i", max_lines=100)
    for _ in range(1000):
        writer.write(LedgerEntry("shard", at=5.0))
    assert len(list(store.list("ledger/"))) == 10


def test_a_part_is_written_when_it_is_old_enough() -> None:
    store = MemoryStore()
    writer = LedgerWriter(store, "i", max_age_s=5.0)
    writer.write(LedgerEntry("start", at=100.0))
    writer.write(LedgerEntry("beat", at=104.0))
    assert list(read_ledger(store, "i")) == []
    writer.write(LedgerEntry("beat", at=105.0))
    assert [e.at for e in read_ledger(store, "i")] == [100.0, 104.0, 105.0]


def test_a_clock_that_jumps_back_loses_nothing() -> None:
    store = MemoryStore()
    writer = LedgerWriter(store, "i")
    writer.write(LedgerEntry("beat", at=100.0))
    writer.write(LedgerEntry("beat", at=50.0))
    writer.write(LedgerEntry("beat", at=51.0))
    writer.flush()
    assert [e.at for e in read_ledger(store, "i")] == [100.0, 50.0, 51.0]


def test_invocations_sort_by_time() -> None:
    store = MemoryStore()
    names = [new_invocation(datetime(2026, 1, d, 3, 4, 5, tzinfo=UTC)) for d in (9, 10, 2)]
    for name in names:
        writer = LedgerWriter(store, name, max_lines=1)
        writer.write(LedgerEntry("start", at=1.0))
    assert invocations(store) == [names[2], names[0], names[1]]
    assert names[1].startswith("20260110T030405Z-")
    assert [e.event for e in read_ledger(store, names[0])] == ["start"]


def test_more_than_ten_parts_stay_in_order() -> None:
    store = MemoryStore()
    writer = LedgerWriter(store, "i", max_lines=1)
    for n in range(25):
        writer.write(LedgerEntry("beat", at=float(n)))
    assert [e.at for e in read_ledger(store, "i")] == [float(n) for n in range(25)]
