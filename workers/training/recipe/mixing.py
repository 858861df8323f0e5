"""Several images in one network input: the 2×2 mosaic, and the blend of two (mixup).

Mosaic is that of YOLOv4 (Bochkovskiy et al., arXiv 2004.10934). Mixup is that of Zhang et al.
(arXiv 1710.09412) as detectors use it: the boxes of both images count in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np
from numpy.typing import NDArray

from workers.images.preprocessing import Preprocessing
from workers.training.augment import SoftTargets, TrainingSample, augment
from workers.training.recipe.augmentation import Augmentation

_SPLIT = (0.3, 0.7)  # where the four images may meet, as shares of the sides
_BETA = 8.0  # of mixup: 96 of 100 blends show at least a quarter of either image


def mosaic(
    samples: Sequence[TrainingSample],
    preprocessing: Preprocessing,
    augmentations: Sequence[Augmentation],
    rng: np.random.Generator,
) -> TrainingSample:
    """Return one network input of four upright images around a drawn point.

    Each image is varied by its own augmentation, at a scale that ``mosaic_scale`` lowers, and cut
    to its quarter.
    """
    height, width = preprocessing.size
    y, x = (int(v) for v in np.rint(rng.uniform(*_SPLIT, 2) * (height, width)))
    pixels = np.empty((height, width, 3), np.uint8)
    parts = []
    corners = ((0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height))
    for sample, augmentation, (x1, y1, x2, y2) in zip(samples, augmentations, corners, strict=True):
        quarter = replace(preprocessing, size=(y2 - y1, x2 - x1))
        part = augment(sample, quarter, _smaller(augmentation), rng)
        pixels[y1:y2, x1:x2] = part.pixels
        parts.append(_shifted(part, x1, y1))
    return _joined(pixels, parts)


def _smaller(augmentation: Augmentation) -> Augmentation:
    """Return the augmentation of one image of a mosaic."""
    low, high = (a * b for a, b in zip(augmentation.scale, augmentation.mosaic_scale, strict=True))
    return replace(augmentation, scale=(low, high), shift=1.0)


def mixup(
    first: TrainingSample, second: TrainingSample, rng: np.random.Generator
) -> TrainingSample:
    """Blend two network inputs of the same size; the rows of both are kept."""
    share = float(rng.beta(_BETA, _BETA))
    pixels = cv2.addWeighted(first.pixels, share, second.pixels, 1 - share, 0)
    return _joined(np.asarray(pixels, np.uint8), [first, second])


def _shifted(sample: TrainingSample, x: int, y: int) -> TrainingSample:
    by = np.array([x, y, x, y], np.float32)
    return replace(
        sample,
        boxes=sample.boxes + by,
        ignore=sample.ignore + by,
        checked=sample.checked + by,
        silent=sample.silent + np.concatenate([np.zeros(1, np.float32), by]),
    )


def _joined(pixels: NDArray[np.uint8], parts: Sequence[TrainingSample]) -> TrainingSample:
    """Return ``pixels`` with the rows of all parts, in order; pseudo if any part is."""
    return TrainingSample(
        pixels,
        np.concatenate([part.boxes for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.ignore for part in parts]),
        np.concatenate([part.weights for part in parts]),
        _joined_soft(parts),
        any(part.pseudo for part in parts),
        np.concatenate([part.checked for part in parts]),
        np.concatenate([part.silent for part in parts]),
    )


def _joined_soft(parts: Sequence[TrainingSample]) -> SoftTargets | None:
    """Return the stored knowledge of all parts; rows of NaN for parts without any."""
    classes = next((p.soft.scores.shape[1] for p in parts if p.soft is not None), None)
    if classes is None:
        return None
    rows = [p.soft if p.soft is not None else _unknown(p, classes) for p in parts]
    return SoftTargets(
        np.concatenate([row.scores for row in rows]),
        np.concatenate([row.spread for row in rows]),
        np.concatenate([row.human for row in rows]),
    )


def _unknown(part: TrainingSample, classes: int) -> SoftTargets:
    count = len(part.boxes)
    return SoftTargets(
        np.full((count, classes), np.nan, np.float32),
        np.full((count, 4), np.nan, np.float32),
        np.full(count, not part.pseudo),
    )
