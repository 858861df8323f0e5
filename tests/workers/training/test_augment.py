"""Augmentation: boxes stay on their objects, whatever is drawn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.support.samples.training_samples import image_with_patch
from workers.images.letterbox import letterbox
from workers.images.preprocessing import Preprocessing
from workers.training.augment import SoftTargets, TrainingSample, augment
from workers.training.recipe.augmentation import Augmentation

PREPROCESSING = Preprocessing(size=(96, 128), resize_to=(92, 124))
RED = (250, 10, 10)


def sample(
    size: tuple[int, int] = (200, 150), xyxy: tuple[int, int, int, int] = (60, 40, 110, 90)
) -> TrainingSample:
    return TrainingSample(
        image_with_patch(size, xyxy, RED),
        np.array([xyxy], np.float32),
        np.array([3], np.int64),
        np.zeros((0, 4), np.float32),
    )


def red_extent(pixels: NDArray[np.uint8]) -> list[int]:
    """xyxy of everything redder than half way from the grey ground to the patch."""
    rows, columns = np.where((pixels[..., 0].astype(int) - pixels[..., 1]) > 120)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.tuples(st.integers(90, 400), st.integers(90, 400)),
    corner=st.tuples(st.floats(0, 0.6), st.floats(0, 0.6)),
    scale=st.floats(0.6, 1.8),
    flips=st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])),
    padding=st.sampled_from(["center", "bottom_right"]),
)
def test_the_box_lies_where_the_object_is(
    seed: int,
    size: tuple[int, int],
    corner: tuple[float, float],
    scale: float,
    flips: tuple[float, float],
    padding: str,
) -> None:
    x, y = int(corner[0] * size[0]), int(corner[1] * size[1])
    xyxy = (x, y, x + size[0] // 3, y + size[1] // 3)
    moved = augment(
        sample(size, xyxy),
        Preprocessing(size=(96, 128), resize_to=(92, 124), padding=padding),  # type: ignore[arg-type]
        Augmentation(*flips, (scale, scale), 1.0, 0, 0, 0, 0),
        np.random.default_rng(seed),
    )
    # Taught while enough of it is visible, else a region to ignore; gone only with its pixels.
    boxes = np.concatenate([moved.boxes, moved.ignore])
    if len(boxes) == 0:
        assert (moved.pixels[..., 0] > 170).sum() <= 2 * 128 + 2 * 96
        return
    assert np.abs(boxes[0] - red_extent(moved.pixels)).max() <= 1.01


@pytest.mark.parametrize("keep_aspect", [True, False])
@pytest.mark.parametrize("padding", ["center", "bottom_right"])
@pytest.mark.parametrize("size", [(200, 150), (150, 200), (640, 90), (50, 40)])
def test_without_randomness_it_is_the_letterbox_of_inference(
    size: tuple[int, int], padding: str, keep_aspect: bool
) -> None:
    preprocessing = Preprocessing(
        size=(96, 128),
        resize_to=(92, 124),
        keep_aspect=keep_aspect,
        padding=padding,  # type: ignore[arg-type]
    )
    rng = np.random.default_rng(1)
    pixels = np.asarray(rng.integers(0, 256, (size[1], size[0], 3)), np.uint8)
    none = np.zeros((0, 4), np.float32)
    blank = TrainingSample(pixels, none, np.zeros(0, np.int64), none)
    expected, _ = letterbox(pixels, preprocessing)
    found = augment(blank, preprocessing, Augmentation.none(), rng).pixels
    # warpAffine interpolates with 5 bits of position, resize with more.
    assert np.abs(found.astype(int) - expected).mean() < 1.5
    assert ((found == 114).all(axis=2) == (expected == 114).all(axis=2)).mean() > 0.999


def test_an_object_mostly_cut_off_is_ignored_not_taught_and_not_background() -> None:
    at_the_edge = sample((200, 150), (0, 0, 30, 30))
    seen = {"taught": 0, "ignored": 0, "gone": 0}
    for seed in range(200):
        moved = augment(
            at_the_edge, PREPROCESSING, Augmentation(0, 0, (1.5, 1.5), 1.0, 0, 0, 0, 0),
            np.random.default_rng(seed),
        )  # fmt: skip
        visible = (moved.pixels[..., 0] > 170).sum() / (30 * 1.5 * 92 / 150) ** 2
        if len(moved.boxes):
            seen["taught"] += 1
            assert visible > 0.3
        elif len(moved.ignore):
            seen["ignored"] += 1
            assert visible < 0.4
        else:
            seen["gone"] += 1
            assert visible < 0.1
    assert min(seen.values()) > 0, seen


def test_colour_changes_leave_the_padding_as_inference_pads() -> None:
    strong = Augmentation(0, 0, (0.7, 0.7), 1.0, 0.3, 0.4, 0.5, 90)
    for seed in range(20):
        moved = augment(sample(), PREPROCESSING, strong, np.random.default_rng(seed))
        padded = (moved.pixels == 114).all(axis=2)
        assert padded.mean() > 0.4
        assert len(np.unique(moved.pixels[padded])) == 1


def test_colour_is_varied_and_geometry_is_not_by_colour() -> None:
    plain = augment(sample(), PREPROCESSING, Augmentation.none(), np.random.default_rng(0))
    means = set()
    for seed in range(8):
        jitter = Augmentation(0, 0, (1, 1), 0, 0.2, 0.2, 0.3, 20)
        moved = augment(sample(), PREPROCESSING, jitter, np.random.default_rng(seed))
        assert np.array_equal(moved.boxes, plain.boxes)
        means.add(float(moved.pixels.mean()))
    assert len(means) == 8


def test_regions_to_ignore_move_like_boxes() -> None:
    plain = sample()
    both = TrainingSample(plain.pixels, plain.boxes, plain.labels, plain.boxes.copy())
    moved = augment(
        both, PREPROCESSING, Augmentation(1.0, 0, (0.8, 1.2), 1.0), np.random.default_rng(5)
    )
    assert np.allclose(moved.boxes, moved.ignore)


def test_rows_stay_aligned_and_the_spread_turns_with_the_box() -> None:
    """Box 0 is cut to less than 35 %, box 1 on the right, box 2 stays whole."""
    how = Preprocessing(size=(96, 96), resize_to=(96, 96))
    boxes = np.array([[94, 10, 130, 40], [60, 10, 110, 40], [10, 20, 40, 60]], np.float32)
    soft = SoftTargets(
        np.array([[1, 0], [0.4, 0.6], [0.3, 0.7]], np.float32),
        np.array([[1, 2, 3, 4]] * 3, np.float32),
        np.array([True, False, False]),
    )
    given = TrainingSample(
        np.zeros((48, 96, 3), np.uint8), boxes, np.array([0, 1, 1], np.int64),
        np.zeros((0, 4), np.float32), np.array([1, 0.5, 0.25], np.float32), soft, pseudo=True,
        checked=np.array([[0, 0, 48, 48]], np.float32),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    plain = augment(given, how, Augmentation.none(), rng)
    assert plain.labels.tolist() == [1, 1]
    assert plain.weights.tolist() == [0.5, 0.25]
    assert plain.pseudo
    assert plain.soft is not None
    assert plain.soft.human.tolist() == [False, False]
    assert plain.soft.scores.tolist() == soft.scores[1:].tolist()
    np.testing.assert_array_equal(plain.soft.spread, [[1, 2, np.nan, 4], [1, 2, 3, 4]])
    assert plain.checked.tolist() == [[0, 24, 48, 72]]

    small = Augmentation(1.0, 0.0, (0.5, 0.5), 0.0, 0, 0, 0, 0)
    mirrored = augment(given, how, small, rng)
    assert mirrored.soft is not None
    np.testing.assert_array_equal(mirrored.soft.spread[-1], [3, 2, 1, 4])  # of any scale
    turned = augment(given, how, Augmentation(0.0, 1.0, (0.5, 0.5), 0.0, 0, 0, 0, 0), rng)
    assert turned.soft is not None
    np.testing.assert_array_equal(turned.soft.spread[-1], [1, 4, 3, 2])
    assert turned.checked.tolist() == [[24, 36, 48, 60]]
