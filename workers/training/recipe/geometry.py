"""Geometry of augmentation: where an image is placed, and where its boxes are then.

A matrix maps pixel centres; box edges lie between pixels, half a pixel from them.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from workers.images.preprocessing import Preprocessing
from workers.training.recipe.augmentation import Augmentation

_MIN_SIDE_PX = 2.0  # a box with a smaller side counts as gone
_CUT_PX = 0.5  # a side further outside the frame has been cut off

Matrix = NDArray[np.float64]
Boxes = NDArray[np.float32]


def fit_scale(shape: tuple[int, ...], preprocessing: Preprocessing) -> NDArray[np.float64]:
    """Return the factors (x, y) by which the letterbox scales an image of ``shape``."""
    scale = np.array(preprocessing.resize_to[::-1]) / (shape[1], shape[0])
    if preprocessing.keep_aspect:
        scale[:] = scale.min()
    return scale


def placement(
    shape: tuple[int, ...],
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> Matrix:
    """Return the 3×3 matrix from pixels of the upright image to pixels of the network input."""
    height, width = shape[:2]
    fit = fit_scale(shape, preprocessing)
    low, high = np.log(augmentation.scale)
    factor = fit * float(np.exp(rng.uniform(low, high)))
    drawn = np.maximum(np.rint(np.array([width, height]) * factor), 1)
    free = np.array(preprocessing.size[::-1]) - drawn
    rest = free // 2 if preprocessing.padding == "center" else np.minimum(free, 0) // 2
    offset = rest + augmentation.shift * (rng.uniform(0, 1, 2) * free - rest)
    flips = rng.random(2) < (augmentation.flip_horizontal, augmentation.flip_vertical)
    signs = np.where(flips, -1.0, 1.0)
    scale = drawn / (width, height)
    # Pixel i covers [i, i+1): its centre is i + .5, hence the half pixels around the scaling.
    start = np.where(flips, drawn, 0.0) + np.rint(offset)
    matrix = np.eye(3)
    matrix[0, 0], matrix[1, 1] = signs * scale
    matrix[:2, 2] = start + 0.5 * signs * scale - 0.5
    if augmentation.rotate_deg or augmentation.shear_deg:
        return _turned(matrix, np.rint(offset) + drawn / 2 - 0.5, augmentation, rng)
    return matrix


def _turned(
    matrix: Matrix,
    centre: NDArray[np.float64],
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> Matrix:
    """Return ``matrix`` followed by a random turn and shear around ``centre``."""
    turn, shear_x, shear_y = np.deg2rad(
        rng.uniform(-1, 1, 3)
        * (augmentation.rotate_deg, augmentation.shear_deg, augmentation.shear_deg)
    )
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    linear = rotation @ np.array([[1.0, np.tan(shear_x)], [np.tan(shear_y), 1.0]])
    around = np.eye(3)
    around[:2, :2] = linear
    around[:2, 2] = centre - linear @ centre
    return around @ matrix


def is_upright(matrix: Matrix) -> bool:
    """Return whether the matrix only scales, flips and shifts."""
    return bool(matrix[0, 1] == 0 == matrix[1, 0])


def warped(
    pixels: NDArray[np.uint8], matrix: Matrix, preprocessing: Preprocessing
) -> NDArray[np.uint8]:
    """Return the network input, with the padding's value around the image."""
    height, width = preprocessing.size
    found = cv2.warpAffine(
        pixels, matrix[:2], (width, height), flags=cv2.INTER_LINEAR,
        borderValue=(preprocessing.pad_value,) * 3,
    )  # fmt: skip
    return np.asarray(found, np.uint8)


def moved(
    boxes: Boxes, matrix: Matrix, size: tuple[int, int], *, region: bool = False
) -> tuple[Boxes, NDArray[np.float64]]:
    """Return boxes [N, 4] moved and clipped to ``size``, and the visible share [N] of each.

    A share of 0 means that the box is gone. A turned object gets the bounds of the turned ellipse
    in its box, which on average fit objects better than those of the turned corners (Kalra et al.,
    "Towards Rotation Invariance in Object Detection", ICCV 2021).

    Args:
        region: bound the turned corners instead, so that the whole region stays covered.
    """
    edges = _edges(boxes, matrix, region=region)
    low, high = edges[:, 0], edges[:, 1]
    limit = np.array(size[::-1], np.float64)
    clipped_low, clipped_high = low.clip(0, limit), high.clip(0, limit)
    sides = clipped_high - clipped_low
    visible = sides.prod(axis=1) / np.maximum((high - low).prod(axis=1), 1e-9)
    visible[(sides < _MIN_SIDE_PX).any(axis=1)] = 0.0
    return np.concatenate([clipped_low, clipped_high], axis=1).astype(np.float32), visible


def _edges(boxes: Boxes, matrix: Matrix, *, region: bool = False) -> NDArray[np.float64]:
    """Return the moved boxes as [N, 2, 2] (low, high) × (x, y), not clipped."""
    linear = matrix[:2, :2]
    # Box edges lie between pixels, the matrix is for pixel centres: undo its half pixels.
    offset = matrix[:2, 2] + 0.5 - 0.5 * linear.sum(axis=1)
    corners = boxes.reshape(-1, 2, 2)
    if is_upright(matrix):
        corners = corners * np.diag(linear) + offset
        return np.stack([corners.min(axis=1), corners.max(axis=1)], axis=1)
    centre = corners.mean(axis=1, dtype=np.float64) @ linear.T + offset
    half = (corners[:, 1] - corners[:, 0])[:, None] / 2 * linear  # [N, to, from]
    reach = np.abs(half).sum(axis=2) if region else np.sqrt((half**2).sum(axis=2))
    return np.stack([centre - reach, centre + reach], axis=1)


def moved_spread(
    spread: Boxes, boxes: Boxes, matrix: Matrix, size: tuple[int, int]
) -> NDArray[np.float32]:
    """Return the standard deviations [N, 4] of left, top, right and bottom after ``matrix``.

    A mirrored box swaps its sides; scales and turns change nothing, so that the spread is constant
    in strides (see ``in_input_pixels``). A side that the frame cut off has no known spread.
    """
    sides = [2 if matrix[0, 0] < 0 else 0, 3 if matrix[1, 1] < 0 else 1]
    found = spread[:, sides + [(side + 2) % 4 for side in sides]]
    edges = _edges(boxes, matrix).reshape(-1, 4)
    limit = np.tile(np.array(size[::-1], np.float64), 2)
    found[(edges < -_CUT_PX) | (edges > limit + _CUT_PX)] = np.nan
    return found


def repadded(
    pixels: NDArray[np.uint8], shape: tuple[int, ...], matrix: Matrix, value: int
) -> NDArray[np.uint8]:
    """Give the padding its own value again: inference never sees it in another colour."""
    size = (pixels.shape[0], pixels.shape[1])
    padded = np.full_like(pixels, value)
    if is_upright(matrix):
        page = np.array([[0, 0, shape[1], shape[0]]], np.float32)
        found, _ = moved(page, matrix, size)
        x1, y1, x2, y2 = np.rint(found[0]).astype(int)
        padded[y1:y2, x1:x2] = pixels[y1:y2, x1:x2]
        return padded
    page = np.ones(shape[:2], np.uint8)
    inside = cv2.warpAffine(page, matrix[:2], size[::-1], flags=cv2.INTER_NEAREST) > 0
    padded[inside] = pixels[inside]
    return padded
