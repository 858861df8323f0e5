"""Class-agnostic suppression against a plain loop over all pairs."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipelines.policy.one_object import winners
from pipelines.truth.matching import iou_matrix

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
