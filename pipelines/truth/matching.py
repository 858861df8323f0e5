"""Count what a person would have to correct: predicted boxes against true boxes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.floating[Any]]
Ids = NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class Corrections:
    """How predicted boxes of one image differ from the truth; each correction is counted once.

    Attributes:
        right: predictions with the class and IoU >= 0.5 of a true box.
        wrong_class: IoU >= 0.5 with a true box of another class.
        misplaced: the class, but IoU in [0.1, 0.5): to be moved.
        spurious: predictions with nothing there: to be deleted.
        missed: true boxes without a prediction: to be drawn.
    """

    right: int = 0
    wrong_class: int = 0
    misplaced: int = 0
    spurious: int = 0
    missed: int = 0

    @property
    def errors(self) -> int:
        """Everything that is not right."""
        return self.wrong_class + self.misplaced + self.spurious + self.missed

    @property
    def predicted(self) -> int:
        """Predicted boxes."""
        return self.right + self.wrong_class + self.misplaced + self.spurious

    @property
    def true(self) -> int:
        """True boxes."""
        return self.right + self.wrong_class + self.misplaced + self.missed

    def __add__(self, other: Corrections) -> Corrections:
        sums = (getattr(self, f.name) + getattr(other, f.name) for f in fields(Corrections))
        return Corrections(*sums)


def iou_matrix(a: Boxes, b: Boxes) -> NDArray[np.float64]:
    """Return the IoU of xyxy boxes [N, 4] and [M, 4]: float64 [N, M]; 0 for boxes without area."""
    a, b = np.asarray(a, np.float64).reshape(-1, 4), np.asarray(b, np.float64).reshape(-1, 4)
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    union = _area(a)[:, None] + _area(b)[None, :] - shared
    out: NDArray[np.float64] = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return out


def iou_of_pairs(a: Boxes, b: Boxes) -> NDArray[np.float64]:
    """Return the IoU of xyxy boxes [N, 4] with those of the same index: float64 [N].

    ``iou_matrix``'s numbers to the bit, where only some of its cells are wanted.
    """
    ax1, ay1, ax2, ay2 = _columns(a)
    bx1, by1, bx2, by2 = _columns(b)
    wide = np.maximum(np.minimum(ax2, bx2) - np.maximum(ax1, bx1), 0.0)
    shared = wide * np.maximum(np.minimum(ay2, by2) - np.maximum(ay1, by1), 0.0)
    area_a = np.maximum(ax2 - ax1, 0.0) * np.maximum(ay2 - ay1, 0.0)
    area_b = np.maximum(bx2 - bx1, 0.0) * np.maximum(by2 - by1, 0.0)
    union = area_a + area_b - shared
    out: NDArray[np.float64] = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return out


def covered(boxes: Boxes, by: Boxes) -> NDArray[np.bool_]:
    """bool [N]: boxes [N, 4] that one of ``by`` [M, 4] overlaps with IoU >= 0.5."""
    iou = iou_matrix(boxes, by)
    return np.asarray((iou >= 0.5).any(axis=1) if iou.size else np.zeros(len(iou), np.bool_))


def match(iou: NDArray[np.float64], at_least: float) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Pair greedily in the order of rows, each with its best free column, as COCO's matching does.

    Args:
        iou: [N, M], rows by falling score; pairs that may not be made hold 0.
        at_least: smallest IoU of a pair, above 0.

    Returns:
        Row indices and column indices of the pairs.
    """
    free = iou.copy()
    rows, columns = [], []
    for row in range(free.shape[0] if free.shape[1] else 0):
        column = int(free[row].argmax())
        if free[row, column] >= at_least:
            rows.append(row)
            columns.append(column)
            free[:, column] = 0.0
    return np.array(rows, np.intp), np.array(columns, np.intp)


Pairs = tuple[NDArray[np.intp], NDArray[np.intp]]


@dataclass(frozen=True, slots=True)
class Pairing:
    """Which prediction goes with which true box, by index; see ``Corrections`` for the kinds."""

    right: Pairs
    wrong_class: Pairs
    misplaced: Pairs
    spurious: NDArray[np.intp]
    missed: NDArray[np.intp]

    def count(self) -> Corrections:
        """Return how many there are of each."""
        return Corrections(
            right=len(self.right[0]),
            wrong_class=len(self.wrong_class[0]),
            misplaced=len(self.misplaced[0]),
            spurious=len(self.spurious),
            missed=len(self.missed),
        )


def compare(boxes: Boxes, ids: Ids, true_boxes: Boxes, true_ids: Ids) -> Corrections:
    """Count what a person would correct in one image; arguments as for ``pair``."""
    return pair(boxes, ids, true_boxes, true_ids).count()


def pair(boxes: Boxes, ids: Ids, true_boxes: Boxes, true_ids: Ids) -> Pairing:
    """Classify every box of one image by what a person would do with it.

    Args:
        boxes: xyxy [N, 4], by falling score.
        ids: [N] class ids.
        true_boxes: xyxy [M, 4].
        true_ids: [M] class ids.
    """
    iou = iou_matrix(boxes, true_boxes)
    same = np.asarray(ids)[:, None] == np.asarray(true_ids)[None, :]
    rows_left, columns_left = (np.ones(n, np.bool_) for n in iou.shape)
    found = []
    for allowed, at_least in ((same, 0.5), (~same, 0.5), (same, 0.1)):
        rows, columns = match(np.where(allowed, iou, 0.0), at_least)
        rows_left[rows], columns_left[columns] = False, False
        iou[rows] = 0.0
        iou[:, columns] = 0.0
        found.append((rows, columns))
    right, wrong_class, misplaced = found
    spurious, missed = np.flatnonzero(rows_left), np.flatnonzero(columns_left)
    return Pairing(right, wrong_class, misplaced, spurious, missed)


def _columns(boxes: Boxes) -> NDArray[np.float64]:
    """[4, N], each side contiguous."""
    return np.ascontiguousarray(np.asarray(boxes, np.float64).reshape(-1, 4).T)


def _area(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    out: NDArray[np.float64] = np.prod(np.clip(boxes[:, 2:] - boxes[:, :2], 0, None), axis=1)
    return out
