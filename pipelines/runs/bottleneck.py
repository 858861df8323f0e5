"""Name in one sentence what limits a run, from the seconds its workers' threads measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from storage.runs.ledger import LedgerEntry

_BUSY = 0.5  # a stage is the limit if it is busy at least this share of its threads' time
_ADVICE = {
    "infer": "model-bound: a faster device, runtime or precision shortens the run, nothing else",
    "decode": "decode-bound: add CPUs to each worker (workers.cpus), or store smaller images",
    "fetch": "storage-bound: bring the workers nearer to the source, or use larger shards",
    "nms": "NMS-bound: raise model.score_floor, or use more and smaller workers",
    "write": "write-bound: fewer boxes (model.score_floor) or more workers a machine",
}
_LATENCY = (
    "latency-bound: no stage is busy half of the time; use larger shards, or let workers hold "
    "more of them (workers.depth)"
)


@dataclass(slots=True)
class WorkerTime:
    """Where the workers' time went, added up over the shards of one invocation.

    Attributes:
        seconds: by stage, over all workers and threads. ``wait`` is the infer threads', for
            images; ``commit`` the time of the conditional puts, several of which run at once.
        threads: of one worker, where a stage has more than one.
    """

    threads: dict[str, int] = field(default_factory=dict)
    seconds: Counter[str] = field(default_factory=Counter)
    _fill: Counter[str] = field(default_factory=Counter)
    _images: int = 0

    def add(self, entry: LedgerEntry) -> None:
        """One entry of the ledger; only shards say something."""
        if entry.event == "start":
            self.threads = {
                "decode": int(entry.note.get("decoders", 1)),
                "nms": int(entry.note.get("nms_threads", 1)),
            }
        if entry.event != "shard":
            return
        self.seconds.update(entry.seconds)
        images = sum(entry.counts.values())
        self._images += images
        for queue, share in entry.note.get("fill", {}).items():
            self._fill[queue] += share * images

    @staticmethod
    def of(entries: Iterable[LedgerEntry]) -> WorkerTime:
        """Of an invocation's entries."""
        made = WorkerTime()
        for entry in entries:
            made.add(entry)
        return made

    @property
    def fill(self) -> dict[str, float]:
        """Mean fill of the workers' queues over the images, 0 to 1; empty where not reported."""
        return {queue: total / self._images for queue, total in self._fill.items() if self._images}

    @property
    def busy(self) -> dict[str, float]:
        """Share of its threads' time that each stage worked, 0 to 1."""
        wall = self.seconds["infer"] + self.seconds["wait"]  # the infer threads do nothing else
        if not wall:
            return {}
        return {
            stage: min(1.0, self.seconds[stage] / (wall * self.threads.get(stage, 1)))
            for stage in _ADVICE
        }

    @property
    def limit(self) -> str | None:
        """The sentence; None where no worker has reported its seconds."""
        busy = self.busy
        if not busy:
            return None
        most = max(busy, key=lambda stage: busy[stage])
        advice = _ADVICE[most] if busy[most] >= _BUSY else _LATENCY
        shares = ", ".join(
            f"{name} {100 * busy[stage]:.0f} %"
            for stage, name in (("infer", "the model"), ("decode", "decoders"),
                                ("fetch", "reading"), ("nms", "NMS"), ("write", "writing"))
        )  # fmt: skip
        return f"{advice} (busy: {shares})"
