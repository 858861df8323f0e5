"""What an invocation did so far, and the interface of whoever is told about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from storage.records import printable
from storage.runs.annotations import ShardFooter


@dataclass(slots=True)
class Tally:
    """What this invocation did so far; the progress display reads it."""

    shards: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    detections: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # of the workers, by stage
    quarantined: int = 0
    errors: int = 0
    requeued: int = 0
    workers_alive: int = 0
    workers_lost: int = 0
    truncated: list[str] = field(default_factory=list)

    @property
    def images(self) -> int:
        """Rows written."""
        return sum(self.counts.values())

    def add(self, footer: ShardFooter) -> None:
        """Count a committed shard."""
        self.shards += 1
        self.detections += footer.detections
        for status, n in footer.counts.items():
            self.counts[status] = self.counts.get(status, 0) + n
        for stage, seconds in footer.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        if footer.source_truncated:
            self.truncated.append(printable(f"{footer.shard_key}: {footer.source_truncated}"))


class Watcher(Protocol):
    """Who is told how it goes, several times a second; and short notes for people."""

    def update(self, tally: Tally) -> None: ...

    def note(self, text: str) -> None: ...
