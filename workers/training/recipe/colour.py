"""Random colour and blur of training images."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from workers.training.recipe.augmentation import Augmentation


def recoloured(
    pixels: NDArray[np.uint8], augmentation: Augmentation, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Change hue, saturation, contrast and brightness of uint8 [H, W, 3] RGB, by table look-up."""
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


def blurred(
    pixels: NDArray[np.uint8], augmentation: Augmentation, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Blur by a Gaussian of random width, with the probability ``augmentation.blur``."""
    if not augmentation.blur or rng.random() >= augmentation.blur:
        return pixels
    sigma = rng.uniform(0.2, 1.0) * augmentation.blur_px
    return np.asarray(cv2.GaussianBlur(pixels, (0, 0), sigma), np.uint8)
