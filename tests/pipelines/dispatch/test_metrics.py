"""Metrics: what Prometheus is told adds up to what was committed; seen on a real Ray's endpoint."""

from __future__ import annotations

import re
import time
import urllib.request
from collections import defaultdict
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.dispatch.metrics import (
    METRICS,
    Measured,
    RayMetrics,
    count_review_queue,
)
from pipelines.dispatch.tally import Tally
from pipelines.labelling.run import measured
from pipelines.runs.drift_record import DRIFT_KEY, DriftRecord, write_drift
from storage.records import STATUSES
from storage.review.answers import Answer, append_answers
from storage.review.queue import read_queue
from storage.runs.annotations import ShardFooter
from storage.stores.memory import MemoryStore
from tests.support.patience import patient
from tests.support.samples.labelled_run import fill, label
from tests.support.samples.review_samples import loose_run, routed


class Quiet:
    """A display that shows nothing."""

    def __init__(self) -> None:
        self.updates = 0
        self.notes: list[str] = []

    def update(self, tally: Tally) -> None:
        self.updates += 1

    def note(self, text: str) -> None:
        self.notes.append(text)


class Sums:
    """A sink that keeps what Prometheus would show."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], float] = defaultdict(float)

    def add(self, name: str, amount: float, **tags: str) -> None:
        self.check("counter", name, tags)
        assert amount > 0
        self.values[name, "".join(tags.values())] += amount

    def set(self, name: str, value: float, **tags: str) -> None:
        self.check("gauge", name, tags)
        self.values[name, "".join(tags.values())] = value

    def check(self, kind: str, name: str, tags: dict[str, str]) -> None:
        assert METRICS[name].kind == kind
        assert tuple(tags) == METRICS[name].tags


footers = st.builds(
    ShardFooter,
    shard_id=st.just("0" * 16),
    shard_key=st.just("a.tar"),
    attempt=st.just("a"),
    counts=st.fixed_dictionaries({s: st.integers(0, 9) for s in STATUSES}),
    detections=st.integers(0, 50),
    seconds=st.dictionaries(
        st.sampled_from(["fetch", "decode", "infer", "write", "wait"]), st.floats(0, 9)
    ),
)


@given(turns=st.lists(st.lists(footers, max_size=3), max_size=5))
def test_counters_add_up_to_the_footers_however_often_they_are_told(
    turns: list[list[ShardFooter]],
) -> None:
    tally, sums, display = Tally(), Sums(), Quiet()
    watcher = Measured(display, sums, total_shards=20, review_queue=7, drift=True)
    for turn in turns:
        for footer in turn:
            tally.add(footer)
        watcher.update(tally)
        watcher.update(tally)
    every = [footer for turn in turns for footer in turn]
    for status in STATUSES:
        images = sum(f.counts[status] for f in every)
        assert sums.values["labelfleet_images_total", status] == images
    for stage in {s for f in every for s in f.seconds}:
        spent = sum(f.seconds.get(stage, 0) for f in every)
        assert sums.values["labelfleet_stage_seconds_total", stage] == pytest.approx(spent)
    assert sums.values["labelfleet_detections_total", ""] == sum(f.detections for f in every)
    assert sums.values["labelfleet_shards_committed_total", ""] == len(every)
    if turns:
        assert sums.values["labelfleet_shards_left", ""] == 20 - len(every)
        assert sums.values["labelfleet_review_queue", ""] == 7
        assert sums.values["labelfleet_drift", ""] == 1
    assert display.updates == 2 * len(turns)


def test_notes_pass_through() -> None:
    display = Quiet()
    Measured(display, Sums(), total_shards=1).note("lost worker-1")
    assert display.notes == ["lost worker-1"]


def test_the_table_names_metrics_as_prometheus_wants_them() -> None:
    for name, metric in METRICS.items():
        assert re.fullmatch(r"labelfleet_[a-z_]+", name)
        assert name.endswith("_total") == (metric.kind == "counter")
        assert metric.description.endswith(".")


def test_the_docs_have_every_metric_and_no_other() -> None:
    docs = (Path(__file__).parents[3] / "docs/operations.md").read_text()
    documented = re.findall(r"^\| `(ray_labelfleet_\w+)` \| (\w+) \| ([a-z, ]*) *\|", docs, re.M)
    assert {(name, kind, tags.strip()) for name, kind, tags in documented} == {
        (f"ray_{n}", m.kind, ", ".join(("run", *m.tags))) for n, m in METRICS.items()
    }


def test_the_review_queue_counts_images_without_an_answer() -> None:
    source, output = MemoryStore(), MemoryStore()
    assert count_review_queue(output) == 0
    routed(loose_run(source, output, 3))
    items = list(read_queue(output))
    assert count_review_queue(output) == len(items) == 3
    now = datetime.now(UTC)
    one = Answer(
        items[0].image_id, items[0].sha256, task_id=1, annotation_id=1, annotator="a",
        lead_time_s=1.0, submitted_at=now, skipped=False, boxes=(), deleted=(),
        model_version="m", was_blind=False,
    )  # fmt: skip
    append_answers(output, [one])
    assert count_review_queue(output) == 2


def test_a_review_queue_that_cannot_be_read_ends_no_labelling() -> None:
    source, output = MemoryStore(), MemoryStore()
    manifest = loose_run(source, output, 3)
    routed(manifest)
    [queue] = [found.key for found in output.list("review/queue/")]
    output.put(queue, b"cut off")
    display = Quiet()
    measured(display, manifest, shards=2)
    assert "the review queue could not be counted" in " ".join(display.notes)


def test_an_alarm_of_the_comparison_is_a_gauge_until_a_later_one_is_quiet() -> None:
    manifest, sums = loose_run(MemoryStore(), MemoryStore(), 3), Sums()
    for alarm_at, expected in (("2026-02-02", 1), ("2026-02-01", 0)):
        record = DriftRecord("2026-02-02", "s", 0, 1, 2, alarm_at, "differ")
        write_drift(manifest.store, record)
        told = measured(Quiet(), manifest, shards=1)
        told._sink = sums
        told.update(Tally())
        assert sums.values["labelfleet_drift", ""] == expected
    manifest.store.put(DRIFT_KEY, b"cut off")
    told = measured(Quiet(), manifest, shards=1)
    told._sink = sums
    told.update(Tally())
    assert sums.values["labelfleet_drift", ""] == 0


@pytest.mark.slow
def test_a_real_ray_exports_the_numbers_of_real_footers(local_ray: dict[str, str]) -> None:
    import ray

    source = MemoryStore()
    fill(source)
    manifest = label(source, MemoryStore())
    footers = [manifest.footer(shard_id) for shard_id in manifest.committed()]
    tally = Tally(workers_alive=2, requeued=1)
    watcher = Measured(Quiet(), RayMetrics("cells"), total_shards=9, review_queue=3)
    for footer in footers:
        tally.add(footer)
        watcher.update(tally)
    (node,) = ray.nodes()  # type: ignore[no-untyped-call]  # Ray has none
    assert node["NodeManagerAddress"] == "127.0.0.1"
    url = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    expected = {
        ("ray_labelfleet_images_total", "ok"): 10,
        ("ray_labelfleet_images_total", "undecodable"): 2,
        ("ray_labelfleet_detections_total", ""): 10,
        ("ray_labelfleet_shards_committed_total", ""): 5,
        ("ray_labelfleet_shards_left", ""): 4,
        ("ray_labelfleet_retries_total", ""): 1,
        ("ray_labelfleet_workers", ""): 2,
        ("ray_labelfleet_quarantined_shards", ""): 0,
        ("ray_labelfleet_review_queue", ""): 3,
        ("ray_labelfleet_drift", ""): 0,
    }
    until_s = time.monotonic() + patient(90)
    found: dict[tuple[str, str], float] = {}
    while not expected.items() <= found.items():
        assert time.monotonic() < until_s, found
        watcher.update(tally)
        time.sleep(1)
        with suppress(OSError):  # Ray's agent may not answer yet, or not in time
            found = scrape(url)
    for stage in ("fetch", "decode", "infer", "write"):
        spent = sum(f.seconds[stage] for f in footers)
        assert found["ray_labelfleet_stage_seconds_total", stage] == pytest.approx(spent)


def scrape(url: str) -> dict[tuple[str, str], float]:
    """Our metrics at an endpoint, by name and status or stage: those of the run ``cells``, since
    other tests' runs may have been on the same Ray; all of them say their run."""
    found = {}
    for line in urllib.request.urlopen(url, timeout=10).read().decode().splitlines():
        if line.startswith("ray_labelfleet"):
            name, labels, value = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line).groups()  # type: ignore[union-attr]
            run = re.search(r'\brun="([^"]*)"', labels)
            assert run is not None, labels
            own = re.search(r'(?:status|stage)="(\w+)"', labels)
            if run[1] == "cells":
                found[name, own[1] if own else ""] = float(value)
    return found
