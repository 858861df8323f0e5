"""Diagnose a run's labels against ground truth: at its policy, by kind and by class.

Error types follow TIDE (Bolya et al., ECCV 2020), as counts of accepted boxes and missed objects;
calibration errors are D-ECE (Küppers et al., CVPRW 2020) and LaECE (Oksuz et al., CVPR 2023), over
all boxes of the run, before and after the policy's calibration.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.policy.box_batch import BoxBatch, box_batch
from pipelines.policy.policy import Policy, Thresholds
from pipelines.truth.coco_truth import Join
from pipelines.truth.judge import IOU, TrueBoxes, true_boxes
from pipelines.truth.matching import iou_matrix, match
from storage.coco.truth import Truth
from storage.runs.live_rows import live_tables
from storage.runs.manifest import Manifest

ERROR_TYPES = ("class", "location", "class_and_location", "duplicate", "background", "missed")
BINS = 25  # of the confidence, as LaECE has them
_NEAR = 0.1  # IoU below which a box has nothing to do with an object: TIDE's background threshold
_WORST = 24
_COLUMNS = ("image_id", "status", "width", "height", "detections")


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Calibration errors in [0, 1]; None without boxes."""

    d_ece: float | None
    la_ece: float | None


@dataclass(frozen=True, slots=True)
class Missed:
    """An object that no accepted box found.

    Attributes:
        image_id: of its image.
        xyxy: in pixels of the upright image.
        name: its class.
        share: of the image's area: the larger, the worse.
    """

    image_id: str
    xyxy: tuple[float, float, float, float]
    name: str
    share: float


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A run's labels under one policy.

    Attributes:
        policy: its digest.
        precision, recall: of accepted boxes at IoU 0.5; None without boxes, without objects.
        accepted, objects: how many there are.
        errors: accepted boxes and objects by ``ERROR_TYPES``.
        classes: names, in the order of ``confusion``.
        confusion: objects by [true class, class of the box on them]; the last row: boxes on
            nothing; the last column: objects without a box.
        raw, calibrated: of raw scores, and of the policy's probabilities.
        worst: the largest missed objects.
    """

    policy: str
    precision: float | None
    recall: float | None
    accepted: int
    objects: int
    errors: dict[str, int]
    classes: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    raw: Calibrated
    calibrated: Calibrated
    worst: tuple[Missed, ...]


def diagnose(
    manifest: Manifest,
    truth: Truth,
    join: Join,
    classes: Mapping[int, int],
    ignore: Collection[int],
    policy: Policy,
) -> Diagnosis:
    """Compare a run's boxes under a policy with the truth of the joined images.

    Args:
        manifest, truth, join: the run, the file, and what joins them.
        classes: the run's category id by the truth's, for the classes that both have.
        ignore: the truth's ids whose boxes are regions to leave out.
        policy: decides which boxes are labels.
    """
    categories = manifest.record.identity.categories
    thresholds = policy.thresholds(categories, manifest.record.identity.model_sha256)
    found = _Found([categories[k].name for k in classes.values()], list(classes.values()))
    wanted = pa.array(list(join.image_of_row), pa.string())
    for _, table in live_tables(manifest, list(_COLUMNS), only=join.shard_ids):
        joined = table.filter(pc.is_in(table.column("image_id"), wanted))
        for image in _images(joined, thresholds, truth, join, classes, ignore):
            found.add(image)
    return found.result(policy.digest())


@dataclass(frozen=True, slots=True)
class _Image:
    """One image: its boxes in the run's order, by falling score, and what is true of it."""

    image_id: str
    size: tuple[int, int]
    boxes: NDArray[np.float32]
    ids: NDArray[np.int16]
    scores: NDArray[np.float32]
    right: NDArray[np.float64]
    accepted: NDArray[np.bool_]
    true: TrueBoxes


def _images(
    table: pa.Table,
    thresholds: Thresholds,
    truth: Truth,
    join: Join,
    classes: Mapping[int, int],
    ignore: Collection[int],
) -> Iterator[_Image]:
    if not table.num_rows:
        return
    batch = box_batch(table, thresholds)
    ends = np.searchsorted(batch.image, np.arange(batch.images + 1))
    columns = [table.column(name).to_pylist() for name in ("image_id", "width", "height")]
    for i, (image_id, width, height) in enumerate(zip(*columns, strict=True)):
        number = join.image_of_row[image_id]
        stated = truth.images[number]
        size = (width, height) if width and height else (stated.width, stated.height)
        true = true_boxes(truth, number, classes, ignore, size)
        yield _of_batch(image_id, size, batch, slice(ends[i], ends[i + 1]), true, classes)


def _of_batch(
    image_id: str,
    size: tuple[int, int],
    batch: BoxBatch,
    at: slice,
    true: TrueBoxes,
    classes: Mapping[int, int],
) -> _Image:
    boxes, ids = batch.boxes[at], batch.category_ids[at]
    kept = ~batch.outside[at] & np.isin(ids, list(classes.values())) & true.counts(boxes, ids)
    return _Image(
        image_id=image_id,
        size=size,
        boxes=boxes[kept],
        ids=ids[kept],
        scores=batch.scores[at][kept],
        right=batch.right[at][kept],
        accepted=batch.accepted[at][kept],
        true=true,
    )


