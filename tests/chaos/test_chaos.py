"""A handful of the chaos campaign's schedules; `make chaos` runs a hundred."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.campaign import run_schedule, undisturbed
from tests.chaos.schedule import schedule
from tests.chaos.world import World, world
from tests.support.servers.s3 import S3Server

pytestmark = pytest.mark.slow

SEEDS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def there(
    weed_s3: S3Server,
    local_ray: dict[str, str],
    nano_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in weed_s3.env().items():
            patch.setenv(name, value)
        with world(weed_s3, tmp_path_factory.mktemp("pages"), nano_checkpoint) as made:
            undisturbed(made)
            yield made


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_breaks_every_promise_holds(there: World, seed: int) -> None:
    verdict = run_schedule(there, seed)
    assert not verdict.broken, f"{verdict.line()}\n{verdict.said}"


def test_a_seed_is_a_plan_and_the_seeds_differ() -> None:
    assert schedule(7) == schedule(7)
    plans = [schedule(seed) for seed in range(1, 101)]
    assert len({replace(plan, seed=0) for plan in plans}) == 100
    assert {kind for plan in plans for _, kind, _ in plan.blows} >= {"SIGKILL", "SIGSTOP"}
    assert {plan.outage[1] for plan in plans if plan.outage} == {
        "down", "full", "credentials expired",
    }  # fmt: skip
