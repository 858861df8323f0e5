"""The learning rate over the steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.training.options import FitOptions, learning_rate


@given(steps=st.integers(1, 500), warmup=st.integers(0, 500))
def test_it_never_leaves_its_bounds(steps: int, warmup: int) -> None:
    options = FitOptions(steps=steps, lr=0.01, warmup_steps=min(warmup, steps))
    rates = [learning_rate(step, options) for step in range(steps)]
    assert all(0 < rate <= 0.01 + 1e-12 for rate in rates)


def test_it_rises_linearly_to_the_peak_and_falls_to_the_final_share() -> None:
    options = FitOptions(steps=1000, lr=0.01, warmup_steps=100, final_lr_share=0.05)
    rates = [learning_rate(step, options) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01 / 100)
    assert rates[49] == pytest.approx(0.005)
    assert max(rates) == pytest.approx(0.01)
    assert rates[:100] == sorted(rates[:100])
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] == pytest.approx(0.0005, rel=0.01)


def test_an_extended_training_rises_to_the_cosine_of_all_its_steps() -> None:
    options = FitOptions(
        steps=2000, lr=0.01, warmup_steps=100, final_lr_share=0.05, extended_at=1000
    )
    planned = FitOptions(steps=2000, lr=0.01, warmup_steps=100, final_lr_share=0.05)
    rates = [learning_rate(step, options) for step in range(1000, 2000)]
    assert rates[0] == pytest.approx(0.0005, rel=0.15)  # where it had ended
    assert rates[:100] == sorted(rates[:100])
    assert rates[99:] == [learning_rate(step, planned) for step in range(1099, 2000)]
    assert rates[99] == pytest.approx(0.005, rel=0.1)
    assert rates[-1] == pytest.approx(0.0005, rel=0.01)
    short = FitOptions(steps=1050, lr=0.01, warmup_steps=100, final_lr_share=0.05, extended_at=1000)
    assert max(learning_rate(step, short) for step in range(1000, 1050)) < 0.0008
