"""The drive loop: what each event from the pool means for the run. No Ray process, no clock."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from pipelines.dispatch.limits import Limits
from storage.errors import (
    AccessDenied,
    BucketNotFound,
    CheckpointError,
    LabelfleetError,
    ObjectUnreadable,
    RunLocked,
    ShardFailed,
    StorageFull,
    StorageUnavailable,
    WorkerDiskFull,
    WorkerStartFailed,
)
from storage.records import Shard
from storage.stores.memory import MemoryStore
from tests.support.faulty import Fault, FaultyStore, drop_reply, fail
from tests.support.ray.scripted_drive import Bench, Cluster, ScriptedPool, done, failing, ready
from workers.actors.events import (
    Event,
    ShardError,
    StartFailed,
    WorkerDraining,
    WorkerGone,
)


def test_every_shard_is_counted_once_and_written_to_the_ledger() -> None:
    bench = Bench(20, ScriptedPool())
    assert bench.run() == "done"
    assert bench.drive.tally.shards == 20
    assert bench.drive.tally.counts == {"ok": 60, "undecodable": 20}
    assert bench.drive.tally.images == 80
    assert bench.drive.tally.detections == 140
    entries = bench.entries("shard")
    assert sorted(e.shard_id or "" for e in entries) == sorted(s.shard_id for s in bench.shards)
    assert {e.note["worker"] for e in entries} == {"w0", "w1"}
    assert entries[0].counts == {"ok": 3, "undecodable": 1}
    assert entries[0].seconds == {"infer": 0.5}


def test_no_two_attempts_share_an_id() -> None:
    bench = Bench(5, ScriptedPool(failing(ShardFailed("bad"), "001.tar")))
    bench.run()
    assert len(bench.pool.attempts) == 7
    assert len(set(bench.pool.attempts)) == 7


def test_a_slower_copy_is_not_counted_again() -> None:
    def twice(worker: str, shard: Shard, attempt: str) -> Event:
        bench.pool.say(done(worker, shard, attempt))
        return done(worker, shard, attempt)

    bench = Bench(6, ScriptedPool(twice))
    bench.run()
    assert bench.drive.tally.shards == 6
    assert len(bench.entries("shard")) == 6


def test_a_shard_that_fails_every_attempt_is_quarantined_and_the_rest_is_labelled() -> None:
    bench = Bench(6, ScriptedPool(failing(ShardFailed("shard 003.tar: bad"), "003.tar")))
    assert bench.run() == "done"
    assert bench.drive.tally.quarantined == 1
    assert bench.drive.tally.errors == 3
    assert bench.drive.tally.shards == 5
    (found,) = bench.manifest.quarantined().values()
    assert found["key"] == "003.tar"
    assert found["errors"] == ["shard 003.tar: bad"] * 3
    assert found["invocation"] == "now"
    assert any(note.startswith("quarantined 003.tar") for note in bench.notes.said)


def test_twenty_quarantined_and_none_committed_end_the_run() -> None:
    bench = Bench(100, ScriptedPool(failing(ShardFailed("the codec is missing"))))
    error = bench.fails(ShardFailed)
    assert "20 shards" in error.message
    assert "the codec is missing" in error.message
    assert error.hint
    assert len(bench.manifest.quarantined()) == 20


def test_twenty_quarantined_beside_one_success_do_not() -> None:
    bad = [f"{index:03d}.tar" for index in range(1, 30)]
    bench = Bench(30, ScriptedPool(failing(ShardFailed("bad"), *bad)))
    assert bench.run() == "done"
    assert (bench.drive.tally.quarantined, bench.drive.tally.shards) == (29, 1)


# -- storage


@pytest.mark.parametrize("error", [StorageFull("no space left"), BucketNotFound("no bucket")])
def test_what_no_other_shard_would_survive_ends_the_run_at_once(error: LabelfleetError) -> None:
    bench = Bench(6, ScriptedPool(failing(error, "002.tar")))
    assert bench.fails(type(error)) is error
    assert not bench.manifest.quarantined()


@pytest.mark.parametrize("error", [AccessDenied("expired"), StorageUnavailable("down")])
def test_an_outage_ends_the_run_and_charges_no_shard(error: LabelfleetError) -> None:
    bench = Bench(30, ScriptedPool(failing(error)))
    assert bench.fails(type(error)) is error
    assert bench.drive.tally.errors == 3
    assert not bench.manifest.quarantined()


def test_one_forbidden_object_is_not_an_outage() -> None:
    bench = Bench(30, ScriptedPool(failing(AccessDenied("forbidden"), "004.tar")))
    assert bench.run() == "done"
    assert (bench.drive.tally.quarantined, bench.drive.tally.shards) == (1, 29)


@pytest.mark.parametrize("error", [AccessDenied("expired"), StorageUnavailable("down")])
@pytest.mark.parametrize("left", [1, 2])
def test_an_outage_with_few_shards_left_sets_none_aside(error: LabelfleetError, left: int) -> None:
    last = [f"{index:03d}.tar" for index in range(30 - left, 30)]
    bench = Bench(30, ScriptedPool(failing(error, *last)))
    assert bench.fails(type(error)) is error
    assert bench.drive.tally.shards == 30 - left
    assert not bench.manifest.quarantined()


def test_objects_that_alone_cannot_be_read_hold_up_none_of_the_others() -> None:
    archived = [f"{index:03d}.tar" for index in range(25)]  # more than make a systematic fault
    bench = Bench(40, ScriptedPool(failing(ObjectUnreadable("archived"), *archived)))
    assert bench.run() == "done"
    assert (bench.drive.tally.quarantined, bench.drive.tally.shards) == (25, 15)
    assert bench.pool.replaced == [], "no worker is at fault"


def test_a_success_in_between_ends_the_streak() -> None:
    seen: set[str] = set()

    def every_other(worker: str, shard: Shard, attempt: str) -> Event:
        first, odd = shard.key not in seen, int(shard.key[:3]) % 2
        seen.add(shard.key)
        if first and odd:
            return ShardError(worker, shard.shard_id, StorageUnavailable("a hiccup"))
        return done(worker, shard, attempt)

    bench = Bench(40, ScriptedPool(every_other, [ready("w0")]), depth=1)
    assert bench.run() == "done"
    assert (bench.drive.tally.shards, bench.drive.tally.errors) == (40, 20)


@pytest.mark.parametrize("trouble", [fail, drop_reply])
def test_a_ledger_that_cannot_be_written_is_noted_and_loses_nothing(
    trouble: Callable[..., Fault],
) -> None:
    store = FaultyStore(MemoryStore(), [trouble("put", "ledger/", times=3)])
    bench = Bench(10, ScriptedPool(), store=store, ledger_lines=2)
    assert bench.run() == "done"
    assert sum("ledger" in note for note in bench.notes.said) == 1
    assert len(bench.entries("shard")) == 10


# -- workers


def test_a_lost_worker_s_shards_go_to_another() -> None:
    def dies(worker: str, shard: Shard, attempt: str) -> Event | None:
        if worker == "w0":
            if not lost:
                lost.append(shard.key)
                bench.pool.say(WorkerGone("w0", "killed", False), ready("w2"))
            return None
        return done(worker, shard, attempt)

    lost: list[str] = []
    bench = Bench(12, ScriptedPool(dies))
    assert bench.run() == "done"
    assert bench.drive.tally.shards == 12
    assert bench.drive.tally.workers_lost == 1
    assert bench.drive.tally.requeued >= 1
    assert any("w0" in note and "requeued" in note for note in bench.notes.said)


def test_a_worker_whose_node_is_going_gets_no_more_and_what_it_has_counts() -> None:
    def drains(worker: str, shard: Shard, attempt: str) -> Event:
        if worker == "w0" and not cluster.left:
            bench.pool.say(WorkerDraining("w0", "spot notice (terminate)", 110.0))
        return done(worker, shard, attempt)

    cluster = Cluster()
    bench = Bench(40, ScriptedPool(drains), cluster=cluster)
    assert bench.run() == "done"
    assert bench.drive.tally.shards == 40
    assert set(cluster.left) == {("w0", "spot notice (terminate)", 110.0)}
    given = [worker for worker, _ in bench.pool.submitted]
    assert 1 <= given.count("w0") <= 6  # what it had when it said so
    assert any("w0 gets no more shards" in note for note in bench.notes.said)


def test_the_cluster_is_followed_with_what_has_ended() -> None:
    cluster = Cluster()
    bench = Bench(6, ScriptedPool(failing(ShardFailed("bad"), "003.tar")), cluster=cluster)
    bench.run()
    assert cluster.ended[0] == 0
    assert cluster.ended == sorted(cluster.ended)
    assert cluster.ended[-1] in (5, 6)  # five done, one set aside


@pytest.mark.parametrize("jump_s", [-86_400.0, -1.0, 86_400.0])
def test_a_clock_that_jumps_decides_nothing_and_loses_no_line(jump_s: float) -> None:
    now, rng = [1.7e9], random.Random(3)

    def wall() -> float:
        now[0] += jump_s if rng.random() < 0.5 else 0.1
        return now[0]

    bench = Bench(20, ScriptedPool(), limits=Limits(seconds=3600), wall=wall)
    assert bench.run() == "done"
    assert sorted(e.shard_id or "" for e in bench.entries("shard")) == sorted(
        shard.shard_id for shard in bench.shards
    )
    assert bench.stopper.requests == 0


def test_workers_that_cannot_start_end_the_run_with_their_own_error() -> None:
    failed = StartFailed(LabelfleetError("libcuda is missing", hint="install the driver"))
    bench = Bench(3, ScriptedPool(first=[failed] * 10))
    error = bench.fails(WorkerStartFailed)
    assert "5 workers in a row" in error.message
    assert "libcuda is missing" in error.message
    assert error.hint == "install the driver"
    assert bench.pool.turns == 5


def test_a_model_that_cannot_load_is_not_tried_again() -> None:
    error = CheckpointError("cells.pth is corrupt")
    bench = Bench(3, ScriptedPool(first=[StartFailed(error)] * 10))
    assert bench.fails(CheckpointError) is error
    assert bench.pool.turns == 1


def test_one_gpu_that_cannot_start_does_not_stop_the_others() -> None:
    failed = StartFailed(CheckpointError("out of memory"))
    bench = Bench(3, ScriptedPool(first=[ready("w0"), *[failed] * 20]))
    assert bench.run() == "done"
    assert bench.drive.tally.shards == 3


def test_workers_that_cannot_start_after_commits_end_the_run_as_well() -> None:
    failed = StartFailed(WorkerStartFailed("the node has no disk left"))

    def once(worker: str, shard: Shard, attempt: str) -> Event | None:
        if shard.key == "000.tar":
            return done(worker, shard, attempt)
        if shard.key == "001.tar":
            bench.pool.say(WorkerGone("w0", "killed", False), *[failed] * 10)
        return None

    bench = Bench(9, ScriptedPool(once, [ready("w0")]))
    bench.fails(WorkerStartFailed)
    assert bench.drive.tally.shards == 1


# -- stopping


def test_asked_once_it_finishes_what_is_in_flight() -> None:
    bench = Bench(100, ScriptedPool())
    bench.pool.each_turn = lambda turn: bench.stopper.request() if turn == 10 else None
    assert bench.run() == "stopped"
    assert bench.drive.tally.shards == len(bench.pool.submitted) < 100
    assert sum("finishing" in note for note in bench.notes.said) == 1


def test_the_deadline_stops_it_like_a_first_request() -> None:
    bench = Bench(100, ScriptedPool(), limits=Limits(seconds=0.0))
    assert bench.run() == "stopped"
    assert bench.stopper.reason == "max_hours or max_cost reached"
    assert bench.drive.tally.shards == len(bench.pool.submitted)


def test_a_lost_lock_ends_it_before_anything_more_is_handed_out() -> None:
    given_at_loss: list[int] = []

    def guard() -> None:
        if bench.pool.turns == 5:
            given_at_loss.append(len(bench.pool.submitted))
            raise RunLocked("the run's lock was lost")

    bench = Bench(100, ScriptedPool(), guard=guard)
    bench.fails(RunLocked)
    assert given_at_loss == [len(bench.pool.submitted)]


def test_a_worker_on_which_everything_fails_is_replaced_and_no_shard_is_charged_away() -> None:
    def answer(worker: str, shard: Shard, attempt: str) -> Event:
        if worker == "w1":
            return ShardError(worker, shard.shard_id, ShardFailed("its network is broken"))
        return done(worker, shard, attempt)

    bench = Bench(30, ScriptedPool(answer))
    assert bench.run() == "done"
    assert bench.pool.replaced == ["w1"]
    assert bench.drive.tally.shards == 30
    assert bench.drive.tally.quarantined == 0


def test_old_poison_shards_do_not_end_later_runs() -> None:
    bench = Bench(25, ScriptedPool(failing(ShardFailed("poison"))))
    bench.dispatcher.last_chance = frozenset(s.shard_id for s in bench.shards)
    assert bench.run() == "done"
    assert bench.drive.tally.quarantined == 25


def test_a_full_disk_on_the_only_worker_ends_the_run() -> None:
    pool = ScriptedPool(failing(WorkerDiskFull("no space left for its spool")), [ready("w0")])
    assert "no space left" in Bench(5, pool).fails(WorkerDiskFull).message


def test_no_worker_for_too_long_ends_the_run() -> None:
    class Empty(ScriptedPool):
        def events(self, timeout_s: float) -> list[Event]:
            return []

    bench = Bench(1, Empty(), limits=Limits(start_after_s=-1.0))
    assert "no worker was ready" in bench.fails(WorkerStartFailed).message
