"""The simulation of benchmarks/dispatch_scale.py, small: its promises, not its pace."""

from __future__ import annotations

import pytest

from benchmarks.dispatch_scale import POISON, Simulation
from pipelines.dispatch.dispatcher import DispatchRules


@pytest.mark.parametrize("seed", range(3))
def test_every_shard_ends_once_whatever_dies(seed: int) -> None:
    count = POISON // 2
    rules = DispatchRules(depth=3)
    simulation = Simulation(count, 40, seed, rules=rules, poison=500, kills=1 / 200)
    found = simulation.run(sample_every=1000)
    set_aside = {q.shard.shard_id for q in simulation.dispatcher.quarantined}
    done = {f"{i:016x}" for i, seen in enumerate(simulation.seen) if seen}
    # All ids, none twice (the simulation itself refuses a second end).
    assert done.isdisjoint(set_aside)
    assert len(done) + len(set_aside) == count
    assert {f"{i:016x}" for i in range(499, count, 500)} <= set_aside
    assert found.deaths > 0
    assert found.requeued > 0
