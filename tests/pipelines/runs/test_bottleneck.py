"""What limits a run is told by whose threads were busy."""

from __future__ import annotations

import pytest

from pipelines.runs.bottleneck import WorkerTime
from storage.runs.ledger import LedgerEntry


def shard(seconds: dict[str, float], images: int = 100, **fill: float) -> LedgerEntry:
    return LedgerEntry(
        "shard", 1.0, "0" * 16, {"ok": images}, 0, seconds, {"worker": "a", "fill": fill}
    )


def time_of(seconds: dict[str, float], decoders: int = 4) -> WorkerTime:
    start = LedgerEntry("start", 0.0, note={"workers": 1, "decoders": decoders})
    return WorkerTime.of([start, shard(seconds)])


@pytest.mark.parametrize(
    ("seconds", "bound"),
    [
        ({"infer": 95, "wait": 5, "decode": 80, "fetch": 10, "write": 1}, "model-bound"),
        ({"infer": 30, "wait": 70, "decode": 380, "fetch": 10, "write": 1}, "decode-bound"),
        ({"infer": 30, "wait": 70, "decode": 40, "fetch": 98, "write": 1}, "storage-bound"),
        ({"infer": 30, "wait": 70, "decode": 40, "fetch": 9, "write": 99}, "write-bound"),
        ({"infer": 5, "wait": 95, "decode": 4, "fetch": 9, "write": 1, "commit": 240},
         "latency-bound"),
    ],
)  # fmt: skip
def test_the_busiest_threads_are_the_limit(seconds: dict[str, float], bound: str) -> None:
    limit = time_of(seconds).limit
    assert limit is not None
    assert limit.startswith(bound)


def test_decoders_are_busy_by_their_number() -> None:
    seconds = {"infer": 50.0, "wait": 50.0, "decode": 100.0}
    assert time_of(seconds, decoders=1).busy["decode"] == 1.0
    assert time_of(seconds, decoders=4).busy["decode"] == 0.25


def test_without_seconds_nothing_is_said() -> None:
    assert WorkerTime.of([]).limit is None
    assert time_of({}).limit is None


def test_fill_is_the_mean_over_images() -> None:
    time = WorkerTime.of([shard({}, 30, decoded=1.0), shard({}, 10, decoded=0.2)])
    assert time.fill == {"decoded": pytest.approx(0.8)}
