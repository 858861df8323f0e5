"""The ledger: what was written is read back, in order, in few objects."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.runs.ledger import (
    LedgerEntry,
    LedgerWriter,
    entries_of,
    invocations,
    new_invocation,
    part_is_whole,
    read_ledger,
)
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


FIELDS: dict[str, Any] = {
    "event": "shard", "at": 5.0, "shard_id": "0" * 16, "counts": {"ok": 2}, "detections": 3,
    "seconds": {"infer": 1.5},
}  # fmt: skip
FACTS: dict[str, Any] = {
    "worker": "w", "outcome": "done", "won": True, "alive": 1, "workers": 2, "gpus": 0.5,
    "decoders": 2, "nms_threads": 1, "before_s": 2.5, "fill": {"decoded": 0.5},
    "warnings": {"cut off": 1},
}  # fmt: skip
WRONG = (
    None, True, "x", -1, -0.5, float("nan"), float("inf"), 1e300, 10**400, [], [1], {"ok": None},
    {"ok": "x"}, {"ok": -1}, {"infer": float("inf")}, {"infer": 10**400, "fetch": 0.5},
)  # fmt: skip


def line(**fields: Any) -> bytes:
    return json.dumps({**FIELDS, "note": FACTS, **fields}).encode() + b"\n"


def kind_of(value: Any) -> object:
    """Return what a reader relies on: numbers alike, a dict's values too."""
    if isinstance(value, dict):
        return {float if type(one) is int else type(one) for one in value.values()}
    return float if type(value) is int else type(value)


@pytest.mark.parametrize("name", FIELDS)
def test_an_entry_with_a_field_of_a_wrong_type_is_skipped_and_its_part_is_not_whole(
    name: str,
) -> None:
    assert part_is_whole(line())
    for wrong in WRONG:
        part = line() + line(**{name: wrong}) + line(at=6.0)
        found = list(entries_of(part))
        assert [entry.at for entry in found[:: len(found) - 1]] == [5.0, 6.0]
        assert part_is_whole(part) is (len(found) == 3)
        for entry in found:
            value = asdict(entry)[name]
            assert kind_of(value) == kind_of(FIELDS[name]) or value in ({}, None)
            assert value is not None or name == "shard_id"


@pytest.mark.parametrize("name", FACTS)
def test_a_fact_of_a_wrong_type_counts_as_not_told(name: str) -> None:
    for wrong in WRONG:
        (entry,) = entries_of(line(note={**FACTS, name: wrong, "other": wrong}))
        assert entry.note.keys() >= FACTS.keys() - {name} | {"other"}
        told = entry.note.get(name, FACTS[name])
        assert kind_of(told) == kind_of(FACTS[name]) or told == {} or name == "worker"
    (entry,) = entries_of(line())
    assert entry.note == FACTS
