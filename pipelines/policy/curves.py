"""Curves and thresholds from judged boxes, each class leaning on all classes where it has few.

Isotonic regression (Zadrozny and Elkan 2002) of right on score, in two levels: the curve over all
classes is drawn towards the stated prior, the curve of a class towards that over all. What a curve
is drawn towards counts like ``STRENGTH`` boxes of its own, so a class of five boxes leans on the
others and a class of 1,000 does not. A class that cannot reach the precision asked for is accepted
where it comes closest, but not below a floor (``Wanted.floor``). A class whose boxes stay below the
floor accepts only boxes that are each as likely to be right as the floor says, if there are any.
The fit says so in each case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.policy.policy import Calibration, ClassThresholds, Curve, Policy, prior
from pipelines.truth.judge import IOU, JudgedBoxes
from storage.records import Category

STRENGTH = 10.0  # boxes that the prior counts for
ENOUGH_RIGHT = 10  # accepted boxes below which a precision says nothing
_FEW = 3  # likeliest boxes that must reach the floor before any of them is accepted
NOTHING = 1.0  # an accept threshold that no calibrated probability reaches
_FLOOR, _SHORT = 0.5, 0.2  # accepted boxes: right at least this often; this far below the target
_ANCHORS = (
    np.arange(1, 21).astype(np.float64) / 20
)  # scores at which a curve is held where it has no boxes
_ANCHOR_WEIGHT = 0.25  # boxes, each
_NEAR = 0.02  # of the best precision that can be reached
_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Wanted:
    """The goals that thresholds must meet.

    Attributes:
        precision: share of accepted boxes that are to be right.
        lost: largest share of the right boxes that may be dropped below ``reject``.
    """

    precision: float = 0.9
    lost: float = 0.02

    @property
    def floor(self) -> float:
        """Precision below which nothing is accepted: ``precision`` - 0.2, and 0.5 or more."""
        return min(self.precision, max(_FLOOR, self.precision - _SHORT))


def fit_policy(
    judged: JudgedBoxes,
    categories: Sequence[Category],
    wanted: Wanted,
    images: NDArray[np.bool_],
    model_sha256: str | None = None,
) -> Policy:
    """Return curves and thresholds from the boxes of these images (bool [images])."""
    used = images[judged.image]
    pooled = _curve(judged, used, prior)
    accept, reject = _thresholds(judged, used, pooled, wanted)
    curves, thresholds = {}, {}
    for category in categories:
        own = used & (judged.category_ids == category.id)
        if own.any():
            curve = _curve(judged, own, pooled)
            curves[category.name] = curve
            pair = _thresholds(judged, own, curve, wanted)
            thresholds[category.name] = ClassThresholds(accept=pair[0], reject=pair[1])
    return Policy(
        accept=accept,
        reject=reject,
        classes=thresholds,
        calibration=Calibration(all=pooled, classes=curves, iou=IOU),
        model_sha256=model_sha256,
    )


def evidence(boxes: int) -> float:
    """Return the share of a class's curve that its own boxes speak for, in [0, 1)."""
    return boxes / (boxes + STRENGTH)


def _curve(
    judged: JudgedBoxes, used: NDArray[np.bool_], towards: Callable[[_Floats], _Floats]
) -> Curve:
    from sklearn.isotonic import IsotonicRegression

    scores = judged.scores[used].astype(np.float64)
    weight = judged.weight[used] / judged.weight[used].mean()
    drawn = STRENGTH / len(scores)  # towards the other curve, at each box
    right = (weight * judged.right[used] + drawn * towards(scores)) / (weight + drawn)
    edge = 0.5 / (len(scores) + STRENGTH)  # nothing is certain: 1 would pass any threshold
    fitted = IsotonicRegression(out_of_bounds="clip", y_min=edge, y_max=1 - edge).fit(
        np.concatenate([scores, _ANCHORS]),
        np.concatenate([right, towards(_ANCHORS)]),
        np.concatenate([weight + drawn, np.full(len(_ANCHORS), _ANCHOR_WEIGHT)]),
    )
    knots = zip(fitted.X_thresholds_, fitted.y_thresholds_, strict=True)
    at, probabilities = zip(*((round(float(s), 6), round(float(p), 8)) for s, p in knots),
                            strict=True)  # fmt: skip
    return Curve(scores=at, probabilities=probabilities)


def _thresholds(
    judged: JudgedBoxes, used: NDArray[np.bool_], curve: Curve, wanted: Wanted
) -> tuple[float, float]:
    """(accept, reject) on calibrated probabilities, each between two that occur."""
    levels, level_of = np.unique(curve(judged.scores[used]), return_inverse=True)
    weight: _Floats = np.bincount(level_of, weights=judged.weight[used]).astype(np.float64)
    boxes = np.cumsum(np.bincount(level_of)[::-1])[::-1]
    good = weight * levels
    accept = _accept(levels, weight, boxes, wanted)
    lost = np.cumsum(good) - good  # right boxes below each level
    kept = np.flatnonzero(lost <= wanted.lost * good.sum())
    return accept, min(accept, _between(levels, int(kept[-1])))


def _accept(levels: _Floats, weight: _Floats, boxes: NDArray[np.int64], wanted: Wanted) -> float:
    """Return the accept threshold; a higher target never lowers it.

    The accepted boxes are right as often as asked for, by their probabilities, or as often as can
    be reached, and none of them is less than half as likely to be right. Where ten boxes cannot
    reach the floor, every accepted box is itself as likely as the floor; where not even the
    likeliest three reach it, no box is accepted.

    Args:
        levels: float64 [L], rising: probabilities that occur.
        weight: float64 [L], of their boxes.
        boxes: int64 [L], boxes of this level or more.
    """
    precision = np.cumsum((weight * levels)[::-1])[::-1] / np.cumsum(weight[::-1])[::-1]
    enough = boxes >= min(ENOUGH_RIGHT, boxes[0])
    best = float(precision[enough].max())
    if best >= wanted.floor:
        goal = min(wanted.precision, max(best - _NEAR, wanted.floor))
        likely = levels >= min(goal / 2, float(levels[enough].max()))
        return _between(levels, int(np.flatnonzero(enough & likely & (precision >= goal))[0]))
    few = boxes >= min(_FEW, boxes[0])
    if precision[few].max() < wanted.floor:
        return NOTHING
    return _between(levels, int(np.flatnonzero(levels >= wanted.floor)[0]), wanted.floor)


def _between(levels: _Floats, at: int, least: float = 0.0) -> float:
    """Just below a level, at ``least`` or more: rounding may then not move a box across."""
    below = max(levels[at - 1], least) if at else least
    return round(float(below + levels[at]) / 2, 6)
