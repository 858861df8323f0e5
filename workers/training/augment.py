"""Random geometry, colour and blur for training; boxes move with the pixels.

Without any randomness (``Augmentation.none()``) the geometry is the letterbox that inference uses,
so what the network learns on is what it will see.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from workers.images.preprocessing import Preprocessing
from workers.training.recipe.augmentation import Augmentation
from workers.training.recipe.colour import blurred, recoloured
from workers.training.recipe.geometry import (
    Matrix,
    fit_scale,
    moved,
    moved_spread,
    placement,
    repadded,
    warped,
)

_MIN_VISIBLE = 0.35  # a box with less than this visible is ignored, not learned


def _no_boxes() -> NDArray[np.float32]:
    return np.zeros((0, 4), np.float32)


def _no_silence() -> NDArray[np.float32]:
    return np.zeros((0, 5), np.float32)


@dataclass(frozen=True, slots=True)
class SoftTargets:
    """What a teacher stored about each box of an image.

    Attributes:
        scores: float32 [N, C], class probabilities; a row of NaN where none are stored.
        spread: float32 [N, 4], standard deviations of left, top, right and bottom; NaN where
            unknown. In pixels of the image, until ``in_input_pixels``.
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
        silent: float32 [S, 5], class and xyxy: regions where "no object of this class" is not
            taught, since its objects there are not all labelled.
    """

    pixels: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    ignore: NDArray[np.float32]
    weights: NDArray[np.float32] = None  # type: ignore[assignment]  # set below: needs N
    soft: SoftTargets | None = None
    pseudo: bool = False
    checked: NDArray[np.float32] = field(default_factory=_no_boxes)
    silent: NDArray[np.float32] = field(default_factory=_no_silence)

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
    size, shape = preprocessing.size, sample.pixels.shape
    matrix = placement(shape, preprocessing, augmentation, rng)
    pixels = warped(sample.pixels, matrix, preprocessing)
    boxes, visible = moved(sample.boxes, matrix, size)
    ignore, ignore_visible = moved(sample.ignore, matrix, size, region=True)
    checked, checked_visible = moved(sample.checked, matrix, size, region=True)
    silent, silent_visible = moved(sample.silent[:, 1:], matrix, size, region=True)
    cut = (visible > 0) & (visible < _MIN_VISIBLE)
    taught = visible >= _MIN_VISIBLE
    pixels = blurred(recoloured(pixels, augmentation, rng), augmentation, rng)
    return TrainingSample(
        repadded(pixels, shape, matrix, preprocessing.pad_value),
        boxes[taught],
        sample.labels[taught],
        np.concatenate([ignore[ignore_visible > 0], boxes[cut]]),
        sample.weights[taught],
        _moved_soft(sample, matrix, size, taught),
        sample.pseudo,
        checked[checked_visible > 0],
        np.concatenate([sample.silent[:, :1], silent], axis=1)[silent_visible > 0],
    )


def in_input_pixels(sample: TrainingSample, preprocessing: Preprocessing) -> TrainingSample:
    """Return an image with the spread of its boxes in pixels of the network input, unaugmented.

    There it stays when augmentation scales the image, so that it is constant in strides. A
    detector's DFL distributions behave so: against a Gaussian of constant spread in strides their
    KL divergence at scale .75 / .6 is .06 / .10, against one of constant spread in pixels of the
    image .21 / 1.16 (bccd, a YOLO-NAS of 1.8M parameters).
    """
    soft = sample.soft
    if soft is None:
        return sample
    scale = np.tile(fit_scale(sample.pixels.shape, preprocessing), 2).astype(np.float32)
    return replace(sample, soft=replace(soft, spread=soft.spread * scale))


def _moved_soft(
    sample: TrainingSample, matrix: Matrix, size: tuple[int, int], kept: NDArray[np.bool_]
) -> SoftTargets | None:
    """Return the kept rows with their spread in the pixels it was in: see ``in_input_pixels``."""
    soft = sample.soft
    if soft is None:
        return None
    spread = moved_spread(soft.spread, sample.boxes, matrix, size)
    return SoftTargets(soft.scores[kept], spread[kept], soft.human[kept])
