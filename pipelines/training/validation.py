"""Measure a detector's mAP on a training-format set, in memory, for the trainer's validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.coco_matching import ChunkedMatching, detection_rows, truth_box
from storage.records import Detections
from workers.detectors.protocol import Detector
from workers.images.letterbox import letterbox
from workers.training.coco_set import TrainingSet, load_sample
from workers.training.usable import TrainingImage

_BATCH = 8
_ALL_AREAS = 0


@dataclass(frozen=True, slots=True)
class Scores:
    """COCO's figures in [0, 1]; ``per_class`` is AP by class name, for classes that occur."""

    map_: float
    map50: float
    map75: float
    ar: float
    per_class: dict[str, float]
    images: int
    objects: int


def measure(detector: Detector, images: TrainingSet) -> Scores:
    """Run ``detector`` over every image, and compare with the boxes there.

    Regions to ignore count as COCO crowds of every class.
    """
    matching = ChunkedMatching(len(images.classes))
    for chunk in _chunks(images.images):
        truth = [box for i, image in enumerate(chunk, 1) for box in _truth(i, image, images)]
        found = _detect(detector, chunk)
        rows = [
            detection_rows(i, one, (image.width, image.height))
            for i, (image, one) in enumerate(zip(chunk, found, strict=True), 1)
        ]
        matching.add(len(chunk), truth, np.concatenate(rows))
    precision, recall = matching.curves()
    precision, recall = precision[..., _ALL_AREAS], recall[..., _ALL_AREAS]
    return Scores(
        map_=_mean(precision),
        map50=_mean(precision[0]),
        map75=_mean(precision[5]),
        ar=_mean(recall),
        per_class={
            name: _mean(precision[:, :, k])
            for k, name in enumerate(images.classes)
            if (precision[:, :, k] > -1).any()
        },
        images=len(images.images),
        objects=images.objects,
    )


def _chunks(images: Sequence[TrainingImage]) -> Iterator[Sequence[TrainingImage]]:
    for start in range(0, len(images), _BATCH):
        yield images[start : start + _BATCH]


def _detect(detector: Detector, chunk: Sequence[TrainingImage]) -> list[Detections]:
    """Return the detections of each image, in its own upright pixels."""
    how = detector.preprocessing
    boxed = [letterbox(load_sample(image, how.value_range).pixels, how) for image in chunk]
    found = detector.detect(np.stack([pixels for pixels, _ in boxed]))
    return [back.invert(one) for (_, back), one in zip(boxed, found, strict=True)]


def _truth(number: int, image: TrainingImage, images: TrainingSet) -> Iterator[dict[str, Any]]:
    for box, label in zip(image.boxes.tolist(), image.labels.tolist(), strict=True):
        yield _true(number, label, box, crowd=False)
    for box in image.ignore.tolist():
        for label in range(len(images.classes)):
            yield _true(number, label, box, crowd=True)


def _true(number: int, label: int, xyxy: list[float], *, crowd: bool) -> dict[str, Any]:
    x1, y1, x2, y2 = xyxy
    wide, high = x2 - x1, y2 - y1
    return truth_box(label, (x1, y1, wide, high), wide * high, ignore=crowd, number=number)


def _mean(values: NDArray[np.float64]) -> float:
    there = values[values > -1]  # COCO writes -1 where there is nothing to find
    return float(there.mean()) if there.size else 0.0
