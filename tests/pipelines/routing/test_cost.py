"""The cost model and the budget: what is stated is what is counted."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.routing.cost import Budget, CostModel, learn_cost
from storage.errors import ConfigError


def test_cost_is_linear_in_what_there_is_to_do() -> None:
    cost = CostModel(4, 1, 10, "stated")
    np.testing.assert_allclose(cost.seconds(np.array([0, 3]), np.array([0, 2])), [4, 27])


@pytest.mark.parametrize(
    ("text", "unit", "units"),
    [
        ("12345678 images", "images", 12345678),
        ("500 images", "images", 500),
        ("1 image", "images", 1),
        (" 2.5 minutes ", "minutes", 150),
    ],
)
def test_budget_is_read(text: str, unit: str, units: float) -> None:
    budget = Budget.parse(text)
    assert (budget.unit, budget.units) == (unit, units)
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize("text", ["500", "five images", "-3 images", "3 hours", ""])
def test_another_budget_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="budget"):
        Budget.parse(text)


def test_lead_times_teach_the_cost_despite_lunch_breaks() -> None:
    rng = np.random.default_rng(1)
    shown, corrections = rng.integers(0, 30, 200), rng.integers(0, 8, 200)
    seconds = (5 + 0.8 * shown + 6 * corrections) * rng.uniform(0.8, 1.2, 200)
    seconds[::20] += 3600.0
    learned = learn_cost(shown, corrections, seconds, fallback=CostModel())
    found = (learned.per_image_s, learned.per_box_s, learned.per_correction_s)
    np.testing.assert_allclose(found, (5, 0.8, 6), rtol=0.2)


def test_few_lead_times_teach_nothing() -> None:
    stated = CostModel()
    assert learn_cost([1] * 19, [1] * 19, [9.0] * 19, fallback=stated) is stated
    assert learn_cost([1] * 30, [1] * 30, [float("nan")] * 30, fallback=stated) is stated
