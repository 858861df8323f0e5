"""Compare a run with itself: whether images listed later are like the first ones.

All images since the reference are one stream, in the order of the listings, so that a false alarm
has a probability of at most ``RISK`` over all nights together. After an alarm the newest listing
becomes the reference. An alarm marks a guarantee in the run's policy as stale.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import numpy as np

from pipelines.evaluation.drift import (
    RISK,
    Drift,
    DriftTest,
    ImageStatistics,
    random_place,
    read_statistics,
)
from pipelines.policy.policy import POLICY_KEY, Policy
from pipelines.runs.drift_record import DriftRecord, read_drift, write_drift
from storage.runs.listing import Listing
from storage.runs.manifest import Manifest

_SHARDS, _IMAGES = 8, 500  # of a listing, drawn at random
_REFERENCE_IMAGES = 2000


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def watch_run(
    manifest: Manifest, *, risk: float = RISK, now: Callable[[], str] = _now
) -> DriftRecord | None:
    """Compare the run's newer images with its first ones, and keep what was found.

    The caller holds the run's lock. None: there is one listing only, or nothing new.
    """
    listings = list(Listing(manifest.store).added())
    committed = manifest.committed()
    before = read_drift(manifest.store)
    begin, since = (0, _first(listings))
    if before is not None:
        begin, since = before.reference_from, before.reference
        if before.alarmed:
            begin, since = before.listings - 1, before.listings
    if len(listings) <= since or (before is not None and len(listings) == before.listings):
        return None
    drift = _stream(manifest, [ids & committed for ids in listings], (begin, since), risk)
    if drift is None:
        return None
    at = now()
    kept = ("", "") if before is None else (before.alarm_at, before.alarm)
    alarm_at, alarm = (at, drift.sentence) if drift.alarm else kept
    record = DriftRecord(at, drift.sentence, begin, since, len(listings), alarm_at, alarm)
    if drift.alarm:
        mark_stale(manifest, f"{at[:10]}: later images {drift.sentence}")
    write_drift(manifest.store, record)
    return record


def _first(listings: list[set[str]]) -> int:
    """Return how many of the first listings it takes until one holds an image."""
    return next((i for i, ids in enumerate(listings, 1) if ids), len(listings))


def _stream(
    manifest: Manifest, listings: list[set[str]], reference_at: tuple[int, int], risk: float
) -> Drift | None:
    classes = [c.name for c in manifest.record.identity.categories]
    begin, since = reference_at
    first = set().union(*(_drawn(ids) for ids in listings[begin:since]))
    reference = read_statistics(manifest, classes, only=first, most=_REFERENCE_IMAGES)
    if not len(reference.values):
        return None
    named = [n.removeprefix("boxes of ") for n in reference.names if n.startswith("boxes of ")]
    test = DriftTest(reference.names, reference.values, risk=risk)
    seen = set(reference.sha256)
    newest: ImageStatistics | None = None
    for ids in listings[since:]:
        found = read_statistics(
            manifest, classes, only=_drawn(ids), most=_IMAGES, names=named
        )  # fmt: skip
        for sha, values in zip(found.sha256, found.values, strict=True):
            if sha not in seen:
                seen.add(sha)
                test.see(values)
        newest = found if len(found.values) else newest
    if newest is None or not test.images:
        return None
    before, after = (np.mean(one.values, axis=0) for one in (reference, newest))
    return test.result(before, after, len(reference.values))


def _drawn(ids: set[str]) -> set[str]:
    return set(sorted(ids, key=random_place)[:_SHARDS])


def mark_stale(manifest: Manifest, why: str) -> bool:
    """Mark the guarantee in the run's policy as stale. False: there is none that still holds."""
    policy = Policy.of_run(manifest.store, manifest.url)
    if policy is None or policy.guarantee is None or policy.guarantee.void:
        return False
    stale = policy.guarantee.model_copy(update={"stale": why})
    marked = policy.model_copy(update={"guarantee": stale})
    manifest.store.put(POLICY_KEY, marked.to_yaml().encode())
    return True
