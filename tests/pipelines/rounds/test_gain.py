"""Teacher against student: COCO's own figures by size and class, and what the intervals say."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.evaluation.coco_matching import ChunkedMatching, detection_rows, truth_box
from pipelines.models.loss_interval import match
from pipelines.models.measure import Expected
from pipelines.rounds.gain import SIZES, Comparison, Gain
from storage.records import Detections

CLASSES = 2


def detections(boxes: NDArray[Any], scores: NDArray[Any], classes: NDArray[Any]) -> Detections:
    return dataclasses.replace(
        Detections.empty(0),
        boxes=boxes.astype(np.float32),
        scores=scores.astype(np.float32),
        category_ids=classes.astype(np.int16),
    )


def crowded(images: int, seed: int) -> tuple[Expected, list[Detections]]:
    """Objects of all sizes close together, some of them crowds, and a model that is often off."""
    rng = np.random.default_rng(seed)
    expected, found = [], []
    for _ in range(images):
        n = int(rng.integers(3, 9))
        corner = rng.uniform(0, 300, (n, 2))
        side = np.exp(rng.uniform(np.log(8), np.log(220), (n, 2)))
        classes = rng.integers(0, CLASSES, n)
        expected.append(
            tuple(
                truth_box(int(k), [*xy, *wh], float(wh[0] * wh[1] * rng.uniform(0.6, 1)),
                          ignore=bool(rng.random() < 0.15))
                for k, xy, wh in zip(classes, corner.tolist(), side, strict=True)
            )
        )  # fmt: skip
        twice = np.concatenate([np.arange(n), rng.integers(0, n, 3)])
        shift = rng.normal(0, 0.08, (len(twice), 2)) * side[twice]
        size = side[twice] * np.exp(rng.normal(0, 0.1, (len(twice), 2)))
        xy = corner[twice] + shift
        scores = np.sort(rng.uniform(0.05, 1, len(twice)))[::-1]
        found.append(detections(np.concatenate([xy, xy + size], 1), scores, classes[twice]))
    return Expected(tuple(expected), CLASSES), found


def coco(expected: Expected, found: list[Detections], area: int) -> float:
    """faster-coco-eval's AP in an area range."""
    matching = ChunkedMatching(CLASSES)
    truth = [{**box, "image_id": n} for n, boxes in enumerate(expected.images, 1) for box in boxes]
    rows = [detection_rows(n, one, None) for n, one in enumerate(found, 1)]
    matching.add(len(rows), truth, np.concatenate(rows))
    precision = matching.curves()[0][..., area]
    return float(precision[precision > -1].mean()) * 100


@pytest.mark.parametrize("seed", range(3))
def test_ap_by_size_is_cocos(seed: int) -> None:
    expected, found = crowded(25, seed)
    once = np.ones((1, 25), np.int64)
    assert match(found, expected).mean_ap(once)[0] == pytest.approx(coco(expected, found, 0))
    for number, areas in enumerate(SIZES.values(), 1):
        own = match(found, expected, areas).mean_ap(once)[0]
        assert own == pytest.approx(coco(expected, found, number), abs=1e-9)


def comparison(gain: float, low: float, high: float) -> Comparison:
    one = Gain("mAP", 40.0, 40.0 + gain, gain, low, high, 100)
    return Comparison(50, one, (), (), (), ())


def test_the_sentence_says_plainly_who_won() -> None:
    assert comparison(3.0, 1.0, 5.0).sentence.startswith("The student beats its teacher: 43.0")
    worse = comparison(-3.0, -5.0, -1.0)
    assert worse.sentence.startswith("The student did not win, it is worse than its teacher")
    unclear = comparison(0.5, -1.0, 2.0)
    assert "do not settle it" in unclear.sentence
    assert "+0.5 [-1.0, +2.0]" in unclear.sentence
    assert "did not win" in comparison(-0.5, -2.0, 1.0).sentence
    assert [c.overall.verdict for c in (worse, unclear)] == ["worse", "unclear"]
    nothing = Comparison(5, Gain("mAP", None, None, None, None, None, 0), (), (), (), ())
    assert "nothing can be said" in nothing.sentence


def test_a_comparison_survives_its_record() -> None:
    made = comparison(3.0, 1.0, 5.0)
    again = Comparison.from_fields(made.to_fields())
    assert again == made
    assert made.to_fields()["verdict"] == "better"
