"""The events that a pool of workers reports, one small record each."""

from __future__ import annotations

from dataclasses import dataclass

from storage.errors import LabelfleetError
from storage.runs.manifest import Commit
from workers.actors.actor import WorkerFacts


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker is ready for shards."""

    worker: str
    facts: WorkerFacts


@dataclass(frozen=True, slots=True)
class WorkerGone:
    """A worker is lost and being replaced; ``blameless``: its node was the cause, not a shard."""

    worker: str
    reason: str
    blameless: bool


@dataclass(frozen=True, slots=True)
class WorkerDraining:
    """A worker's node is leaving: the worker gets no more shards, and WorkerGone follows.

    ``within_s``: seconds until then; None: not said.
    """

    worker: str
    reason: str
    within_s: float | None


@dataclass(frozen=True, slots=True)
class StartFailed:
    """A worker could not be started; the pool tries another one."""

    error: LabelfleetError


@dataclass(frozen=True, slots=True)
class ShardDone:
    """A shard is committed, by this attempt or by a rival."""

    worker: str
    shard_id: str
    commit: Commit


@dataclass(frozen=True, slots=True)
class ShardError:
    """An attempt failed with an error that names its shard."""

    worker: str
    shard_id: str
    error: LabelfleetError


Event = WorkerReady | WorkerDraining | WorkerGone | StartFailed | ShardDone | ShardError
