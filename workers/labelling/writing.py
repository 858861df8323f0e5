"""The write thread of a worker: writes the rows of all jobs, each shard's in its own order."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby

from workers.labelling.job import ShardJob
from workers.labelling.job_image import JobImage
from workers.labelling.spool import spool_error


@dataclass(frozen=True, slots=True)
class Counted:
    """A job whose last image has been fetched, so that its end is known."""

    job: ShardJob


@dataclass(frozen=True, slots=True)
class Abandoned:
    """A job that was abandoned; its rows are dropped."""

    job: ShardJob


class RowStage:
    """The work of the write thread; other threads only ``put``."""

    def __init__(self) -> None:
        self._entries: queue.SimpleQueue[Sequence[JobImage] | Counted | Abandoned | None] = (
            queue.SimpleQueue()
        )
        self.images_done = 0

    def put(self, entry: Sequence[JobImage] | Counted | Abandoned | None) -> None:
        """Hand an entry to the write thread; None ends it."""
        self._entries.put(entry)

    def loop(self) -> None:
        """Run until None arrives."""
        while (entry := self._entries.get()) is not None:
            if isinstance(entry, Abandoned):
                with suppress(Exception):  # on a full disk; the file is not wanted
                    entry.job.writer.abandon()
            elif isinstance(entry, Counted):
                entry.job.end_if_whole()
            else:
                for job, images in groupby(entry, lambda image: image.job):
                    self._write(job, images)

    def _write(self, job: ShardJob, images: Iterable[JobImage]) -> None:
        if job.over:
            return
        began_s = time.perf_counter()
        try:
            self.images_done += job.write((image.index, image.row) for image in images)
        except OSError as exc:
            job.fail(spool_error(exc, job.spool))
        except MemoryError:
            raise  # the worker's trouble, no shard's
        except Exception as exc:  # noqa: BLE001 - border of the shard: its attempt is told
            job.fail(exc)
        else:
            job.seconds["write"] += time.perf_counter() - began_s
            job.end_if_whole()
