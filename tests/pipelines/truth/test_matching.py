"""Corrections are what a person would do, each counted once."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from pipelines.truth.matching import Corrections, compare, iou_matrix

SQUARE = [10.0, 10.0, 20.0, 20.0]
SHIFTED = [16.0, 10.0, 26.0, 20.0]  # IoU 0.25 with SQUARE
FAR = [100.0, 100.0, 120.0, 120.0]


def _compare(
    boxes: list[list[float]], ids: list[int], true: list[list[float]], true_ids: list[int]
) -> Corrections:
    return compare(
        np.array(boxes, np.float32), np.array(ids), np.array(true, np.float32), np.array(true_ids)
    )


def test_each_kind_of_correction() -> None:
    assert _compare([SQUARE], [0], [SQUARE], [0]) == Corrections(right=1)
    assert _compare([SQUARE], [1], [SQUARE], [0]) == Corrections(wrong_class=1)
    assert _compare([SHIFTED], [0], [SQUARE], [0]) == Corrections(misplaced=1)
    assert _compare([FAR], [0], [SQUARE], [0]) == Corrections(spurious=1, missed=1)
    assert _compare([], [], [SQUARE, FAR], [0, 0]) == Corrections(missed=2)
    assert _compare([SHIFTED], [1], [SQUARE], [0]) == Corrections(spurious=1, missed=1)


def test_a_second_box_on_the_same_object_is_spurious() -> None:
    assert _compare([SQUARE, SQUARE], [0, 0], [SQUARE], [0]) == Corrections(right=1, spurious=1)


def test_the_better_score_gets_the_object() -> None:
    # The first box takes what it fits, although the second would fit it better.
    near = [10.0, 10.0, 20.0, 19.0]
    assert _compare([near, SQUARE], [0, 0], [SQUARE], [0]) == Corrections(right=1, spurious=1)


def test_boxes_without_area_overlap_nothing() -> None:
    point = np.array([[5.0, 5.0, 5.0, 5.0]])
    assert iou_matrix(point, point).tolist() == [[0.0]]


coordinate = st.floats(0, 50, width=32)


@st.composite
def labelled(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    n = draw(st.integers(0, 6))
    corners = draw(arrays(np.float32, (n, 2, 2), elements=coordinate))
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    return boxes, draw(arrays(np.int16, n, elements=st.integers(0, 1)))


@settings(deadline=None)
@given(labelled(), labelled())
def test_every_box_is_counted_once(
    predicted: tuple[np.ndarray, np.ndarray], true: tuple[np.ndarray, np.ndarray]
) -> None:
    found = compare(*predicted, *true)
    assert found.predicted == len(predicted[0])
    assert found.true == len(true[0])
    assert min(found.right, found.wrong_class, found.misplaced, found.spurious, found.missed) >= 0
