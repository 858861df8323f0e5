"""Policy: every box gets one decision, and thresholds and scores only ever push one way."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from sklearn.isotonic import IsotonicRegression

from pipelines.policy.policy import Curve, Decision, Policy, Thresholds, counts, prior
from storage.errors import ConfigError
from storage.records import Category

CATEGORIES = (Category(0, "RBC", 1), Category(1, "WBC", 2), Category(2, "Platelets", 3))
relaxed = settings(deadline=None)

share = st.floats(0, 1, width=32)
pairs = st.tuples(share, share).map(sorted)
curves = st.lists(st.tuples(share, share), min_size=1, max_size=6).map(
    lambda knots: Curve(
        scores=tuple(sorted(s for s, _ in knots)),
        probabilities=tuple(sorted(p for _, p in knots)),
    )
)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    n = draw(st.integers(0, 30))
    scores = draw(arrays(np.float32, n, elements=share))
    return scores, draw(arrays(np.int16, n, elements=st.integers(0, 2)))


def _thresholds(limits: list[list[float]], curve: Curve | None) -> Thresholds:
    by_class = np.array(limits, np.float32)
    return Thresholds(by_class[:, 1], by_class[:, 0], None if curve is None else (curve,) * 3)


any_thresholds = st.builds(_thresholds, st.lists(pairs, min_size=3, max_size=3), st.none() | curves)


@relaxed
@given(boxes(), any_thresholds, st.booleans())
def test_every_box_gets_exactly_one_decision(
    box: tuple[np.ndarray, np.ndarray], thresholds: Thresholds, queued: bool
) -> None:
    found = counts(thresholds.decide(*box, queued))
    assert sum(found.values()) == len(box[0])
    assert found["ignore" if queued else "review"] == 0


@relaxed
@given(boxes(), any_thresholds)
def test_asking_a_person_moves_only_the_band(
    box: tuple[np.ndarray, np.ndarray], thresholds: Thresholds
) -> None:
    alone, asked = thresholds.decide(*box, False), thresholds.decide(*box, True)
    moved = alone != asked
    assert (alone[moved] == Decision.IGNORE).all()
    assert (asked[moved] == Decision.REVIEW).all()


@relaxed
@given(boxes(), st.lists(pairs, min_size=3, max_size=3), st.none() | curves, share, share)
def test_counts_are_monotone_in_the_thresholds(
    box: tuple[np.ndarray, np.ndarray],
    limits: list[list[float]],
    curve: Curve | None,
    higher_accept: float,
    lower_reject: float,
) -> None:
    before = counts(_thresholds(limits, curve).decide(*box))
    raised = [[r, max(a, higher_accept)] for r, a in limits]
    lowered = [[min(r, lower_reject), a] for r, a in limits]
    assert counts(_thresholds(raised, curve).decide(*box))["accept"] <= before["accept"]
    assert counts(_thresholds(raised, curve).decide(*box))["reject"] == before["reject"]
    assert counts(_thresholds(lowered, curve).decide(*box))["reject"] <= before["reject"]
    assert counts(_thresholds(lowered, curve).decide(*box))["accept"] == before["accept"]


@relaxed
@given(boxes(), any_thresholds, st.booleans())
def test_a_higher_score_never_gets_a_lower_decision(
    box: tuple[np.ndarray, np.ndarray], thresholds: Thresholds, queued: bool
) -> None:
    scores, ids = box
    for category_id in range(3):
        own = np.sort(scores[ids == category_id])
        same = np.full(len(own), category_id, np.int16)
        assert (np.diff(thresholds.decide(own, same, queued)) >= 0).all()


def test_thresholds_belong_to_accept_and_not_to_reject() -> None:
    thresholds = Policy(accept=0.7, reject=0.1).thresholds(CATEGORIES)
    scores = np.array([0.7, np.nextafter(np.float32(0.7), np.float32(0)), 0.1, 0.05], np.float32)
    decided = thresholds.decide(scores, np.zeros(4, np.int16))
    assert [Decision(d) for d in decided] == [
        Decision.ACCEPT, Decision.IGNORE, Decision.IGNORE, Decision.REJECT,
    ]  # fmt: skip


def test_a_class_has_its_own_thresholds_and_inherits_the_rest() -> None:
    policy = Policy.from_config({"accept": 0.7, "reject": 0.1, "classes": {"WBC": {"accept": 0.4}}})
    thresholds = policy.thresholds(CATEGORIES)
    scores = np.full(2, 0.5, np.float32)
    decided = thresholds.decide(scores, np.array([0, 1], np.int16))
    assert [Decision(d) for d in decided] == [Decision.IGNORE, Decision.ACCEPT]
    assert policy.of("WBC") == (0.4, 0.1)


def test_calibration_comes_before_the_thresholds_and_is_sklearns() -> None:
    rng = np.random.default_rng(0)
    raw = rng.random(400)
    right = rng.random(400) < raw**2
    fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(raw, right)
    curve = {
        "scores": fitted.X_thresholds_.tolist(),
        "probabilities": fitted.y_thresholds_.tolist(),
    }
    policy = Policy.from_config({"accept": 0.5, "calibration": {"all": curve}})
    thresholds = policy.thresholds(CATEGORIES)
    scores = rng.random(200).astype(np.float32)
    ids = np.zeros(200, np.int16)
    expected = fitted.predict(scores.astype(np.float64))
    np.testing.assert_allclose(thresholds.probability(scores, ids), expected, atol=1e-9)
    accepted = thresholds.decide(scores, ids) == Decision.ACCEPT
    np.testing.assert_array_equal(accepted, expected.astype(np.float32) >= np.float32(0.5))


def test_prior_says_what_was_measured_on_blood_cells() -> None:
    right = prior(np.array([0.25, 0.55, 0.95], np.float32))
    np.testing.assert_allclose(right, [0.05, 0.5, 0.98], atol=0.01)


def test_yaml_round_trip(tmp_path: Path) -> None:
    policy = Policy.from_config(
        {
            "accept": 0.6,
            "reject": 0.2,
            "classes": {"RBC": {"reject": 0.3}},
            "calibration": {
                "all": {"scores": [0.1, 0.9], "probabilities": [0.0, 1.0]},
                "classes": {"WBC": {"scores": [0.5], "probabilities": [0.4]}},
            },
            "model_sha256": "ab" * 32,
        }
    )
    path = tmp_path / "policy.yaml"
    path.write_text(policy.to_yaml())
    assert Policy.load(str(path)) == policy
    assert Policy.load(str(path)).digest() == policy.digest()
    assert Policy().digest() != policy.digest()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"accept": 0.1, "reject": 0.7}, "is above"),
        ({"acept": 0.5}, "did you mean `accept`"),
        ({"accept": 1.5}, "accept"),
        ({"classes": {"RBC": {"reject": 0.9}}}, "classes.RBC: reject 0.9 is above accept 0.7"),
        (
            {"calibration": {"all": {"scores": [0.1, 0.2], "probabilities": [0.5, 0.4]}}},
            "never does",
        ),
    ],
)
def test_a_wrong_policy_says_what_is_wrong(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Policy.from_config(fields)


def test_an_unknown_class_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Platelet") as caught:
        Policy.from_config({"classes": {"Platelet": {}}}).thresholds(CATEGORIES)
    assert caught.value.hint == "did you mean 'Platelets'?"


def test_a_policy_fitted_on_another_model_is_refused() -> None:
    policy = Policy(model_sha256="ab" * 32)
    policy.thresholds(CATEGORIES, "ab" * 32)
    with pytest.raises(ConfigError, match="fitted on model"):
        policy.thresholds(CATEGORIES, "cd" * 32)


def test_a_file_that_is_not_a_policy_is_named(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("- 0.7\n")
    with pytest.raises(ConfigError, match=r"policy\.yaml holds no policy"):
        Policy.load(str(path))
