"""Whether two runtimes agree: by anchor, in any order, and never where one gives no number."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from storage.errors import ArtefactError
from workers.compile.agreement import difference, refuse_difference
from workers.detectors.nms import Selected

BATCH = np.zeros((2, 4, 4, 3), np.uint8)


@dataclass(frozen=True)
class Fixed:
    """A session that has one answer."""

    answer: Selected

    def run(self, batch: NDArray[np.uint8]) -> Selected:
        return self.answer


def selected(anchors: int = 20, classes: int = 3) -> Selected:
    rng = np.random.default_rng(0)
    shape = (len(BATCH), anchors)
    return Selected(
        anchors=np.tile(np.arange(anchors, dtype=np.int32), (len(BATCH), 1)),
        scores=rng.uniform(0.2, 0.9, (*shape, classes)).astype(np.float32),
        boxes=rng.uniform(0, 600, (*shape, 4)).astype(np.float32),
        box_std=rng.uniform(0, 9, (*shape, 4)).astype(np.float32),
        entropy=rng.uniform(0, 2, shape).astype(np.float32),
        total=np.zeros(len(BATCH), np.float32),
    )


def test_order_does_not_count() -> None:
    one = selected()
    order = np.random.default_rng(1).permutation(one.anchors.shape[1])
    other = Selected(
        **{
            f.name: value[:, order] if (value := getattr(one, f.name)).ndim > 1 else value
            for f in dataclasses.fields(Selected)
        }
    )
    found = difference(Fixed(one), Fixed(other), BATCH, 0.05)
    assert found.anchors == 40
    assert (found.missing, found.box_px, found.score) == (0, 0, 0)
    refuse_difference(found, "it")


@pytest.mark.parametrize("where", ["scores", "boxes"])
@pytest.mark.parametrize("value", [0.06, np.nan, np.inf])
def test_a_value_that_is_off_or_no_number_is_noticed(where: str, value: float) -> None:
    one, other = selected(), selected()
    changed: NDArray[Any] = getattr(other, where)
    changed[0, 3, 1] += value
    found = difference(Fixed(one), Fixed(other), BATCH, 0.05)
    assert not found.same
    with pytest.raises(ArtefactError, match="does not agree with torch"):
        refuse_difference(found, "it")


def test_images_without_objects_are_compared_too() -> None:
    one, other = selected(), selected()
    other.boxes[1, 4, 2] += 1
    found = difference(Fixed(one), Fixed(other), BATCH, floor=0.95)
    assert (found.anchors, found.missing, found.same) == (40, 0, False)
    other = selected()
    other.anchors[:, 7] = 99  # among the unlikely it may be a tie
    found = difference(Fixed(one), Fixed(other), BATCH, floor=0.95)
    assert (found.anchors, found.missing, found.same) == (38, 0, True)
    other.anchors[:] += 100
    assert not difference(Fixed(one), Fixed(other), BATCH, floor=0.95).same


def test_an_anchor_that_is_not_selected_is_noticed() -> None:
    one, other = selected(), selected()
    other.anchors[1, 7] = 99
    assert difference(Fixed(one), Fixed(other), BATCH, 0.05).missing == 1
