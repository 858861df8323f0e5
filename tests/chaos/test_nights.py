"""A few of the nights' schedules; `make chaos` runs two hundred."""

from __future__ import annotations

import pytest

from tests.chaos.nights import plan, run_schedule


@pytest.mark.slow
@pytest.mark.parametrize("seed", [7, 33])
def test_whatever_a_night_brings_no_image_is_lost_in_silence(seed: int) -> None:
    verdict = run_schedule(seed)
    assert not verdict.broken, verdict.line()


def test_the_seeds_meet_every_event() -> None:
    assert plan(3) == plan(3)
    met = {event for seed in range(1, 51) for night in plan(seed).nights for event in night}
    assert met == {
        "half gone", "one gone", "zeroed page", "outage in a list", "new", "stopped",
        "garbage collected",
    }  # fmt: skip
