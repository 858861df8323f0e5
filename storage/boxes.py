"""Boxes and the image border: one rule for labels, evaluation, fitting, routing and training."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def clipped(boxes: NDArray[Any], width: ArrayLike, height: ArrayLike) -> NDArray[Any]:
    """Clip boxes to their image.

    A box entirely outside the image ends up on the border with no area.

    Args:
        boxes: xyxy [N, 4], any float type.
        width, height: of the upright image; one number, or one per box [N].

    Returns:
        A new array of the same shape and type.
    """
    wide = np.asarray(width, boxes.dtype)[..., None]
    high = np.asarray(height, boxes.dtype)[..., None]
    out = boxes.copy()
    out[:, 0::2] = np.clip(boxes[:, 0::2], 0, wide)
    out[:, 1::2] = np.clip(boxes[:, 1::2], 0, high)
    return out


def has_area(boxes: NDArray[Any]) -> NDArray[np.bool_]:
    """Return bool [N]: True for xyxy boxes with positive width and height."""
    return np.asarray((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]), np.bool_)
