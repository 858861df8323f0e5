"""Dispatcher: which shard goes to which worker next. A pure state machine without Ray or a clock.

    queued ──assign──> in flight ──completed──> done
      ^                   │ failed / worker lost
      └──── requeue ──────┤
                          └── attempts used up ──> quarantined

Shards are pulled from an iterator only as workers have room, so a million of them cost no memory.
The caller passes the time, reports what happened, and carries out what ``assign`` returns.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from statistics import median

from storage.records import Shard

_SAMPLE = 200  # durations kept for the straggler rule


@dataclass(frozen=True, slots=True)
class DispatchRules:
    """The limits.

    Attributes:
        attempts: failures that name the shard, after which it is quarantined.
        depth: most shards in flight per worker.
        deaths_before_alone: worker deaths a shard was present at, after which it runs alone.
        straggler_factor: near the end, a shard in flight longer than this times the median gets
            a second copy on an idle worker.
        straggler_min_s: never before this many seconds. Near the end, shards of a draining worker
            are copied at any age.
    """

    attempts: int = 3
    depth: int = 3
    deaths_before_alone: int = 2
    straggler_factor: float = 3.0
    straggler_min_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Assignment:
    """An order to give a shard to a worker; ``attempt`` counts from 1, ``copy`` is speculative."""

    worker: str
    shard: Shard
    attempt: int
    copy: bool = False


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A shard that used up its attempts, and the error of each."""

    shard: Shard
    errors: tuple[str, ...]


@dataclass(slots=True)
class _Flight:
    shard: Shard
    started_s: float


@dataclass(slots=True)
class _Worker:
    flights: dict[str, _Flight] = field(default_factory=dict)
    draining: bool = False
    alone: str | None = None  # the one shard it may run


