"""Chart a run's pace, and tell its bottleneck, from the ledger of its newest invocation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.runs.bottleneck import WorkerTime
from pipelines.runs.pace import PaceCount
from storage.runs.annotations import COMMIT, STAGES
from storage.runs.ledger import LedgerEntry, invocations, read_ledger
from storage.runs.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Pace:
    """One invocation.

    Attributes:
        started_at: seconds since the epoch.
        startup_s: until a worker was ready.
        seconds: from its start to its last commit.
        images: committed in it; ``mean_images_per_s``: of them, see ``pipelines.runs.pace``.
        workers: the count it reported at its start, or None.
        invocations: how many there were in all.
        time: where its workers' time went.
        edges_s, images_per_s: [bins + 1] seconds since the start, [bins] images a second between.
    """

    started_at: float
    startup_s: float
    seconds: float
    images: int
    mean_images_per_s: float
    workers: int | None
    invocations: int
    time: WorkerTime
    edges_s: NDArray[np.float64]
    images_per_s: NDArray[np.float64]

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of work by stage, added up over workers and threads; waiting is none."""
        return {
            stage: self.time.seconds[stage]
            for stage in (*STAGES, COMMIT)
            if stage != "wait" and self.time.seconds[stage]
        }

    @property
    def limit(self) -> str | None:
        """One sentence on what limits the run; None where the ledger has no stage seconds."""
        if self.time.limit is None:
            return None
        if self.startup_s > self.seconds / 2:
            return (
                f"Most of the time went into starting the workers ({self.startup_s:.0f} of "
                f"{self.seconds:.0f} s), which a larger run pays once."
            )
        return f"{self.time.limit[0].upper()}{self.time.limit[1:]}."


def newest_pace(manifest: Manifest, bins: int = 48) -> Pace | None:
    """Return the newest invocation that committed a shard; None where no ledger has one."""
    names = invocations(manifest.store)
    for name in reversed(names):
        if pace := _pace(list(read_ledger(manifest.store, name)), len(names), bins):
            return pace
    return None


def _pace(entries: list[LedgerEntry], n_invocations: int, bins: int) -> Pace | None:
    won = [e for e in entries if e.event == "shard" and e.note.get("won", True)]
    if not won:
        return None
    start = entries[0].at
    end = max(start, max(e.at for e in won))
    edges = np.linspace(0.0, max(end - start, 1e-9), bins + 1, dtype=np.float64)
    pace = PaceCount.of(entries)
    startup_s = min(pace.startup_s, won[0].at - start)
    done = _done_by(edges, won, start, startup_s)
    return Pace(
        started_at=start,
        startup_s=startup_s,
        seconds=end - start,
        images=pace.images,
        mean_images_per_s=pace.images_per_s or 0.0,
        workers=entries[0].note.get("workers"),
        invocations=n_invocations,
        time=WorkerTime.of([entries[0], *won]),
        edges_s=edges,
        images_per_s=np.diff(done) / np.diff(edges),
    )


def _done_by(
    edges: NDArray[np.float64], won: list[LedgerEntry], start: float, startup_s: float
) -> NDArray[np.float64]:
    """Return images done by each edge.

    A shard's are spread over the time since its worker's last one.
    """
    last: dict[object, float] = {}
    begun, ended, images = [], [], []
    for entry in won:
        worker = entry.note.get("worker")
        begun.append(min(last.get(worker, startup_s), entry.at - start))
        ended.append(entry.at - start)
        images.append(sum(entry.counts.values()))
        last[worker] = entry.at - start
    since, until = np.array(begun), np.array(ended)
    width = np.maximum(until - since, 1e-9)
    counts = np.array(images, np.float64)
    return np.array([(counts * np.clip((edge - since) / width, 0, 1)).sum() for edge in edges])
