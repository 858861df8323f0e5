"""How much mAP a model loses, and how sure that is: a paired bootstrap over images.

Images are drawn with replacement, the same draw for both models, and both are scored on each draw.
What the images have in common cancels, so the interval of the difference is far narrower than that
of either mAP; what is left is how much the loss depends on which images happened to be measured.
The matching is COCO's (all sizes, 100 boxes a class and image); the ends of the percentile interval
are widened for few images, as Hesterberg (2015) does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.coco_matching import detection_rows
from pipelines.models.measure import SURE, Expected
from storage.records import Detections

TAIL = 0.05  # on each side: the upper end is the bound that holds with 95 % confidence
DRAWS = 500
_SEED = 0
_MAX_BOXES = 100  # a class and image, as COCO counts
_IOUS = np.linspace(0.5, 0.95, 10)
Areas = tuple[float, float]  # pixels, both ends count
ALL_AREAS: Areas = (0.0, float("inf"))
_HELD = 1 << 23  # numbers of a bootstrap that are held at once
_RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True, slots=True)
class Loss:
    """Points of mAP lost, with the interval that holds the loss with 90 % confidence."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


@dataclass(frozen=True, slots=True)
class Agreement:
    """Share of sure boxes in common, None where there are none; ``low`` with 95 % confidence."""

    value: float | None
    low: float


@dataclass(frozen=True, slots=True)
class _ClassMatches:
    """One class over all images, best score first.

    Attributes:
        image: index of the image that each box is in, int64 [D].
        right, ignored: bool [T, D], by IoU threshold.
        wanted: boxes to find in each image, int64 [N].
    """

    image: NDArray[np.int64]
    right: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    wanted: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Matches:
    """What a model found on a set of images, compared with what was expected."""

    images: int
    classes: tuple[_ClassMatches, ...]

    def mean_ap(self, weights: NDArray[np.int64]) -> NDArray[np.float64]:
        """mAP in points for each row of ``weights`` [B, N], how often each image counts.

        NaN where a draw holds nothing to find.
        """
        found = [_in_blocks(one, weights) for one in self.classes if one.wanted.any()]
        if not found:
            return np.full(len(weights), np.nan)
        known = np.stack(found)
        counted = (~np.isnan(known)).sum(0)
        total = np.nansum(known, axis=0)
        return np.where(counted > 0, 100 * total / np.maximum(counted, 1), np.nan)


def match(found: Sequence[Detections], expected: Expected, areas: Areas = ALL_AREAS) -> Matches:
    """Match a model's detections, clipped to their images, with the boxes to find.

    Args:
        found: detections of each image.
        expected: the boxes to find.
        areas: only objects of this size count, as in COCO's small, medium and large.
    """
    rows = [detection_rows(1, one, None) for one in found]
    cells = [
        [_match_cell(row[row[:, 6] == k], [box for box in boxes if box["category_id"] == k], areas)
         for row, boxes in zip(rows, expected.images, strict=True)]
        for k in range(1, expected.classes + 1)
    ]  # fmt: skip
    return Matches(len(rows), tuple(_joined(of_class) for of_class in cells))


def loss_between(before: Matches, after: Matches) -> Loss:
    """Return what ``after`` loses against ``before`` on the same images."""
    images = before.images
    everything = np.ones((1, images), np.int64)
    value = float((before.mean_ap(everything) - after.mean_ap(everything))[0])
    if images < 2 or np.isnan(value):
        return Loss(0.0 if np.isnan(value) else value, -100.0, 100.0)
    draws = _draws(images)
    lost = before.mean_ap(draws) - after.mean_ap(draws)
    tail = _widened(images)
    low, high = np.quantile(lost[~np.isnan(lost)], (tail, 1 - tail))
    return Loss(value, min(float(low), value), max(float(high), value))


