"""Drive: the loop between Dispatcher and LabelPool, which decides what each event means."""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from pipelines.dispatch.dispatcher import Dispatcher
from pipelines.dispatch.limits import Limits, Spent
from pipelines.dispatch.tally import Caller, Tally
from pipelines.display.plural import counted
from storage.errors import (
    AccessDenied,
    BucketNotFound,
    ConfigError,
    ModelError,
    NotAtomic,
    ObjectUnreadable,
    ShardFailed,
    StorageError,
    StorageFull,
    StorageUnavailable,
    WorkerDiskFull,
    WorkerStartFailed,
)
from storage.records import Shard
from storage.runs.ledger import LedgerEntry, LedgerWriter
from workers.actors.events import (
    Event,
    ShardDone,
    ShardError,
    StartFailed,
    WorkerDraining,
    WorkerGone,
    WorkerReady,
)

log = logging.getLogger("labelfleet.drive")

Outcome = Literal["done", "stopped"]

# Never the fault of a single shard: the others would fail the same way.
_ENDS_THE_RUN = (StorageFull, BucketNotFound, NotAtomic)
# A shard's fault or an outage. It is the shard's where another one is labelled before the next
# try; it is an outage where this many attempts at one shard, or shards, fail in a row.
_MAYBE_OUTAGE = (AccessDenied, StorageUnavailable)
_OUTAGE_SHARDS = 3
_OUTAGE_ATTEMPTS = 3
# This many shards failing in a row on one worker, while others succeed: it is the worker.
_FAILING_SHARDS = 3
_START_FAILURES = 5
# This many set aside and none committed: something is wrong with all of them.
_SYSTEMATIC = 20
_BEAT_S = 5.0
_WAITING_NOTE_S = 60.0


class Pool(Protocol):
    """What the loop needs of a LabelPool."""

    @property
    def alive(self) -> int: ...

    def submit(self, worker: str, shard: Shard, attempt: str) -> None: ...

    def events(self, timeout_s: float) -> list[Event]: ...

    def replace(self, worker: str, reason: str) -> None: ...


class Follows(Protocol):
    """Keeps the pool in step with the cluster: an Elastic."""

    def follow(self, ended: int) -> None: ...

    def leaving(self, worker: str, reason: str, within_s: float | None) -> None: ...


class _Fixed:
    """A cluster that never changes."""

    def follow(self, ended: int) -> None:
        """Do nothing."""

    def leaving(self, worker: str, reason: str, within_s: float | None) -> None:
        """Do nothing."""


