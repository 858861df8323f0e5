"""``labelfleet fit``: calibrate scores and set thresholds, from boxes known right or wrong.

A YOLO-NAS score is not a probability. Curves by class make it one (see ``curves``), and the
thresholds lie on the probabilities:

    accept   the lowest from which the accepted boxes of the class are right as often as asked for,
             or closest to it, but not below a floor
    reject   the highest below which at most a given share of the class's right boxes lies

Both describe boxes like those fitted on. What to expect of others is measured by five-fold
cross-validation over images, and reported beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.policy.curves import ENOUGH_RIGHT, NOTHING, Wanted, evidence, fit_policy
from pipelines.policy.ignore_band import JudgedImage, bound_band, ignored_share
from pipelines.policy.policy import Decision, Policy
from pipelines.truth.audit_images import nothing_counts
from pipelines.truth.bulk import accepted_in_bulk
from pipelines.truth.judge import JudgedBoxes, answered_images, judge, truth_images
from storage.coco.truth import Truth
from storage.errors import ConfigError
from storage.records import Category
from storage.review.answers import read_answers, standing
from storage.runs.manifest import Manifest

_ENOUGH_IMAGES = 30  # below, a fit says how thin its evidence is
_HALF = 0.5  # evidence below which a class leans on the others more than on itself
_SLACK = 0.02  # of precision, before a missed target is worth a warning
_MUCH = 0.25  # share of the image area that is worth a warning
FOLDS = 5  # of the cross-validation; fewer images with boxes cannot be fitted on
_BINS = 15


@dataclass(frozen=True, slots=True)
class ClassFit:
    """One class as it was fitted.

    Attributes:
        name: of the class.
        boxes, right, true: predicted boxes, those that are right, true objects (weighted).
        evidence: share of its curve that its own boxes speak for; all classes speak for the rest.
        accept, reject: thresholds, probabilities.
        accepted: boxes from ``accept`` on, cross-validated, as the next two are.
        precision, recall: of accepted boxes; None: nothing to divide by.
        met: boxes are accepted and reach the precision asked for, up to two points.
    """

    name: str
    boxes: int
    right: int
    true: float
    evidence: float
    accept: float
    reject: float
    accepted: int
    precision: float | None
    recall: float | None
    met: bool

    @property
    def leans(self) -> bool:
        """Whether other classes' boxes count for more than its own."""
        return self.evidence < _HALF


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted policy and how far to trust it.

    Attributes:
        policy: calibration and thresholds.
        images, boxes: fitted on.
        error_before, error_after: ``calibration_error`` of raw scores and of cross-validated
            probabilities.
        precision, recall: of accepted boxes, cross-validated.
        classes: one a class of the run.
        source: what said which boxes are right.
        ignored_area: mean share of the image area between the thresholds; None: not measured.
        warnings: what a reader must know before using the policy.
        refused: why the policy must not be used; None: it may be.
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
    ignored_area: float | None = None
    warnings: tuple[str, ...] = ()
    refused: str | None = None

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "policy": self.policy.to_fields()}


def fit_run(
    manifest: Manifest,
    truth: Truth | None,
    wanted: Wanted | None = None,
    *,
    allow_missing: bool = False,
    count_bulk: bool = False,
    ignore_area: float | None = None,
) -> Fit:
    """Fit a policy on a run: on ground truth, or on the answers to its audit.

    Only audit answers are used, each for as many images as it stands for: what was routed by value
    is not a random sample.

    Args:
        manifest: the run.
        truth: COCO ground truth; None: the audit's answers.
        wanted: what the thresholds are for.
        allow_missing: leave out images of the truth that the run has no row for.
        count_bulk: predictions accepted in bulk count as answers.
        ignore_area: largest mean share of the image area between the thresholds; ``reject`` is
            raised until it holds.

    Raises:
        ConfigError: hardly anything to fit on.
        TruthMismatch, ReviewError: see ``judge``.
    """
    identity = manifest.record.identity
    if truth is not None:
        rows = truth_images(manifest, truth, allow_missing=allow_missing)
        known = [(row, true, 1.0) for row, true in rows]
        source = truth.source
    else:
        known = list(answered_images(manifest, count_bulk=count_bulk))
        source = "audit answers"
        if not known:
            raise nothing_counts(
                manifest, count_bulk=count_bulk,
                so=", and no ground truth is given: there is nothing to fit on",
            )  # fmt: skip
    judged = judge(((row.detections, t, w) for row, t, w in known), len(identity.categories))
    found = fit(judged, identity.categories, wanted or Wanted(), source, identity.model_sha256)
    policy = found.policy.model_copy(update={"precision": identity.precision})
    found = replace(found, policy=policy)
    images = [JudgedImage(r.detections, r.width, r.height, w) for r, _, w in known]
    bulk = _bulk_warning(manifest, count_bulk) if truth is None else ()
    found = _with_band(found, images, identity.categories, ignore_area, bulk)
    return replace(found, policy=with_known(found.policy, judged, identity.categories))


