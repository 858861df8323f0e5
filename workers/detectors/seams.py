"""Merge the boxes of an image processed in overlapping tiles across their seams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.records import Detections
from workers.images.preprocessing import Window

MATCH = 0.5  # overlap from which two boxes are of one object, as in SAHI
_NEAR = 0.04  # of a tile's side: a box that ends so near to an inner edge may be cut by it


def merged_windows(
    found: Sequence[Detections], windows: Sequence[Window], width: int, height: int
) -> Detections:
    """Detections of an image from those of its parts, each object once.

    1. A box of the whole image, which the network saw smaller, yields to any tile that holds all
       of it. That tile's word stands, also where it found nothing.
    2. The rest goes through greedy non-maximum merging by intersection over the smaller box, as
       SAHI does it, with limits: boxes of one window never merge with each other, since NMS has
       settled those; a box that no inner edge of its tile can have cut is merged by intersection
       over union, and two such boxes do not grow.
    3. A box that still overlaps a better one of another window by ``MATCH``, of their union, or of
       the smaller one where that may be cut, is dropped.

    Args:
        found: of each window, in its own pixels.
        windows: where they lie in the image.
        width, height: of the image.
    """
    boxes = [
        replace(one, boxes=one.boxes + np.array([w.x, w.y] * 2, np.float32))
        for one, w in zip(found, windows, strict=True)
    ]
    every = _together(boxes)
    part = np.repeat(np.arange(len(windows)), [len(one) for one in found])
    cut = np.concatenate(
        [_cut(one.boxes, w, width, height) for one, w in zip(boxes, windows, strict=True)]
    )
    whole = np.array([(w.width, w.height) == (width, height) for w in windows])
    stays = ~(whole[part] & _in_a_tile(every.boxes, windows, width, height))
    return merged(_picked(every, stays), part=part[stays], cut=cut[stays])


def _in_a_tile(
    boxes: NDArray[np.float32], windows: Sequence[Window], width: int, height: int
) -> NDArray[np.bool_]:
    """Return bool [N]: boxes that cross no inner edge of some tile."""
    held = np.zeros(len(boxes), np.bool_)
    for w in windows:
        if (w.width, w.height) == (width, height):
            continue  # the whole image sees nothing better
        right, bottom = w.x + w.width, w.y + w.height
        inside = (boxes[:, 0] >= w.x) | (w.x == 0)
        inside &= (boxes[:, 1] >= w.y) | (w.y == 0)
        inside &= (boxes[:, 2] <= right) | (right == width)
        inside &= (boxes[:, 3] <= bottom) | (bottom == height)
        held |= inside
    return held


def _cut(boxes: NDArray[np.float32], window: Window, width: int, height: int) -> NDArray[np.bool_]:
    """Return bool [N]: boxes that reach an inner edge of the window."""
    near_x, near_y = _NEAR * window.width, _NEAR * window.height
    right, bottom = window.x + window.width, window.y + window.height
    return np.asarray(
        ((boxes[:, 0] < window.x + near_x) & (window.x > 0))
        | ((boxes[:, 1] < window.y + near_y) & (window.y > 0))
        | ((boxes[:, 2] > right - near_x) & (right < width))
        | ((boxes[:, 3] > bottom - near_y) & (bottom < height)),
        np.bool_,
    )


def merged(
    every: Detections,
    *,
    part: NDArray[np.int64] | None = None,
    cut: NDArray[np.bool_] | None = None,
) -> Detections:
    """Greedy non-maximum merging within each class (SAHI's GreedyNMMPostprocess, metric IOS).

    From the highest score down, a box takes in those that overlap it by ``MATCH`` of the smaller
    of the two, and grows to hold them. It keeps its score, class, top-k classes, entropy and
    anchor; each side's spread comes from the box that the side comes from.

    Args:
        part: int64 [N], the window of each box; boxes of one window do not merge. None: all may.
        cut: bool [N], whether a box may end at a seam; None: all may.
    """
    order = np.argsort(-every.scores, kind="stable")
    boxes = every.boxes.astype(np.float64)
    free = np.ones(len(order), np.bool_)
    side = np.arange(len(order))[:, None].repeat(4, axis=1)  # which box each side comes from
    kept = []
    for place, index in enumerate(order):
        if not free[index]:
            continue
        kept.append(index)
        later = order[place + 1 :]
        later = later[free[later] & (every.category_ids[later] == every.category_ids[index])]
        if part is not None:
            later = later[part[later] != part[index]]
        taken = later[_overlap(boxes, index, later, cut) >= MATCH]
        if part is not None:  # one of each window: its others are other objects
            taken = taken[np.sort(np.unique(part[taken], return_index=True)[1])]
        free[taken] = False
        for other in taken:  # again, now that the box has grown
            if cut is not None and not (cut[index] or cut[other]):
                continue
            if _overlap(boxes, index, np.array([other]), cut)[0] >= MATCH:
                _grow(boxes, side, index, other)
    places = np.array(kept, np.int64)
    if part is not None and cut is not None:
        stays = _best_of_windows(
            boxes[places], every.category_ids[places], part[places], cut[places]
        )
        places = places[stays]
    return _with_sides(every, places, boxes, side)


def _best_of_windows(
    boxes: NDArray[np.float64],
    category_ids: NDArray[np.int16],
    part: NDArray[np.int64],
    cut: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Return bool [N], best first: what overlaps no better box of another window by ``MATCH``."""
    stays = np.ones(len(boxes), np.bool_)
    for index in range(1, len(boxes)):
        better = np.flatnonzero(stays[:index] & (category_ids[:index] == category_ids[index]))
        better = better[part[better] != part[index]]
        stays[index] = not (_overlap(boxes, index, better, cut) >= MATCH).any()
    return stays


def _overlap(
    boxes: NDArray[np.float64],
    index: int,
    others: NDArray[np.int64],
    cut: NDArray[np.bool_] | None,
) -> NDArray[np.float64]:
    """Intersection over the smaller area, or over the union where the smaller one is not cut."""
    one, rest = boxes[index], boxes[others]
    low, high = np.maximum(one[:2], rest[:, :2]), np.minimum(one[2:], rest[:, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=1)
    area = np.prod(np.clip(one[2:] - one[:2], 0, None))
    areas = np.prod(np.clip(rest[:, 2:] - rest[:, :2], 0, None), axis=1)
    over = np.minimum(area, areas)
    if cut is not None:
        by_seam = np.where(areas <= area, cut[others], cut[index])
        over = np.where(by_seam, over, area + areas - shared)
    return np.asarray(np.divide(shared, over, out=np.zeros_like(shared), where=over > 0))


def _grow(boxes: NDArray[np.float64], side: NDArray[np.int64], index: int, other: int) -> None:
    for k in range(4):
        further = boxes[other, k] < boxes[index, k] if k < 2 else boxes[other, k] > boxes[index, k]
        if further:
            boxes[index, k], side[index, k] = boxes[other, k], other


def _with_sides(
    every: Detections,
    kept: NDArray[np.int64],
    boxes: NDArray[np.float64],
    side: NDArray[np.int64],
) -> Detections:
    spread = None
    if every.box_std is not None:
        spread = np.take_along_axis(every.box_std, side[kept], axis=0)
    return replace(_picked(every, kept), boxes=boxes[kept].astype(np.float32), box_std=spread)


def _picked(every: Detections, which: NDArray[np.bool_] | NDArray[np.int64]) -> Detections:
    columns: dict[str, Any] = {
        field.name: None if (values := getattr(every, field.name)) is None else values[which]
        for field in fields(Detections)
    }
    return Detections(**columns)


def _together(parts: Sequence[Detections]) -> Detections:
    """Return all boxes, part after part."""
    columns = {
        field.name: [getattr(one, field.name) for one in parts] for field in fields(Detections)
    }
    joined: dict[str, Any] = {
        name: None if any(v is None for v in values) else np.concatenate(values)
        for name, values in columns.items()
    }
    return Detections(**joined)
