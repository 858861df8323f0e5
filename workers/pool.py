"""LabelPool: creates, pins, watches and replaces actors; turns Ray's errors into ours.

The pool replaces a dead actor itself (``max_restarts=0``): with Ray's restarts, Ray and the pool
would both put a process on one GPU. It never retries a shard; that is the Dispatcher's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import ray
from ray import exceptions as ray_errors

from storage.errors import LabelfleetError, ShardFailed, WorkerLost, WorkerStartFailed
from storage.manifest import Commit
from storage.records import Shard
from workers.actor import LabelActor, WorkerFacts
from workers.spec import WorkerSpec

log = logging.getLogger("labelfleet.pool")

# "The actor is gone", in all the ways Ray says it. NodeDiedError, WorkerCrashedError and
# OutOfMemoryError are no RayActorErrors.
ACTOR_DIED = (
    ray_errors.RayActorError,  # ActorDiedError, ActorUnavailableError
    ray_errors.WorkerCrashedError,
    ray_errors.OutOfMemoryError,
    ray_errors.NodeDiedError,
    ray_errors.ObjectLostError,
    ray_errors.RaySystemError,
    ray_errors.TaskUnschedulableError,
    ray_errors.ActorUnschedulableError,
)


@dataclass(frozen=True, slots=True)
class PoolSize:
    """How many actors, and what each reserves of its node."""

    count: int
    gpus: float
    cpus: float


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker takes shards from now on."""

    worker: str
    facts: WorkerFacts


@dataclass(frozen=True, slots=True)
class WorkerGone:
    """A worker is gone and being replaced; ``blameless``: its node went, no shard did it."""

    worker: str
    reason: str
    blameless: bool


@dataclass(frozen=True, slots=True)
class StartFailed:
    """A worker could not be started; another one is tried."""

    error: LabelfleetError


@dataclass(frozen=True, slots=True)
class ShardDone:
    """A shard is committed, by this attempt or by a rival's."""

    worker: str
    shard_id: str
    commit: Commit


@dataclass(frozen=True, slots=True)
class ShardError:
    """An attempt failed with an error that names its shard."""

    worker: str
    shard_id: str
    error: LabelfleetError


Event = WorkerReady | WorkerGone | StartFailed | ShardDone | ShardError


@dataclass(slots=True)
class _Member:
    handle: Any
    ready: bool = False
    shards: set[str] = field(default_factory=set)
    images_done: int = 0
    moved_s: float = 0.0  # when an image was last seen to be finished
    asked_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Call:
    kind: str  # start | label | progress
    worker: str
    shard_id: str = ""


