"""LabelPool: creates, pins, watches and replaces actors; turns Ray's errors into ours.

The pool replaces a dead actor itself (``max_restarts=0``): with Ray's restarts, Ray and the pool
would both put a process on one GPU. It never retries a shard; the Dispatcher does. A worker
whose node is going is replaced before it ends, and finishes what it has while there is time.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import ray
from ray import exceptions as ray_errors

from storage.errors import LabelfleetError, WorkerLost, WorkerStartFailed
from storage.records import Shard
from workers.actors.actor import LabelActor
from workers.actors.events import (
    Event,
    ShardDone,
    ShardError,
    StartFailed,
    WorkerDraining,
    WorkerGone,
    WorkerReady,
)
from workers.actors.ray_errors import first_line, is_death, node_went, own_error
from workers.spec import WorkerSpec

log = logging.getLogger("labelfleet.pool")

_CLOSE_S = 5.0
_LEAVE_EARLY_S = 5.0  # before a node's deadline its unfinished shards go to others
_ASK_S = 5.0
_START_PAUSE_S, _START_PAUSE_MAX_S = 1.0, 120.0


@dataclass(frozen=True, slots=True)
class PoolSize:
    """The number of actors, and what each reserves of its node."""

    count: int
    gpus: float
    cpus: float


@dataclass(slots=True)
class _Member:
    handle: Any
    ready: bool = False
    node_id: str = ""
    shards: set[str] = field(default_factory=set)
    images_done: int = 0
    moved_s: float = 0.0  # when a finished image was last seen
    asked_s: float = 0.0
    asking: bool = False
    leaving: str = ""  # the reason, once its node is leaving
    until_s: float | None = None


@dataclass(frozen=True, slots=True)
class _Call:
    kind: str  # start | label | progress
    worker: str
    shard_id: str = ""


class LabelPool:
    """The actors of one run. Used by one thread.

    Args:
        spec: given to each actor.
        size: how many, and their resources; ``resize`` changes how many.
        depth: shards in flight an actor, at most; sizes Ray's concurrency.
        hang_after_s: without a finished image for this long, an actor is replaced.
        actor: the class that Ray runs.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        size: PoolSize,
        *,
        depth: int,
        hang_after_s: float,
        actor: type[LabelActor] = LabelActor,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec, self._size, self._actor = spec, size, actor
        self._depth, self._hang_after_s, self._clock = depth, hang_after_s, clock
        self._count = size.count
        self._members: dict[str, _Member] = {}
        self._calls: dict[Any, _Call] = {}
        self._names = (f"worker-{i}" for i in count())
        self._said: list[Event] = []
        self._start_failures = 0
        self._create_at_s: list[float] = []  # when to retry starts that failed
        self._watched_s = clock()

    @property
    def alive(self) -> int:
        """Workers that are ready."""
        return sum(member.ready for member in self._members.values())

    @property
    def count(self) -> int:
        """Workers wanted: ready, loading, or waiting for room."""
        return self._count

    def places(self) -> dict[str, str]:
        """Return the node of each ready worker, by Ray's id."""
        return {name: member.node_id for name, member in self._members.items() if member.ready}

    def start(self) -> None:
        """Create the actors; ``events`` reports WorkerReady for each."""
        self._fill()

    def resize(self, count: int) -> None:
        """Set the number of workers wanted. Ready workers stay; a smaller count only withdraws
        actors that are still loading or waiting for room."""
        self._count = count
        while self._create_at_s and self._staying() > count:
            self._create_at_s.pop()
        waiting = [name for name, member in self._members.items() if not member.ready]
        for worker in waiting[::-1][: max(0, self._staying() - count)]:
            self._forget(worker)

    def drain(self, worker: str, reason: str, within_s: float | None) -> None:
        """Drain a worker whose node is leaving, and create another one at once. ``events`` reports
        WorkerDraining and, once it is empty or its time is up, WorkerGone (blameless)."""
        member = self._members.get(worker)
        if member is None or member.leaving:
            return
        member.leaving = reason
        if within_s is not None:
            member.until_s = self._clock() + max(0.0, within_s - _LEAVE_EARLY_S)
        self._said.append(WorkerDraining(worker, reason, within_s))

    def submit(self, worker: str, shard: Shard, attempt: str) -> None:
        """Give a shard to a worker; ``events`` reports ShardDone or ShardError."""
        member = self._members[worker]
        if not member.shards:
            member.moved_s = self._clock()
        member.shards.add(shard.shard_id)
        ref = member.handle.label.remote(shard, attempt)
        self._calls[ref] = _Call("label", worker, shard.shard_id)

    def events(self, timeout_s: float) -> list[Event]:
        """Return the events since the last call; wait up to ``timeout_s`` for the first."""
        self._watch()
        refs = list(self._calls)
        if not refs:
            time.sleep(0 if self._said else timeout_s)
        elif ray.wait(refs, timeout=0 if self._said else timeout_s)[0]:
            done, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
            # Deaths last, so that shards finished before a death are not lost.
            for call, answer in sorted(map(self._answer, done), key=lambda a: is_death(a[1])):
                if call.worker in self._members:
                    self._said.extend(self._settle(call, answer))
        said, self._said = self._said, []
        return said

    def replace(self, worker: str, reason: str) -> None:
        """Kill a worker and create another; ``events`` reports WorkerGone (blameless)."""
        if worker in self._members:
            self._said.extend(self._replace(worker, reason, blameless=True))

    def close(self) -> None:
        """End every actor: ask it first, so that it can clean up, and kill it after some seconds.

        What they had in flight is lost, what they committed stays.
        """
        asked = {
            member.handle.close.remote(): worker
            for worker, member in self._members.items()
            if member.ready and not member.leaving
        }
        closing = set(asked.values())
        asked |= {ref: c.worker for ref, c in self._calls.items() if c.worker in closing}
        # Only an idle one may end itself: Ray 2.60 aborts, now and then, a process that has another
        # call when it exits (bad_optional_access), and reports a crash.
        busy = {asked[ref] for ref in self._unfinished(asked)}
        self._unfinished(
            self._members[worker].handle.__ray_terminate__.remote() for worker in closing - busy
        )
        for worker in list(self._members):
            self._forget(worker)

    # -- internals

    @staticmethod
    def _unfinished(refs: Iterable[Any]) -> list[Any]:
        """Wait some seconds for these calls; return those that have not ended."""
        waiting = list(refs)
        return ray.wait(waiting, num_returns=len(waiting), timeout=_CLOSE_S)[1] if waiting else []

    def _staying(self) -> int:
        """Count the workers that are ready or starting, except those whose node is leaving."""
        return sum(not m.leaving for m in self._members.values()) + len(self._create_at_s)

    def _fill(self) -> None:
        for _ in range(self._count - self._staying()):
            self._create()

    def _create(self) -> None:
        worker = next(self._names)
        options = {
            "num_cpus": self._size.cpus,
            "num_gpus": self._size.gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            # The shards, the progress question, and close.
            "max_concurrency": self._depth + 2,
            "runtime_env": {"env_vars": _thread_environment(self._spec.torch_threads)},
        }
        actor: Any = ray.remote(self._actor)
        handle = actor.options(**options).remote(self._spec)
        self._members[worker] = _Member(handle, moved_s=self._clock())
        self._calls[handle.start.remote()] = _Call("start", worker)

    def _answer(self, ref: Any) -> tuple[_Call, Any]:
        """Return the value of a finished call, or its exception."""
        call = self._calls.pop(ref)
        try:
            return call, ray.get(ref)
        except ray_errors.RayError as exc:
            return call, exc

    def _settle(self, call: _Call, answer: Any) -> Iterator[Event]:
        if isinstance(answer, ray_errors.RayTaskError):
            yield from self._failed(call, own_error(answer))
        elif isinstance(answer, ray_errors.RayError):
            yield from self._died(call, answer)
        else:
            yield from self._succeeded(call, answer)

    def _succeeded(self, call: _Call, value: Any) -> Iterator[Event]:
        member = self._members[call.worker]
        if call.kind == "start":
            member.ready, member.moved_s, member.node_id = True, self._clock(), value.node_id
            self._start_failures = 0
            yield WorkerReady(call.worker, value)
        elif call.kind == "progress":
            member.asking = False
            if value.images_done > member.images_done:
                member.images_done, member.moved_s = value.images_done, self._clock()
            if value.notice is not None:
                reason = f"spot notice ({value.notice.action})"
                self.drain(call.worker, reason, value.notice.within_s)
        else:
            member.shards.discard(call.shard_id)
            member.moved_s = self._clock()
            yield ShardDone(call.worker, call.shard_id, value)

    def _failed(self, call: _Call, error: LabelfleetError) -> Iterator[Event]:
        if call.kind == "start":
            yield from self._could_not_start(call.worker, error)
        elif isinstance(error, WorkerLost):
            yield from self._replace(call.worker, error.message, blameless=False)
        elif call.kind == "label":
            member = self._members[call.worker]
            member.shards.discard(call.shard_id)
            member.moved_s = self._clock()
            yield ShardError(call.worker, call.shard_id, error)

    def _died(self, call: _Call, exc: Exception) -> Iterator[Event]:
        reason = first_line(exc)
        if not self._members[call.worker].ready and call.kind == "start":
            error = WorkerStartFailed(f"a worker died while starting: {reason}")
            yield from self._could_not_start(call.worker, error)
        else:
            yield from self._replace(call.worker, reason, blameless=node_went(exc))

    def _could_not_start(self, worker: str, error: LabelfleetError) -> Iterator[Event]:
        """Retry after a growing pause, since a broken node would fail every few seconds."""
        self._forget(worker)
        yield StartFailed(error)
        pause_s = min(_START_PAUSE_S * 2**self._start_failures, _START_PAUSE_MAX_S)
        self._start_failures += 1
        self._create_at_s.append(self._clock() + pause_s)

    def _replace(self, worker: str, reason: str, *, blameless: bool) -> Iterator[Event]:
        log.warning("lost %s: %s", worker, reason)
        self._forget(worker)
        yield WorkerGone(worker, reason, blameless)

    def _forget(self, worker: str) -> None:
        member = self._members.pop(worker)
        self._calls = {ref: call for ref, call in self._calls.items() if call.worker != worker}
        with suppress(Exception):  # it may be dead already, or its node unreachable
            ray.kill(member.handle, no_restart=True)

    def _watch(self) -> None:
        """Create missing workers, release leaving ones, replace hanging ones."""
        now_s = self._clock()
        self._create_at_s = [at_s for at_s in self._create_at_s if at_s > now_s]
        self._fill()
        if now_s - self._watched_s > self._hang_after_s / 2:
            for member in self._members.values():
                member.moved_s = now_s  # the driver was suspended, not the workers
        self._watched_s = now_s
        for worker, member in list(self._members.items()):
            if member.leaving and (not member.shards or now_s >= (member.until_s or math.inf)):
                self._said.extend(self._replace(worker, member.leaving, blameless=True))
            elif member.shards and now_s - member.moved_s > self._hang_after_s:
                reason = f"no image finished in {self._hang_after_s:.0f} s"
                self._said.extend(self._replace(worker, reason, blameless=False))
            elif member.ready:
                self._ask(worker, member, now_s)

    def _ask(self, worker: str, member: _Member, now_s: float) -> None:
        """Ask a worker for its progress, one call at a time; idle ones too, for spot notices."""
        if not member.asking and now_s - member.asked_s > min(_ASK_S, self._hang_after_s / 4):
            member.asking, member.asked_s = True, now_s
            self._calls[member.handle.progress.remote()] = _Call("progress", worker)


def _thread_environment(threads: int) -> dict[str, str]:
    """Set the variables that size thread pools when a library is loaded."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return dict.fromkeys(names, str(threads))
