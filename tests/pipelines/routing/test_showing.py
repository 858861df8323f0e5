"""Which boxes reviewers see: exactly those that cost less shown than hidden, one a place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.policy.box_batch import BoxBatch, box_batch
from pipelines.policy.policy import Policy
from pipelines.routing.cost import CostModel
from pipelines.routing.route import route_run
from pipelines.routing.showing import ONE_PLACE, Show, ShowRule, pays_above
from pipelines.truth.matching import iou_matrix
from storage.errors import ConfigError
from storage.records import Detections
from storage.review.queue import queue_parts, read_head
from storage.runs.live_rows import live_tables
from storage.runs.manifest import Manifest
from storage.stores.memory import MemoryStore
from tests.support.samples.review_runs import distinct_row, random_run
from tests.support.samples.synthetic_run import boxes, make_run, tar_shard

seconds = st.floats(0.01, 60)


def batch_of(manifest: Manifest, policy: Policy | None = None) -> BoxBatch:
    (table,) = [t for _, t in live_tables(manifest)]
    thresholds = (policy or Policy()).thresholds(manifest.record.identity.categories)
    return box_batch(table, thresholds)


def run_with(found: Detections) -> Manifest:
    shard = tar_shard("a.tar")
    return make_run(MemoryStore(), {shard: [distinct_row("a.tar/0.jpg", shard, found)]})


def test_the_default_costs_pay_above_61_percent() -> None:
    assert pays_above(CostModel()) == pytest.approx((1.6 + 7.0) / 14.0)
    assert pays_above(CostModel(7.8, 9.0, 25.5)) == pytest.approx(0.6765, abs=1e-4)
    assert pays_above(CostModel(7.8, 7.0, 7.0)) == 1.0
    assert pays_above(CostModel(7.8, 0.0, 0.0)) == 1.0


@given(seconds, seconds, seconds, st.lists(st.floats(0, 1), max_size=8))
def test_no_other_choice_of_boxes_is_expected_to_take_less_time(
    per_image: float, per_box: float, per_correction: float, right: list[float]
) -> None:
    cost = CostModel(per_image, per_box, per_correction)
    p = np.array(right)

    def expected(shown: np.ndarray) -> float:  # type: ignore[type-arg]
        corrections = np.where(shown, 1 - p, p).sum()
        return float(cost.seconds(shown.sum(), corrections))

    chosen = expected(p > pays_above(cost))
    for bits in range(2 ** len(right)):
        shown = (bits >> np.arange(len(right)) & 1).astype(np.bool_)
        assert chosen <= expected(shown) + 1e-9


def test_a_page_of_boxes_shows_each_place_once_whatever_the_classes() -> None:
    manifest = random_run(MemoryStore(), 1, 60, seed=3)
    one_object_off = Policy(accept=0.7, reject=0.1, one_object=None)
    batch = batch_of(manifest, one_object_off)
    shown = ShowRule.choose("auto", CostModel()).shown(batch)
    assert shown.any()
    assert (batch.right[shown] > 0.614).all()
    assert shown.sum() < batch.standing.sum()
    for image in range(batch.images):
        here = shown & (batch.image == image)
        iou = np.triu(iou_matrix(batch.boxes[here], batch.boxes[here]), 1)
        assert (iou < ONE_PLACE).all()


def test_of_identical_boxes_the_likeliest_is_shown() -> None:
    stack = boxes([[10, 10, 110, 110]] * 3 + [[300, 10, 400, 110]], [0.9, 0.8, 0.7, 0.3],
                  [0, 1, 2, 0])  # fmt: skip
    batch = batch_of(run_with(stack))
    assert ShowRule.choose("auto", CostModel()).shown(batch).tolist() == [True] + [False] * 3
    assert ShowRule.choose("none", CostModel()).shown(batch).tolist() == [False] * 4
    assert ShowRule().shown(batch).tolist() == [True, False, False, True]  # as older versions did


def test_by_score_the_boxes_that_the_policy_accepts_are_shown() -> None:
    batch = batch_of(run_with(boxes([[10, 10, 60, 60], [90, 90, 150, 150]], [0.55, 0.45], [0, 0])),
                     Policy(accept=0.5, reject=0.1))  # fmt: skip
    assert ShowRule.choose("score", CostModel()).shown(batch).tolist() == [True, False]
    assert ShowRule.choose("auto", CostModel()).shown(batch).tolist() == [False, False]


def test_a_queue_remembers_its_rule_and_expects_the_time_that_it_takes() -> None:
    found = boxes([[10, 10, 60, 60], [90, 90, 150, 150]], [0.9, 0.4], [0, 0])
    right = (
        Policy().thresholds([]).probability(found.scores, found.category_ids)
    )  # the prior: no calibration
    expected = {
        "auto": 7.8 + 1.6 + 7.0 * (1 - right[0] + right[1]),
        "none": 7.8 + 7.0 * (right[0] + right[1]),
    }
    show: Show
    for show in ("auto", "none"):
        manifest = run_with(found)
        summary = route_run(manifest, budget="1 image", policy=Policy(), invocation="i", show=show)
        assert summary.minutes * 60 == pytest.approx(expected[show])
        head = read_head(manifest.store, queue_parts(manifest.store)[0])
        assert ShowRule.from_fields(head.show) == ShowRule.choose(show, CostModel())
    with pytest.raises(ConfigError, match=r"review\.show"):
        route_run(manifest, budget="1 image", policy=Policy(), invocation="j", show="all")  # type: ignore[arg-type]
