"""Judge which of a run's boxes are right, by COCO ground truth or by audit answers.

A box is right when a true box of its class, not taken by a higher score, overlaps it with IoU 0.5
or more. Boxes whose centre lies in an unlabelled region (a crowd of their class, DontCare)
or that people disagreed about are left out.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.truth.bulk import accepted_in_bulk
from pipelines.truth.coco_truth import (
    is_ignore_class,
    join_rows,
    match_categories,
    refuse_unmatched,
)
from pipelines.truth.compared import queue_entries
from pipelines.truth.matching import Boxes, Ids, iou_matrix, match
from pipelines.truth.settle import settle
from pipelines.truth.usable import usable_answers
from storage.boxes import clipped, has_area
from storage.coco.truth import Truth
from storage.records import AnnotationRow, Detections
from storage.runs.annotation_rows import table_to_rows
from storage.runs.live_rows import live_tables
from storage.runs.manifest import Manifest

log = logging.getLogger("labelfleet.review")

IOU = 0.5


@dataclass(frozen=True, slots=True)
class TrueBoxes:
    """What is true of one image.

    Attributes:
        boxes: float64 [M, 4] xyxy pixels; ``category_ids`` int64 [M], the run's.
        regions: float64 [R, 4] xyxy, not to be counted; ``region_ids`` int64 [R], the class whose
            boxes they silence, or -1: all classes.
    """

    boxes: NDArray[np.float64]
    category_ids: NDArray[np.int64]
    regions: NDArray[np.float64]
    region_ids: NDArray[np.int64]

    def counts(self, boxes: Boxes, category_ids: Ids) -> NDArray[np.bool_]:
        """bool [N]: boxes [N, 4] whose centre is in no region that silences their class [N]."""
        centre = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
        within = (centre >= self.regions[None, :, :2]) & (centre <= self.regions[None, :, 2:])
        same = (self.region_ids < 0) | (self.region_ids == category_ids[:, None])
        return np.asarray(~(within.all(axis=2) & same).any(axis=1))

    def right(self, boxes: Boxes, category_ids: Ids) -> NDArray[np.bool_]:
        """bool [N]: boxes [N, 4], by falling score, that match a true box of their class [N]."""
        same = category_ids[:, None] == self.category_ids[None, :]
        out = np.zeros(len(boxes), np.bool_)
        out[match(np.where(same, iou_matrix(boxes, self.boxes), 0.0), IOU)[0]] = True
        return out


@dataclass(frozen=True, slots=True)
class JudgedBoxes:
    """The counted boxes of many images, N in all.

    Attributes:
        images: how many images were judged.
        scores: float32 [N], raw; ``category_ids`` int64 [N]; ``image`` int64 [N], from 0.
        right: bool [N].
        weight: float64 [N]: images of the run that the box's image stands for.
        true_by_image: float64 [images, classes], true objects, weighted.
    """

    images: int
    scores: NDArray[np.float32]
    category_ids: NDArray[np.int64]
    image: NDArray[np.int64]
    right: NDArray[np.bool_]
    weight: NDArray[np.float64]
    true_by_image: NDArray[np.float64]


def judge(images: Iterable[tuple[Detections, TrueBoxes, float]], n_classes: int) -> JudgedBoxes:
    """Judge every image's detections against what is true of it; with the image's weight."""
    scores: list[NDArray[np.float32]] = [np.zeros(0, np.float32)]
    ids: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    image: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    rights: list[NDArray[np.bool_]] = [np.zeros(0, np.bool_)]
    weights: list[NDArray[np.float64]] = [np.zeros(0)]
    trues: list[NDArray[np.float64]] = [np.zeros((0, n_classes))]
    for number, (found, true, weight) in enumerate(images):
        counted = true.counts(found.boxes, found.category_ids)
        boxes, category_ids = found.boxes[counted], found.category_ids[counted]
        scores.append(found.scores[counted])
        ids.append(category_ids.astype(np.int64))
        image.append(np.full(len(boxes), number, np.int64))
        rights.append(true.right(boxes, category_ids))
        weights.append(np.full(len(boxes), weight))
        trues.append(
            weight * np.bincount(true.category_ids, minlength=n_classes)[None].astype(np.float64)
        )
    return JudgedBoxes(
        images=len(trues) - 1,
        scores=np.concatenate(scores),
        category_ids=np.concatenate(ids),
        image=np.concatenate(image),
        right=np.concatenate(rights),
        weight=np.concatenate(weights),
        true_by_image=np.concatenate(trues),
    )


def truth_images(
    manifest: Manifest, truth: Truth, *, allow_missing: bool = False
) -> Iterator[tuple[AnnotationRow, TrueBoxes]]:
    """Yield every readable live row that the ground truth knows, with what is true of it.

    Raises:
        TruthMismatch: names and rows do not join one to one, or (unless allowed) some are missing.
    """
    join = join_rows(truth, _names(manifest))
    if not allow_missing or not join.image_of_row:
        hint = "finish the run, or give --allow-missing"
        if not join.image_of_row:
            hint = "none of the names match: is this the ground truth of the run's source?"
        refuse_unmatched(truth, join, hint=hint)
    names = [c.name for c in manifest.record.identity.categories]
    ids = match_categories(names, truth.categories)
    wanted = pa.array(list(join.image_of_row), pa.string())
    for _, table in live_tables(manifest, only=join.shard_ids):
        for row in table_to_rows(table.filter(pc.is_in(table.column("image_id"), wanted))):
            if row.status == "ok":
                number = join.image_of_row[row.image_id]
                yield within(row), true_boxes(truth, number, ids, (), (row.width, row.height))


def answered_images(
    manifest: Manifest, *, count_bulk: bool = False
) -> Iterator[tuple[AnnotationRow, TrueBoxes, float]]:
    """Yield answered live rows of the audit: row, the boxes left by the person, and the weight.

    Predictions accepted in bulk do not count as answers unless ``count_bulk``. The audit draws
    images by name: the same pixels under another name are not part of the sample. Answers that
    name a class which the run lacks are left out, and logged.
    """
    found = usable_answers([manifest])
    for aside in found.set_aside:
        log.warning("set aside: %s", aside)
    book = settle(a for a in found.answers if count_bulk or not accepted_in_bulk(a))
    weights = {
        (entry.item.image_id, sha256): 1 / max(entry.item.inclusion, 1e-9)
        for sha256, entries in queue_entries([manifest]).items()
        for entry in entries
        if entry.item.part == "audit" and sha256 in book.settled
    }
    names = [c.name for c in manifest.record.identity.categories]
    wanted = pa.array([image_id for image_id, _ in weights], pa.string())
    for _, table in live_tables(manifest):
        for row in table_to_rows(table.filter(pc.is_in(table.column("image_id"), wanted))):
            weight = weights.get((row.image_id, row.sha256))
            if weight is None or row.status != "ok":
                continue
            settled = book.settled[row.sha256]
            kept = [(box.bbox, names.index(box.category)) for box in settled.answer.boxes]
            disputed = [(box.bbox, names.index(box.category)) for box in settled.disputed]
            yield within(row), _boxes(kept, disputed, (row.width, row.height)), weight


def _names(manifest: Manifest) -> Iterator[tuple[str, str]]:
    for shard_id, table in live_tables(manifest, ["image_id"]):
        for image_id in table.column("image_id").to_pylist():
            yield image_id, shard_id


def within(row: AnnotationRow) -> AnnotationRow:
    """Return the row with its boxes clipped to its image, less those that have no area there."""
    found = row.detections
    boxes = clipped(found.boxes, row.width, row.height)
    kept = has_area(boxes)
    arrays: dict[str, Any] = {f.name: getattr(found, f.name) for f in fields(found)}
    arrays["boxes"] = boxes
    chosen: dict[str, Any] = {
        name: None if values is None else values[kept] for name, values in arrays.items()
    }
    return replace(row, detections=Detections(**chosen))


def true_boxes(
    truth: Truth,
    number: int,
    ids: Mapping[int, int],
    ignore: Collection[int],
    size: tuple[int, int],
) -> TrueBoxes:
    """Return what is true of one image of the file.

    Args:
        truth, number: the file, and the image's index in it.
        ids: the run's category id by the file's, where both have the class.
        ignore: the file's ids whose boxes silence every class, besides DontCare and its like.
        size: (width, height) of the upright image.
    """
    counted: list[_Named] = []
    regions: list[_Named] = [((x, y, x + w, y + h), -1) for x, y, w, h in truth.regions_of(number)]
    for box in truth.boxes[number]:
        if box.category_id in ignore:
            regions.append((box.xyxy, -1))
        elif box.category_id not in ids:
            if is_ignore_class(truth.categories[box.category_id]):
                regions.append((box.xyxy, -1))
        elif box.ignore:
            regions.append((box.xyxy, ids[box.category_id]))
        else:
            counted.append((box.xyxy, ids[box.category_id]))
    return _boxes(counted, regions, size)


_Named = tuple[Sequence[float], int]


def _boxes(
    counted: Sequence[_Named], regions: Sequence[_Named], size: tuple[int, int]
) -> TrueBoxes:
    """Return what is true of an image of this size, clipped to it.

    Boxes without area are dropped.
    """

    def inside(of: Sequence[_Named]) -> tuple[NDArray[Any], NDArray[Any]]:
        given = np.array([at for at, _ in of], np.float64).reshape(-1, 4)
        corners = clipped(given, *size)
        kept = has_area(corners)
        return corners[kept], np.array([k for _, k in of], np.int64)[kept]

    return TrueBoxes(*inside(counted), *inside(regions))