def agreement(before: Sequence[Detections], after: Sequence[Detections]) -> Agreement:
    """Return the share of sure boxes that two models have in common, with its bound over images.

    Sure are scores from ``SURE``; a box of one is common when the other has one of the same class
    at an IoU of 0.5 or more, each taken once. Scores that fall below count as lost, and boxes that
    only one model has count against it. ``value`` is None where neither is sure of anything.
    """
    common, every = [], []
    for a, b in zip(before, after, strict=True):
        first, second = a.scores >= SURE, b.scores >= SURE
        shared = _common(
            a.boxes[first], a.category_ids[first], b.boxes[second], b.category_ids[second]
        )
        common.append(2 * shared)
        every.append(int(first.sum() + second.sum()))
    if not sum(every):
        return Agreement(None, 1.0)
    value, images = sum(common) / sum(every), len(every)
    if images < 2:
        return Agreement(value, 0.0)
    draws = _draws(images)
    drawn = draws @ np.array(every)
    shares = (draws @ np.array(common))[drawn > 0] / drawn[drawn > 0]
    return Agreement(value, min(value, float(np.quantile(shares, _widened(images)))))


def _common(
    a: NDArray[np.float32],
    a_class: NDArray[np.integer[Any]],
    b: NDArray[np.float32],
    b_class: NDArray[np.integer[Any]],
) -> int:
    """Return how many boxes pair up one to one, nearest first."""
    overlap = _overlaps(_xywh(a), _xywh(b), crowd=False)
    overlap[a_class[:, None] != b_class[None]] = 0
    pairs = 0
    while overlap.size and overlap.max() >= _IOUS[0]:
        i, j = np.unravel_index(overlap.argmax(), overlap.shape)
        overlap[i, :] = overlap[:, j] = 0
        pairs += 1
    return pairs


