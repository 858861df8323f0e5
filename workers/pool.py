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

_CLOSE_S = 5.0
_START_PAUSE_S, _START_PAUSE_MAX_S = 1.0, 120.0


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
        self._members: dict[str, _Member] = {}
        self._calls: dict[Any, _Call] = {}
        self._names = (f"worker-{i}" for i in count())
        self._said: list[Event] = []
        self._start_failures = 0
        self._create_at_s: list[float] = []  # when to try again what could not start
        self._watched_s = clock()

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
            # Deaths last: what a worker finished before it died is not to be lost with it.
            for call, answer in sorted(map(self._answer, done), key=lambda a: _is_death(a[1])):
                if call.worker in self._members:
                    self._said.extend(self._settle(call, answer))
        said, self._said = self._said, []
        return said

    def replace(self, worker: str, reason: str) -> None:
        """Kill a worker and create another; WorkerGone (blameless) comes with ``events``."""
        if worker in self._members:
            self._said.extend(self._replace(worker, reason, blameless=True))

    def close(self) -> None:
        """End every actor: asked first, so that it can clean up, and killed after some seconds.

        What they had in flight is lost, what they committed stays.
        """
        asked = []
        for member in self._members.values():
            if member.ready:
                asked.append(member.handle.close.remote())
                asked.append(member.handle.__ray_terminate__.remote())
        if asked:
            ray.wait(asked, num_returns=len(asked), timeout=_CLOSE_S)
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
            # The shards, the progress question, and close.
            "max_concurrency": self._depth + 2,
            "runtime_env": {"env_vars": _thread_environment(self._spec.torch_threads)},
        }
        actor: Any = ray.remote(self._actor)
        handle = actor.options(**options).remote(self._spec)
        self._members[worker] = _Member(handle, moved_s=self._clock())
        self._calls[handle.start.remote()] = _Call("start", worker)

    def _answer(self, ref: Any) -> tuple[_Call, Any]:
        """A finished call and its value, or the exception in its place."""
        call = self._calls.pop(ref)
        try:
            return call, ray.get(ref)
        except ray_errors.RayError as exc:
            return call, exc

    def _settle(self, call: _Call, answer: Any) -> Iterator[Event]:
        if isinstance(answer, ray_errors.RayTaskError):
            yield from self._failed(call, _own_error(answer))
        elif isinstance(answer, ray_errors.RayError):
            yield from self._died(call, answer)
        else:
            yield from self._succeeded(call, answer)

    def _succeeded(self, call: _Call, value: Any) -> Iterator[Event]:
        member = self._members[call.worker]
        if call.kind == "start":
            member.ready, member.moved_s = True, self._clock()
            self._start_failures = 0
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
            yield from self._could_not_start(call.worker, error)
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
            error = WorkerStartFailed(f"a worker died while starting: {reason}")
            yield from self._could_not_start(call.worker, error)
        else:
            yield from self._replace(call.worker, reason, blameless=_node_went(exc))

    def _could_not_start(self, worker: str, error: LabelfleetError) -> Iterator[Event]:
        """Try another one, later each time: a broken node would fail every few seconds for ever."""
        self._forget(worker)
        yield StartFailed(error)
        pause_s = min(_START_PAUSE_S * 2**self._start_failures, _START_PAUSE_MAX_S)
        self._start_failures += 1
        self._create_at_s.append(self._clock() + pause_s)

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
        due = [at_s for at_s in self._create_at_s if at_s <= now_s]
        self._create_at_s = [at_s for at_s in self._create_at_s if at_s > now_s]
        for _ in due:
            self._create()
        if now_s - self._watched_s > self._hang_after_s / 2:
            for member in self._members.values():
                member.moved_s = now_s  # it was the driver that stood still, not they
        self._watched_s = now_s
        for worker, member in list(self._members.items()):
            if not member.ready or not member.shards:
                continue
            if now_s - member.moved_s > self._hang_after_s:
                reason = f"no image finished in {self._hang_after_s:.0f} s"
                self._said.extend(self._replace(worker, reason, blameless=False))
            elif now_s - member.asked_s > min(5.0, self._hang_after_s / 4):
                member.asked_s = now_s
                self._calls[member.handle.images_done.remote()] = _Call("progress", worker)


def _is_death(answer: Any) -> bool:
    """ "The actor is gone", in all the ways Ray says it; a task's own error is none."""
    return isinstance(answer, ray_errors.RayError) and not isinstance(
        answer, ray_errors.RayTaskError
    )


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