class SetsAside(Protocol):
    """Keeps a record of a shard that failed its last attempt: a Manifest."""

    def set_aside(self, shard: Shard, errors: list[str], invocation: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Journal:
    """Where an invocation's records go.

    Attributes:
        manifest: takes the quarantine records.
        ledger: takes the events.
        invocation: id, for both.
        wall: seconds since the epoch, for the ledger alone: no decision depends on it.
    """

    manifest: SetsAside
    ledger: LedgerWriter
    invocation: str
    wall: Callable[[], float] = time.time


@dataclass(frozen=True, slots=True)
class Terms:
    """Conditions that end an invocation before its work is done.

    Attributes:
        limits: after which it stops.
        guard: called every turn; raises when the run must not go on (its lock was lost).
    """

    limits: Limits = field(default_factory=Limits)
    guard: Callable[[], None] = lambda: None


class Drive:
    """One invocation's loop. Used by one thread.

    Args:
        journal: where its records go.
        dispatcher: decides which worker gets which shard.
        pool: carries it out.
        caller: follows it, and may stop it.
        terms: when it has to end early.
        cluster: updated every turn; None: the cluster never changes.
    """

    def __init__(
        self,
        journal: Journal,
        dispatcher: Dispatcher,
        pool: Pool,
        caller: Caller,
        *,
        terms: Terms | None = None,
        cluster: Follows | None = None,
    ) -> None:
        self._journal, self._dispatcher, self._pool = journal, dispatcher, pool
        self._watcher, self._stopper = caller.watcher, caller.stopper
        self._terms, self._cluster = terms or Terms(), cluster or _Fixed()
        self.tally = Tally()
        self._spent = Spent(self._terms.limits)
        self._beat_s = 0.0
        self._start_failures = 0
        # Attempts by shard that failed in a row with what may be an outage, and the shards that
        # failed so while others were labelled.
        self._outage: Counter[str] = Counter()
        self._own_fault: set[str] = set()
        self._unreadable: set[str] = set()  # shards whose object alone cannot be read
        self._attempts: dict[tuple[str, str], str] = {}  # ids in flight, by worker and shard
        self._failing: dict[str, set[str]] = {}  # worker -> shards it failed, none done since
        self._fresh_quarantined = 0
        self._said: set[str] = set()
        self._worked_s = self._waited_s = time.monotonic()
        self._ready_s: float | None = None  # when the first worker was
        self._ledger_failed = False

    def run(self, total: int = 0) -> Outcome:
        """Label until nothing is left, or until asked to stop.

        Args:
            total: number of shards to label, for the progress display.

        Raises:
            KeyboardInterrupt: on the second request, from wherever the loop was.
            LabelfleetError: the run cannot go on; the message says why.
        """
        self.tally.total = total
        with self._stopper.heeding():
            while not self._dispatcher.done:
                self._turn()
        return "stopped" if self._dispatcher.closed and self._dispatcher.has_more else "done"

    # -- one turn

    def _turn(self) -> None:
        self._terms.guard()
        self._heed_stop()
        self._cluster.follow(self.tally.shards + self.tally.quarantined)
        self._assign()
        for event in self._pool.events(timeout_s=0.2):
            self._handle(event)
        self._await_workers()
        if self._ready_s is not None:
            self.tally.working_s = time.monotonic() - self._ready_s
        self._beat()
        self._watcher.update(self.tally)

    def _assign(self) -> None:
        for given in self._dispatcher.assign(time.monotonic()):
            attempt = f"{self._journal.invocation}-{given.shard.shard_id}-{secrets.token_hex(4)}"
            self._attempts[given.worker, given.shard.shard_id] = attempt
            self._pool.submit(given.worker, given.shard, attempt)

    def _heed_stop(self) -> None:
        if self._spent.used_up(self._pool.alive) and not self._stopper.requests:
            self._stopper.request("max_hours or max_cost reached")
        if self._stopper.requests and not self._dispatcher.closed:
            self._dispatcher.close()
            self._watcher.note(
                f"{self._stopper.reason}: finishing "
                f"{counted(self._dispatcher.in_flight, 'shard')} in flight; Ctrl-C again stops at "
                "once"
            )

    def _handle(self, event: Event) -> None:
        match event:
            case WorkerReady():
                self._start_failures = 0
                self._ready_s = self._ready_s or time.monotonic()
                self._dispatcher.worker_joined(event.worker)
                self._write("ready", note={"worker": event.worker, "alive": self._pool.alive})
            case ShardDone():
                self._shard_done(event)
            case ShardError():
                self._shard_failed(event)
            case WorkerDraining():
                self._watcher.note(f"{event.worker} gets no more shards: {event.reason}")
                self._dispatcher.worker_draining(event.worker)
                self._cluster.leaving(event.worker, event.reason, event.within_s)
            case WorkerGone():
                self._worker_gone(event)
            case StartFailed():
                self._start_failed(event)
        self._set_aside()
        self.tally.workers_alive = self._pool.alive
        self.tally.requeued = self._dispatcher.requeued_count

    def _worker_gone(self, event: WorkerGone) -> None:
        self.tally.workers_lost += 1
        held = self._dispatcher.holds(event.worker)
        requeued = f"; requeued: {counted(len(held), 'shard')}" if held else ""
        self._watcher.note(f"lost {event.worker}: {event.reason}{requeued}")
        self._failing.pop(event.worker, None)
        for worker, shard_id in [key for key in self._attempts if key[0] == event.worker]:
            ids = {"worker": worker, "shard": shard_id}
            ids["attempt"] = self._attempts.pop((worker, shard_id))
            log.info("requeued: its worker is gone: %s", event.reason, extra=ids)
        self._dispatcher.worker_lost(event.worker, reason=event.reason, blameless=event.blameless)

    def _shard_done(self, event: ShardDone) -> None:
        self._own_fault |= self._outage.keys() - {event.shard_id}
        self._own_fault.discard(event.shard_id)
        self._outage.clear()
        self._failing.pop(event.worker, None)
        self._attempts.pop((event.worker, event.shard_id), None)
        if not self._dispatcher.completed(event.worker, event.shard_id, time.monotonic()):
            return  # a slower copy
        footer = event.commit.footer
        self.tally.add(footer)
        log.info(
            "committed: %d images", footer.images,
            extra={"worker": event.worker, "shard": event.shard_id, "attempt": footer.attempt},
        )  # fmt: skip
        self._write(
            "shard",
            shard_id=event.shard_id,
            counts=footer.counts,
            detections=footer.detections,
            seconds=footer.seconds,
            note={
                "worker": event.worker,
                "won": event.commit.won,
                "fill": footer.fill,
                "warnings": footer.warnings,
            },
        )

    def _shard_failed(self, event: ShardError) -> None:
        if isinstance(event.error, _ENDS_THE_RUN):
            raise event.error
        if isinstance(event.error, WorkerDiskFull) and self._pool.alive <= 1:
            raise event.error
        self.tally.errors += 1
        attempt = self._attempts.pop((event.worker, event.shard_id), "")
        ids = {"worker": event.worker, "shard": event.shard_id, "attempt": attempt}
        log.info("attempt failed: %s", event.error.message, extra=ids)
        self._watcher.note(f"attempt failed: {event.error.message}")
        if isinstance(event.error, _MAYBE_OUTAGE) and self._is_excused(event):
            self._dispatcher.excused(event.worker, event.shard_id)
        else:
            self._dispatcher.failed(event.worker, event.shard_id, event.error.message)
        if isinstance(event.error, ObjectUnreadable):
            self._unreadable.add(event.shard_id)
        else:
            self._replace_if_failing(event.worker, event.shard_id)

    def _is_excused(self, event: ShardError) -> bool:
        """Return whether an attempt counts against no shard, since storage itself may have failed.

        Raises the attempt's error when it is an outage.
        """
        self._outage[event.shard_id] += 1
        in_a_row = self._outage[event.shard_id]
        if len(self._outage) >= _OUTAGE_SHARDS or in_a_row >= _OUTAGE_ATTEMPTS:
            raise event.error
        charged = event.shard_id in self._own_fault
        self._own_fault.discard(event.shard_id)
        return not charged

    def _replace_if_failing(self, worker: str, shard_id: str) -> None:
        """Replace a worker on which everything fails while others succeed."""
        failing = self._failing.setdefault(worker, set())
        failing.add(shard_id)
        if len(failing) >= _FAILING_SHARDS and self._pool.alive > 1 and self.tally.shards:
            del self._failing[worker]
            self._pool.replace(worker, f"{len(failing)} shards in a row failed on it")

    def _await_workers(self) -> None:
        """Note that no worker is ready; after ``start_after_s``, raise."""
        now_s = time.monotonic()
        if self._pool.alive:
            self._worked_s = self._waited_s = now_s
        elif now_s - self._worked_s > self._terms.limits.start_after_s:
            raise WorkerStartFailed(
                f"no worker was ready for {self._terms.limits.start_after_s:.0f} s",
                hint="`ray status` shows what the cluster has free; see workers.start_after_s",
            )
        elif now_s - self._waited_s > _WAITING_NOTE_S:
            self._waited_s = now_s
            self._watcher.note(
                f"no worker has been ready for {now_s - self._worked_s:.0f} s: they load, "
                "or wait for room on the cluster"
            )

    def _start_failed(self, event: StartFailed) -> None:
        self._start_failures += 1
        if event.error.message not in self._said:  # the pool keeps trying: one note is enough
            self._said.add(event.error.message)
            self._watcher.note(f"a worker could not start: {event.error.message}")
        if self._pool.alive:
            return  # the others go on; the pool keeps trying
        if self._start_failures >= _START_FAILURES:
            raise WorkerStartFailed(
                f"{_START_FAILURES} workers in a row could not start: {event.error.message}",
                hint=event.error.hint or "run with --debug, or see `labelfleet doctor`",
            )
        if isinstance(event.error, ModelError | ConfigError):
            raise event.error  # it will not load at the next attempt either

    def _set_aside(self) -> None:
        journal = self._journal
        for record in self._dispatcher.take_quarantined():
            self.tally.quarantined += 1
            journal.manifest.set_aside(record.shard, list(record.errors), journal.invocation)
            self._watcher.note(f"quarantined {record.shard.key}: {record.errors[-1]}")
            # Neither those that failed before nor objects that alone cannot be read say anything
            # about the other shards.
            expected = self._dispatcher.last_chance | self._unreadable
            self._fresh_quarantined += record.shard.shard_id not in expected
            if self._fresh_quarantined >= _SYSTEMATIC and not self.tally.shards:
                raise ShardFailed(
                    f"{_SYSTEMATIC} shards failed every attempt and none succeeded; "
                    f"the last one: {record.errors[-1]}",
                    hint="fix the cause and run the same command: each of them is tried again",
                )

    def _beat(self) -> None:
        now_s = time.monotonic()
        if now_s - self._beat_s >= _BEAT_S:
            self._beat_s = now_s
            self._write("beat", note={"alive": self._pool.alive, "images": self.tally.images})

    def _write(self, event: str, **fields: object) -> None:
        """Write to the ledger: a cache, whose failure is noted once and does not end the run."""
        try:
            entry = LedgerEntry(event=event, at=self._journal.wall(), **fields)  # type: ignore[arg-type]  # the dataclass checks the names
            self._journal.ledger.write(entry)
            self._ledger_failed = False
        except _ENDS_THE_RUN:
            raise
        except StorageError as exc:  # the writer keeps what was not written
            if not self._ledger_failed:
                self._watcher.note(f"the ledger could not be written: {exc.message}")
            self._ledger_failed = True
