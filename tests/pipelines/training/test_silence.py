"""Where a class is silent: what a fit knows of it, and what its thresholds accept."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.policy.fit import with_known
from pipelines.policy.policy import Policy
from pipelines.training.silence import silent_classes
from pipelines.truth.judge import JudgedBoxes
from storage.records import Category

CATEGORIES = tuple(Category(i, name, i + 1) for i, name in enumerate(("cell", "speck", "none")))


def judged() -> JudgedBoxes:
    """Of 100 cells 80 are found; of 50 specks 30, all but 5 of them with faint boxes."""
    rows = [(0.9, 0, True)] * 80 + [(0.1, 0, False)] * 20
    rows += [(0.6, 1, True)] * 5 + [(0.05, 1, True)] * 25 + [(0.05, 1, False)] * 400
    scores, ids, right = (np.array(column) for column in zip(*rows, strict=True))
    image = np.arange(len(rows)) % 10
    true = np.zeros((10, 3))
    true[:, 0], true[:, 1] = 10, 5
    return JudgedBoxes(10, scores.astype(np.float32), ids, image, right, np.ones(len(rows)), true)


def test_the_known_share_counts_labels_and_undecided_boxes_that_are_right() -> None:
    policy = Policy.from_config(
        {"accept": 0.8, "reject": 0.3, "classes": {"cell": {}, "speck": {}, "none": {}}}
    )
    found = with_known(policy, judged(), CATEGORIES)
    shares = {name: own.known for name, own in found.classes.items()}
    assert shares == {"cell": 0.8, "speck": 0.1, "none": None}
    assert Policy.from_yaml(found.to_yaml().encode(), where="here") == found
    wider = with_known(policy.with_thresholds(None, 0.05), judged(), CATEGORIES)
    assert wider.classes["speck"].known == 0.6
    assert silent_classes(found, CATEGORIES, 0.5).keys() == {1}
    assert silent_classes(found, CATEGORIES, 0.9).keys() == {0, 1}
    assert silent_classes(wider, CATEGORIES, 0.5) == {}


def test_thresholds_by_hand_void_what_was_measured_at_the_fitted_ones() -> None:
    policy = Policy.from_config({"classes": {"cell": {"known": 0.2}}})
    assert policy.with_thresholds(0.9, None).classes["cell"].known == 0.2
    assert policy.with_thresholds(None, 0.05).classes["cell"].known is None


@pytest.mark.parametrize(
    ("own", "silent"),
    [({"accept": 1.0}, True), ({"accept": 0.95}, True), ({"accept": 0.85}, False), ({}, False)],
)
def test_a_class_is_silent_where_no_calibrated_score_is_accepted(
    own: dict[str, float], silent: bool
) -> None:
    curve = {"scores": [0.0, 1.0], "probabilities": [0.0, 0.9]}
    policy = Policy.from_config({"classes": {"cell": own}, "calibration": {"all": curve}})
    assert (0 in silent_classes(policy, CATEGORIES, 0.5)) == silent
