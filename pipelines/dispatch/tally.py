"""What an invocation has done so far, and how its caller watches and stops it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Protocol

from pipelines.dispatch.stopping import Stopper
from storage.records import printable
from storage.runs.annotations import ShardFooter

log = logging.getLogger("labelfleet")


@dataclass(slots=True)
class Tally:
    """What this invocation has done so far; the progress display reads it.

    Attributes:
        total: shards that this invocation has to label.
        seconds: of the workers, by stage.
        working_s: since the first worker was ready; `images_per_s` is measured over it.
    """

    total: int = 0
    shards: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    detections: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    quarantined: int = 0
    errors: int = 0
    requeued: int = 0
    workers_alive: int = 0
    workers_lost: int = 0
    working_s: float = 0.0
    truncated: list[str] = field(default_factory=list)

    @property
    def images(self) -> int:
        """Rows written."""
        return sum(self.counts.values())

    @property
    def images_per_s(self) -> float:
        """Rate since the first worker was ready, as `labelfleet status` has it."""
        return self.images / self.working_s if self.working_s else 0.0

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
    """Watches an invocation: gets figures several times a second, and short notes for people."""

    def update(self, tally: Tally) -> None: ...

    def note(self, text: str) -> None: ...


class Unwatched:
    """A Watcher for callers that read the summary alone; notes go to the log."""

    def update(self, tally: Tally) -> None:
        """Ignore the figures."""

    def note(self, text: str) -> None:
        """Log the note."""
        log.info("%s", text)


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller's side of an invocation: who follows it, and who may stop it."""

    watcher: Watcher = field(default_factory=Unwatched)
    stopper: Stopper = field(default_factory=Stopper)
