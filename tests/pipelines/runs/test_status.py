"""Status: the counts of the live set, whoever knows them, and whether a driver is at work."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from pipelines.runs.status import SILENT_AFTER_S, RunStatus, run_status, status_table
from storage.records import AnnotationRow, Shard
from storage.runs.ledger import LedgerEntry, LedgerWriter
from storage.runs.manifest import Manifest
from storage.stores.memory import MemoryStore
from tests.support.samples.synthetic_run import (
    boxes,
    commit_rows,
    image_shard,
    list_shards,
    make_run,
    record,
    row,
    tar_shard,
)

TARS = [tar_shard(f"{i}.tar") for i in range(5)]


def rows_of(shard: Shard) -> list[AnnotationRow]:
    found = boxes([(1, 1, 9, 9), (2, 2, 9, 9)], [0.9, 0.2], [0, 1])
    return [
        row(f"{shard.key}/a.jpg", shard.shard_id, found),
        row(f"{shard.key}/b.jpg", shard.shard_id),
        row(f"{shard.key}/c.jpg", shard.shard_id, status="undecodable"),
    ]


@pytest.fixture
def manifest() -> Manifest:
    """Five shards, of which two are labelled and one is quarantined."""
    run = make_run(MemoryStore(), {s: rows_of(s) for s in TARS[:2]}, unlabelled=TARS[2:])
    run.set_aside(TARS[2], ["ShardFailed: poison"], "i")
    return run


def write_ledger(manifest: Manifest, name: str, *entries: LedgerEntry) -> None:
    writer = LedgerWriter(manifest.store, name)
    for entry in entries:
        writer.write(entry)
    writer.flush()


def start(at: float) -> LedgerEntry:
    return LedgerEntry("start", at, note={"workers": 2, "shards": 5})


def shard(at: float, which: Shard, **note: object) -> LedgerEntry:
    counts = {
        "ok": 2,
        "undecodable": 1,
        "too_large": 0,
        "unsupported": 0,
        "missing": 0,
        "not_finite": 0,
    }
    return LedgerEntry("shard", at, which.shard_id, counts, 2, {"infer": 1.0}, dict(note))


def beat(at: float, alive: int = 2) -> LedgerEntry:
    return LedgerEntry("beat", at, note={"alive": alive})


def text_of(status: RunStatus) -> str:
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(status_table(status))
    return console.export_text()


def test_counts_without_a_ledger_come_from_the_footers(manifest: Manifest) -> None:
    s = run_status(manifest)
    assert (s.listed, s.committed, s.quarantined, s.left) == (5, 2, 1, 2)
    assert s.images == {
        "ok": 4,
        "undecodable": 2,
        "too_large": 0,
        "unsupported": 0,
        "missing": 0,
        "not_finite": 0,
    }
    assert s.detections == 4
    assert s.plain_glob_exact
    assert s.invocation is None


def test_the_ledger_gives_the_same_counts_without_reading_footers(manifest: Manifest) -> None:
    expected = run_status(manifest)
    # A shard twice in the ledger (continued, speculated) counts once; one was never committed.
    write_ledger(manifest, "1", start(0), shard(1, TARS[0]), shard(2, TARS[4]))
    write_ledger(manifest, "2", start(10), shard(11, TARS[0]), shard(12, TARS[1]))
    with_ledger = run_status(manifest, now=12)
    assert with_ledger.images == expected.images
    assert with_ledger.detections == expected.detections
    reads = 0

    def refuse(shard_id: str) -> None:
        nonlocal reads
        reads += 1

    manifest.footer = refuse  # type: ignore[assignment,method-assign]
    assert run_status(manifest, now=12).images == expected.images
    assert reads == 0


def test_an_incomplete_ledger_is_completed_from_the_footers(manifest: Manifest) -> None:
    write_ledger(manifest, "1", start(0), shard(1, TARS[1]))
    assert run_status(manifest, now=2).images["ok"] == 4


def test_running_silent_ended(manifest: Manifest) -> None:
    write_ledger(manifest, "1", start(100), shard(110, TARS[0]), shard(120, TARS[1]), beat(140, 1))
    running = run_status(manifest, now=145).invocation
    assert running is not None
    assert (running.state, running.workers, running.shards, running.images) == ("running", 1, 2, 6)
    assert running.started_at == 100
    assert running.silent_s == 5
    assert running.images_per_s == pytest.approx(6 / 20)
    # Two shards in 40 s, two left, heard of 5 s ago.
    assert running.eta_s == pytest.approx(35)
    silent = run_status(manifest, now=141 + SILENT_AFTER_S).invocation
    assert silent is not None
    assert (silent.state, silent.eta_s) == ("silent", None)
    write_ledger(manifest, "2", start(200), LedgerEntry("end", 210, note={"outcome": "done"}))
    ended = run_status(manifest, now=9999).invocation
    assert ended is not None
    assert (ended.invocation, ended.state, ended.outcome) == ("2", "ended", "done")
    assert ended.images == 0


def test_the_pace_is_counted_from_the_first_worker_on(manifest: Manifest) -> None:
    write_ledger(
        manifest, "1", start(100), beat(130, 0), beat(160, 0), beat(161, 1), shard(170, TARS[0])
    )
    found = run_status(manifest, now=170).invocation
    assert found is not None
    assert (found.seconds, found.startup_s) == (70, 60)
    assert found.images_per_s == pytest.approx(3 / 10)
    assert found.eta_s == pytest.approx(20)


def test_the_time_begins_with_the_command_where_the_ledger_says_when(manifest: Manifest) -> None:
    began = LedgerEntry("start", 100, note={"workers": 1, "before_s": 25.0})
    write_ledger(manifest, "1", began, beat(130, 0), beat(160, 1), shard(170, TARS[0]))
    found = run_status(manifest, now=170).invocation
    assert found is not None
    assert (found.seconds, found.startup_s) == (25 + 70, 25 + 30)
    assert found.images_per_s == pytest.approx(3 / 40)


def test_images_that_are_not_ok_are_explained(manifest: Manifest) -> None:
    found = run_status(manifest, now=2)
    counts = dict.fromkeys(found.images, 0) | {"ok": 3, "missing": 1}
    text = " ".join(text_of(replace(found, images=counts)).split())
    assert "3 ok, 1 missing missing: could not be read from the source" in text
    assert "the next `labelfleet run` looks again" in text
    assert "labelfleet report" in text
    assert "too_large" not in text
    assert "link" not in text, "links are unsupported"


def test_a_copy_that_lost_the_race_is_not_counted(manifest: Manifest) -> None:
    write_ledger(manifest, "1", start(0), shard(1, TARS[0], won=True), shard(2, TARS[0], won=False))
    found = run_status(manifest, now=2).invocation
    assert found is not None
    assert (found.shards, found.images) == (1, 3)


def test_tombstoned_images_and_dead_shards() -> None:
    old = image_shard("a.jpg", "b.jpg", "c.jpg")
    rows = [
        row("a.jpg", old.shard_id, boxes([(1, 1, 2, 2)], [0.5], [0])),
        row("b.jpg", old.shard_id, boxes([(1, 1, 2, 2)] * 2, [0.5] * 2, [0] * 2)),
        row("c.jpg", old.shard_id, status="missing"),
    ]
    tar = TARS[0]
    manifest = make_run(MemoryStore(), {old: rows, tar: rows_of(tar)})
    assert run_status(manifest).plain_glob_exact
    list_shards(manifest.store, [image_shard("a.jpg"), image_shard("b.jpg", etag="2")])
    s = run_status(manifest)
    assert (s.listed, s.committed, s.left) == (2, 1, 1)
    assert s.images["ok"] == 1
    assert s.images["missing"] == 0
    assert s.detections == 1
    assert (s.dead_objects, s.tombstones) == (1, 2)
    assert not s.plain_glob_exact
    said = text_of(s)
    assert "1 dead object and rows of up to 2 images that changed or vanished: read live" in said
    assert "or run `labelfleet gc memory://" in said


def test_gc_is_not_suggested_for_rows_that_it_leaves() -> None:
    old = image_shard("a.jpg", "b.jpg")
    rows = [row("a.jpg", old.shard_id), row("b.jpg", old.shard_id)]
    manifest = make_run(MemoryStore(), {old: rows})
    list_shards(manifest.store, [image_shard("a.jpg")])
    said = text_of(run_status(manifest))
    assert "also holds rows of up to 1 image that changed or vanished: read live rows" in said
    assert "gc" not in said


def test_warnings_are_counted_from_ledger_footer_and_rows_alike() -> None:
    old = image_shard("a.jpg", "b.jpg")
    rows = [
        row("a.jpg", old.shard_id, warning="premature end: 9 bytes; trailing bytes: 3"),
        row("b.jpg", old.shard_id, warning="trailing bytes: 5"),
    ]
    manifest = make_run(MemoryStore(), {old: rows})
    expected = {"trailing bytes": 2, "premature end": 1}
    s = run_status(manifest)
    assert s.warnings == expected
    assert "2 trailing bytes, 1 premature end" in text_of(s)
    write_ledger(manifest, "1", start(1), shard(2, old, warnings=expected))
    assert run_status(manifest).warnings == expected
    list_shards(manifest.store, [image_shard("a.jpg"), image_shard("b.jpg", etag="2")])
    assert run_status(manifest).warnings == {"trailing bytes": 1, "premature end": 1}


def test_an_object_absent_from_all_listings_is_dead(manifest: Manifest) -> None:
    stray = tar_shard("stray.tar")
    commit_rows(manifest, stray, rows_of(stray))
    s = run_status(manifest)
    assert (s.dead_objects, s.committed, s.images["ok"]) == (1, 2, 4)
    assert not s.plain_glob_exact


def test_a_quarantined_shard_that_was_labelled_after_all_is_committed(manifest: Manifest) -> None:
    commit_rows(manifest, TARS[2], rows_of(TARS[2]))
    s = run_status(manifest)
    assert (s.committed, s.quarantined, s.left) == (3, 0, 2)


def test_a_run_that_was_only_created() -> None:
    s = run_status(Manifest.create_or_continue(MemoryStore(), record()))
    assert (s.listed, s.committed, s.left, s.detections) == (0, 0, 0, 0)
    assert "nothing has been listed yet" in text_of(s)


def test_json_and_text(manifest: Manifest) -> None:
    write_ledger(manifest, "1", start(100), shard(110, TARS[0]), beat(140, 1))
    s = run_status(manifest, now=145)
    assert json.loads(json.dumps(s.to_fields())) == s.to_fields()
    text = text_of(s)
    assert "2 of 5 labelled (40.0 %), 2 left, 1 quarantined" in text
    assert "running on 1 worker:" in text
    assert "silent for" in text_of(run_status(manifest, now=10_000))


def test_it_says_what_limits_the_run() -> None:
    manifest = make_run(MemoryStore(), {s: rows_of(s) for s in TARS[:2]})
    slow = {"fetch": 1.0, "decode": 19.0, "wait": 8.0, "infer": 2.0}
    note = {"worker": "a", "fill": {"fetched": 0.9, "decoded": 0.1}}
    entries = [
        LedgerEntry("shard", 10 + i, TARS[i].shard_id, {"ok": 3}, 2, slow, note) for i in (0, 1)
    ]
    write_ledger(manifest, "1", LedgerEntry("start", 1, note={"decoders": 2}), *entries)
    found = run_status(manifest, now=20)
    assert found.invocation is not None
    assert found.invocation.stages == {"fetch": 2, "decode": 38, "wait": 16, "infer": 4}
    assert found.invocation.fill == {"fetched": 0.9, "decoded": 0.1}
    said = Console(width=200, record=True, file=io.StringIO())
    said.print(status_table(found))
    text = said.export_text()
    assert "decode-bound: add CPUs" in text
    assert "fetched 90 %" in text
