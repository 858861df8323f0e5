"""A run compared with itself: silent while images stay alike, else an alarm."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipelines.evaluation.watch import watch_run
from pipelines.policy.policy import POLICY_KEY, Policy
from pipelines.policy.statement import Guarantee
from pipelines.runs.drift_record import DRIFT_KEY, read_drift
from pipelines.runs.status import run_status, status_table
from pipelines.runs.verify import verify_run
from storage.records import AnnotationRow, Shard, StoredObject
from storage.runs.listing import Listing
from storage.runs.manifest import Manifest
from storage.stores.memory import MemoryStore
from tests.support.samples.synthetic_run import boxes, commit_rows, image_shard, record, row

BOX = (10.0, 10.0, 50.0, 50.0)
GUARANTEE = Guarantee(
    target=0.95,
    confidence=0.9,
    thresholds={"RBC": 0.7},
    run="cells",
    images=100,
    audited=40,
    source="answers",
    model_sha256="ab" * 32,
)


class Nights:
    """A run whose source grows by a shard a night."""

    def __init__(self) -> None:
        self.manifest = Manifest.create_or_continue(MemoryStore(), record())
        self._rng = np.random.default_rng(4)
        self._listed: list[StoredObject] = []
        self._night = 0

    def label(self, images: int, mean: float = 8.0) -> None:
        """List and label a night's images, with that many boxes on average."""
        self._night += 1
        keys = [f"{self._night:03d}/{i:04d}.jpg" for i in range(images)]
        shard = image_shard(*keys, etag=str(self._night))
        self._listed += shard.objects
        Listing(self.manifest.store).refresh(self._listed, lambda fresh: iter([shard]))
        commit_rows(self.manifest, shard, [self._row(shard, o.key, mean) for o in shard.objects])

    def _row(self, shard: Shard, key: str, mean: float) -> AnnotationRow:
        n = int(self._rng.poisson(mean))
        scores = np.sort(self._rng.uniform(0.3, 1, n))[::-1]
        made = row(key, shard.shard_id, boxes([BOX] * n, scores, [0] * n))
        return replace(
            made, sha256=self._rng.bytes(32).hex(), nbytes=int(self._rng.normal(9e4, 5e3))
        )


def test_alike_nights_raise_no_alarm_and_other_images_do() -> None:
    nights = Nights()
    store = nights.manifest.store
    store.put(POLICY_KEY, Policy(guarantee=GUARANTEE).to_yaml().encode())
    nights.label(150)
    assert watch_run(nights.manifest) is None  # one listing: nothing to compare
    for night in range(3):
        nights.label(60)
        found = watch_run(nights.manifest, now=lambda night=night: f"2026-02-0{night + 1}T00:00:00")
        assert found is not None
        assert (found.alarm, found.reference, found.listings) == ("", 1, night + 2)
    assert watch_run(nights.manifest) is None  # nothing new since
    assert Policy.of_run(store, "run").guarantee.stale == ""  # type: ignore[union-attr]
    nights.label(60, mean=3.0)
    found = watch_run(nights.manifest, now=lambda: "2026-02-09T00:00:00")
    assert found is not None
    assert found.alarm_at == "2026-02-09T00:00:00"
    assert "boxes 8" in found.alarm or "boxes of RBC 8" in found.alarm
    assert read_drift(store) == found
    policy = Policy.of_run(store, "run")
    assert policy is not None
    assert policy.guarantee is not None
    assert (
        "It is stale, 2026-02-09: later images left the distribution" in policy.guarantee.sentence
    )
    status = run_status(nights.manifest)
    assert status.drift == found
    assert status_table(status)
    assert not verify_run(nights.manifest).differences


def test_after_an_alarm_the_new_images_are_the_reference() -> None:
    nights = Nights()
    nights.label(150)
    nights.label(60, mean=3.0)
    first = watch_run(nights.manifest, now=lambda: "2026-02-01T00:00:00")
    assert first is not None
    assert first.alarm
    nights.label(60, mean=3.0)
    again = watch_run(nights.manifest, now=lambda: "2026-02-02T00:00:00")
    assert again is not None
    assert (again.reference_from, again.reference) == (1, 2)
    assert (again.alarm_at, again.alarm) == (first.alarm_at, first.alarm)  # the last one is kept


def test_a_damaged_record_does_not_hide_the_status() -> None:
    nights = Nights()
    nights.label(5)
    nights.manifest.store.put(DRIFT_KEY, b"{")
    assert run_status(nights.manifest).drift is None
