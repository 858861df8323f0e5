"""LabelActor: the thin shell that a Ray worker process runs around one ShardLabeller."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from storage.errors import LabelfleetError
from storage.logs import about, set_up_logging
from storage.records import Shard
from storage.runs.manifest import Commit
from workers.actors.shared_folders import check_folders
from workers.actors.spot import SpotNotice, watch_this_machine
from workers.spec import WorkerSpec

if TYPE_CHECKING:  # heavy: OpenCV, which the driver does not need
    from workers.labelling.labeller import ShardLabeller


log = logging.getLogger("labelfleet.worker")


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """A started worker's description of itself; ``node_id`` is Ray's."""

    host: str
    pid: int
    device: str
    batch_size: int
    node_id: str = ""


@dataclass(frozen=True, slots=True)
class WorkerProgress:
    """A worker's progress: images that became rows, and whether its node is about to leave."""

    images_done: int
    notice: SpotNotice | None = None


class LabelActor:
    """One model on one device. The constructor does nothing that can fail; ``start`` loads.

    (An error in a Ray actor's constructor reaches the driver only as text; from a method it comes
    as the exception it was.)
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec

    def start(self) -> WorkerFacts:
        """Load the model, start the threads. Raises ConfigError, ModelError, StorageError, ..."""
        set_up_logging(self._spec.log_format, run=self._spec.run)
        check_folders(self._spec)
        self._labeller = self.open()
        self._spot = watch_this_machine()
        return WorkerFacts(
            host=socket.gethostname(),
            pid=os.getpid(),
            device=self._spec.model.device,
            batch_size=self._spec.options.batch_size,
            node_id=ray.get_runtime_context().get_node_id(),
        )

    def open(self) -> ShardLabeller:
        """Create the labeller around the spec's model."""
        from workers.labelling.assemble import open_labeller  # heavy: torch and super-gradients

        return open_labeller(self._spec)

    def label(self, shard: Shard, attempt: str) -> Commit:
        """See ``ShardLabeller.label``."""
        with about(shard=shard.shard_id, attempt=attempt):
            try:
                commit = self._labeller.label(shard, attempt)
            except LabelfleetError as exc:
                log.warning("attempt failed: %s", exc.message)
                raise
            footer = commit.footer
            said = "committed" if commit.won else "another attempt was first"
            log.info("%s: %d images", said, footer.images, extra={"seconds": footer.seconds})
            return commit

    def progress(self) -> WorkerProgress:
        """Return the progress; a separate thread answers while the others are busy."""
        return WorkerProgress(self._labeller.images_done, self._spot.notice)

    def close(self) -> None:
        """End the threads within bounded time."""
        self._spot.close()
        self._labeller.close()
