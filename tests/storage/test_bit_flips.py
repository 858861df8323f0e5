"""A bit flipped at rest, in any kind of object: an error that names it, or no change at all."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.policy.policy import Policy
from pipelines.rounds.state import RoundState, StepRecord
from pipelines.runs.drift_record import read_drift
from pipelines.truth.compared import from_jsonl
from storage.errors import LabelfleetError
from storage.labels.versions import (
    read_label_tables,
    read_lineage,
    read_version,
    read_version_file,
)
from storage.objects.json_records import read_record
from storage.parquet.files import METADATA_KEY, opened
from storage.review.answers import read_answers
from storage.review.frames import read_frame
from storage.review.gold import GoldImage, read_gold, write_gold
from storage.review.kept import read_kept
from storage.review.not_shown import read_not_shown
from storage.review.queue import read_head, read_queue
from storage.review.refreshed import read_refreshed
from storage.review.settings import read_settings
from storage.runs.annotation_rows import table_to_rows
from storage.runs.annotations import read_footer, read_identity, read_tables
from storage.runs.ledger import invocations, read_ledger
from storage.runs.listing import Listing
from storage.runs.manifest import Manifest, RunRecord
from storage.stores.memory import MemoryStore
from tests.support.samples.whole_run import KINDS, whole_run

EVERY = 97


@pytest.fixture(scope="module")
def run() -> MemoryStore:
    store = MemoryStore()
    whole_run(MemoryStore(), store)
    seen = GoldImage("truth", (((1.0, 2.0, 3.0, 4.0), "RBC"),), (((5.0, 6.0, 7.0, 8.0), ""),))
    write_gold(store, "20260131T120000Z-1f3a9c", {"ab" * 32: seen, "cd" * 32: seen})
    return store


def _annotations(store: MemoryStore, key: str) -> Any:
    tables = [table.to_pylist() for table in read_tables(store, key)]
    rows = sum(len(list(table_to_rows(table))) for table in read_tables(store, key))
    footer = read_footer(store, store.head(key))
    return tables, rows, footer, read_identity(store, key)


def _listing(store: MemoryStore, key: str) -> Any:
    listing = Listing(store)
    return list(listing.all_shards()), list(listing.live_shards()), listing.dropped()


def _labels(store: MemoryStore, key: str) -> Any:
    lineage = read_version(store, "v0001")
    return [table.to_pylist() for table in read_label_tables(store, lineage)]


READERS: dict[str, Callable[[MemoryStore, str], Any]] = {
    "run.json": lambda store, key: RunRecord.from_json(store.get(key)),
    "source/": _listing,
    "annotations/": _annotations,
    "quarantine/": lambda store, key: Manifest(store, None).quarantined()[  # type: ignore[arg-type]
        key.removeprefix("quarantine/").removesuffix(".json")
    ],
    "review/queue/": lambda store, key: (read_head(store, key), list(read_queue(store, [key]))),
    "review/frames/": lambda store, key: read_frame(store, key).tolist(),
    "review/answers/": lambda store, key: list(read_answers(store, [key])),
    "review/refreshed.json": lambda store, key: read_refreshed(store),
    "left_out.json": lambda store, key: Manifest(store, None).left_out(),  # type: ignore[arg-type]
    "report/drift.json": lambda store, key: read_drift(store),
    "review/gold/": lambda store, key: read_gold(store),
    "review/not_shown.json": lambda store, key: read_not_shown(store),
    "review/kept.json": lambda store, key: read_kept(store),
    "review/settings.json": lambda store, key: read_settings(store),
    "labels/v0001/part-": _labels,
    "labels/v0001/lineage.json": lambda store, key: read_lineage(store, "v0001"),
    "labels/v0001/claim.json": lambda store, key: read_record(store, key)["attempt"],
    "labels/v0001/policy.yaml": lambda store, key: Policy.from_yaml(
        read_version_file(store, read_version(store, "v0001"), "policy.yaml"), where=key
    ),
    "labels/v0001/answered.jsonl": lambda store, key: from_jsonl(
        read_version_file(store, read_version(store, "v0001"), "answered.jsonl")
    ),
    "labels/v0001/alternatives.jsonl": lambda store, key: read_version_file(
        store, read_version(store, "v0001"), "alternatives.jsonl"
    ),
    "labels/v0001/set_aside.jsonl": lambda store, key: read_version_file(
        store, read_version(store, "v0001"), "set_aside.jsonl"
    ),
    "labels/latest.json": lambda store, key: read_version(store),
}


def _moved_run() -> MemoryStore:
    store = MemoryStore()
    whole_run(MemoryStore(), store)
    Listing(store).moved_to({}, "s3://elsewhere/plates")
    return store


def _round() -> MemoryStore:
    store = MemoryStore()
    RoundState(store).write(
        StepRecord("teacher", "done", 1, {"truth": "its sha256"}, {"checkpoint": "teacher.st"})
    )
    return store


# Objects that a run has only after a move of its source, or that lie at a round's output.
ELSEWHERE: dict[str, tuple[Callable[[], MemoryStore], Callable[[MemoryStore, str], Any]]] = {
    "source/moved-1.json": (_moved_run, lambda store, key: Listing(store).place()),
    "source/moved-1/": (_moved_run, _listing),
    "state/teacher.json": (_round, lambda store, key: RoundState(store).read("teacher")),
}


def _flipped(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ (1 << at % 8)]) + raw[at + 1 :]


def _read(
    reader: Callable[[MemoryStore, str], Any], store: MemoryStore, key: str
) -> tuple[str | None, Any]:
    """The error's message, or None and what was read."""
    try:
        return None, reader(store, key)
    except LabelfleetError as exc:
        return exc.message, None


