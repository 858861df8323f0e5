"""The run lock: never two owners, and a dead one never blocks for long."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from storage.errors import ObjectNotFound, RunLocked, StorageUnavailable
from storage.objects.json_records import json_record, read_record
from storage.objects.protocols import ObjectStore
from storage.runs.lock import LOCK_KEY, Owner, read_lock, run_lock
from storage.stores.local import LocalStore
from storage.stores.memory import MemoryStore
from tests.support.faulty import FaultyStore, drop_reply, fail
from tests.support.servers.s3 import S3Server

_LIMIT_S = 120


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def holder(store: ObjectStore) -> Owner:
    return read_record(store, LOCK_KEY, lambda fields: Owner(**fields))


def is_free(store: ObjectStore) -> bool:
    try:
        store.head(LOCK_KEY)
    except ObjectNotFound:
        return True
    return False


def until(done: Callable[[], bool]) -> None:
    limit = time.monotonic() + _LIMIT_S
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.01)


def own(store: ObjectStore, **other: object) -> Owner:
    """Ourselves as the lock would write it, with some of it replaced; not held."""
    with run_lock(store, "labelfleet run cells"):
        return replace(holder(store), **{"token": "t" * 16, **other})  # type: ignore[arg-type]  # by name


def leave(store: ObjectStore, owner: Owner) -> None:
    """The lock as another process left it behind."""
    store.put(LOCK_KEY, json_record(asdict(owner)))


def acquire(store: ObjectStore, **how: object) -> Owner:
    """Take the lock, see who holds it, give it back."""
    with run_lock(store, "labelfleet run cells", **how):  # type: ignore[arg-type]  # by name
        return holder(store)


class Clock:
    """Time that passes only during a sleep."""

    def __init__(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        self.now_s = 0.0
        self._meanwhile = meanwhile

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self._meanwhile()


def test_it_is_held_inside_and_free_after(store: MemoryStore) -> None:
    with run_lock(store, "labelfleet run cells") as lock:
        lock.check()
        assert holder(store).pid == os.getpid()
        assert holder(store).command == "labelfleet run cells"
    assert is_free(store)
    acquire(store)


def test_it_is_free_after_an_error(store: MemoryStore) -> None:
    with pytest.raises(ZeroDivisionError), run_lock(store, "labelfleet run cells"):
        raise ZeroDivisionError
    assert is_free(store)


def test_a_live_holder_on_this_host_is_named_and_not_waited_for(store: MemoryStore) -> None:
    clock = Clock()
    with run_lock(store, "labelfleet run cells"):
        with pytest.raises(RunLocked) as caught:
            acquire(store, sleep=clock.sleep, clock=clock)
        assert holder(store).token  # still theirs
    assert clock.now_s == 0
    for named in (str(os.getpid()), socket.gethostname(), "labelfleet run cells"):
        assert named in caught.value.message
    assert caught.value.exit_code == 75
    assert caught.value.hint


_HOLD = """
import sys, time
from storage.runs.lock import run_lock
from storage.stores.open import open_store
with run_lock(open_store(sys.argv[1]), "labelfleet run cells"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_process_of_this_host_is_followed_at_once(tmp_path: Path, reaped: bool) -> None:
    store, clock = LocalStore(str(tmp_path)), Clock()
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(RunLocked, match=str(process.pid)):
            acquire(store)
        process.send_signal(signal.SIGKILL)
        if reaped:
            process.wait()
        else:  # a zombie, whose parent has not looked yet
            stat = Path(f"/proc/{process.pid}/stat")
            until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z")
        assert acquire(store, sleep=clock.sleep, clock=clock).pid == os.getpid()
    assert clock.now_s == 0


def test_a_later_process_with_the_same_pid_is_not_taken_for_the_owner(store: MemoryStore) -> None:
    leave(store, own(store, started="1"))
    assert acquire(store).token != "t" * 16


@pytest.mark.parametrize("elsewhere", [{"host": "node-7"}, {"boot": "before the power cut"}])
def test_a_stale_lock_from_elsewhere_is_taken_over_after_a_whole_lease(
    store: MemoryStore, elsewhere: dict[str, str]
) -> None:
    leave(store, own(store, **elsewhere))
    clock = Clock()
    assert acquire(store, lease_s=30, sleep=clock.sleep, clock=clock).pid == os.getpid()
    assert clock.now_s >= 30


def test_a_counter_that_moves_within_the_lease_means_alive(store: MemoryStore) -> None:
    left = own(store, host="node-7")
    leave(store, left)
    clock = Clock(lambda: leave(store, replace(left, counter=int(clock.now_s) // 25)))
    with pytest.raises(RunLocked, match="node-7"):
        acquire(store, lease_s=30, sleep=clock.sleep, clock=clock)
    assert holder(store).token == left.token


def test_a_foreign_lock_released_while_watched_is_taken(store: MemoryStore) -> None:
    leave(store, own(store, host="node-7"))
    clock = Clock(lambda: store.delete(LOCK_KEY))
    assert acquire(store, lease_s=30, sleep=clock.sleep, clock=clock).pid == os.getpid()
    assert clock.now_s < 30


UNREADABLE = (b"{", b"[]", b'{"token": "x"}', b'{"new": 1}')


@pytest.mark.parametrize("content", UNREADABLE)
def test_an_unreadable_lock_that_stands_still_is_taken_over(
    store: MemoryStore, content: bytes
) -> None:
    store.put(LOCK_KEY, content)
    clock = Clock()
    assert acquire(store, lease_s=30, sleep=clock.sleep, clock=clock).pid == os.getpid()
    assert clock.now_s >= 30


def test_an_unreadable_lock_that_is_renewed_has_a_live_holder(store: MemoryStore) -> None:
    store.put(LOCK_KEY, b'{"beat": 0}')
    clock = Clock(lambda: store.put(LOCK_KEY, b'{"beat": %d}' % clock.now_s) and None)
    with pytest.raises(RunLocked, match=r"lock\.json"):
        acquire(store, lease_s=30, sleep=clock.sleep, clock=clock)
    assert clock.now_s < 30


def test_a_newer_version_s_lock_is_read_by_what_is_known_of_it(store: MemoryStore) -> None:
    newer = {**asdict(own(store)), "nodes": ["a", "b"]}
    store.put(LOCK_KEY, json_record(newer))
    with pytest.raises(RunLocked, match=str(os.getpid())):
        acquire(store)


def test_a_flipped_bit_never_makes_a_live_holder_look_dead(store: MemoryStore) -> None:
    with run_lock(store, "labelfleet run cells", lease_s=600):
        raw = store.get(LOCK_KEY)
        for at in range(len(raw)):
            store.put(LOCK_KEY, raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
            found, _ = read_lock(store)
            assert found is None or found.alive(), raw[:at]
        store.put(LOCK_KEY, raw)


def test_a_process_hidden_in_proc_is_watched_not_taken_for_dead(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As under hidepid=2: another user's process has no entry in /proc, and may not be signalled.
    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    left = own(store, pid=2**22 + 7)  # beyond any pid: /proc has no entry for it
    leave(store, left)
    monkeypatch.setattr(os, "kill", refuse)
    assert left.alive() is None
    clock = Clock(lambda: leave(store, replace(left, counter=int(clock.now_s))))
    with pytest.raises(RunLocked):
        acquire(store, lease_s=30, sleep=clock.sleep, clock=clock)
    monkeypatch.undo()
    assert left.alive() is False


# -- while it is held


def test_the_heartbeat_raises_the_counter_while_it_is_held(store: MemoryStore) -> None:
    with run_lock(store, "labelfleet run cells", lease_s=0.1) as lock:
        until(lambda: holder(store).counter >= 3)
        lock.check()
    assert is_free(store)


def test_a_lock_that_was_taken_over_fails_the_check_and_is_left_to_the_taker(
    store: MemoryStore,
) -> None:
    taker = own(store, host="node-7")
    with run_lock(store, "labelfleet run cells", lease_s=0.1) as lock:
        leave(store, taker)
        with pytest.raises(RunLocked, match="another process took it over"):
            until(lambda: lock.check() is not None)
    assert holder(store) == taker


def test_a_lock_that_vanished_fails_the_check(store: MemoryStore) -> None:
    with run_lock(store, "labelfleet run cells", lease_s=0.1) as lock:
        store.delete(LOCK_KEY)
        with pytest.raises(RunLocked):
            until(lambda: lock.check() is not None)


def test_a_heartbeat_that_cannot_reach_the_store_fails_the_check(store: MemoryStore) -> None:
    faulty = FaultyStore(store, [fail("replace", times=None)])
    with (
        run_lock(faulty, "labelfleet run cells", lease_s=0.1) as lock,
        pytest.raises(StorageUnavailable, match="could not be renewed"),
    ):
        until(lambda: lock.check() is not None)


def test_a_short_outage_is_outlived(store: MemoryStore) -> None:
    faulty = FaultyStore(store, [fail("replace", times=1)])
    with run_lock(faulty, "labelfleet run cells", lease_s=1.5) as lock:
        until(lambda: holder(store).counter >= 1)
        lock.check()


def test_a_pause_does_not_lose_a_lock_that_stayed_free(store: MemoryStore) -> None:
    clock = Clock()
    with run_lock(store, "labelfleet run cells", lease_s=600, clock=clock) as lock:
        clock.now_s = 5000  # a laptop slept
        lock.check()
        assert holder(store).counter == 1


def test_after_a_pause_a_taker_is_seen_at_the_first_check(store: MemoryStore) -> None:
    taker = own(store, host="node-7")
    clock = Clock()
    with run_lock(store, "labelfleet run cells", lease_s=600, clock=clock) as lock:
        leave(store, taker)
        clock.now_s = 5000
        with pytest.raises(RunLocked):
            lock.check()
    assert holder(store) == taker


def test_our_own_renewal_whose_reply_was_lost_is_not_a_rival(store: MemoryStore) -> None:
    faulty = FaultyStore(store, [drop_reply("replace", times=2)])
    with run_lock(faulty, "labelfleet run cells", lease_s=0.2) as lock:
        until(lambda: holder(store).counter >= 4)
        lock.check()
    assert faulty.hits["drop_reply"] == 2
    assert is_free(store)


class LosesReplies:
    """A store whose own retry meets the object that its first try had made."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def create(self, key: str, body: bytes) -> str:
        self._store.create(key, body)
        return self._store.create(key, body)


def test_our_own_create_whose_reply_was_lost_is_not_a_rival(store: MemoryStore) -> None:
    lossy: ObjectStore = LosesReplies(store)  # type: ignore[assignment]  # the rest by name
    assert acquire(lossy).pid == os.getpid()
    assert is_free(store)


def test_a_release_that_fails_raises_no_error(store: MemoryStore) -> None:
    faulty = FaultyStore(store, [fail("delete", error=StorageUnavailable)])
    acquire(faulty)
    assert not is_free(store)


def test_a_release_never_deletes_the_lock_of_a_taker(store: MemoryStore) -> None:
    taker = own(store, host="node-7")
    with run_lock(store, "labelfleet run cells", lease_s=600):
        leave(store, taker)  # between the last beat and the release
    assert holder(store) == taker


def test_a_release_s_own_mark_whose_delete_failed_is_taken_over(store: MemoryStore) -> None:
    faulty = FaultyStore(store, [fail("delete", error=StorageUnavailable)])
    acquire(faulty)
    assert holder(store).released
    clock = Clock()
    assert acquire(store, sleep=clock.sleep, clock=clock).pid == os.getpid()
    assert is_free(store)


def test_a_holder_that_makes_no_progress_stops_renewing(store: MemoryStore) -> None:
    with run_lock(store, "labelfleet run cells", lease_s=0.1) as lock:
        with lock.needing_progress(0.3):
            until(lambda: lock._is_stalled())  # the main thread hangs
            time.sleep(0.2)
            stood = holder(store).counter
            time.sleep(0.3)
            assert holder(store).counter == stood
            lock.check()  # it stayed free: the run goes on
            assert holder(store).counter > stood
        until(lambda: holder(store).counter > stood + 3)


# -- races


class Contest:
    """Eight contenders at the same moment; a winner holds the lock until the others have lost."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._start, self._all_lost = threading.Barrier(8), threading.Event()
        self._inside = threading.Semaphore(1)

    def run(self) -> int:
        """How many held it; fails when two did at the same time."""
        with ThreadPoolExecutor(8) as threads:
            tries = [threads.submit(self._contend) for _ in range(8)]
            until(lambda: sum(t.done() for t in tries) >= 7)
            self._all_lost.set()
            return sum(t.result() for t in tries)

    def _contend(self) -> bool:
        self._start.wait()
        try:
            with run_lock(self._store, "labelfleet run cells"):
                assert self._inside.acquire(blocking=False), "two hold it"
                self._all_lost.wait(_LIMIT_S)
                self._inside.release()
                return True
        except RunLocked:
            return False


def race(store: ObjectStore, *, leave_stale: bool) -> None:
    for _ in range(5):
        if leave_stale:
            leave(store, own(store, started="1"))
        assert Contest(store).run() == 1
        assert is_free(store)


@pytest.mark.parametrize("leave_stale", [False, True])
def test_of_racing_contenders_in_memory_one_wins(store: MemoryStore, leave_stale: bool) -> None:
    race(store, leave_stale=leave_stale)


@pytest.mark.parametrize("leave_stale", [False, True])
def test_of_racing_contenders_in_a_folder_one_wins(tmp_path: Path, leave_stale: bool) -> None:
    race(LocalStore(str(tmp_path)), leave_stale=leave_stale)


@pytest.mark.slow
@pytest.mark.parametrize("leave_stale", [False, True])
def test_of_racing_contenders_on_moto_one_wins(moto_s3: S3Server, leave_stale: bool) -> None:
    race(moto_s3.fresh_store(), leave_stale=leave_stale)


@pytest.mark.slow
@pytest.mark.parametrize("leave_stale", [False, True])
def test_of_racing_contenders_on_seaweedfs_one_wins(weed_s3: S3Server, leave_stale: bool) -> None:
    race(weed_s3.fresh_store(), leave_stale=leave_stale)
