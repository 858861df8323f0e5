"""Measure the cost of a precision: mAP against ground truth, or agreement with fp32 without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipelines.evaluation.coco_matching import ChunkedMatching, detection_rows, truth_box
from pipelines.models.sample_images import Inputs
from pipelines.truth.coco_truth import is_ignore_class, match_categories
from storage.boxes import clipped, has_area
from storage.coco.truth import Truth
from storage.errors import ArtefactError, TruthMismatch
from storage.records import Detections
from workers.detectors.protocol import Detector

BATCH = 8
SURE = 0.5  # fp32's boxes from this score on stand in for ground truth
_ALL_AREAS = 0


@dataclass(frozen=True, slots=True)
class Expected:
    """Boxes to find: COCO annotations an image, with category ids from 1, and how many classes."""

    images: tuple[tuple[dict[str, Any], ...], ...]
    classes: int


def expected_from_truth(truth: Truth, indices: Sequence[int], classes: Sequence[str]) -> Expected:
    """Ground truth of these images, in the model's classes; crowds and DontCare count neither way.

    Raises:
        TruthMismatch: it shares no class with the model.
    """
    of_truth = match_categories(classes, truth.categories)
    if not of_truth:
        raise TruthMismatch(
            f"{truth.source} and the model share no class: {sorted(truth.categories.values())} "
            f"there, {list(classes)} in the model",
            hint="give the ground truth the model's class names",
        )
    every = sorted(set(of_truth.values()))
    images = []
    for index in indices:
        boxes: list[dict[str, Any]] = []
        for box in truth.boxes[index]:
            known = of_truth.get(box.category_id)
            if known is not None:
                boxes.append(truth_box(known, box.xywh, box.area, ignore=box.ignore))
            elif is_ignore_class(truth.categories[box.category_id]):
                boxes += [truth_box(k, box.xywh, box.area, ignore=True) for k in every]
        for xywh in truth.regions_of(index):
            boxes += [truth_box(k, xywh, xywh[2] * xywh[3], ignore=True) for k in every]
        images.append(tuple(boxes))
    return Expected(tuple(images), len(classes))


def expected_from_detections(found: Sequence[Detections], classes: int) -> Expected:
    """Return a detector's sure boxes as ground truth; its uncertain ones count neither way."""
    images = []
    for one in found:
        inside = has_area(one.boxes)
        boxes, scores, ids = one.boxes[inside], one.scores[inside], one.category_ids[inside]
        wide = boxes[:, 2:] - boxes[:, :2]
        images.append(
            tuple(
                truth_box(int(k), (*box[:2], *side), side[0] * side[1], ignore=score < SURE)
                for box, side, k, score in zip(
                    boxes.tolist(), wide.tolist(), ids, scores, strict=True
                )
            )
        )
    return Expected(tuple(images), classes)


def detect_all(detector: Detector, inputs: Inputs) -> list[Detections]:
    """Return the detections of every image, in its upright pixels and clipped to it."""
    found: list[Detections] = []
    for start in range(0, len(inputs), BATCH):
        found += detector.detect(np.ascontiguousarray(inputs.pixels[start : start + BATCH]))
    return [
        _clipped(back.invert(one), back.width, back.height)
        for back, one in zip(inputs.transforms, found, strict=True)
    ]


def _clipped(found: Detections, width: int, height: int) -> Detections:
    return replace(found, boxes=clipped(found.boxes, width, height))


def mean_ap(found: Sequence[Detections], expected: Expected) -> float:
    """COCO mAP in points, 0 to 100, over classes that are expected somewhere; 0 without any."""
    matching = ChunkedMatching(expected.classes)
    truth = [
        {**box, "image_id": number}
        for number, boxes in enumerate(expected.images, 1)
        for box in boxes
    ]
    rows = [detection_rows(number, one, None) for number, one in enumerate(found, 1)]
    matching.add(len(rows), truth, np.concatenate(rows))
    precision = matching.curves()[0][..., _ALL_AREAS]
    known = precision[precision > -1]
    return float(known.mean() * 100) if known.size else 0.0


def refuse_unmeasured(fp32: float, images: int, against: str, limit: float) -> None:
    """Refuse to call a loss small where float32 itself has nothing to lose.

    Args:
        fp32: its mAP in points.
        images: how many were measured on.
        against: the truth's URL, or ``fp32``.
        limit: points that may be lost; from 100 on any loss is allowed, and so is this.

    Raises:
        ArtefactError: it has nothing to lose.
    """
    if fp32 > 0 or limit >= 100:
        return
    own = f"is sure of no box (a score of {SURE:g} or more)"
    finds = own if against == "fp32" else f"finds no object of {against}"
    raise ArtefactError(
        f"the loss of INT8 cannot be measured: on {images} images fp32 itself {finds}",
        hint="give `labelfleet compile` a --truth with objects that the model finds; or use "
        "`precision: fp32`; or allow any loss by `model.max_loss: 100`",
    )
