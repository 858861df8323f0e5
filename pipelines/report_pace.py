"""How fast a run went and what held it up, from the ledger of its newest invocation."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storage.ledger import LedgerEntry, invocations, read_ledger
from storage.manifest import Manifest

STAGES = ("fetch", "decode", "infer", "write")
_ADVICE = {
    "fetch": "Reading from storage took the largest part: bring the workers nearer to the source, "
    "or use larger shards.",
    "decode": "Decoding images took the largest part: give each worker more CPU cores.",
    "infer": "The model took the largest part: a faster device, runtime or precision shortens "
    "the run, nothing else does.",
    "write": "Writing took the largest part: bring the workers nearer to the output.",
}


@dataclass(frozen=True, slots=True)
class Pace:
    """One invocation.

    Attributes:
        started_at: seconds since the epoch.
        seconds: from its start to its last commit.
        images: committed in it.
        workers: as many as it said at its start, or None.
        invocations: how many there were in all.
        stages: seconds per stage, added up over workers and threads.
        edges_s, images_per_s: [bins + 1] seconds since the start, [bins] images a second between.
    """

    started_at: float
    seconds: float
    images: int
    workers: int | None
    invocations: int
    stages: dict[str, float]
    edges_s: NDArray[np.float64]
    images_per_s: NDArray[np.float64]

    @property
    def mean_images_per_s(self) -> float:
        """Over the whole invocation, its start included."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def limit(self) -> str | None:
        """One sentence on what limits the run; None where the ledger has no stage seconds."""
        total = sum(self.stages.values())
        if not total:
            return None
        slowest = max(self.stages, key=lambda stage: self.stages[stage])
        share = self.stages[slowest] / total
        advice = _ADVICE.get(slowest, f"{slowest} took the largest part.")
        return f"{advice} It is {100 * share:.0f} % of the workers' measured seconds."


def newest_pace(manifest: Manifest, bins: int = 48) -> Pace | None:
    """The newest invocation that committed a shard; None where no ledger tells of one."""
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
    stages: Counter[str] = Counter()
    for entry in won:
        stages.update(entry.seconds)
    edges = np.linspace(0.0, max(end - start, 1e-9), bins + 1, dtype=np.float64)
    done = _done_by(edges, won, start)
    return Pace(
        started_at=start,
        seconds=end - start,
        images=sum(sum(e.counts.values()) for e in won),
        workers=entries[0].note.get("workers"),
        invocations=n_invocations,
        stages={s: stages[s] for s in (*STAGES, *sorted(stages.keys() - set(STAGES))) if stages[s]},
        edges_s=edges,
        images_per_s=np.diff(done) / np.diff(edges),
    )


def _done_by(
    edges: NDArray[np.float64], won: list[LedgerEntry], start: float
) -> NDArray[np.float64]:
    """Images done by each edge; a shard's are spread over the time since its worker's last one."""
    last: dict[object, float] = {}
    begun, ended, images = [], [], []
    for entry in won:
        worker = entry.note.get("worker")
        begun.append(min(last.get(worker, 0.0), entry.at - start))
        ended.append(entry.at - start)
        images.append(sum(entry.counts.values()))
        last[worker] = entry.at - start
    since, until = np.array(begun), np.array(ended)
    width = np.maximum(until - since, 1e-9)
    counts = np.array(images, np.float64)
    return np.array([(counts * np.clip((edge - since) / width, 0, 1)).sum() for edge in edges])