class LabelPool:
    """The actors of one run. Used by one thread.

    Args:
        spec: given to each actor.
        size: how many, and their resources.
        depth: shards in flight an actor, at most; sizes Ray's concurrency.
        hang_after_s: without a finished image for this long, an actor is replaced.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        size: PoolSize,
        *,
        depth: int,
        hang_after_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec, self._size = spec, size
        self._depth, self._hang_after_s, self._clock = depth, hang_after_s, clock
        self._members: dict[str, _Member] = {}
        self._calls: dict[Any, _Call] = {}
        self._names = (f"worker-{i}" for i in count())
        self._said: list[Event] = []

    @property
    def alive(self) -> int:
        """Workers that are ready."""
        return sum(member.ready for member in self._members.values())

    def start(self) -> None:
        """Create the actors; each one's WorkerReady comes with ``events``."""
        for _ in range(self._size.count):
            self._create()

    def submit(self, worker: str, shard: Shard, attempt: str) -> None:
        """Give a shard to a worker; ShardDone or ShardError comes with ``events``."""
        member = self._members[worker]
        if not member.shards:
            member.moved_s = self._clock()
        member.shards.add(shard.shard_id)
        ref = member.handle.label.remote(shard, attempt)
        self._calls[ref] = _Call("label", worker, shard.shard_id)

    def events(self, timeout_s: float) -> list[Event]:
        """What happened since the last call; waits up to ``timeout_s`` for something to happen."""
        self._watch()
        refs = list(self._calls)
        if not refs:
            time.sleep(0 if self._said else timeout_s)
        elif ray.wait(refs, timeout=0 if self._said else timeout_s)[0]:
            done, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
            for ref in done:
                call = self._calls.pop(ref, None)
                if call is not None and call.worker in self._members:
                    self._said.extend(self._settle(ref, call))
        said, self._said = self._said, []
        return said

    def close(self) -> None:
        """Kill every actor; what they had in flight is lost, what they committed stays."""
        for worker in list(self._members):
            self._forget(worker)

    # -- how it works

    def _create(self) -> None:
        worker = next(self._names)
        options = {
            "num_cpus": self._size.cpus,
            "num_gpus": self._size.gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            # The shards, the progress question, and one in reserve for close.
            "max_concurrency": self._depth + 2,
            "runtime_env": {"env_vars": _thread_environment(self._spec.torch_threads)},
        }
        actor: Any = ray.remote(LabelActor)
        handle = actor.options(**options).remote(self._spec)
        self._members[worker] = _Member(handle, moved_s=self._clock())
        self._calls[handle.start.remote()] = _Call("start", worker)

    def _settle(self, ref: Any, call: _Call) -> Iterator[Event]:
        try:
            value = ray.get(ref)
        except ray_errors.RayTaskError as exc:
            yield from self._failed(call, _own_error(exc))
        except ACTOR_DIED as exc:
            yield from self._died(call, exc)
        else:
            yield from self._succeeded(call, value)

    def _succeeded(self, call: _Call, value: Any) -> Iterator[Event]:
        member = self._members[call.worker]
        if call.kind == "start":
            member.ready, member.moved_s = True, self._clock()
            yield WorkerReady(call.worker, value)
        elif call.kind == "progress":
            if value > member.images_done:
                member.images_done, member.moved_s = value, self._clock()
        else:
            member.shards.discard(call.shard_id)
            member.moved_s = self._clock()
            yield ShardDone(call.worker, call.shard_id, value)

    def _failed(self, call: _Call, error: LabelfleetError) -> Iterator[Event]:
        if call.kind == "start":
            self._forget(call.worker)
            yield StartFailed(error)
            self._create()
        elif isinstance(error, WorkerLost):
            yield from self._replace(call.worker, error.message, blameless=False)
        elif call.kind == "label":
            member = self._members[call.worker]
            member.shards.discard(call.shard_id)
            member.moved_s = self._clock()
            yield ShardError(call.worker, call.shard_id, error)

    def _died(self, call: _Call, exc: Exception) -> Iterator[Event]:
        reason = _first_line(exc)
        if not self._members[call.worker].ready and call.kind == "start":
            self._forget(call.worker)
            yield StartFailed(WorkerStartFailed(f"a worker died while starting: {reason}"))
            self._create()
        else:
            yield from self._replace(call.worker, reason, blameless=_node_went(exc))

    def _replace(self, worker: str, reason: str, *, blameless: bool) -> Iterator[Event]:
        log.warning("lost %s: %s", worker, reason)
        self._forget(worker)
        yield WorkerGone(worker, reason, blameless)
        self._create()

    def _forget(self, worker: str) -> None:
        member = self._members.pop(worker)
        self._calls = {ref: call for ref, call in self._calls.items() if call.worker != worker}
        with suppress(Exception):  # it may be dead already, or its node unreachable
            ray.kill(member.handle, no_restart=True)

    def _watch(self) -> None:
        """Ask busy workers how far they are; replace those that stand still."""
        now_s = self._clock()
        for worker, member in list(self._members.items()):
            if not member.ready or not member.shards:
                continue
            if now_s - member.moved_s > self._hang_after_s:
                reason = f"no image finished in {self._hang_after_s:.0f} s"
                self._said.extend(self._replace(worker, reason, blameless=False))
            elif now_s - member.asked_s > min(5.0, self._hang_after_s / 4):
                member.asked_s = now_s
                self._calls[member.handle.images_done.remote()] = _Call("progress", worker)


def _own_error(exc: ray_errors.RayTaskError) -> LabelfleetError:
    cause = exc.cause
    if isinstance(cause, LabelfleetError):
        return cause
    return ShardFailed(f"{type(cause).__name__}: {cause}")


def _first_line(exc: Exception) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return f"{type(exc).__name__}: {lines[0] if lines else 'no details'}"


def _node_went(exc: Exception) -> bool:
    """Whether the node died or was taken, rather than the process."""
    if isinstance(exc, ray_errors.NodeDiedError) or getattr(exc, "preempted", False):
        return True
    text = str(exc).lower()
    return "node was terminated" in text or "node died" in text or "its node has died" in text


def _thread_environment(threads: int) -> dict[str, str]:
    """Thread pools that are sized when a library loads must know their share before."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return dict.fromkeys(names, str(threads))
