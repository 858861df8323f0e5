"""Turned and sheared images: objects, regions and padding where the pixels are."""

from __future__ import annotations

import cv2
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.images.preprocessing import Preprocessing
from workers.training.augment import TrainingSample, augment
from workers.training.recipe.augmentation import Augmentation

PREPROCESSING = Preprocessing(size=(160, 192), resize_to=(156, 188))
RED = (250, 10, 10)


def turned(rotate: float, shear: float, **more: float) -> Augmentation:
    return Augmentation(
        more.get("flip", 0.0), 0, (0.9, 0.9), more.get("shift", 0.0), 0, 0, 0, 0,
        rotate_deg=rotate, shear_deg=shear,
    )  # fmt: skip


def ellipse(size: tuple[int, int], xyxy: tuple[int, int, int, int]) -> TrainingSample:
    """A filled ellipse that touches all sides of its box; the region to ignore is the box."""
    x1, y1, x2, y2 = xyxy
    columns, rows = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    inside = ((columns - (x1 + x2) / 2) / ((x2 - x1) / 2)) ** 2 + (
        (rows - (y1 + y2) / 2) / ((y2 - y1) / 2)
    ) ** 2 <= 1
    pixels = np.full((size[1], size[0], 3), 90, np.uint8)
    pixels[inside] = RED
    box = np.array([xyxy], np.float32)
    return TrainingSample(pixels, box, np.array([0], np.int64), box.copy())


def red(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> list[int]:
    rows, columns = np.where((pixels[..., 0].astype(int) - pixels[..., 1]) > 120)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rotate=st.floats(1, 45),
    shear=st.floats(0, 12),
    flip=st.sampled_from([0.0, 1.0]),
    sides=st.tuples(st.integers(30, 80), st.integers(30, 80)),
)
def test_the_box_of_a_turned_object_touches_it_on_all_sides(
    seed: int, rotate: float, shear: float, flip: float, sides: tuple[int, int]
) -> None:
    x, y = 100 - sides[0] // 2, 90 - sides[1] // 2
    sample = ellipse((200, 180), (x, y, x + sides[0], y + sides[1]))
    made = augment(
        sample, PREPROCESSING, turned(rotate, shear, flip=flip), np.random.default_rng(seed)
    )
    found = np.array(red(made.pixels))
    assert np.abs(made.boxes[0] - found).max() <= 1.3
    # A region covers the whole turned box, so that nothing in it is background.
    assert (made.ignore[0, :2] <= made.boxes[0, :2]).all()
    assert (made.ignore[0, 2:] >= made.boxes[0, 2:]).all()


def test_a_region_bounds_the_corners_of_the_turned_box() -> None:
    pixels = np.full((180, 200, 3), 90, np.uint8)
    pixels[60:120, 70:140] = RED
    box = np.array([[70, 60, 140, 120]], np.float32)
    sample = TrainingSample(pixels, box, np.array([0], np.int64), box.copy(), checked=box.copy())
    for seed in range(20):
        made = augment(sample, PREPROCESSING, turned(30, 8), np.random.default_rng(seed))
        assert np.abs(made.ignore[0] - red(made.pixels)).max() <= 1.3
        assert np.array_equal(made.ignore, made.checked)


def test_the_padding_of_a_turned_image_is_that_of_inference_whatever_the_colour() -> None:
    sample = ellipse((200, 180), (40, 40, 100, 120))
    angle_seen = False
    for seed in range(10):
        strong = Augmentation(0, 0, (0.6, 0.6), 0.0, 0.3, 0.4, 0.5, 60, rotate_deg=40, blur=1.0)
        made = augment(sample, PREPROCESSING, strong, np.random.default_rng(seed))
        padded = (made.pixels == 114).all(axis=-1)
        area = 0.6 * 0.6 * (156 / 180) ** 2 * 200 * 180
        assert abs((~padded).sum() - area) < 0.03 * area
        corners = cv2.minAreaRect(np.argwhere(~padded).astype(np.float32))
        angle_seen |= 5 < corners[2] % 90 < 85
    assert angle_seen


def test_turns_are_drawn_within_their_limits_and_zero_draws_nothing() -> None:
    sample = ellipse((200, 180), (40, 40, 100, 120))
    for augmentation in (Augmentation(), Augmentation(rotate_deg=0.0, shear_deg=0.0, blur=0.0)):
        rng, other = np.random.default_rng(1), np.random.default_rng(1)
        augment(sample, PREPROCESSING, augmentation, rng)
        # scale, two of the position, two flips, four of the colour
        other.random(9)
        assert rng.random() == other.random()


def test_blur_softens_edges_with_its_probability() -> None:
    sample = ellipse((200, 180), (40, 40, 100, 120))

    def steepest(blur: float, seed: int) -> int:
        how = Augmentation(0, 0, (1, 1), 0, 0, 0, 0, 0, blur=blur, blur_px=3.0)
        pixels = augment(sample, PREPROCESSING, how, np.random.default_rng(seed)).pixels
        return int(np.abs(np.diff(pixels[..., 0].astype(int), axis=1)).max())

    sharp = steepest(0.0, 0)
    assert all(steepest(1.0, seed) < 0.8 * sharp for seed in range(10))
    softened = sum(steepest(0.5, seed) < 0.8 * sharp for seed in range(60))
    assert 15 < softened < 45
