"""Measure the pace of one invocation from its ledger: the same figure for all who show it.

Images per second are counted from the first ready worker to the last commit; start-up is what comes
before, from the invocation's start.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from storage.runs.ledger import LedgerEntry, invocations, read_ledger
from storage.runs.manifest import Manifest


@dataclass(frozen=True, slots=True)
class MeasuredPace:
    """The pace of an invocation that labelled something, with its ``workers`` and ``gpus``."""

    images_per_s: float
    workers: int
    gpus: float


@dataclass(slots=True)
class PaceCount:
    """Add up the entries of one invocation, oldest first.

    Attributes:
        shards, images: committed by it; a copy that lost the race for its shard does not count.
    """

    shards: int = 0
    images: int = 0
    _note: Mapping[str, Any] = field(default_factory=dict)  # of its start
    _started_at: float | None = None
    _ready_at: float | None = None
    _waited_until: float = 0.0
    _committed_at: float = 0.0

    @staticmethod
    def of(entries: Iterable[LedgerEntry]) -> PaceCount:
        """Add up all entries of an invocation."""
        count = PaceCount()
        for entry in entries:
            count.add(entry)
        return count

    def add(self, entry: LedgerEntry) -> None:
        """Add the next entry."""
        if self._started_at is None:
            self._started_at = self._waited_until = entry.at
        if entry.event == "start":
            self._note = entry.note
        if self._ready_at is None:
            if entry.event == "ready":
                self._ready_at = entry.at
            elif entry.event == "shard" or entry.note.get("alive"):
                # The first sign of a worker in a ledger without `ready`: it was ready since the
                # last entry that saw none.
                self._ready_at = self._waited_until
            else:
                self._waited_until = entry.at
        if entry.event == "shard" and entry.note.get("won", True):
            self.shards += 1
            self.images += sum(entry.counts.values())
            self._committed_at = max(self._committed_at, entry.at)

    @property
    def startup_s(self) -> float:
        """Seconds from the start until a worker was ready, or until the last entry so far."""
        if self._started_at is None:
            return 0.0
        ready_at = self._waited_until if self._ready_at is None else self._ready_at
        return max(0.0, ready_at - self._started_at)

    @property
    def working_s(self) -> float:
        """Seconds from the first ready worker to the last commit; 0 before one."""
        if self._ready_at is None or not self.shards:
            return 0.0
        return max(0.0, self._committed_at - self._ready_at)

    @property
    def images_per_s(self) -> float | None:
        """Images committed per second of ``working_s``; None before the first commit."""
        return self.images / self.working_s if self.images and self.working_s else None

    @property
    def measured(self) -> MeasuredPace | None:
        """The pace so far with what it was measured on; None before the first commit."""
        if not self.images_per_s:
            return None
        workers, gpus = int(self._note.get("workers", 1)), float(self._note.get("gpus", 0))
        return MeasuredPace(self.images_per_s, workers, gpus)

    def seconds_left(self, shards: int, heard_at: float, now: float) -> float | None:
        """Estimate, from ``now``, the time for ``shards`` more; None before the first commit.

        The time since the last commit, up to the last entry at ``heard_at``, counts as work too.
        """
        if self._ready_at is None or not self.shards or heard_at <= self._ready_at:
            return None
        each = (heard_at - self._ready_at) / self.shards
        return max(0.0, shards * each - (now - heard_at))


def measured_pace(manifest: Manifest) -> MeasuredPace | None:
    """Return the pace of a run's newest invocation that labelled anything."""
    for invocation in reversed(invocations(manifest.store)):
        found = PaceCount.of(read_ledger(manifest.store, invocation)).measured
        if found is not None:
            return found
    return None
