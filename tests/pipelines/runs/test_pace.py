"""One pace of an invocation for summary, status, plan and report."""

from __future__ import annotations

import pytest

from pipelines.runs.pace import PaceCount
from storage.runs.ledger import LedgerEntry


def entry(event: str, at: float, images: int = 0, **note: object) -> LedgerEntry:
    return LedgerEntry(event, at, shard_id="a", counts={"ok": images}, note=note)


def test_images_count_from_the_first_ready_worker_to_the_last_commit() -> None:
    pace = PaceCount.of(
        [
            entry("start", 100, workers=2),
            entry("beat", 110, alive=0),
            entry("ready", 130, alive=1),
            entry("ready", 150, alive=2),
            entry("shard", 160, 60),
            entry("shard", 165, 999, won=False),  # lost the race for its shard
            entry("shard", 170, 60),
            entry("beat", 190, alive=2),
            entry("end", 200, outcome="done"),
        ]
    )
    assert (pace.shards, pace.images) == (2, 120)
    assert (pace.startup_s, pace.working_s) == (30, 40)
    assert pace.images_per_s == pytest.approx(3)
    # Two shards in the 60 s to the last beat, three more; 5 s have gone by since.
    assert pace.seconds_left(3, heard_at=190, now=195) == pytest.approx(85)


def test_before_the_first_commit_nothing_is_claimed() -> None:
    assert PaceCount().startup_s == 0
    waiting = PaceCount.of([entry("start", 0), entry("beat", 40, alive=0)])
    assert (waiting.startup_s, waiting.images_per_s) == (40, None)
    ready = PaceCount.of([entry("start", 0), entry("ready", 50, alive=1), entry("beat", 60)])
    assert (ready.startup_s, ready.working_s, ready.images_per_s) == (50, 0, None)
    assert ready.seconds_left(3, heard_at=60, now=60) is None
