"""Intervals: they hold the truth as often as they say, and behave at the edges."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from pipelines.evaluation.intervals import (
    Estimate,
    Sample,
    plain,
    quotient,
    rate_estimate,
    share_estimate,
)
from pipelines.review.view import figure


def _sample(images: int, x: list[float], y: list[float]) -> Sample:
    return Sample(images, np.array(x, float), np.array(y, float))


@st.composite
def samples(draw: st.DrawFn) -> list[Sample]:
    made = []
    for _ in range(draw(st.integers(1, 3))):
        k = draw(st.integers(1, 8))
        y = draw(arrays(np.int64, k, elements=st.integers(0, 30)))
        x = np.array([draw(st.integers(0, int(n))) for n in y])
        made.append(Sample(k + draw(st.integers(0, 1000)), x.astype(float), y.astype(float)))
    return made


@settings(deadline=None)
@given(samples())
def test_an_interval_holds_its_estimate_and_stays_a_share(strata: list[Sample]) -> None:
    found = share_estimate(strata)
    assert 0 <= found.low <= found.high <= 1
    if found.value is not None:
        assert found.low <= found.value <= found.high


def test_weights_are_one_over_the_inclusion_probability() -> None:
    # 900 images of which half the boxes are right, sampled at 1 in 300; 100 all right, at 1 in 10.
    few = _sample(900, [1, 1, 1], [2, 2, 2])
    many = _sample(100, [2] * 10, [2] * 10)
    found = share_estimate([few, many])
    assert found.value == pytest.approx(0.9 * 0.5 + 0.1 * 1.0)


def test_a_census_is_certain() -> None:
    found = share_estimate([_sample(3, [1, 2, 0], [2, 2, 1])])
    assert found == Estimate(0.6, 0.6, 0.6)


def test_no_error_seen_is_not_no_error() -> None:
    found = share_estimate([_sample(10_000, [10] * 30, [10] * 30)])
    assert found.value == found.high == 1.0
    assert 0.8 < found.low < 0.95
    more = share_estimate([_sample(10_000, [10] * 300, [10] * 300)])
    assert found.low < more.low < 1.0


def test_nothing_to_divide_by_is_unknown() -> None:
    assert share_estimate([]).value is None
    assert share_estimate([_sample(10, [0, 0], [0, 0])]) == Estimate(None, 0.0, 1.0)


def test_one_image_says_next_to_nothing() -> None:
    found = share_estimate([_sample(10, [3], [4])])
    assert (found.low, found.high) == (0.0, 1.0)


def test_clustered_errors_widen_the_interval() -> None:
    spread = share_estimate([_sample(5000, [8, 10] * 20, [10] * 40)])
    bunched = share_estimate([_sample(5000, [10] * 36 + [0] * 4, [10] * 40)])
    assert spread.value == bunched.value
    assert bunched.high - bunched.low > 1.5 * (spread.high - spread.low)


def _coverage(truth: float, k: int, seed: int) -> float:
    """Of images whose boxes are right together, as often as ``truth`` says."""
    rng = np.random.default_rng(seed)
    boxes = rng.poisson(8, 3000)
    right = rng.binomial(boxes, rng.beta(truth * 5, (1 - truth) * 5, 3000))
    ratio = right.sum() / boxes.sum()
    hits = 0
    for _ in range(300):
        at = rng.choice(3000, k, replace=False)
        found = share_estimate([Sample(3000, right[at].astype(float), boxes[at].astype(float))])
        hits += found.low <= ratio <= found.high
    return hits / 300


@pytest.mark.slow
@pytest.mark.parametrize("truth", [0.3, 0.8, 0.97])
def test_the_truth_is_covered_as_often_as_promised(truth: float) -> None:
    # 0.93 promised; three standard deviations of 300 draws below it is 0.886.
    assert _coverage(truth, 30, seed=5) > 0.9


def test_rates_cover_the_truth_too() -> None:
    rng = np.random.default_rng(3)
    minutes = rng.lognormal(0, 0.5, 4000)
    errors = rng.poisson(2 * minutes)
    truth = errors.sum() / minutes.sum()
    hits = 0
    for _ in range(300):
        at = rng.choice(4000, 40, replace=False)
        found = rate_estimate([Sample(4000, errors[at].astype(float), minutes[at])])
        hits += found.low <= truth <= found.high
    assert hits / 300 > 0.9


def test_a_rate_of_nothing_found_is_bounded_by_the_rule_of_three() -> None:
    found = rate_estimate([_sample(10**9, [0, 0, 0], [10, 10, 10])])
    assert (found.value, found.low) == (0.0, 0.0)
    assert found.high == pytest.approx(0.1)


def test_a_quotient_of_rates() -> None:
    found = quotient(Estimate(4.0, 2.0, 8.0), Estimate(1.0, 0.5, 2.0))
    assert found.value == 4.0
    assert found.low == pytest.approx(4 * 2 ** -(2**0.5))
    assert found.high == pytest.approx(4 * 2 ** (2**0.5))
    assert quotient(Estimate(1.0, 0.5, 2), Estimate(0.0, 0.0, 0.1)).value is None


def test_figures_for_people_have_no_exponents_and_no_absurd_ends() -> None:
    assert [plain(v) for v in (1550.0, 96716935.27, 72.2, 25.0, 0.4567, 0.0)] == [
        "1,550", "96,716,935", "72.2", "25", "0.457", "0.00",
    ]  # fmt: skip
    assert Estimate(72.2, 0.00005, 96716935.27).vague
    assert Estimate(2.0, 0.0, float("inf")).vague
    assert not Estimate(2.0, 0.5, 8.0).vague
    assert "96" not in figure(Estimate(72.2, 0.00005, 96716935.27))
    assert figure(Estimate(2.0, 0.5, 8.0)) == "2  (0.5 to 8)"
