"""One attempt at one shard: its rows in order, the time of each stage, and how it ended."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from storage.errors import LabelfleetError, ShardFailed
from storage.records import AnnotationRow, Shard
from storage.runs.annotations import COMMIT, QUEUES, STAGES, RowWriter, ShardFooter
from storage.runs.manifest import Commit


@dataclass(slots=True, eq=False)
class ShardJob:
    """The state of one attempt; each stage writes only its own fields.

    Attributes:
        lock: for what several threads change, of the attempt and of its images.
        ended: set when the attempt is over, well or not.
        over: the same, which every stage asks for every image: an attribute costs a tenth.
        error: why it failed.
        truncated: what cut the shard's reading short, when something did.
        fetched: images, once the last one was read.
        written: rows, in the order of the shard.
        seconds: per stage, added up over threads.
        fill: per queue, added up over images: how full it was when an image's batch began.
        inferred: images that were in a batch.
    """

    shard: Shard
    attempt: str
    spool: Path
    writer: RowWriter
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)
    over: bool = False
    error: LabelfleetError | None = None
    truncated: str | None = None
    fetched: int | None = None
    written: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    fill: dict[str, float] = field(default_factory=lambda: dict.fromkeys(QUEUES, 0.0))
    inferred: int = 0
    _pending: dict[int, Callable[[], AnnotationRow]] = field(default_factory=dict)

    def fail(self, error: Exception) -> None:
        """Keep the first error; later ones are ignored."""
        if not self.over:
            if not isinstance(error, LabelfleetError):
                error = ShardFailed(f"{type(error).__name__}: {error}")
            self.error = error
            self._end()

    def _end(self) -> None:
        self.over = True
        self.ended.set()

    def write(self, rows: Iterable[tuple[int, Callable[[], AnnotationRow]]]) -> int:
        """Accept rows in any order, write them in shard order; return how many were written."""
        self._pending.update(rows)
        before = self.written
        while (due := self._pending.pop(self.written, None)) is not None:
            self.writer.write(due())
            self.written += 1
        return self.written - before

    def spent(self, stage: str, seconds: float) -> None:
        """Add to the time of a stage that has several threads."""
        with self.lock:
            self.seconds[stage] += seconds

    def inferred_in(
        self, batch: int, images: int, seconds: dict[str, float], fill: dict[str, float]
    ) -> None:
        """Record a batch of size ``batch``, of which ``images`` are this job's.

        Args:
            seconds: what the whole batch took, by stage.
            fill: how full each queue was when it began.
        """
        self.inferred += images
        for stage, s in seconds.items():
            self.seconds[stage] += s * images / batch
        for name, share in fill.items():
            self.fill[name] += share * images

    def end_if_whole(self) -> None:
        """End the attempt once every fetched image is a row."""
        if self.written == self.fetched:
            self._end()

    def finish(self) -> ShardFooter:
        """Complete the spool file."""
        images = max(1, self.inferred)
        return self.writer.finish(
            self.shard.shard_id,
            self.shard.key,
            self.attempt,
            source_truncated=self.truncated,
            seconds={stage: round(s, 4) for stage, s in self.seconds.items()},
            fill={name: round(total / images, 3) for name, total in self.fill.items()},
        )


def with_commit_seconds(commit: Commit, seconds: float) -> Commit:
    """Return the commit, with the time it took among its footer's seconds."""
    told = {**commit.footer.seconds, COMMIT: round(seconds, 4)}
    return replace(commit, footer=replace(commit.footer, seconds=told))