def _xywh(xyxy: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = xyxy.astype(np.float64)
    return np.concatenate([wide[:, :2], wide[:, 2:] - wide[:, :2]], axis=1)


def _draws(images: int) -> NDArray[np.int64]:
    """Return how often each draw holds each image [DRAWS, images]; the same ones every time."""
    rng = np.random.default_rng(_SEED)
    return rng.multinomial(images, np.full(images, 1 / images), size=DRAWS)


def _widened(images: int) -> float:
    """Return the tail to cut to leave out ``TAIL``: percentiles of few images are too narrow."""
    from scipy.stats import norm, t  # type: ignore[import-untyped]  # scipy ships no types

    return float(norm.cdf(np.sqrt(images / (images - 1)) * t.ppf(TAIL, images - 1)))


@dataclass(frozen=True, slots=True)
class _Cell:
    scores: NDArray[np.float64]
    right: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    wanted: int


def _match_cell(rows: NDArray[np.float64], boxes: Sequence[dict[str, Any]], areas: Areas) -> _Cell:
    """Match one class in one image: each box takes the best true box left, as in COCO.

    True boxes of another size and crowds are taken only where nothing else fits, and what takes
    them counts neither way; nor does an unmatched box of another size.
    """
    rows = rows[np.argsort(-rows[:, 5], kind="stable")][:_MAX_BOXES]
    counted = [b for b in boxes if not b["ignore"] and areas[0] <= b["area"] <= areas[1]]
    aside = [b for b in boxes if not b["ignore"] and not areas[0] <= b["area"] <= areas[1]]
    crowd = _bboxes([b for b in boxes if b["ignore"]])
    right = np.zeros((len(_IOUS), len(rows)), np.bool_)
    own = rows[:, 3] * rows[:, 4]
    ignored = np.repeat(((own < areas[0]) | (own > areas[1]))[None], len(_IOUS), axis=0)
    if len(rows) and boxes:
        overlap, beside = (
            _overlaps(rows[:, 1:5], _bboxes(some), crowd=False) for some in (counted, aside)
        )
        inside = _overlaps(rows[:, 1:5], crowd, crowd=True).max(1, initial=0.0)
        free, free_aside = (np.ones((len(_IOUS), len(some)), np.bool_) for some in (counted, aside))
        for d in range(len(rows)):
            if counted:
                right[:, d] = _take(free, overlap[d])
            if aside:
                ignored[:, d] |= _take(free_aside & ~right[:, d, None], beside[d], free_aside)
        ignored |= inside[None] >= _IOUS[:, None]
        ignored &= ~right
    return _Cell(rows[:, 5], right, ignored, len(counted))


def _bboxes(boxes: Sequence[dict[str, Any]]) -> NDArray[np.float64]:
    return np.array([b["bbox"] for b in boxes], np.float64).reshape(-1, 4)


def _take(
    open_: NDArray[np.bool_], overlap: NDArray[np.float64], free: NDArray[np.bool_] | None = None
) -> NDArray[np.bool_]:
    """Take the best true box at each IoU threshold; bool [T]: where one fits.

    Args:
        open_: bool [T, G]: boxes that may be taken.
        overlap: with each of them, float64 [G].
        free: where to mark what was taken; None: in ``open_``.
    """
    fits = np.where(open_ & (overlap >= _IOUS[:, None]), overlap, -1.0)
    best = fits.shape[1] - 1 - fits[:, ::-1].argmax(1)  # the last of equals, as COCO
    found = np.asarray(fits.max(1) >= 0)
    taken = np.flatnonzero(found)
    (open_ if free is None else free)[taken, best[taken]] = False
    return found


def _overlaps(
    found: NDArray[np.float64], true: NDArray[np.float64], *, crowd: bool
) -> NDArray[np.float64]:
    """IoU of xywh boxes [D, G]; of a crowd, the share of the found box that lies in it."""
    low = np.maximum(found[:, None, :2], true[None, :, :2])
    high = np.minimum(
        found[:, None, :2] + found[:, None, 2:], true[None, :, :2] + true[None, :, 2:]
    )
    inter = np.prod(np.clip(high - low, 0, None), axis=2)
    own = (found[:, 2] * found[:, 3])[:, None]
    union = own if crowd else own + (true[:, 2] * true[:, 3])[None] - inter
    return np.asarray(inter / np.maximum(union, 1e-12))


def _joined(cells: Sequence[_Cell]) -> _ClassMatches:
    image = np.repeat(np.arange(len(cells)), [len(one.scores) for one in cells])
    order = np.argsort(-np.concatenate([one.scores for one in cells]), kind="stable")
    return _ClassMatches(
        image[order],
        np.concatenate([one.right for one in cells], axis=1)[:, order],
        np.concatenate([one.ignored for one in cells], axis=1)[:, order],
        np.array([one.wanted for one in cells], np.int64),
    )


def _in_blocks(one: _ClassMatches, weights: NDArray[np.int64]) -> NDArray[np.float64]:
    """As ``_average_precision``, a few draws at a time: memory does not grow with the boxes."""
    step = max(1, _HELD // max(1, len(one.image)))
    blocks = [weights[at : at + step] for at in range(0, len(weights), step)]
    return np.concatenate([_average_precision(one, block) for block in blocks])


def _average_precision(one: _ClassMatches, weights: NDArray[np.int64]) -> NDArray[np.float64]:
    """AP over all IoU thresholds [B]; NaN in a draw without this class.

    Precision is highest at boxes that are right, so the curve is looked at there alone.
    """
    wanted = weights @ one.wanted
    total = np.zeros(len(weights))
    for right, ignored in zip(one.right, one.ignored, strict=True):
        kept = ~ignored
        places = np.flatnonzero(right[kept])
        if not len(places):
            continue
        count = weights[:, one.image[kept]]
        seen = np.cumsum(count, axis=1)[:, places]
        hits = np.cumsum(count[:, places], axis=1)
        precision = np.maximum.accumulate((hits / np.maximum(seen, 1))[:, ::-1], axis=1)[:, ::-1]
        recall = hits / np.maximum(wanted, 1)[:, None]
        levels = np.searchsorted(_RECALLS, recall.ravel(), side="right").reshape(recall.shape)
        reached = np.diff(levels, axis=1, prepend=0)  # levels of recall that begin at this box
        total += (precision * reached).sum(1) / len(_RECALLS)
    return np.where(wanted > 0, total / len(_IOUS), np.nan)
