"""The run lock: one driver at a time works on a run, and a dead one never blocks it for long.

``lock.json`` names the owner and carries a counter that the owner raises every third of a lease.
Clocks are never compared across machines: a taker watches the counter, and takes over only after
it stood still for a whole lease on the taker's own monotonic clock. An owner whose process is gone
from this very boot of this very host is taken over at once. The conditional put of the commits
stays the backstop: even two owners could not double a label. (So it is where a server ignores
If-Match on PutObject; moto, SeaweedFS and AWS honour it.)
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from storage.errors import (
    AlreadyExists,
    LabelfleetError,
    ObjectChanged,
    ObjectNotFound,
    RunLocked,
    StorageUnavailable,
)
from storage.objects.protocols import SupportsCreate, SupportsDelete, SupportsGet, SupportsHead
from storage.objects.protocols import SupportsReplace as Replaces

LOCK_KEY = "lock.json"
LEASE_S = 30.0

log = logging.getLogger("labelfleet.lock")


class LockStore(SupportsGet, SupportsHead, SupportsCreate, Replaces, SupportsDelete, Protocol):
    """What the lock needs of a store."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds the lock. ``started`` tells a process from a later one with the same pid."""

    token: str
    host: str
    boot: str
    pid: int
    started: str
    command: str
    counter: int = 0

    def describe(self) -> str:
        """For people."""
        return f"`{self.command}` (pid {self.pid} on {self.host})"

    def is_dead_here(self) -> bool:
        """Certainly gone: this boot of this host knows no such process."""
        if (self.host, self.boot) != (socket.gethostname(), _boot_id()):
            return False
        return _started(self.pid) != self.started


def _boot_id() -> str:
    """This boot, and this pid namespace: containers of one host count their processes apart."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return secrets.token_hex(8)  # unknown: never equal, so never taken over at once


def _started(pid: int) -> str:
    """The process's start in clock ticks since boot, '' when there is none, or it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]


class RunLock:
    """A held lock; its heartbeat runs until ``release``."""

    def __init__(
        self,
        store: LockStore,
        owner: Owner,
        etag: str,
        lease_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._owner, self._etag = store, owner, etag
        self._lease_s, self._clock = lease_s, clock
        self._renewed_s = clock()
        self._lost: LabelfleetError | None = None
        self._renewing = threading.Lock()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._heartbeat, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise when the lock can no longer be trusted to be ours.

        After a pause (the process was suspended, the heartbeat hangs) the store is asked.

        Raises:
            RunLocked: another process took it over.
            StorageUnavailable: it could not be renewed in time.
        """
        if self._overdue():
            self._beat()
        if self._lost is not None:
            raise self._lost

    def release(self) -> None:
        """Stop the heartbeat; remove the lock if it still is ours."""
        self._released.set()
        self._thread.join(timeout=self._lease_s)
        try:
            if self._lost is None and _read(self._store)[0].token == self._owner.token:
                self._store.delete(LOCK_KEY)
        except ObjectNotFound:
            pass  # it is gone already
        except LabelfleetError as exc:
            log.warning("the run's lock stays behind, to be taken over later: %s", exc.message)

    def _heartbeat(self) -> None:
        while not self._released.wait(self._lease_s / 3) and self._lost is None:
            self._beat()

    def _overdue(self) -> bool:
        # A taker may act one lease after our last renewal: stop trusting it before.
        return self._clock() - self._renewed_s > self._lease_s * 0.8

    def _beat(self) -> None:
        with self._renewing:
            try:
                self._renew()
            except (ObjectChanged, ObjectNotFound):
                self._lost = RunLocked(
                    "the run's lock was lost: another process took it over",
                    hint="what is committed stays; see `labelfleet status`",
                )
            except LabelfleetError as exc:
                if self._overdue():
                    self._lost = StorageUnavailable(
                        f"the run's lock was lost: it could not be renewed: {exc.message}",
                        hint="what is committed stays; run the same command to continue",
                    )

    def _renew(self) -> None:
        began_s = self._clock()
        owner = replace(self._owner, counter=self._owner.counter + 1)
        try:
            self._etag = self._store.replace(LOCK_KEY, _body(owner), if_match=self._etag)
        except ObjectChanged:
            found, etag = _read(self._store)
            if found.token != owner.token:
                raise
            # Our own renewal, now or an earlier one, whose reply was lost.
            self._etag, owner = etag, found
        self._owner, self._renewed_s = owner, began_s


@contextmanager
def run_lock(
    store: LockStore,
    command: str,
    *,
    lease_s: float = LEASE_S,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[RunLock]:
    """Hold the run's lock.

    Args:
        store: the run's output.
        command: what the holder does, for the message the other one gets.
        lease_s: seconds; the same for all who share a run.

    Raises:
        RunLocked: somebody alive holds it; says who (exit code 75).
    """
    pid = os.getpid()
    owner = Owner(
        secrets.token_hex(8), socket.gethostname(), _boot_id(), pid, _started(pid), command
    )
    etag = _acquire(store, owner, lease_s, sleep, clock)
    lock = RunLock(store, owner, etag, lease_s, clock)
    try:
        yield lock
    finally:
        lock.release()


def _acquire(
    store: LockStore,
    owner: Owner,
    lease_s: float,
    sleep: Callable[[float], None],
    clock: Callable[[], float],
) -> str:
    while True:
        try:
            return store.create(LOCK_KEY, _body(owner))
        except AlreadyExists:
            pass
        try:
            holder, etag = _read(store)
            if holder.token == owner.token:
                return etag  # our own create, its reply lost
            if not holder.is_dead_here():
                _wait_until_abandoned(store, holder, lease_s, sleep, clock)
            return store.replace(LOCK_KEY, _body(owner), if_match=etag)
        except ObjectNotFound:
            continue  # released in between
        except ObjectChanged:
            raise RunLocked(
                "the run's lock was taken by another process just now",
                hint="wait for that run to end, or look at `labelfleet status`",
            ) from None


def _wait_until_abandoned(
    store: LockStore,
    holder: Owner,
    lease_s: float,
    sleep: Callable[[float], None],
    clock: Callable[[], float],
) -> None:
    if (holder.host, holder.boot) != (socket.gethostname(), _boot_id()):
        log.warning("is %s alive? waiting up to %.0f s to see", holder.describe(), lease_s)
        until_s = clock() + lease_s
        while clock() < until_s:
            sleep(min(1.0, lease_s / 10))
            now, _ = _read(store)
            if (now.token, now.counter) != (holder.token, holder.counter):
                break
        else:
            return
    raise RunLocked(
        f"the run is held by {holder.describe()}",
        hint="wait for it to end; `labelfleet status` shows how far it is",
    )


def _read(store: LockStore) -> tuple[Owner, str]:
    """Who holds it, and the etag. Raises ObjectNotFound, or RunLocked where that is unreadable."""
    while True:
        listed = store.head(LOCK_KEY)
        try:
            raw = store.get(LOCK_KEY, if_match=listed.etag)
        except ObjectChanged:
            continue  # renewed in between
        try:
            return Owner(**json.loads(raw)), listed.etag
        except (ValueError, TypeError) as exc:
            raise RunLocked(
                f"{LOCK_KEY} cannot be read: damaged, or written by another version of labelfleet",
                hint=f"if nothing works on the run, delete {LOCK_KEY} at its output",
            ) from exc


def _body(owner: Owner) -> bytes:
    return json.dumps(asdict(owner)).encode()