class _Found:
    """Adds images up."""

    def __init__(self, names: Sequence[str], ids: Sequence[int]) -> None:
        self._names = tuple(names)
        self._index = {k: i for i, k in enumerate(ids)}
        n = len(names) + 1
        self._confusion = np.zeros((n, n), np.int64)
        self._errors = dict.fromkeys(ERROR_TYPES, 0)
        self._accepted = self._objects = self._right = 0
        self._boxes: list[NDArray[np.float64]] = [np.zeros((0, 5))]
        self._worst: list[Missed] = []

    def add(self, image: _Image) -> None:
        """Count one image."""
        iou = iou_matrix(image.boxes, image.true.boxes)
        same = image.ids[:, None] == image.true.category_ids[None, :]
        self._note_boxes(image, iou, same)
        at = image.accepted
        self._note_labels(image, iou[at], same[at], image.ids[at])

    def _note_boxes(self, image: _Image, iou: NDArray[Any], same: NDArray[Any]) -> None:
        rows, columns = match(np.where(same, iou, 0.0), IOU)
        overlap = np.zeros(len(image.boxes))
        overlap[rows] = iou[rows, columns]
        self._boxes.append(
            np.column_stack(
                [image.scores, image.right, overlap > 0, overlap, image.ids.astype(np.float64)]
            )
        )

    def _note_labels(
        self, image: _Image, iou: NDArray[Any], same: NDArray[Any], ids: NDArray[Any]
    ) -> None:
        right = match(np.where(same, iou, 0.0), IOU)
        self._accepted += len(ids)
        self._objects += iou.shape[1]
        self._right += len(right[0])
        covered = np.zeros(iou.shape[1], np.bool_)
        covered[right[1]] = True
        for box in np.setdiff1d(np.arange(len(ids)), right[0]):
            kind, of = error_type(iou[box], same[box])
            self._errors[kind] += 1
            if kind in ("class", "location"):
                covered[of] = True  # TIDE: to put this error right is to find the object
        self._errors["missed"] += int((~covered).sum())
        self._note_confusion(image, iou, ids)
        without = np.setdiff1d(np.arange(iou.shape[1]), right[1])
        self._note_missed(image, without)

    def _note_confusion(self, image: _Image, iou: NDArray[Any], ids: NDArray[Any]) -> None:
        rows, columns = match(iou, IOU)
        true = [self._index[int(k)] for k in image.true.category_ids]
        made = [self._index[int(k)] for k in ids]
        for row, column in zip(rows, columns, strict=True):
            self._confusion[true[column], made[row]] += 1
        for row in np.setdiff1d(np.arange(len(made)), rows):
            self._confusion[-1, made[row]] += 1
        for column in np.setdiff1d(np.arange(len(true)), columns):
            self._confusion[true[column], -1] += 1

    def _note_missed(self, image: _Image, missed: NDArray[np.intp]) -> None:
        area = max(image.size[0] * image.size[1], 1)
        for at in missed:
            x1, y1, x2, y2 = (float(v) for v in image.true.boxes[at])
            name = self._names[self._index[int(image.true.category_ids[at])]]
            share = (x2 - x1) * (y2 - y1) / area
            self._worst.append(Missed(image.image_id, (x1, y1, x2, y2), name, share))
        self._worst.sort(key=lambda one: -one.share)
        del self._worst[_WORST:]

    def result(self, policy: str) -> Diagnosis:
        """Return everything added up."""
        scores, right, hit, overlap, ids = np.concatenate(self._boxes).T
        return Diagnosis(
            policy=policy,
            precision=self._right / self._accepted if self._accepted else None,
            recall=self._right / self._objects if self._objects else None,
            accepted=self._accepted,
            objects=self._objects,
            errors=self._errors,
            classes=self._names,
            confusion=tuple(tuple(int(n) for n in row) for row in self._confusion),
            raw=Calibrated(d_ece(scores, hit), la_ece(scores, hit, overlap, ids)),
            calibrated=Calibrated(d_ece(right, hit), la_ece(right, hit, overlap, ids)),
            worst=tuple(self._worst),
        )


def error_type(iou: NDArray[Any], same: NDArray[Any]) -> tuple[str, int]:
    """TIDE's type of one box that is not right, and the object it is about (-1: none).

    Types are tried in the order of TIDE's own code.

    Args:
        iou: [M], with each true box.
        same: bool [M], whether that has the box's class.
    """
    own, other = np.where(same, iou, 0.0), np.where(same, 0.0, iou)
    best_own, best_other = own.max(initial=0.0), other.max(initial=0.0)
    if _NEAR <= best_own < IOU:
        return "location", int(own.argmax())
    if best_other >= IOU:
        return "class", int(other.argmax())
    if best_own >= IOU:
        return "duplicate", int(own.argmax())
    if best_other >= _NEAR:
        return "class_and_location", int(other.argmax())
    return "background", -1


def d_ece(confidence: NDArray[Any], hit: NDArray[Any]) -> float | None:
    """Detection ECE: |precision - mean confidence| by bin, weighted by the boxes in it."""
    if not len(confidence):
        return None
    gap = _gaps(confidence, hit)
    return float(np.abs(gap).sum() / len(confidence))


def la_ece(
    confidence: NDArray[Any], hit: NDArray[Any], overlap: NDArray[Any], ids: NDArray[Any]
) -> float | None:
    """Localisation-aware ECE: as ``d_ece`` with precision times mean IoU, mean over the classes.

    Args:
        confidence, hit, overlap: [N]; ``overlap``: IoU of the hit's true box, 0 otherwise.
        ids: [N] class ids.
    """
    classes = np.unique(ids)
    if not len(classes):
        return None
    # In a bin, precision x mean IoU of the hits is the mean over its boxes of overlap where hit.
    each = [
        np.abs(_gaps(confidence[ids == k], (overlap * hit)[ids == k])).sum() / (ids == k).sum()
        for k in classes
    ]
    return float(np.mean(each))


def _gaps(confidence: NDArray[Any], achieved: NDArray[Any]) -> NDArray[np.float64]:
    """[BINS], sum over a bin's boxes of what was achieved less the confidence."""
    where = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    return np.bincount(where, weights=achieved - confidence, minlength=BINS).astype(np.float64)
