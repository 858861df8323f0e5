"""Random flips, scale, position and colour for training; boxes move with the pixels.

Without any randomness (``Augmentation.none()``) the geometry is the letterbox that inference uses,
so what the network learns on is what it will see.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from workers.images.preprocessing import Preprocessing

_MIN_VISIBLE = 0.35  # a box with less than this visible is ignored, not learned
_MIN_SIDE_PX = 2.0  # nor is a smaller one


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How strongly training images are varied.

    Attributes:
        flip_horizontal, flip_vertical: probabilities.
        scale: (low, high) factors on the letterbox scale, drawn log-uniformly.
        shift: 0 keeps the letterbox position, 1 allows any within the free or cut-off margin.
        brightness, contrast, saturation: largest relative change.
        hue_deg: largest rotation of the hue circle (360°).
    """

    flip_horizontal: float = 0.5
    flip_vertical: float = 0.0
    scale: tuple[float, float] = (0.7, 1.5)
    shift: float = 1.0
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.3
    hue_deg: float = 6.0

    @staticmethod
    def none() -> Augmentation:
        """Return the plain letterbox."""
        return Augmentation(0.0, 0.0, (1.0, 1.0), 0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class TrainingSample:
    """One network input: uint8 [H, W, 3] RGB; boxes and ignore xyxy in its pixels."""

    pixels: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    ignore: NDArray[np.float32]


def augment(
    sample: TrainingSample,
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> TrainingSample:
    """Warp an upright image (any size) into a network input of ``preprocessing.size``.

    Boxes of which less than 35 % stay visible become regions to ignore: neither object nor
    background would be right.
    """
    matrix = _placement(sample.pixels.shape, preprocessing, augmentation, rng)
    height, width = preprocessing.size
    pixels = cv2.warpAffine(
        sample.pixels, matrix[:2], (width, height), flags=cv2.INTER_LINEAR,
        borderValue=(preprocessing.pad_value,) * 3,
    )  # fmt: skip
    boxes, visible = _moved(sample.boxes, matrix, (height, width))
    ignore, ignore_visible = _moved(sample.ignore, matrix, (height, width))
    cut = (visible > 0) & (visible < _MIN_VISIBLE)
    taught = visible >= _MIN_VISIBLE
    recoloured = _recoloured(np.asarray(pixels, np.uint8), augmentation, rng)
    return TrainingSample(
        _repadded(recoloured, sample.pixels.shape, matrix, preprocessing.pad_value),
        boxes[taught],
        sample.labels[taught],
        np.concatenate([ignore[ignore_visible > 0], boxes[cut]]),
    )


def _placement(
    shape: tuple[int, ...],
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """3×3 matrix from pixel positions of the upright image to those of the network input."""
    height, width = shape[:2]
    fit = np.array(preprocessing.resize_to[::-1]) / (width, height)
    if preprocessing.keep_aspect:
        fit[:] = fit.min()
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
    return matrix


def _moved(
    boxes: NDArray[np.float32], matrix: NDArray[np.float64], size: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Return boxes [N, 4] moved and clipped, and the share [N] of each that is left; 0: gone."""
    scale = np.array([matrix[0, 0], matrix[1, 1]])
    # Box edges lie between pixels, the matrix is for pixel centres: undo its half pixels.
    offset = matrix[:2, 2] + 0.5 - 0.5 * scale
    corners = boxes.reshape(-1, 2, 2) * scale + offset
    low, high = corners.min(axis=1), corners.max(axis=1)
    limit = np.array(size[::-1], np.float64)
    clipped_low, clipped_high = low.clip(0, limit), high.clip(0, limit)
    sides = clipped_high - clipped_low
    visible = sides.prod(axis=1) / np.maximum((high - low).prod(axis=1), 1e-9)
    visible[(sides < _MIN_SIDE_PX).any(axis=1)] = 0.0
    return np.concatenate([clipped_low, clipped_high], axis=1).astype(np.float32), visible


def _recoloured(
    pixels: NDArray[np.uint8], augmentation: Augmentation, rng: np.random.Generator
) -> NDArray[np.uint8]:
    brightness, contrast, saturation, hue = rng.uniform(-1, 1, 4) * (
        augmentation.brightness, augmentation.contrast,
        augmentation.saturation, augmentation.hue_deg,
    )  # fmt: skip
    if saturation or hue:
        pixels = _hue_and_saturation(pixels, float(hue), float(saturation))
    if not brightness and not contrast:
        return pixels
    levels = np.arange(256, dtype=np.float64)
    table = (levels - 128) * (1 + contrast) + 128 + 255 * brightness
    return np.asarray(cv2.LUT(pixels, np.clip(np.rint(table), 0, 255).astype(np.uint8)), np.uint8)


def _repadded(
    pixels: NDArray[np.uint8], shape: tuple[int, ...], matrix: NDArray[np.float64], value: int
) -> NDArray[np.uint8]:
    """Give the padding its own value again: inference never sees it in another colour."""
    page = np.array([[0, 0, shape[1], shape[0]]], np.float32)
    moved, _ = _moved(page, matrix, (pixels.shape[0], pixels.shape[1]))
    x1, y1, x2, y2 = np.rint(moved[0]).astype(int)
    padded = np.full_like(pixels, value)
    padded[y1:y2, x1:x2] = pixels[y1:y2, x1:x2]
    return padded


def _hue_and_saturation(
    pixels: NDArray[np.uint8], hue_deg: float, saturation: float
) -> NDArray[np.uint8]:
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
    levels = np.arange(256)
    tables = np.stack(
        [
            (levels + round(hue_deg / 2)) % 180,  # OpenCV stores half degrees
            np.clip(np.rint(levels * (1 + saturation)), 0, 255),
            levels,
        ],
        axis=-1,
    ).astype(np.uint8)
    changed = cv2.LUT(hsv, tables.reshape(1, 256, 3))
    return np.asarray(cv2.cvtColor(changed, cv2.COLOR_HSV2RGB), np.uint8)
