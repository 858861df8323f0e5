"""Random flips, scale, position and colour for training; boxes move with the pixels.

Without any randomness (``Augmentation.none()``) the geometry is the letterbox that inference uses,
so what the network learns on is what it will see.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from workers.images.preprocessing import Preprocessing

_MIN_VISIBLE = 0.35  # a box with less than this visible is ignored, not learned
_MIN_SIDE_PX = 2.0  # nor is a smaller one
_CUT_PX = 0.5  # a side further outside the frame has been cut off


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


def _no_boxes() -> NDArray[np.float32]:
    return np.zeros((0, 4), np.float32)


@dataclass(frozen=True, slots=True)
class SoftTargets:
    """What a teacher stored about each box of an image.

    Attributes:
        scores: float32 [N, C], class probabilities; a row of NaN where none are stored.
        spread: float32 [N, 4], standard deviations of left, top, right and bottom in pixels of
            the sample; NaN where unknown.
        human: bool [N], boxes of people, which the teacher has no say about.
    """

    scores: NDArray[np.float32]
    spread: NDArray[np.float32]
    human: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class TrainingSample:
    """One image with its targets; every array of N rows describes the same N boxes.

    Attributes:
        pixels: uint8 [H, W, 3] RGB.
        boxes: float32 [N, 4] xyxy in its pixels.
        labels: int64 [N], contiguous class indices.
        ignore: float32 [M, 4] xyxy, regions where "no object" is not taught.
        weights: float32 [N], the probability that each box is right; 1 if not given.
        soft: what a teacher stored about the boxes; None: nothing.
        pseudo: a model labelled the image, so that it gets the strong augmentation.
        checked: float32 [K, 4] xyxy, regions that people checked.
    """

    pixels: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    ignore: NDArray[np.float32]
    weights: NDArray[np.float32] = None  # type: ignore[assignment]  # set below: needs N
    soft: SoftTargets | None = None
    pseudo: bool = False
    checked: NDArray[np.float32] = field(default_factory=_no_boxes)

    def __post_init__(self) -> None:
        if self.weights is None:
            object.__setattr__(self, "weights", np.ones(len(self.boxes), np.float32))


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
    checked, checked_visible = _moved(sample.checked, matrix, (height, width))
    cut = (visible > 0) & (visible < _MIN_VISIBLE)
    taught = visible >= _MIN_VISIBLE
    recoloured = _recoloured(np.asarray(pixels, np.uint8), augmentation, rng)
    return TrainingSample(
        _repadded(recoloured, sample.pixels.shape, matrix, preprocessing.pad_value),
        boxes[taught],
        sample.labels[taught],
        np.concatenate([ignore[ignore_visible > 0], boxes[cut]]),
        sample.weights[taught],
        _moved_soft(sample, matrix, (height, width), taught),
        sample.pseudo,
        checked[checked_visible > 0],
    )


def _moved_soft(
    sample: TrainingSample,
    matrix: NDArray[np.float64],
    size: tuple[int, int],
    kept: NDArray[np.bool_],
) -> SoftTargets | None:
    """Return the kept rows with their spread in pixels of the network input.

    A mirrored box swaps its sides. A side that the frame cut off has no known spread.
    """
    soft = sample.soft
    if soft is None:
        return None
    scale = np.array([matrix[0, 0], matrix[1, 1]])
    spread = soft.spread * np.abs(np.tile(scale, 2)).astype(np.float32)
    sides = [2 if scale[0] < 0 else 0, 3 if scale[1] < 0 else 1]
    spread = spread[:, sides + [(side + 2) % 4 for side in sides]]
    edges = _corners(sample.boxes, matrix).reshape(-1, 4)
    limit = np.tile(np.array(size[::-1], np.float64), 2)
    spread[(edges < -_CUT_PX) | (edges > limit + _CUT_PX)] = np.nan
    return SoftTargets(soft.scores[kept], spread[kept], soft.human[kept])


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
    corners = _corners(boxes, matrix)
    low, high = corners[:, 0], corners[:, 1]
    limit = np.array(size[::-1], np.float64)
    clipped_low, clipped_high = low.clip(0, limit), high.clip(0, limit)
    sides = clipped_high - clipped_low
    visible = sides.prod(axis=1) / np.maximum((high - low).prod(axis=1), 1e-9)
    visible[(sides < _MIN_SIDE_PX).any(axis=1)] = 0.0
    return np.concatenate([clipped_low, clipped_high], axis=1).astype(np.float32), visible


def _corners(boxes: NDArray[np.float32], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the moved boxes as [N, 2, 2] (low, high) × (x, y), not clipped."""
    scale = np.array([matrix[0, 0], matrix[1, 1]])
    # Box edges lie between pixels, the matrix is for pixel centres: undo its half pixels.
    offset = matrix[:2, 2] + 0.5 - 0.5 * scale
    corners = boxes.reshape(-1, 2, 2) * scale + offset
    return np.stack([corners.min(axis=1), corners.max(axis=1)], axis=1)


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
