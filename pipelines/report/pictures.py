"""Embed pictures as data: URIs: the report is one file and loads nothing."""

from __future__ import annotations

import base64

import cv2
import numpy as np
from numpy.typing import NDArray

from storage.errors import StorageError


def jpeg_uri(pixels: NDArray[np.uint8], quality: int) -> str:
    """RGB pixels [H, W, 3] as a data: URI. Raises StorageError when they cannot be encoded."""
    done, jpeg = cv2.imencode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise StorageError("a picture could not be encoded as JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode()
