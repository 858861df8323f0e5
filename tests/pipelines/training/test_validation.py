"""Scores of a detector on a set: a perfect one gets 1, and each kind of fault its price."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.training.validation import measure
from storage.records import Detections
from tests.support.samples.training_samples import box, write_coco
from workers.images.preprocessing import Preprocessing
from workers.training.coco_set import TrainingSet, read_training_set

PREPROCESSING = Preprocessing(size=(64, 96), resize_to=(60, 92))


@dataclass
class Oracle:
    """A detector that knows the answers, image by image, in the order they are asked."""

    images: TrainingSet
    change: Callable[[Detections], Detections] = lambda d: d
    asked: int = 0

    @property
    def classes(self) -> tuple[str, ...]:
        return self.images.classes

    @property
    def preprocessing(self) -> Preprocessing:
        return PREPROCESSING

    def detect(self, batch: NDArray[np.uint8]) -> Sequence[Detections]:
        found = [self._answer(self.asked + i) for i in range(len(batch))]
        self.asked += len(batch)
        return found

    def start(self, batch: NDArray[np.uint8]) -> Callable[[], Sequence[Detections]]:
        found = self.detect(batch)
        return lambda: found

    def _answer(self, index: int) -> Detections:
        image = self.images.images[index]
        scale = min(60 / image.height, 92 / image.width)
        pad = [(96 - round(image.width * scale)) // 2, (64 - round(image.height * scale)) // 2]
        n = len(image.labels)
        return self.change(
            Detections(
                boxes=(image.boxes * scale + np.array(pad * 2)).astype(np.float32),
                scores=np.linspace(0.9, 0.5, n, dtype=np.float32),
                category_ids=image.labels.astype(np.int16),
                topk_ids=image.labels[:, None].astype(np.int16),
                topk_scores=np.full((n, 1), 0.9, np.float32),
                box_std=np.ones((n, 4), np.float32),
                box_entropy=np.ones(n, np.float32),
                anchor=np.zeros(n, np.int32),
            )
        )


@pytest.fixture
def images(tmp_path: Path) -> TrainingSet:
    sizes = [(100 + 9 * n, 80) for n in range(19)]
    boxes = [
        box(n, category, 5 + 30 * k, 10, 24, 30)
        for n in range(1, 19)  # the last image stays empty
        for k, category in enumerate((7, 3))
    ]
    boxes.append(box(1, 90, 60, 40, 20, 20))
    path = write_coco(tmp_path, sizes, boxes)
    return read_training_set(path, tmp_path, ignore_categories=["blur"])


def test_a_perfect_detector_scores_one(images: TrainingSet) -> None:
    scores = measure(Oracle(images), images)
    assert scores.map_ == scores.map50 == scores.ar == 1.0
    assert scores.per_class == {"ring": 1.0, "bar": 1.0}
    assert (scores.images, scores.objects) == (19, 36)


def test_boxes_beside_the_objects_score_nothing(images: TrainingSet) -> None:
    aside = Oracle(images, lambda d: replace(d, boxes=d.boxes + 40))
    assert measure(aside, images).map50 == 0.0


def test_one_class_taken_for_another_costs_both(images: TrainingSet) -> None:
    # The bars, surer than the rings, now say ring.
    all_rings = Oracle(
        images, lambda d: replace(d, category_ids=d.category_ids * 0, scores=1 - d.scores)
    )
    scores = measure(all_rings, images)
    assert scores.per_class["bar"] == 0.0
    assert 0 < scores.per_class["ring"] < 1


def test_a_detection_in_a_region_to_ignore_costs_nothing(images: TrainingSet) -> None:
    region = images.images[0].ignore[0]
    scale, pad = 60 / 80, np.array([(96 - round(100 * 60 / 80)) // 2, 2] * 2)

    def with_one_more(found: Detections) -> Detections:
        if next(asked) > 0:
            return found  # only the first image has a region
        extra = (region * scale + pad).astype(np.float32)[None]
        return replace(
            found,
            boxes=np.concatenate([extra, found.boxes[1:]]),
            scores=np.array([0.99, *found.scores[1:]], np.float32),
        )

    asked = itertools.count()
    within = measure(Oracle(images, with_one_more), images)
    assert within.per_class["bar"] == 1.0
    # One ring of 18 is missed; as a false alarm at score .99 it would halve the rest.
    assert within.per_class["ring"] == pytest.approx(17 / 18, abs=0.01)