def with_known(policy: Policy, judged: JudgedBoxes, categories: Sequence[Category]) -> Policy:
    """Return the policy with the share of each class's objects that it keeps, as label or
    undecided. Classes without a true object get none."""
    ids = judged.category_ids.astype(np.int16)
    decided = policy.thresholds(categories).decide(judged.scores, ids)
    kept = judged.right & (decided >= Decision.IGNORE)
    classes = dict(policy.classes)
    for category in categories:
        true = float(judged.true_by_image[:, category.id].sum())
        own = classes.get(category.name)
        if own is not None and true > 0:
            found = float(judged.weight[kept & (judged.category_ids == category.id)].sum()) / true
            known = round(min(found, 1.0), 4)
            classes[category.name] = own.model_copy(update={"known": known})
    return policy.model_copy(update={"classes": classes})


def _bulk_warning(manifest: Manifest, counted: bool) -> tuple[str, ...]:
    """Return the warning about answers that were given in bulk."""
    n = len({a.sha256 for a in standing(read_answers(manifest.store)) if accepted_in_bulk(a)})
    if not n:
        return ()
    what = f"{n} images were accepted in bulk, with no time spent on them"
    return (f"{what}; counted as asked" if counted else f"{what}: not counted (--count-bulk)",)


def _with_band(
    found: Fit,
    images: Sequence[JudgedImage],
    categories: Sequence[Category],
    at_most: float | None,
    warnings: tuple[str, ...],
) -> Fit:
    """Return the fit with its ignore band measured, and bounded where that is asked for."""
    policy = found.policy
    if at_most is not None:
        policy = bound_band(policy, images, categories, at_most)
    share = ignored_share(images, policy, categories)
    if share > _MUCH:
        warnings += (
            f"boxes between the thresholds cover {share:.0%} of the image area, where training "
            "learns nothing: bound it with --ignore-area, or `fit.ignore_area` in a round",
        )
    rejects = {c.name: policy.of(c.name)[1] for c in categories}
    classes = tuple(replace(c, reject=rejects[c.name]) for c in found.classes)
    return replace(found, policy=policy, classes=classes, ignored_area=share,
                   warnings=(*found.warnings, *warnings))  # fmt: skip


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
    if with_boxes < FOLDS or judged.right.sum() < ENOUGH_RIGHT:
        raise ConfigError(
            f"{int(judged.right.sum())} right boxes in {with_boxes} images with boxes are known, "
            "too few to fit a policy on",
            hint="give --truth with more images, or have people answer more of the audit",
        )
    policy = fit_policy(judged, categories, wanted, np.ones(judged.images, np.bool_), model_sha256)
    held_out, accepted = _cross_validated(judged, categories, wanted)
    classes = tuple(_class_fit(judged, policy, c, accepted, wanted) for c in categories)
    weight, true = judged.weight, judged.true_by_image.sum()
    precision = _share(judged.right, accepted, weight)
    return Fit(
        policy=policy,
        images=judged.images,
        boxes=len(judged.scores),
        error_before=calibration_error(judged.scores, judged),
        error_after=calibration_error(held_out, judged),
        precision=precision,
        recall=_ratio(weight[accepted & judged.right].sum(), true),
        classes=classes,
        source=source,
        warnings=tuple(_warnings(with_boxes, len(judged.scores), classes, wanted)),
        refused=_refused(precision, classes, wanted),
    )


