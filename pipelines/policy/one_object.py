"""One object, one label: of boxes that lie on each other the likeliest stays, whatever its class.

Non-maximum suppression works class by class, so a detector may report one object under two
classes. As two labels that is a contradiction; the other class is an alternative.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.truth.matching import iou_of_pairs

_PAIRS_AT_ONCE = 1 << 16  # bounds memory, and fits a processor's cache


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
    order = taking_part[np.lexsort((rank[taking_part], image[taking_part]))]
    for likelier, other in _pairs(image[order]):
        overlap = iou_of_pairs(boxes[order[likelier]], boxes[order[other]]) >= iou
        for first, second in zip(order[likelier[overlap]], order[other[overlap]], strict=True):
            if out[first] < 0 and out[second] < 0:
                out[second] = first
    return out


def _pairs(image: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield all pairs of places with the same image, by first and then by second place.

    Args:
        image: [N], ascending.
    """
    places = np.arange(len(image))
    later = np.searchsorted(image, image, side="right") - places - 1
    until = np.cumsum(later)
    start = 0
    while start < len(image):
        before = until[start] - later[start]
        end = max(start + 1, int(np.searchsorted(until, before + _PAIRS_AT_ONCE, side="right")))
        some = later[start:end]
        first = np.repeat(places[start:end], some)
        nth = np.arange(len(first)) - np.repeat(until[start:end] - some - before, some)
        yield first, first + 1 + nth
        start = end
