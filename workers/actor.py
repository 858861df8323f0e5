"""LabelActor: the thin shell that a Ray worker process runs around one ShardLabeller."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from storage.manifest import Commit
from storage.records import Shard
from workers.spec import WorkerSpec


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What a started worker says about itself."""

    host: str
    pid: int
    device: str
    batch_size: int


class LabelActor:
    """One model on one device. The constructor does nothing that can fail; ``start`` loads.

    (An error in a Ray actor's constructor reaches the driver only as text; from a method it comes
    as the exception it was.)
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec

    def start(self) -> WorkerFacts:
        """Load the model and start the threads. Raises ModelError, StorageError, ..."""
        from workers.assemble import open_labeller  # heavy: torch and super-gradients

        self._labeller = open_labeller(self._spec)
        return WorkerFacts(
            host=socket.gethostname(),
            pid=os.getpid(),
            device=self._spec.model.device,
            batch_size=self._spec.options.batch_size,
        )

    def label(self, shard: Shard, attempt: str) -> Commit:
        """See ``ShardLabeller.label``."""
        return self._labeller.label(shard, attempt)

    def images_done(self) -> int:
        """Images that became rows so far."""
        return self._labeller.images_done

    def close(self) -> None:
        """End the threads within bounded time."""
        self._labeller.close()
