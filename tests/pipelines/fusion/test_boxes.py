"""Weighted boxes fusion equals the reference implementation; votes and agreement are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose

from pipelines.fusion.boxes import Votes, fuse_boxes

CASES = json.loads((Path(__file__).parent / "wbf_cases.json").read_text())["cases"]


def votes(
    boxes: Any, scores: Any, category_ids: Any, *, classes: int = 2, weight: float = 1.0
) -> Votes:
    return Votes(
        np.array(boxes, float).reshape(-1, 4),
        np.array(scores, float),
        np.array(category_ids, np.int64),
        np.ones(classes, bool),
        weight,
    )


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_equal_to_ensemble_boxes(case: dict[str, Any]) -> None:
    runs = [
        votes(**run, classes=case["classes"], weight=weight)
        for run, weight in zip(case["runs"], case["weights"], strict=True)
    ]
    fused = fuse_boxes(runs, case["iou"])
    wanted = case["fused"]
    assert len(fused) == len(wanted["scores"])
    assert_allclose(fused.scores, wanted["scores"], atol=1e-6)
    assert fused.category_ids.tolist() == wanted["category_ids"]
    assert_allclose(fused.boxes, np.reshape(wanted["boxes"], (-1, 4)), atol=1e-6)
    members = [one for box in fused.members for one in box]
    assert len(members) == len(set(members)) == sum(len(run["scores"]) for run in case["runs"])


def test_two_runs_that_say_the_same_agree_wholly() -> None:
    run = votes([[10, 10, 50, 50]], [0.8], [1])
    fused = fuse_boxes([run, run])
    assert fused.agreement.tolist() == [1.0]
    assert_allclose(fused.run_scores, [[0.8, 0.8]])
    assert_allclose(fused.scores, [0.8])


def test_a_box_that_one_run_drew_alone_has_half_its_score_and_no_agreement() -> None:
    fused = fuse_boxes([votes([[10, 10, 50, 50]], [0.8], [1]), votes([], [], [])])
    assert fused.agreement.tolist() == [0.0]
    assert_allclose(fused.scores, [0.4])
    assert_allclose(fused.run_scores, [[0.8, np.nan]])


def test_with_one_vote_a_run_fused_with_itself_stays_as_it_was() -> None:
    near = [[0, 0, 100, 100], [0, 0, 100, 65], [0, 0, 70, 100]]  # NMS at 0.7 leaves them apart
    run = votes(near, [0.9, 0.3, 0.2], [1, 1, 1])
    fused = fuse_boxes([run, run], one_vote=True)
    assert_allclose(fused.boxes, near)
    assert_allclose(fused.scores, [0.9, 0.3, 0.2])
    assert fused.agreement.tolist() == [1.0, 1.0, 1.0]
    averaged = fuse_boxes([run, run])  # as the reference has it: faint boxes dull a sure one
    assert averaged.scores[0] < 0.6


def test_agreement_is_overlap_times_ratio_of_scores() -> None:
    one, other = votes([[0, 0, 10, 10]], [0.8], [0]), votes([[0, 0, 10, 8]], [0.4], [0])
    assert_allclose(fuse_boxes([one, other]).agreement, [0.8 * 0.5])
    third = votes([], [], [])
    assert_allclose(fuse_boxes([one, other, third]).agreement, [0.8 * 0.5 / 3])


def test_a_run_that_lacks_the_class_neither_votes_nor_counts() -> None:
    one = votes([[0, 0, 10, 10]], [0.8], [1])
    other = Votes(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64), np.array([True, False]))
    fused = fuse_boxes([one, other])
    assert_allclose(fused.scores, [0.8])
    assert np.isnan(fused.agreement).all()
