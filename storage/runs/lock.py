"""The run lock: one driver at a time works on a run, and a dead one never blocks it for long.

``lock.json`` names the owner and carries a counter that the owner raises every third of a lease.
Clocks are never compared across machines: a taker watches the counter, and takes over only after
it stood still for a whole lease on the taker's own monotonic clock. An owner whose process is gone
from this very boot of this very host is taken over at once. A lock that cannot be read (damaged, or
written by another version) is watched in the same way, by its etag. The conditional put of the
commits stays the backstop: even two owners could not double a label. (It is the only protection
where a server ignores If-Match on PutObject; moto, SeaweedFS and AWS honour it.)

Object storage has no conditional delete. So a release first marks the lock as released, by a
conditional put that succeeds only while it is the owner's, and then deletes it at once; a taker
that sees the mark waits for the delete.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

from storage.errors import (
    AlreadyExists,
    LabelfleetError,
    ObjectChanged,
    ObjectNotFound,
    RunLocked,
    StorageError,
    StorageUnavailable,
)
from storage.objects.json_records import json_record, parse_record
from storage.objects.protocols import SupportsCreate, SupportsDelete, SupportsGet, SupportsHead
from storage.objects.protocols import SupportsReplace as Replaces

LOCK_KEY = "lock.json"
LEASE_S = 30.0
_WITHOUT_STATUS = ("labelfleet train ", "labelfleet round ", "labelfleet suite ")

log = logging.getLogger("labelfleet.lock")


class LockStore(SupportsGet, SupportsHead, SupportsCreate, Replaces, SupportsDelete, Protocol):
    """The store verbs that the lock needs."""


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
    released: bool = False

    def describe(self) -> str:
        """For people."""
        return f"`{self.command}` (pid {self.pid} on {self.host})"

    def alive(self) -> bool | None:
        """Return whether the process lives, as far as this host can tell; None: it cannot.

        Another user's process may be hidden in /proc (hidepid): whether it is the owner or a later
        one with the same pid is then unknown.
        """
        if (self.host, self.boot) != (socket.gethostname(), _boot_id()):
            return None
        if started := _started(self.pid):
            return started == self.started
        return None if _is_hidden(self.pid) else False


def _boot_id() -> str:
    """Return the ids of this boot and this pid namespace: containers on a host number their
    processes separately."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return secrets.token_hex(8)  # unknown: never equal, so never taken over at once


def _started(pid: int) -> str:
    """Return the process's start in clock ticks since boot, '' when there is none, or it has
    ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]


def _is_hidden(pid: int) -> bool:
    """Return whether a process that /proc does not show us lives all the same."""
    try:
        Path(f"/proc/{pid}/stat").read_text()
        return False  # it is shown, so it has ended and its parent has not reaped it
    except FileNotFoundError:
        pass
    except OSError:
        return True  # another user's, with hidepid=1
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's, with hidepid=2
    return True


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
        self._renewed_s = self._progress_s = clock()
        self._stall_s: float | None = None
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
        self._progress_s = self._clock()
        if self._overdue():
            self._beat()
        if self._lost is not None:
            raise self._lost

    @contextmanager
    def needing_progress(self, stall_s: float) -> Iterator[None]:
        """Renew the lock only while ``check`` is called at least every ``stall_s`` seconds.

        A process that hangs then loses the run to the next one, instead of blocking it for good.
        """
        before = self._stall_s
        self._progress_s, self._stall_s = self._clock(), stall_s
        try:
            yield
        finally:
            self._stall_s = before

    def release(self) -> None:
        """Stop the heartbeat; remove the lock if it still is ours."""
        self._released.set()
        self._thread.join(timeout=self._lease_s)
        if self._lost is not None or not self._renewing.acquire(timeout=self._lease_s):
            return  # no longer ours, or a beat that hangs
        try:
            self._renew(released=True)
            if not self._overdue():  # else a taker may have stopped waiting for the delete
                self._store.delete(LOCK_KEY)
        except (ObjectNotFound, ObjectChanged):
            pass  # it is gone already, or another process's
        except LabelfleetError as exc:
            log.warning("the run's lock stays behind, to be taken over later: %s", exc.message)
        finally:
            self._renewing.release()

    def _heartbeat(self) -> None:
        while not self._released.wait(self._lease_s / 3) and self._lost is None:
            if not self._is_stalled():
                self._beat()

    def _is_stalled(self) -> bool:
        limit_s = self._stall_s
        return limit_s is not None and self._clock() - self._progress_s > limit_s

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

    def _renew(self, *, released: bool = False) -> None:
        began_s = self._clock()
        owner = replace(self._owner, counter=self._owner.counter + 1, released=released)
        try:
            self._etag = self._store.replace(LOCK_KEY, _body(owner), if_match=self._etag)
        except ObjectChanged:
            found, etag = read_lock(self._store)
            if found is None or found.token != owner.token:
                raise
            # Our own renewal, now or an earlier one, whose reply was lost.
            self._etag = etag
            if found.released != released:
                self._etag = self._store.replace(LOCK_KEY, _body(owner), if_match=etag)
            else:
                owner = found
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
        RunLocked: a live process holds it; the message names it (exit code 75).
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
            holder, etag = read_lock(store)
            if holder is not None and holder.token == owner.token:
                return etag  # our own create, its reply lost
            if holder is None or holder.alive() is not False:
                _wait_until_abandoned(store, holder, etag, lease_s, sleep, clock)
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
    holder: Owner | None,
    etag: str,
    lease_s: float,
    sleep: Callable[[float], None],
    clock: Callable[[], float],
) -> None:
    """Return once the lock has stood still for a whole lease.

    Raises:
        RunLocked: it is held by a process that lives.
        ObjectNotFound: it was released.
    """
    who = "the writer of an unreadable lock.json" if holder is None else holder.describe()
    if holder is None or holder.released or holder.alive() is None:
        log.warning("is %s alive? waiting up to %.0f s to see", who, lease_s)
        until_s = clock() + lease_s
        while clock() < until_s:
            sleep(min(1.0, lease_s / 10))
            if store.head(LOCK_KEY).etag != etag and _moved(read_lock(store)[0], holder):
                break
        else:
            return
    of_a_run = holder is None or not holder.command.startswith(_WITHOUT_STATUS)
    raise RunLocked(
        f"{'the run' if of_a_run else 'the output'} is held by {who}",
        hint="wait for it to end"
        + ("; `labelfleet status` shows how far it is" if of_a_run else ""),
    )


def _moved(now: Owner | None, before: Owner | None) -> bool:
    """Return whether the lock shows another beat or another owner."""
    if now is None or before is None:
        return True
    return (now.token, now.counter) != (before.token, before.counter)


def read_lock(store: LockStore) -> tuple[Owner | None, str]:
    """Return the lock's owner (None: unreadable) and its etag. Raises ObjectNotFound."""
    while True:
        listed = store.head(LOCK_KEY)
        try:
            raw = store.get(LOCK_KEY, if_match=listed.etag)
        except ObjectChanged:
            continue  # renewed in between
        try:
            return parse_record(raw, LOCK_KEY, _owner), listed.etag
        except StorageError as exc:
            log.warning("%s", exc.message)
            return None, listed.etag


def _owner(found: dict[str, Any]) -> Owner:
    known = {f.name: found[f.name] for f in fields(Owner) if f.name in found}
    owner = Owner(**known)  # a newer version may say more
    if not (isinstance(owner.pid, int) and isinstance(owner.counter, int)):
        raise TypeError("pid and counter are numbers")
    return owner


def _body(owner: Owner) -> bytes:
    return json_record(asdict(owner))
