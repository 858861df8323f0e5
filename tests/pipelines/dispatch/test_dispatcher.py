"""Dispatcher: every shard exactly once or quarantined, whatever dies; by hand and by machine."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipelines.dispatch.dispatcher import Dispatcher, DispatchRules
from storage.records import Shard, StoredObject


def shards(n: int) -> list[Shard]:
    return [Shard(f"{i:016x}", "tar", (StoredObject(f"{i}.tar", 1, "e"),)) for i in range(n)]


def test_fills_workers_evenly_up_to_depth() -> None:
    d = Dispatcher(shards(10), DispatchRules(depth=2))
    d.worker_joined("a")
    d.worker_joined("b")
    given = d.assign(0)
    assert [(g.worker, g.shard.key) for g in given] == [
        ("a", "0.tar"), ("b", "1.tar"), ("a", "2.tar"), ("b", "3.tar"),
    ]  # fmt: skip
    assert d.assign(0) == []


def test_pulls_lazily() -> None:
    pulled = count()
    d = Dispatcher((s for s in shards(1000) if next(pulled) >= 0), DispatchRules(depth=2))
    d.worker_joined("a")
    d.assign(0)
    assert next(pulled) <= 3


def test_lost_worker_gives_its_shards_back_before_new_ones() -> None:
    d = Dispatcher(shards(4), DispatchRules(depth=2))
    d.worker_joined("a")
    d.assign(0)
    d.worker_lost("a", reason="killed")
    d.worker_joined("b")
    assert {g.shard.key for g in d.assign(1)} == {"0.tar", "1.tar"}


def test_three_errors_that_name_the_shard_quarantine_it_and_the_rest_goes_on() -> None:
    d = Dispatcher(shards(3), DispatchRules(depth=1, attempts=3))
    d.worker_joined("a")
    completed: list[str] = []
    while not d.done:
        for g in d.assign(0):
            if g.shard.key == "1.tar":
                d.failed("a", g.shard.shard_id, f"bad, attempt {g.attempt}")
            else:
                assert d.completed("a", g.shard.shard_id, 1)
                completed.append(g.shard.key)
    assert [q.shard.key for q in d.quarantined] == ["1.tar"]
    assert d.quarantined[0].errors == tuple(f"bad, attempt {i}" for i in (1, 2, 3))
    assert sorted(completed) == ["0.tar", "2.tar"]


def test_a_shard_present_at_two_deaths_runs_alone_and_only_then_is_charged() -> None:
    d = Dispatcher(shards(4), DispatchRules(depth=4, attempts=1))
    for i in range(2):
        d.worker_joined(f"w{i}")
        assert len(d.assign(0)) == 4
        d.worker_lost(f"w{i}", reason="SIGSEGV")
    assert d.quarantined == []
    killed: list[str] = []
    completed: list[str] = []
    for i in count(2):
        if d.done:
            break
        d.worker_joined(f"w{i}")
        (given,) = d.assign(0)  # alone
        if given.shard.key == "2.tar":
            d.worker_lost(f"w{i}", reason="SIGSEGV")
            killed.append(given.shard.key)
        else:
            assert d.completed(f"w{i}", given.shard.shard_id, 1)
            completed.append(given.shard.key)
            d.worker_lost(f"w{i}", reason="not needed any more")
    assert killed == ["2.tar"]
    assert [q.shard.key for q in d.quarantined] == ["2.tar"]
    assert "SIGSEGV" in d.quarantined[0].errors[0]
    assert sorted(completed) == ["0.tar", "1.tar", "3.tar"]


def test_blameless_losses_never_charge() -> None:
    d = Dispatcher(shards(1), DispatchRules(attempts=1))
    for i in range(20):
        d.worker_joined(f"w{i}")
        assert len(d.assign(0)) == 1
        d.worker_lost(f"w{i}", reason="spot notice", blameless=True)
    assert d.quarantined == []
    assert not d.done


def test_straggler_gets_one_copy_and_counts_once() -> None:
    d = Dispatcher(shards(3), DispatchRules(depth=1, straggler_min_s=5))
    d.worker_joined("fast")
    d.worker_joined("slow")
    first = {g.worker: g.shard for g in d.assign(0)}
    assert d.completed("fast", first["fast"].shard_id, 1)
    (second,) = d.assign(1)
    assert d.completed("fast", second.shard.shard_id, 2)
    assert d.assign(3) == []
    (copy,) = d.assign(10)
    assert (copy.worker, copy.shard, copy.copy) == ("fast", first["slow"], True)
    assert d.assign(20) == []
    assert d.completed("fast", copy.shard.shard_id, 11)
    assert not d.completed("slow", copy.shard.shard_id, 12)
    assert d.done


def test_a_failed_copy_does_not_charge_while_the_other_runs() -> None:
    d = Dispatcher(shards(2), DispatchRules(depth=1, attempts=1, straggler_min_s=1))
    d.worker_joined("fast")
    d.worker_joined("slow")
    held = {g.worker: g.shard for g in d.assign(0)}
    d.completed("fast", held["fast"].shard_id, 1)
    (copy,) = d.assign(100)
    assert d.failed("fast", copy.shard.shard_id, "disk full") is None
    assert d.completed("slow", copy.shard.shard_id, 101)
    assert d.done
    assert d.quarantined == []


def test_draining_worker_gets_nothing_more_but_may_finish() -> None:
    d = Dispatcher(shards(3), DispatchRules(depth=1))
    d.worker_joined("a")
    (given,) = d.assign(0)
    d.worker_draining("a")
    assert d.completed("a", given.shard.shard_id, 1)
    assert d.assign(2) == []
    assert not d.done


def test_near_the_end_an_idle_worker_takes_over_what_a_draining_one_has() -> None:
    d = Dispatcher(shards(2), DispatchRules(depth=1))
    d.worker_joined("going")
    d.worker_joined("staying")
    held = {g.worker: g.shard for g in d.assign(0)}
    d.worker_draining("going")
    d.completed("staying", held["staying"].shard_id, 1)
    (copy,) = d.assign(1)
    assert (copy.worker, copy.shard, copy.copy) == ("staying", held["going"], True)
    d.worker_lost("going", reason="its node drains", blameless=True)
    assert d.requeued_count == 0  # the copy has it already
    assert d.completed("staying", copy.shard.shard_id, 2)
    assert d.done


@pytest.mark.parametrize("depth", [1, 3])
def test_gpus_of_different_speed_take_work_at_their_own_pace(depth: int) -> None:
    seconds = {"a10": 3, "l4": 4, "h100": 1}  # a shard
    d = Dispatcher(shards(400), DispatchRules(depth=depth))
    for worker in seconds:
        d.worker_joined(worker)
    done = dict.fromkeys(seconds, 0)
    ends = dict(seconds)  # when a worker finishes the shard it is at
    now = 0
    while not d.done:
        d.assign(now)
        now += 1
        for worker, pace in seconds.items():
            held = d.holds(worker)
            if held and now >= ends[worker]:
                done[worker] += d.completed(worker, held[0], now)
                ends[worker] = now + pace
    assert sum(done.values()) == 400
    share = 400 / (1 / 3 + 1 / 4 + 1)
    for worker, pace in seconds.items():
        assert abs(done[worker] - share / pace) <= 4
    assert now <= share + 3 * 4  # the slowest one's last shards end it


def test_reports_about_unknown_workers_and_shards_change_nothing() -> None:
    d = Dispatcher(shards(1))
    assert not d.completed("ghost", "0" * 16, 0)
    assert d.holds("ghost") == []
    assert d.failed("ghost", "0" * 16, "x") is None
    d.worker_lost("ghost", reason="x")
    assert not d.done


def test_a_worker_that_fails_everything_uses_up_no_shard() -> None:
    d = Dispatcher(shards(60), DispatchRules(depth=2, attempts=3))
    for name in ("bad", "good", "better"):
        d.worker_joined(name)
    now = 0.0
    completions = 0
    while not d.done:
        now += 1
        d.assign(now)
        for shard_id in d.holds("bad"):  # fails at once, so it is always the emptiest
            d.failed("bad", shard_id, "no space left in its spool folder")
        for name in ("good", "better"):
            for shard_id in d.holds(name)[:1]:
                completions += d.completed(name, shard_id, now)
    assert d.quarantined == []
    assert completions == 60


def test_the_only_worker_left_gets_a_shard_again_that_failed_on_it() -> None:
    d = Dispatcher(shards(1), DispatchRules(attempts=3))
    d.worker_joined("a")
    for _ in range(3):
        (given,) = d.assign(0)
        d.failed("a", given.shard.shard_id, "bad")
    assert d.done
    assert len(d.quarantined) == 1


def test_closed_hands_out_nothing_and_says_whether_something_is_left() -> None:
    d = Dispatcher(shards(2), DispatchRules(depth=1))
    d.worker_joined("a")
    (given,) = d.assign(0)
    d.close()
    assert d.completed("a", given.shard.shard_id, 1)
    assert d.assign(1) == []
    assert d.done
    assert d.has_more
    last = Dispatcher(shards(1))
    last.worker_joined("a")
    (given,) = last.assign(0)
    last.close()
    last.completed("a", given.shard.shard_id, 1)
    assert not last.has_more


class RandomDeaths(RuleBasedStateMachine):
    """Any order of joins, losses, failures, completions: each shard ends once, none vanishes."""

    @initialize(n=st.integers(0, 12), depth=st.integers(1, 4), attempts=st.integers(1, 3))
    def start(self, n: int, depth: int, attempts: int) -> None:
        self.total = n
        self.now = 0.0
        self.names = count()
        self.completions: list[str] = []
        self.flying: list[tuple[str, str]] = []
        rules = DispatchRules(attempts=attempts, depth=depth, straggler_min_s=3)
        self.d = Dispatcher(shards(n), rules)

    @rule()
    def join(self) -> None:
        self.d.worker_joined(f"w{next(self.names)}")

    @rule(dt=st.floats(0, 10))
    def assign(self, dt: float) -> None:
        self.now += dt
        for g in self.d.assign(self.now):
            assert len(self.d.holds(g.worker)) <= self.d.rules.depth
            self.flying.append((g.worker, g.shard.shard_id))

    def _pick(self, data: st.DataObject) -> tuple[str, str]:
        i = data.draw(st.integers(0, len(self.flying) - 1))
        return self.flying.pop(i)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        worker, shard_id = self._pick(data)
        if self.d.completed(worker, shard_id, self.now):
            self.completions.append(shard_id)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        worker, shard_id = self._pick(data)
        self.d.failed(worker, shard_id, "error")

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), blameless=st.booleans())
    def lose(self, data: st.DataObject, blameless: bool) -> None:
        worker, _ = self._pick(data)
        self.flying = [f for f in self.flying if f[0] != worker]
        self.d.worker_lost(worker, reason="killed", blameless=blameless)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.flying) - 1))
        self.d.worker_draining(self.flying[i][0])

    @invariant()
    def none_twice(self) -> None:
        ended = [*self.completions, *(q.shard.shard_id for q in self.d.quarantined)]
        assert len(set(ended)) == len(ended) <= self.total

    def teardown(self) -> None:
        if not hasattr(self, "d"):
            return
        for i in range(1000):  # healthy from here on: everything must end
            if self.d.done:
                break
            self.d.worker_joined(f"healthy{i % 3}")
            self.assign(1.0)
            while self.flying:
                worker, shard_id = self.flying.pop()
                if self.d.completed(worker, shard_id, self.now):
                    self.completions.append(shard_id)
        assert self.d.done
        ended = [*self.completions, *(q.shard.shard_id for q in self.d.quarantined)]
        assert sorted(ended) == [s.shard_id for s in shards(self.total)]


TestRandomDeaths = RandomDeaths.TestCase
TestRandomDeaths.settings = settings(stateful_step_count=40)


@pytest.mark.slow
def test_a_thousand_workers_and_many_shards_stay_flat() -> None:
    d = Dispatcher(iter(shards(20_000)), DispatchRules(depth=3))
    for i in range(1000):
        d.worker_joined(f"w{i}")
    now = 0.0
    completions = 0
    while not d.done:
        now += 1
        d.assign(now)
        for worker in d.workers():
            for shard_id in d.holds(worker)[:1]:
                completions += d.completed(worker, shard_id, now)
        assert d.in_flight <= 3000
    assert completions == 20_000
