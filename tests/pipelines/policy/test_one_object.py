"""Class-agnostic suppression against a plain loop over all pairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.policy import one_object
from pipelines.policy.one_object import winners
from pipelines.truth.matching import iou_matrix, iou_of_pairs

corner = st.integers(0, 6)
one = st.tuples(
    st.integers(0, 2), corner, corner, st.integers(1, 6), st.integers(1, 6), st.booleans()
)


@given(st.lists(one, max_size=14), st.randoms(use_true_random=False))
def test_winners_are_those_of_the_plain_loop(found: list[tuple[int, ...]], rng: object) -> None:
    found = sorted(found, key=lambda b: b[0])
    image = np.array([b[0] for b in found], np.int64)
    boxes = np.array([(x, y, x + w, y + h) for _, x, y, w, h, _ in found], np.float64).reshape(
        -1, 4
    )
    candidates = np.array([b[5] for b in found], np.bool_)
    order = list(range(len(found)))
    rng.shuffle(order)  # type: ignore[attr-defined]
    rank = np.argsort(np.array(order, np.int64))
    iou = iou_matrix(boxes, boxes)
    expected = np.full(len(found), -1)
    standing: list[int] = []
    for at in order:
        if candidates[at]:
            first = [s for s in standing if image[s] == image[at] and iou[s, at] >= 0.5]
            if first:
                expected[at] = first[0]
            else:
                standing.append(at)
    assert winners(image, boxes, rank, candidates, 0.5).tolist() == expected.tolist()


def test_pairs_taken_a_few_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = np.random.default_rng(0)
    low = chance.uniform(0, 20, (200, 2))
    boxes = np.concatenate([low, low + chance.uniform(1, 20, (200, 2))], axis=1)
    image = np.sort(chance.integers(0, 5, 200))
    rank, candidates = chance.permutation(200), chance.uniform(size=200) < 0.9
    at_once = winners(image, boxes, rank, candidates, 0.3)
    assert (at_once >= 0).sum() > 50
    monkeypatch.setattr(one_object, "_PAIRS_AT_ONCE", 7)
    assert winners(image, boxes, rank, candidates, 0.3).tolist() == at_once.tolist()
    first, second = chance.integers(0, 200, (2, 300))
    wanted = iou_matrix(boxes, boxes)[first, second]
    assert (iou_of_pairs(boxes[first], boxes[second]) == wanted).all()
