"""One object, one label: of boxes that lie on each other the likeliest stays, whatever its class.

Non-maximum suppression works class by class, so a detector may report one object under two
classes. As two labels that is a contradiction; the other class is an alternative.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.truth.matching import iou_matrix


def winners(
    image: NDArray[np.int64],
    boxes: NDArray[np.floating[Any]],
    rank: NDArray[np.int64],
    candidates: NDArray[np.bool_],
    iou: float,
) -> NDArray[np.int64]:
    """For each box the index of the box that stands for the same object, -1: it stands itself.

    Greedy, as in class-agnostic non-maximum suppression: in the order of ``rank`` a box that
    overlaps one that stands with at least ``iou`` yields to the first such.

    Args:
        image: [N], which image a box is in, ascending.
        boxes: xyxy [N, 4].
        rank: [N], the smaller the likelier.
        candidates: bool [N], boxes that take part.
        iou: in (0, 1].

    Returns:
        int64 [N].
    """
    out = np.full(len(image), -1, np.int64)
    taking_part = np.flatnonzero(candidates)
    starts = np.flatnonzero(np.diff(image[taking_part], prepend=-1))
    for group in np.split(taking_part, starts[1:]):
        if len(group) > 1:
            _settle(group[np.argsort(rank[group], kind="stable")], boxes, iou, out)
    return out


def _settle(
    order: NDArray[np.int64],
    boxes: NDArray[np.floating[Any]],
    iou: float,
    out: NDArray[np.int64],
) -> None:
    overlap = iou_matrix(boxes[order], boxes[order]) >= iou
    for i in np.flatnonzero(np.triu(overlap, 1).any(axis=1)):
        if out[order[i]] < 0:
            beaten = np.flatnonzero(overlap[i, i + 1 :]) + i + 1
            open_ = order[beaten][out[order[beaten]] < 0]
            out[open_] = order[i]
