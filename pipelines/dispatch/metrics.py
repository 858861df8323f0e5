"""The metrics that a run exports to Prometheus through Ray, and the watcher that feeds them.

Ray exports each of them on a node's metrics port, with ``ray_`` before its name (a dashboard asks
for ``ray_labelfleet_images_total``). Only the driver records: workers report to it, by footers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from ray.util.metrics import Counter, Gauge

from pipelines.dispatch.tally import Tally, Watcher
from storage.objects.protocols import SupportsGet, SupportsList
from storage.records import STATUSES
from storage.review.answers import read_answers, standing
from storage.review.queue import read_queue

RUN = "run"  # a tag of all of them: the run's name


class SupportsQueue(SupportsList, SupportsGet, Protocol):
    """What counting the review queue needs of a store."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: a ``counter`` only grows within an invocation, a ``gauge`` is as of now."""

    kind: Literal["counter", "gauge"]
    description: str
    tags: tuple[str, ...] = ()


METRICS: Mapping[str, Metric] = {
    "labelfleet_images_total": Metric(
        "counter", "Images that became rows in this invocation, by status.", ("status",)
    ),
    "labelfleet_detections_total": Metric("counter", "Boxes above the score floor."),
    "labelfleet_shards_committed_total": Metric("counter", "Shards committed."),
    "labelfleet_shards_left": Metric("gauge", "Shards that this invocation has still to label."),
    "labelfleet_retries_total": Metric(
        "counter", "Shards given back to the queue: their attempt failed or their worker was lost."
    ),
    "labelfleet_quarantined_shards": Metric(
        "gauge", "Shards that used up their attempts in this invocation."
    ),
    "labelfleet_workers": Metric("gauge", "Workers that take shards."),
    "labelfleet_workers_lost_total": Metric("counter", "Workers that died, hung or were replaced."),
    "labelfleet_stage_seconds_total": Metric(
        "counter",
        "Seconds that workers spent in a stage (fetch, decode, infer, nms, write, commit), or the "
        "GPU waiting (wait), as the footers of committed shards say.",
        ("stage",),
    ),
    "labelfleet_review_queue": Metric(
        "gauge", "Routed images without an answer, as the invocation found them."
    ),
    "labelfleet_drift": Metric(
        "gauge", "1: the newest comparison of later images with the first ones raised an alarm."
    ),
}


class Sink(Protocol):
    """Where numbers go."""

    def add(self, name: str, amount: float, **tags: str) -> None: ...

    def set(self, name: str, value: float, **tags: str) -> None: ...


class RayMetrics:
    """Ray's metrics, each created on first use. Needs a connected Ray.

    Args:
        run: name of the run, or of the training.
        metrics: the known ones.
    """

    def __init__(self, run: str, metrics: Mapping[str, Metric] = METRICS) -> None:
        self._run, self._metrics = {RUN: run}, metrics
        self._made: dict[str, Counter | Gauge] = {}

    def add(self, name: str, amount: float, **tags: str) -> None:
        """Raise a counter; skip a zero, which Ray refuses."""
        counter = self._metric(name)
        if isinstance(counter, Counter) and amount > 0:
            counter.inc(amount, tags={**self._run, **tags})

    def set(self, name: str, value: float, **tags: str) -> None:
        """Set a gauge."""
        gauge = self._metric(name)
        if isinstance(gauge, Gauge):
            gauge.set(value, tags={**self._run, **tags})

    def _metric(self, name: str) -> Counter | Gauge:
        if name not in self._made:
            metric = self._metrics[name]
            kind = Counter if metric.kind == "counter" else Gauge
            self._made[name] = kind(name, metric.description, (RUN, *metric.tags))
        return self._made[name]


class Measured:
    """A watcher that exports the figures to a sink and passes them on to another watcher.

    Args:
        watcher: the display for people.
        sink: where the numbers go.
        total_shards: of this invocation.
        review_queue, drift: see METRICS.
    """

    def __init__(
        self,
        watcher: Watcher,
        sink: Sink,
        *,
        total_shards: int,
        review_queue: int = 0,
        drift: bool = False,
    ) -> None:
        self._watcher, self._sink = watcher, sink
        self._total, self._review_queue, self._drift = total_shards, review_queue, drift
        self._told: dict[tuple[str, str], float] = {}

    def update(self, tally: Tally) -> None:
        """Export and pass on the figures."""
        self._watcher.update(tally)
        for status in STATUSES:
            self._reached("labelfleet_images_total", tally.counts.get(status, 0), status=status)
        for stage, seconds in tally.seconds.items():
            self._reached("labelfleet_stage_seconds_total", seconds, stage=stage)
        self._reached("labelfleet_detections_total", tally.detections)
        self._reached("labelfleet_shards_committed_total", tally.shards)
        self._reached("labelfleet_retries_total", tally.requeued)
        self._reached("labelfleet_workers_lost_total", tally.workers_lost)
        left = self._total - tally.shards - tally.quarantined
        self._sink.set("labelfleet_shards_left", left)
        self._sink.set("labelfleet_quarantined_shards", tally.quarantined)
        self._sink.set("labelfleet_workers", tally.workers_alive)
        self._sink.set("labelfleet_review_queue", self._review_queue)
        self._sink.set("labelfleet_drift", float(self._drift))

    def note(self, text: str) -> None:
        """Pass the note on; it is for people only."""
        self._watcher.note(text)

    def _reached(self, name: str, value: float, **tags: str) -> None:
        """Turn a sum into the increment that a counter takes."""
        key = (name, "".join(tags.values()))
        before = self._told.get(key, 0)
        if value > before:
            self._sink.add(name, value - before, **tags)
            self._told[key] = value


def count_review_queue(store: SupportsQueue) -> int:
    """Count routed images without an answer, equal pixels once."""
    routed = {item.sha256 for item in read_queue(store)}
    return len(routed - {a.sha256 for a in standing(read_answers(store))}) if routed else 0
