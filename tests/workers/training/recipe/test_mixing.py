"""Mosaic and mixup: rows stay with their boxes, and boxes with their pixels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from workers.images.preprocessing import Preprocessing
from workers.training.augment import SoftTargets, TrainingSample
from workers.training.recipe.augmentation import Augmentation
from workers.training.recipe.mixing import mixup, mosaic

PREPROCESSING = Preprocessing(size=(96, 128), resize_to=(92, 124))
# Far from each other and from the greys of ground and padding.
COLOURS = np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250], [250, 250, 10]], np.uint8)
PLAIN = Augmentation(0.5, 0.5, (0.7, 1.4), 1.0, 0, 0, 0, 0)


def painted(
    number: int, size: tuple[int, int], xyxy: tuple[int, int, int, int], *, soft: bool = True
) -> TrainingSample:
    """Image ``number``: a grey ground with one box in its colour; each row tells the number."""
    pixels = np.full((size[1], size[0], 3), 90, np.uint8)
    x1, y1, x2, y2 = xyxy
    pixels[y1:y2, x1:x2] = COLOURS[number]
    box = np.array([xyxy], np.float32)
    scores = np.zeros((1, 4), np.float32)
    scores[0, number] = 1
    return TrainingSample(
        pixels,
        box,
        np.array([number], np.int64),
        box.copy(),
        np.array([0.2 + number / 10], np.float32),
        SoftTargets(scores, np.full((1, 4), 1.0 + number, np.float32), np.array([number == 2]))
        if soft
        else None,
        number == 3,
        np.array([[0, 0, *size]], np.float32),
        np.array([[number, 0, 0, *size]], np.float32),
    )


def extent(pixels: NDArray[np.uint8], colour: NDArray[np.uint8]) -> list[int] | None:
    """xyxy of everything nearer to ``colour`` than to grey."""
    off = np.abs(pixels.astype(int) - colour).max(axis=-1)
    rows, columns = np.where(off < 80)
    if len(rows) == 0:
        return None
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


sizes = st.tuples(st.integers(60, 300), st.integers(60, 300))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), shapes=st.lists(sizes, min_size=4, max_size=4))
def test_in_a_mosaic_every_row_lies_over_its_own_colour(
    seed: int, shapes: list[tuple[int, int]]
) -> None:
    four = [
        painted(k, (w, h), (w // 4, h // 5, w // 4 + w // 2, h // 5 + h // 2))
        for k, (w, h) in enumerate(shapes)
    ]
    made = mosaic(four, PREPROCESSING, [PLAIN] * 4, np.random.default_rng(seed))
    assert made.pixels.shape == (96, 128, 3)
    assert made.soft is not None
    for row, number in enumerate(made.labels.tolist()):
        found = extent(made.pixels, COLOURS[number])
        assert found is not None
        assert np.abs(made.boxes[row] - found).max() <= 1.01
        assert made.weights[row] == pytest.approx(0.2 + number / 10)
        assert made.soft.scores[row].argmax() == number
        assert bool(made.soft.human[row]) == (number == 2)
    taught = len(made.labels)
    assert len(made.boxes) == len(made.weights) == len(made.soft.scores) == taught
    assert len(made.soft.spread) == len(made.soft.human) == taught
    assert made.pseudo
    # Whatever is coloured and not taught is ignored: the regions are the boxes themselves.
    for number in set(range(4)) - set(made.labels.tolist()):
        found = extent(made.pixels, COLOURS[number])
        if found is not None and (found[2] - found[0] > 2 and found[3] - found[1] > 2):
            assert min(np.abs(region - found).max() for region in made.ignore) <= 1.01


def test_the_checked_regions_of_a_mosaic_are_the_pages_of_its_images() -> None:
    four = [painted(k, (100, 80), (10, 10, 60, 60)) for k in range(4)]
    made = mosaic(four, PREPROCESSING, [PLAIN] * 4, np.random.default_rng(3))
    covered = np.zeros(made.pixels.shape[:2], bool)
    for x1, y1, x2, y2 in np.rint(made.checked).astype(int):
        covered[y1:y2, x1:x2] = True
    assert made.silent[:, 0].tolist() == [0, 1, 2, 3]
    assert np.array_equal(made.silent[:, 1:], made.checked), "each silence stays over its image"
    page = (made.pixels != PREPROCESSING.pad_value).any(axis=-1)
    assert (covered == page).mean() > 0.98


def test_four_images_meet_at_one_point_and_each_is_cut_to_its_quarter() -> None:
    four = [painted(k, (400, 400), (0, 0, 400, 400)) for k in range(4)]  # one colour each
    still = Augmentation(0, 0, (4.0, 4.0), 1.0, 0, 0, 0, 0)
    points = set()
    for seed in range(20):
        made = mosaic(four, PREPROCESSING, [still] * 4, np.random.default_rng(seed))
        x, y = np.rint(extent(made.pixels, COLOURS[0])[2:]).astype(int)  # type: ignore[index]
        points.add((int(x), int(y)))
        assert 0.28 <= x / 128 <= 0.72
        assert 0.28 <= y / 96 <= 0.72
        for number, (rows, columns) in enumerate(
            [(slice(0, y), slice(0, x)), (slice(0, y), slice(x, None)),
             (slice(y, None), slice(0, x)), (slice(y, None), slice(x, None))]
        ):  # fmt: skip
            assert (made.pixels[rows, columns] == COLOURS[number]).all()
    assert len(points) > 15


def test_each_image_of_a_mosaic_has_its_own_augmentation() -> None:
    four = [painted(k, (400, 400), (0, 0, 400, 400)) for k in range(4)]
    still = Augmentation(0, 0, (4.0, 4.0), 1.0, 0, 0, 0, 0)
    dark = Augmentation(0, 0, (4.0, 4.0), 1.0, 0.9, 0, 0, 0)
    made = mosaic(four, PREPROCESSING, [still, still, still, dark], np.random.default_rng(0))
    assert (made.pixels[0, 0] == COLOURS[0]).all()
    assert not (made.pixels[-1, -1] == COLOURS[3]).all()


def test_stored_knowledge_stays_with_its_box_and_its_spread_is_not_scaled() -> None:
    four = [painted(k, (200, 200), (50, 50, 90, 90)) for k in range(4)]
    half = Augmentation(0, 0, (1.0, 1.0), 1.0, 0, 0, 0, 0, mosaic_scale=(0.5, 0.5))
    seen = 0
    for seed in range(20):
        made = mosaic(four, PREPROCESSING, [half] * 4, np.random.default_rng(seed))
        assert made.soft is not None
        for box, label, spread in zip(made.boxes, made.labels, made.soft.spread, strict=True):
            scale = 40 * 0.5 * 92 / 200
            known = ~np.isnan(spread)
            assert spread[known] == pytest.approx(1 + label)
            if known.all():
                seen += 1
                assert box[2:] - box[:2] == pytest.approx(scale, rel=0.06)
    assert seen > 10


def test_images_without_stored_knowledge_get_rows_that_say_so() -> None:
    first = painted(0, (128, 96), (10, 10, 50, 50), soft=False)
    second = painted(3, (128, 96), (60, 20, 100, 80))
    made = mixup(first, second, np.random.default_rng(0))
    assert made.soft is not None
    assert np.isnan(made.soft.scores[0]).all()
    assert np.isnan(made.soft.spread[0]).all()
    assert made.soft.human.tolist() == [True, False]
    assert made.soft.scores[1].argmax() == 3


def test_a_blend_shows_both_images_and_keeps_both_rows() -> None:
    first = painted(0, (128, 96), (10, 10, 50, 50))
    second = painted(1, (128, 96), (60, 20, 100, 80))
    shares = []
    for seed in range(200):
        made = mixup(first, second, np.random.default_rng(seed))
        assert made.labels.tolist() == [0, 1]
        assert np.array_equal(made.boxes, np.concatenate([first.boxes, second.boxes]))
        assert made.weights.tolist() == pytest.approx([0.2, 0.3])
        assert len(made.ignore) == len(made.checked) == len(made.silent) == 2
        share = (made.pixels[30, 30, 0] - 90) / (250 - 90)  # red over grey
        other = (made.pixels[50, 80, 1] - 90) / (250 - 90)
        assert share + other == pytest.approx(1, abs=0.02)
        shares.append(share)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.04)
    assert 0.9 < np.mean([0.25 < s < 0.75 for s in shares]) < 1


def test_mixing_images_without_boxes() -> None:
    none = np.zeros((0, 4), np.float32)
    blank = TrainingSample(np.zeros((50, 70, 3), np.uint8), none, np.zeros(0, np.int64), none)
    made = mosaic([blank] * 4, PREPROCESSING, [PLAIN] * 4, np.random.default_rng(0))
    assert made.boxes.shape == made.ignore.shape == made.checked.shape == (0, 4)
    assert made.soft is None
    assert not made.pseudo