@pytest.mark.slow
@pytest.mark.parametrize("kind", READERS)
def test_a_flip_is_a_named_error_or_changes_nothing(run: MemoryStore, kind: str) -> None:
    keys = [o.key for o in run.list(kind)]
    assert keys
    _flip_each(run, keys[:2], READERS[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ELSEWHERE)
def test_so_it_is_in_a_moved_run_and_at_a_round(kind: str) -> None:
    made, reader = ELSEWHERE[kind]
    store = made()
    keys = [o.key for o in store.list(kind)]
    assert keys
    _flip_each(store, keys[:1], reader)


def _flip_each(
    run: MemoryStore, keys: list[str], reader: Callable[[MemoryStore, str], Any]
) -> None:
    for key in keys:
        raw = run.get(key)
        right = reader(run, key)
        flips = errors = 0
        try:
            for at in range(0, len(raw), EVERY if len(raw) > 10 * EVERY else 7):
                flips += 1
                run.put(key, _flipped(raw, at))
                error, found = _read(reader, run, key)
                if error is None:
                    assert found == right, f"{key} at {at} of {len(raw)}"
                    continue
                errors += 1
                assert key in error, at
                assert "\n" not in error
        finally:
            run.put(key, raw)
        assert 2 * errors > flips or not raw, "most flips are noticed, not merely harmless"


def test_a_flip_in_the_ledger_is_never_another_entry(run: MemoryStore) -> None:
    (key, *_) = [o.key for o in run.list("ledger/")]
    raw = run.get(key)
    (invocation, *_) = invocations(run)
    right = list(read_ledger(run, invocation))
    lost = 0
    for at in range(0, len(raw), 13):
        run.put(key, _flipped(raw, at))
        found = list(read_ledger(run, invocation))
        assert all(entry in right for entry in found), at
        lost += found != right
    run.put(key, raw)
    assert lost
    assert right


def test_the_kinds_are_all_that_a_run_leaves(run: MemoryStore) -> None:
    of_version_2 = "labels/v0002/"
    keys = [o.key for o in run.list() if not o.key.startswith(of_version_2)]
    assert [key for key in keys if not key.startswith(KINDS)] == []
    assert {kind for kind in KINDS if any(key.startswith(kind) for key in keys)} == set(KINDS)
    tested = {*READERS, "ledger/", "model/", "policy.yaml"}  # model: test_artefacts
    assert tested == set(KINDS)


@pytest.mark.parametrize("rows", ["annotations/", "labels/v0001/part-", "review/answers/"])
def test_a_file_that_was_rewritten_without_its_seal_is_noticed(run: MemoryStore, rows: str) -> None:
    (key, *_) = [o.key for o in run.list(rows)]
    raw = run.get(key)
    with opened(raw, key) as file:
        table, metadata = file.read(), file.metadata.metadata[METADATA_KEY]
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, write_page_checksum=True) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({METADATA_KEY: metadata})
    with pytest.raises(LabelfleetError, match="its checksum is gone"), opened(sink.getvalue(), key):
        pass
    assert pq.read_table(io.BytesIO(raw)).equals(table)  # any reader reads a sealed file