class Dispatcher:
    """Hands shards to workers until each is done or quarantined.

    Args:
        shards: the work, in order; pulled lazily.
        rules: the limits.
        last_chance: shard ids out of quarantine, which get one attempt.
    """

    def __init__(
        self,
        shards: Iterable[Shard],
        rules: DispatchRules | None = None,
        *,
        last_chance: frozenset[str] = frozenset(),
    ) -> None:
        self.rules = rules or DispatchRules()
        self.last_chance = last_chance
        self._shards: Iterator[Shard] = iter(shards)
        self._exhausted = False
        self._closed = False
        self._requeued: deque[Shard] = deque()
        self._alone: deque[Shard] = deque()  # present at too many deaths: each runs alone
        self._workers: dict[str, _Worker] = {}
        # Workers with room, binned by load, so that a thousand of them need no search per shard.
        self._open: list[dict[str, None]] = [{} for _ in range(self.rules.depth)]
        self._copies: dict[str, set[str]] = {}  # shard id -> workers that have it
        self._errors: dict[str, list[str]] = {}
        self._failed_on: dict[str, set[str]] = {}  # shard id -> workers it failed on
        self._deaths: dict[str, int] = {}
        self._durations_s: deque[float] = deque(maxlen=_SAMPLE)
        self.requeued_count = 0
        self.quarantined: list[Quarantined] = []
        self._taken = 0

    # -- what the caller asks

    @property
    def done(self) -> bool:
        """Whether nothing is queued or in flight."""
        return not self._copies and not self._has_queued()

    @property
    def closed(self) -> bool:
        """Whether handing out has stopped."""
        return self._closed

    @property
    def has_more(self) -> bool:
        """Whether anything is still queued, closed or not."""
        return bool(self._alone) or self._pull()

    @property
    def in_flight(self) -> int:
        """Distinct shards that workers have."""
        return len(self._copies)

    def workers(self) -> list[str]:
        """Known workers."""
        return list(self._workers)

    def holds(self, worker: str) -> list[str]:
        """Return the shard ids that a worker has in flight; empty for an unknown worker."""
        state = self._workers.get(worker)
        return list(state.flights) if state else []

    def assign(self, now_s: float) -> list[Assignment]:
        """Fill the workers, emptiest first, one shard each in turn; then copy stragglers."""
        given: list[Assignment] = []
        passed: set[str] = set()  # workers that may take none of the queued shards
        while (worker := self._emptiest(passed)) is not None:
            shard = self._next_for(worker)
            if shard is None:
                passed.add(worker)
            else:
                given.append(self._give(worker, shard, now_s))
        given.extend(self._copy_stragglers(now_s))
        return given

    # -- what the caller reports

    def worker_joined(self, worker: str) -> None:
        """Register a worker that is ready for shards."""
        self._workers.setdefault(worker, _Worker())
        self._place(worker)

    def worker_draining(self, worker: str) -> None:
        """Stop feeding a worker whose node is going away; what it has may still finish."""
        if worker in self._workers:
            self._workers[worker].draining = True
            self._place(worker)

    def worker_lost(self, worker: str, *, reason: str, blameless: bool = False) -> None:
        """Return the shards of a worker that is gone to the front of the queue.

        Args:
            worker: its name; unknown ones are ignored.
            reason: for the record, should the shard be charged.
            blameless: a drain, a lost node: no shard is suspected of having caused it.
        """
        lost = self._workers.pop(worker, None)
        if lost is None:
            return
        self._place(worker)
        for shard_id, flight in lost.flights.items():
            self._drop_copy(shard_id, worker)
            if blameless:
                self._requeue(flight.shard, suspect=shard_id == lost.alone)
            elif shard_id == lost.alone:
                self._charge(flight.shard, f"its worker died while running it alone: {reason}")
            else:
                self._deaths[shard_id] = self._deaths.get(shard_id, 0) + 1
                self._requeue(flight.shard)

    def completed(self, worker: str, shard_id: str, now_s: float) -> bool:
        """Record that a worker finished a shard.

        Returns:
            False when another copy was first (or the worker is not known to have it): the caller
            counts the shard only once.
        """
        flight = self._finish(worker, shard_id)
        if flight is None:
            return False
        self._durations_s.append(now_s - flight.started_s)
        self._forget(shard_id)
        # The slower copies run on, but are neither awaited nor counted.
        for other in list(self._copies.get(shard_id, ())):
            self._finish(other, shard_id)
        return True

    def failed(self, worker: str, shard_id: str, error: str) -> Quarantined | None:
        """Record an attempt that failed with an error naming the shard.

        Returns:
            The quarantine record, when that was its last attempt.
        """
        flight = self._finish(worker, shard_id)
        if flight is None:
            return None
        self._failed_on.setdefault(shard_id, set()).add(worker)
        return self._charge(flight.shard, error)

    def excused(self, worker: str, shard_id: str) -> None:
        """Record an attempt that failed through no fault of its shard: it is tried again, on
        another worker where there is one, and is not charged."""
        flight = self._finish(worker, shard_id)
        if flight is not None:
            self._failed_on.setdefault(shard_id, set()).add(worker)
            self._requeue(flight.shard)

    def close(self) -> None:
        """Stop handing out: what is in flight may finish, what is queued stays for later."""
        self._closed = True

    def take_quarantined(self) -> list[Quarantined]:
        """Return the quarantine records since the last call."""
        new, self._taken = self.quarantined[self._taken :], len(self.quarantined)
        return new

    # -- internals

    def _has_queued(self) -> bool:
        return not self._closed and self.has_more

    def _pull(self) -> bool:
        """Return whether a shard waits that need not run alone, pulling the next one if needed."""
        if not self._requeued and not self._exhausted:
            shard = next(self._shards, None)
            if shard is None:
                self._exhausted = True
            else:
                self._requeued.append(shard)
        return bool(self._requeued)

    def _emptiest(self, passed: set[str]) -> str | None:
        if not self._has_queued():
            return None
        return next((w for level in self._open for w in level if w not in passed), None)

    def _place(self, worker: str) -> None:
        """Put a worker into the bin of its load, or into none when it accepts no shards."""
        for level in self._open:
            level.pop(worker, None)
        state = self._workers.get(worker)
        if state is None or state.draining or state.alone is not None:
            return
        if len(state.flights) < self.rules.depth:
            self._open[len(state.flights)][worker] = None

    def _next_for(self, worker: str) -> Shard | None:
        if self._alone and not self._workers[worker].flights:
            shard = self._alone.popleft()
            self._workers[worker].alone = shard.shard_id
            return shard
        return self._take(worker) if self._pull() else None

    def _take(self, worker: str) -> Shard | None:
        """Take the first waiting shard that has not failed on this worker, or failed on all others.

        A worker that fails everything (its disk, its network) is always the emptiest: without
        this it would use up every attempt of every shard.
        """
        for i, shard in enumerate(self._requeued):
            failed_on = self._failed_on.get(shard.shard_id, ())
            if worker not in failed_on or all(other in failed_on for other in self._workers):
                del self._requeued[i]
                return shard
        return self._take_new()

    def _take_new(self) -> Shard | None:
        shard = None if self._exhausted else next(self._shards, None)
        self._exhausted = self._exhausted or shard is None
        return shard

    def _give(self, worker: str, shard: Shard, now_s: float, *, copy: bool = False) -> Assignment:
        self._workers[worker].flights[shard.shard_id] = _Flight(shard, now_s)
        self._copies.setdefault(shard.shard_id, set()).add(worker)
        self._place(worker)
        attempt = len(self._errors.get(shard.shard_id, ())) + 1
        return Assignment(worker, shard, attempt, copy)

    def _copy_stragglers(self, now_s: float) -> Iterator[Assignment]:
        idle = list(self._open[0])
        if not idle or self._closed or self._has_queued():
            return
        limit_s = math.inf
        if self._durations_s:
            slow_s = self.rules.straggler_factor * median(self._durations_s)
            limit_s = max(self.rules.straggler_min_s, slow_s)
        slow = sorted(
            (flight.started_s, name, shard_id)
            for name, state in self._workers.items()
            for shard_id, flight in state.flights.items()
            if len(self._copies[shard_id]) == 1
            and state.alone is None
            and (state.draining or now_s - flight.started_s > limit_s)
        )
        for worker, (_, name, shard_id) in zip(idle, slow, strict=False):
            yield self._give(worker, self._workers[name].flights[shard_id].shard, now_s, copy=True)

    def _finish(self, worker: str, shard_id: str) -> _Flight | None:
        state = self._workers.get(worker)
        flight = state.flights.pop(shard_id, None) if state else None
        if state is None or flight is None:
            return None
        self._drop_copy(shard_id, worker)
        if state.alone == shard_id:
            state.alone = None
        self._place(worker)
        return flight

    def _drop_copy(self, shard_id: str, worker: str) -> None:
        holders = self._copies.get(shard_id)
        if holders is not None:
            holders.discard(worker)
            if not holders:
                del self._copies[shard_id]

    def _charge(self, shard: Shard, error: str) -> Quarantined | None:
        if shard.shard_id in self._copies:
            return None  # the other copy may still succeed, and decides
        errors = self._errors.setdefault(shard.shard_id, [])
        errors.append(error)
        allowed = 1 if shard.shard_id in self.last_chance else self.rules.attempts
        if len(errors) < allowed:
            self._requeue(shard)
            return None
        record = Quarantined(shard, tuple(errors))
        self._forget(shard.shard_id)
        self.quarantined.append(record)
        return record

    def _forget(self, shard_id: str) -> None:
        self._errors.pop(shard_id, None)
        self._deaths.pop(shard_id, None)
        self._failed_on.pop(shard_id, None)

    def _requeue(self, shard: Shard, *, suspect: bool = False) -> None:
        if shard.shard_id in self._copies:
            return  # the other copy is still running
        self.requeued_count += 1
        deaths = self._deaths.get(shard.shard_id, 0)
        if suspect or deaths >= self.rules.deaths_before_alone:
            self._alone.append(shard)
        else:
            self._requeued.appendleft(shard)
