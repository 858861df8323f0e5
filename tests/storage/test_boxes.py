"""Clipping: inside the image, as before; outside, on its border and without area."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from storage.boxes import clipped, has_area

sides = st.floats(-50, 150, allow_nan=False, width=32)


def test_one_size_for_all_and_one_a_box() -> None:
    boxes = np.array([[-3, 2, 8, 30], [11, 0, 12, 5]], np.float32)
    assert clipped(boxes, 10, 20).tolist() == [[0, 2, 8, 20], [10, 0, 10, 5]]
    assert clipped(boxes, [10, 20], [20, 3]).tolist() == [[0, 2, 8, 20], [11, 0, 12, 3]]
    assert has_area(clipped(boxes, 10, 20)).tolist() == [True, False]
    assert boxes[0, 0] == -3  # the given boxes stay


@given(st.lists(st.tuples(sides, sides, sides, sides), max_size=5))
def test_clipping_twice_is_clipping_once_and_never_grows_a_box(at: list[tuple[float, ...]]) -> None:
    given_ = np.array(at, np.float32).reshape(-1, 4)
    boxes = np.concatenate([np.minimum(given_[:, :2], given_[:, 2:]),
                            np.maximum(given_[:, :2], given_[:, 2:])], axis=1)  # fmt: skip
    once = clipped(boxes, 100, 80)
    assert np.array_equal(clipped(once, 100, 80), once)
    assert ((once[:, 2:] - once[:, :2]) <= (boxes[:, 2:] - boxes[:, :2])).all()
    assert ((once >= 0) & (once <= [100, 80, 100, 80])).all()
