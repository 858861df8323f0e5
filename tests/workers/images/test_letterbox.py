"""Letterbox against super-gradients' own arithmetic, and the way back."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from storage.records import Detections
from workers.images.letterbox import letterbox
from workers.images.preprocessing import Preprocessing, View

COCO = Preprocessing()
OWN = Preprocessing(size=(416, 640), resize_to=(416, 640), padding="bottom_right", pad_value=7)
SIDES = st.integers(1, 900)


def noise(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def reference(pixels: NDArray[np.uint8], how: Preprocessing) -> NDArray[np.uint8]:
    """The published pipeline, step by step: rescale the longest side, then pad."""
    height, width = pixels.shape[:2]
    scale = min(how.resize_to[0] / height, how.resize_to[1] / width)
    if scale != 1.0:
        sides = (round(width * scale), round(height * scale))
        pixels = cv2.resize(pixels, sides, interpolation=cv2.INTER_LINEAR)  # type: ignore[assignment]
    down, right = how.size[0] - pixels.shape[0], how.size[1] - pixels.shape[1]
    top, left = (down // 2, right // 2) if how.padding == "center" else (0, 0)
    sides_padded = ((top, down - top), (left, right - left), (0, 0))
    return np.pad(pixels, sides_padded, constant_values=how.pad_value)


@pytest.mark.parametrize("how", [COCO, OWN], ids=["coco", "own"])
@pytest.mark.parametrize(
    ("height", "width"),
    [(480, 640), (640, 480), (1, 1), (636, 636), (416, 640), (2000, 333), (333, 777), (37, 900)],
)
def test_pixels_are_those_of_super_gradients(height: int, width: int, how: Preprocessing) -> None:
    pixels = noise(height, width)
    boxed, _ = letterbox(pixels, how)
    np.testing.assert_array_equal(boxed, reference(pixels, how))


@pytest.mark.parametrize("how", [COCO, OWN], ids=["coco", "own"])
def test_writing_into_a_batch_is_the_same_and_touches_one_slot(how: Preprocessing) -> None:
    pixels = noise(300, 200)
    batch = np.full((3, *how.size, 3), 99, np.uint8)
    boxed, _ = letterbox(pixels, how, batch[1])
    assert np.shares_memory(boxed, batch)
    np.testing.assert_array_equal(batch[1], letterbox(pixels, how)[0])
    assert (batch[[0, 2]] == 99).all()


@pytest.mark.parametrize(("height", "width"), [(1, 40_000), (40_000, 1), (3, 5000)])
def test_extremely_long_images_keep_a_pixel(height: int, width: int) -> None:
    boxed, transform = letterbox(np.zeros((height, width, 3), np.uint8), COCO)
    assert boxed.shape == (640, 640, 3)
    assert (boxed == 0).any()
    assert (transform.height, transform.width) == (height, width)


def some_detections(boxes: NDArray[np.float32]) -> Detections:
    count = len(boxes)
    return Detections(
        boxes=boxes,
        scores=np.linspace(0.9, 0.1, count, dtype=np.float32),
        category_ids=np.zeros(count, np.int16),
        topk_ids=np.zeros((count, 1), np.int16),
        topk_scores=np.ones((count, 1), np.float32),
        box_std=np.tile(np.array([[1, 2, 3, 4]], np.float32), (count, 1)),
        box_entropy=np.ones(count, np.float32),
        anchor=np.arange(count, dtype=np.int32),
    )


@given(SIDES, SIDES, st.sampled_from([COCO, OWN]))
def test_the_inverse_puts_boxes_back(height: int, width: int, how: Preprocessing) -> None:
    _, transform = letterbox(np.zeros((height, width, 3), np.uint8), how)
    upright = np.array([[0, 0, width, height], [width / 4, height / 3, width / 2, height]])
    scale = np.array([transform.scale_x, transform.scale_y] * 2)
    shift = np.array([transform.pad_left, transform.pad_top] * 2)
    boxes = (upright * scale + shift).astype(np.float32)
    back = transform.invert(some_detections(boxes))
    np.testing.assert_allclose(back.boxes, upright, atol=0.02 * max(1, 1 / transform.scale_x))
    np.testing.assert_allclose(back.box_std[0], np.array([1, 2, 3, 4]) / scale, rtol=1e-5)
    assert back.boxes.dtype == back.box_std.dtype == np.float32


def test_boxes_beyond_the_border_stay_as_predict_leaves_them() -> None:
    _, transform = letterbox(np.zeros((480, 640, 3), np.uint8), COCO)
    back = transform.invert(some_detections(np.array([[0, 70, 640, 560]], np.float32)))
    assert back.boxes[0, 0] < 0
    assert back.boxes[0, 3] > 480


def test_no_detections_invert_to_none() -> None:
    _, transform = letterbox(np.zeros((10, 10, 3), np.uint8), COCO)
    assert len(transform.invert(Detections.empty(5))) == 0


@pytest.mark.parametrize("how", [COCO, OWN], ids=["coco", "own"])
@pytest.mark.parametrize(("height", "width"), [(480, 640), (333, 777), (37, 900), (636, 636)])
def test_a_mirrored_view_is_the_letterbox_of_the_mirrored_image(
    height: int, width: int, how: Preprocessing
) -> None:
    pixels = noise(height, width)
    seen, _ = letterbox(pixels, View(flip=True).of(how, step=32))
    wanted, _ = letterbox(np.ascontiguousarray(pixels[:, ::-1]), how)
    assert np.abs(seen.astype(int) - wanted).max() <= 1  # OpenCV rounds halves by the place


@given(SIDES, SIDES, st.booleans(), st.sampled_from([0.5, 0.75, 1.0, 1.25]))
def test_boxes_of_a_view_come_back_in_pixels_of_the_image(
    height: int, width: int, flip: bool, scale: float
) -> None:
    """A box drawn in the image, seen in the view, and brought back is the box that was drawn."""
    if not flip and scale == 1:
        return
    how = View(flip, scale).of(COCO, step=32)
    assert all(side % 32 == 0 for side in how.size)
    _, way = letterbox(noise(height, width), how)
    box = np.array([0.1 * width, 0.2 * height, 0.7 * width, 0.9 * height], np.float32)
    mirrored = box if not flip else np.array([width - box[2], box[1], width - box[0], box[3]])
    scaling = np.array([way.scale_x, way.scale_y] * 2)
    inside = mirrored * scaling + np.array([way.pad_left, way.pad_top] * 2)
    back = way.invert(some_detections(inside[None].astype(np.float32)))
    np.testing.assert_allclose(back.boxes[0], box, atol=0.01 * max(height, width))
    assert back.box_std is not None
    sides = [3, 2, 1, 4] if flip else [1, 2, 3, 4]  # left and right change places
    np.testing.assert_allclose(back.box_std[0], np.array(sides) / scaling, rtol=1e-4)


def test_a_view_of_a_jpeg_decoded_smaller_reaches_past_the_image_at_the_right_end() -> None:
    how = View(flip=True).of(COCO, step=32)
    pixels = noise(251, 401)  # of 501 × 801 pixels, at a half
    _, way = letterbox(pixels, how, size=(501, 801), factor=2)
    assert way.mirrored_width == 802
    left = way.invert(some_detections(np.array([[way.pad_left, 0, 320, 9]], np.float32))).boxes[0]
    assert left[2] == pytest.approx(802, abs=2)


def test_a_graph_of_fixed_size_pads_a_smaller_view_and_cannot_show_a_larger_one() -> None:
    how = View(scale=0.5).of(COCO, step=None)
    assert (how.size, how.resize_to) == ((640, 640), (318, 318))
    with pytest.raises(ValueError, match="fixed size"):
        View(scale=1.5).of(COCO, step=None)
