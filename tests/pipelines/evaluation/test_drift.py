"""The drift test: silent on halves of one set, loud on another distribution, at any look."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.evaluation.drift import DriftTest, ImageStatistics, drift_between
from pipelines.evaluation.exchangeability import Floats, RankTest

NAMES = ("boxes", "mean score", "bytes a pixel")


def images(rng: np.random.Generator, n: int, *, shift: float = 0.0, spread: float = 1.0) -> Floats:
    boxes = rng.poisson(8 + shift, n)
    others = rng.normal(shift, spread, (n, len(NAMES) - 1))
    return np.column_stack([boxes, others]).astype(np.float64)


@pytest.mark.slow
def test_two_halves_of_one_set_give_no_alarm_at_any_of_ten_looks() -> None:
    rng = np.random.default_rng(5)
    one_set = images(rng, 400)
    alarms = 0
    for shuffle in range(100):
        order = rng.permutation(len(one_set))
        test = DriftTest(NAMES, one_set[order[:200]], risk=0.01, seed=shuffle)
        looks = []
        for n, i in enumerate(order[200:], 1):
            test.see(one_set[i])
            if n % 20 == 0:
                looks.append(test.alarm_after is not None)
        assert len(looks) == 10
        alarms += any(looks)
    assert alarms <= 5


@pytest.mark.parametrize("change", [{"shift": 1.0}, {"spread": 2.5}, {"spread": 0.3}])
def test_another_distribution_gives_an_alarm_within_200_images(change: dict[str, float]) -> None:
    rng = np.random.default_rng(1)
    test = DriftTest(NAMES, images(rng, 200))
    for values in images(rng, 200, **change):
        test.see(values)
    assert test.alarm_after is not None


@pytest.mark.slow
def test_capital_grows_beyond_its_mark_no_more_often_than_the_risk_says() -> None:
    rng = np.random.default_rng(2)
    beyond = 0
    for _ in range(400):
        test = RankTest(rng.normal(size=50), rng)
        for value in rng.normal(size=100):
            test.see(float(value))
        beyond += test.gambler.most >= np.log(10)
    assert beyond <= 0.1 * 400


def statistics(values: Floats, first: int) -> ImageStatistics:
    sha = tuple(f"{i:064x}" for i in range(first, first + len(values)))
    nothing = np.zeros(1, np.int64)
    return ImageStatistics(NAMES, values, sha, nothing, nothing)


def test_the_same_images_are_compared_with_themselves() -> None:
    rng = np.random.default_rng(3)
    values = images(rng, 150)
    same = drift_between(statistics(values, 0), statistics(values, 0))
    assert (same.kind, same.alarm, same.images) == ("same images", False, 150)
    moved = values.copy()
    moved[:, 1] += np.abs(rng.normal(0.01, 0.01, len(values)))  # far less than images differ
    found = drift_between(statistics(values, 0), statistics(moved, 0))
    assert found.alarm
    assert found.statistics[0].name == "mean score"
    assert "mean score" in found.sentence
    other = drift_between(statistics(values, 0), statistics(moved, 1000))
    assert (other.kind, other.alarm) == ("other images", False)
