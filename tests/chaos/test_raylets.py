"""What the schedules of stopped raylets hold; `make chaos` runs them."""

from __future__ import annotations

from tests.chaos.raylets import schedule


def test_the_seeds_stop_a_raylet_at_any_moment_for_a_while_and_for_good() -> None:
    assert schedule(3) == schedule(3)
    plans = [schedule(seed) for seed in range(1, 13)]
    assert {plan.moment for plan in plans} == {"starting", "labelling", "ending"}
    assert {plan.wakes_after_s is None for plan in plans} == {True, False}
    assert any(plan.interrupted for plan in plans)