def _refused(precision: float | None, classes: Sequence[ClassFit], wanted: Wanted) -> str | None:
    """Return why a policy of this cross-validated precision must not be used, or None."""
    if precision is None or all(c.accept >= NOTHING for c in classes):
        return f"no class has boxes that are right {wanted.floor:.0%} of the time or more"
    if precision < wanted.floor:
        return (
            f"only {precision:.0%} of the accepted boxes are right, where {wanted.precision:.0%} "
            f"was asked for and {wanted.floor:.0%} is the least"
        )
    return None


def _warnings(images: int, boxes: int, classes: Sequence[ClassFit], wanted: Wanted) -> list[str]:
    """Thin evidence, and classes that miss the precision asked for."""
    said = []
    if images < _ENOUGH_IMAGES:
        said.append(
            f"only {images} images with {boxes} boxes: the prior counts for "
            f"{1 - evidence(boxes):.0%} of the curve over all classes; audit more images"
        )
    for c in classes:
        if not c.boxes:
            said.append(f"{c.name}: no box was judged; it takes the curve of all classes")
        elif c.accept >= NOTHING:
            said.append(
                f"{c.name}: {wanted.precision:.0%} right is not reached; none of its {c.boxes:,} "
                f"boxes is accepted: not even the likeliest are right {wanted.floor:.0%} of "
                "the time"
            )
        elif not c.met:
            share = "none" if c.precision is None else f"{c.precision:.0%}"
            said.append(
                f"{c.name}: {wanted.precision:.0%} right is not reached; of {c.accepted:,} "
                f"accepted boxes (of {c.boxes:,}) {share} are right"
            )
    return said


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


def _cross_validated(
    judged: JudgedBoxes, categories: Sequence[Category], wanted: Wanted
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """By box: probability and acceptance, from a fit that did not see its image."""
    with_boxes = np.unique(judged.image)
    folds = np.zeros(judged.images, np.int64)
    folds[np.random.default_rng(0).permutation(with_boxes)] = np.arange(len(with_boxes)) % FOLDS
    held_out = np.zeros(len(judged.scores))
    accepted = np.zeros(len(judged.scores), np.bool_)
    for fold in range(FOLDS):
        policy = fit_policy(judged, categories, wanted, folds != fold)
        here = (folds == fold)[judged.image]
        thresholds = policy.thresholds(categories)
        ids = judged.category_ids[here].astype(np.int16)
        held_out[here] = thresholds.probability(judged.scores[here], ids)
        accepted[here] = thresholds.scores(judged.scores[here], ids) >= thresholds.accept[ids]
    return held_out, accepted


def _class_fit(
    judged: JudgedBoxes,
    policy: Policy,
    category: Category,
    accepted: NDArray[np.bool_],
    wanted: Wanted,
) -> ClassFit:
    own = judged.category_ids == category.id
    true = float(judged.true_by_image[:, category.id].sum())
    accept, reject = policy.of(category.name)
    weight = judged.weight
    precision = _share(judged.right, own & accepted, weight)
    return ClassFit(
        name=category.name,
        boxes=int(own.sum()),
        right=int(judged.right[own].sum()),
        true=true,
        evidence=evidence(int(own.sum())),
        accept=accept,
        reject=reject,
        accepted=int((own & accepted).sum()),
        precision=precision,
        recall=_ratio(weight[own & accepted & judged.right].sum(), true),
        met=accept < NOTHING and precision is not None and precision >= wanted.precision - _SLACK,
    )


def _share(
    right: NDArray[np.bool_], among: NDArray[np.bool_], weight: NDArray[np.float64]
) -> float | None:
    return _ratio(weight[among & right].sum(), weight[among].sum())


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole > 0 else None
