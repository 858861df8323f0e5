"""``labelfleet fit``: what scores mean and where thresholds go, from boxes known right or wrong.

A score of YOLO-NAS is no probability. Isotonic regression (Zadrozny and Elkan 2002) of right on
score, by class where there are enough boxes and over all classes otherwise, makes it one; on the
probabilities lie the thresholds:

    accept   the lowest from which on the accepted boxes of the class are right in so many cases
    reject   the highest below which lie at most so many of the class's right boxes

Both promise something of boxes like those fitted on. What to expect of others is measured by
five-fold cross-validation over images, and reported beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.policy.policy import Calibration, ClassThresholds, Curve, Policy
from pipelines.truth.judge import IOU, JudgedBoxes, answered_images, judge, truth_images
from storage.coco.truth import Truth
from storage.errors import ConfigError
from storage.records import Category
from storage.runs.manifest import Manifest

_ENOUGH_BOXES = 50  # of a class, for a curve and thresholds of its own
_ENOUGH_RIGHT = 10
_FOLDS = 5
_BINS = 15


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the thresholds are for.

    Attributes:
        precision: share of accepted boxes that are to be right.
        lost: largest share of the right boxes that may be dropped below ``reject``.
    """

    precision: float = 0.9
    lost: float = 0.02


@dataclass(frozen=True, slots=True)
class ClassFit:
    """One class as it was fitted; ``own`` False: too few boxes, the thresholds are the pooled ones.

    ``precision`` and ``recall`` of accepted boxes are cross-validated; None: nothing to divide by.
    """

    name: str
    boxes: int
    right: int
    true: float
    own: bool
    accept: float
    reject: float
    precision: float | None
    recall: float | None


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted policy and how far it is to be trusted.

    Attributes:
        policy: calibration and thresholds.
        images, boxes: fitted on.
        error_before, error_after: ``calibration_error`` of raw scores and of cross-validated
            probabilities.
        precision, recall: of accepted boxes, cross-validated.
        classes: one a class of the run.
        source: what said which boxes are right.
    """

    policy: Policy
    images: int
    boxes: int
    error_before: float
    error_after: float
    precision: float | None
    recall: float | None
    classes: tuple[ClassFit, ...]
    source: str

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {**asdict(self), "policy": self.policy.to_fields()}


def fit_run(
    manifest: Manifest,
    truth: Truth | None,
    wanted: Wanted | None = None,
    *,
    allow_missing: bool = False,
) -> Fit:
    """Fit a policy on a run: on ground truth, or on the answers to its audit.

    Only audit answers are used, each for as many images as it stands for: what was routed by value
    is no sample of anything.

    Raises:
        ConfigError: hardly anything to fit on.
        TruthMismatch, ReviewError: see ``judge``.
    """
    identity = manifest.record.identity
    if truth is not None:
        rows = truth_images(manifest, truth, allow_missing=allow_missing)
        source = truth.source
        judged = judge(((r.detections, t, 1.0) for r, t in rows), len(identity.categories))
    else:
        answered = answered_images(manifest)
        source = "audit answers"
        judged = judge(((r.detections, t, w) for r, t, w in answered), len(identity.categories))
    return fit(judged, identity.categories, wanted or Wanted(), source, identity.model_sha256)


def fit(
    judged: JudgedBoxes,
    categories: Sequence[Category],
    wanted: Wanted,
    source: str = "",
    model_sha256: str | None = None,
) -> Fit:
    """Fit a policy on judged boxes.

    Raises:
        ConfigError: boxes in fewer than five images, or fewer than ten right ones.
    """
    with_boxes = len(np.unique(judged.image))
    if with_boxes < _FOLDS or judged.right.sum() < _ENOUGH_RIGHT:
        raise ConfigError(
            f"{int(judged.right.sum())} right boxes in {with_boxes} images with boxes are known, "
            "too few to fit a policy on",
            hint="give --truth with more images, or have people answer more of the audit",
        )
    policy = _policy(judged, categories, wanted, np.ones(judged.images, np.bool_), model_sha256)
    held_out, accepted = _cross_validated(judged, categories, wanted)
    classes = [_class_fit(judged, policy, c, accepted) for c in categories]
    weight, true = judged.weight, judged.true_by_image.sum()
    return Fit(
        policy=policy,
        images=judged.images,
        boxes=len(judged.scores),
        error_before=calibration_error(judged.scores, judged),
        error_after=calibration_error(held_out, judged),
        precision=_share(judged.right, accepted, weight),
        recall=_ratio(weight[accepted & judged.right].sum(), true),
        classes=tuple(classes),
        source=source,
    )


def calibration_error(probabilities: NDArray[np.floating[Any]], judged: JudgedBoxes) -> float:
    """Expected calibration error: mean distance of probability and share right.

    Over 15 bins of each class, so that classes do not make up for each other.
    """
    bins = np.minimum((probabilities * _BINS).astype(np.int64), _BINS - 1)
    cell = judged.category_ids * _BINS + bins
    said, true = (
        np.bincount(cell, weights=judged.weight * values)
        for values in (probabilities.astype(np.float64), judged.right)
    )
    return float(np.abs(said - true).sum() / judged.weight.sum())


def _policy(
    judged: JudgedBoxes,
    categories: Sequence[Category],
    wanted: Wanted,
    images: NDArray[np.bool_],
    model_sha256: str | None = None,
) -> Policy:
    """Curves and thresholds from the boxes of these images."""
    used = images[judged.image]
    pooled = _curve(judged, used)
    accept, reject = _thresholds(judged, used, pooled, wanted)
    curves, thresholds = {}, {}
    for category in categories:
        own = used & (judged.category_ids == category.id)
        if own.sum() >= _ENOUGH_BOXES and judged.right[own].sum() >= _ENOUGH_RIGHT:
            curve = _curve(judged, own)
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


def _curve(judged: JudgedBoxes, used: NDArray[np.bool_]) -> Curve:
    from sklearn.isotonic import IsotonicRegression

    edge = 0.5 / used.sum()  # nothing is certain: a probability of 1 would pass any threshold
    fitted = IsotonicRegression(out_of_bounds="clip", y_min=edge, y_max=1 - edge).fit(
        judged.scores[used].astype(np.float64), judged.right[used], judged.weight[used]
    )
    knots = zip(fitted.X_thresholds_, fitted.y_thresholds_, strict=True)
    scores, probabilities = zip(*((round(float(s), 6), round(float(p), 8)) for s, p in knots),
                                strict=True)  # fmt: skip
    return Curve(scores=scores, probabilities=probabilities)


def _thresholds(
    judged: JudgedBoxes, used: NDArray[np.bool_], curve: Curve, wanted: Wanted
) -> tuple[float, float]:
    """(accept, reject) on calibrated probabilities, each between two that occur."""
    p, right, weight = curve(judged.scores[used]), judged.right[used], judged.weight[used]
    levels, level_of = np.unique(p, return_inverse=True)
    n = np.bincount(level_of, weights=weight)
    good = np.bincount(level_of, weights=weight * right)
    precision = np.cumsum(good[::-1])[::-1] / np.cumsum(n[::-1])[::-1]
    boxes = np.cumsum(np.bincount(level_of)[::-1])[::-1]
    enough = np.flatnonzero((precision >= wanted.precision) & (boxes >= _ENOUGH_RIGHT))
    accept = _between(levels, int(enough[0])) if len(enough) else 1.0
    lost = np.cumsum(good) - good  # right boxes below each level
    kept = np.flatnonzero(lost <= wanted.lost * good.sum())
    reject = _between(levels, int(kept[-1]))
    return accept, min(accept, reject)


def _between(levels: NDArray[np.float64], at: int) -> float:
    """Just below a level: rounding may then not move a box across."""
    below = levels[at - 1] if at else 0.0
    return round(float(below + levels[at]) / 2, 6)


def _cross_validated(
    judged: JudgedBoxes, categories: Sequence[Category], wanted: Wanted
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """By box: probability and acceptance, from a fit that did not see its image."""
    with_boxes = np.unique(judged.image)
    folds = np.zeros(judged.images, np.int64)
    folds[np.random.default_rng(0).permutation(with_boxes)] = np.arange(len(with_boxes)) % _FOLDS
    held_out = np.zeros(len(judged.scores))
    accepted = np.zeros(len(judged.scores), np.bool_)
    for fold in range(_FOLDS):
        policy = _policy(judged, categories, wanted, folds != fold)
        here = (folds == fold)[judged.image]
        thresholds = policy.thresholds(categories)
        ids = judged.category_ids[here].astype(np.int16)
        held_out[here] = thresholds.probability(judged.scores[here], ids)
        accepted[here] = thresholds.scores(judged.scores[here], ids) >= thresholds.accept[ids]
    return held_out, accepted


def _class_fit(
    judged: JudgedBoxes, policy: Policy, category: Category, accepted: NDArray[np.bool_]
) -> ClassFit:
    own = judged.category_ids == category.id
    true = float(judged.true_by_image[:, category.id].sum())
    accept, reject = policy.of(category.name)
    weight = judged.weight
    return ClassFit(
        name=category.name,
        boxes=int(own.sum()),
        right=int(judged.right[own].sum()),
        true=true,
        own=category.name in policy.classes,
        accept=accept,
        reject=reject,
        precision=_share(judged.right, own & accepted, weight),
        recall=_ratio(weight[own & accepted & judged.right].sum(), true),
    )


def _share(
    right: NDArray[np.bool_], among: NDArray[np.bool_], weight: NDArray[np.float64]
) -> float | None:
    return _ratio(weight[among & right].sum(), weight[among].sum())


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole > 0 else None
