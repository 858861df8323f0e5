"""Copies of turned images with their pixels upright, so that every reader sees the boxes in place.

Boxes are in pixels of the upright image. Readers that ignore the EXIF orientation, among them
OpenCV with some flags, torchvision and many loaders, would show them elsewhere.
"""

from __future__ import annotations

import io
import warnings

import cv2
from PIL import Image, UnidentifiedImageError

from storage.errors import StorageError
from workers.images.decode import decode

_ORIENTATION = 0x0112
_MAX_PIXELS = 1 << 29
_JPEG = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111]  # 4:4:4
_ENCODERS = {"JPEG": (".jpg", _JPEG), "WEBP": (".webp", [cv2.IMWRITE_WEBP_QUALITY, 101])}


def upright(raw: bytes) -> bytes | None:
    """The image turned upright in the same format, without its metadata; None: it is upright.

    JPEGs are encoded again at quality 95, everything else without loss; formats other than JPEG
    and WebP become PNG.

    Raises:
        ImageError: it is turned and cannot be decoded.
        StorageError: it cannot be encoded.
    """
    kind, orientation = _look(raw)
    if orientation not in range(2, 9):
        return None
    pixels = decode(raw, max_pixels=_MAX_PIXELS).pixels
    suffix, options = _ENCODERS.get(kind, (".png", []))
    done, encoded = cv2.imencode(suffix, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
    if not done:
        raise StorageError(f"a turned {kind} cannot be encoded upright")
    return bytes(encoded)


def _look(raw: bytes) -> tuple[str, int]:
    """Format and EXIF orientation by the header; 1 where there is none or it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(raw)) as opened:
                return str(opened.format), int(opened.getexif().get(_ORIENTATION, 1))
    except (OSError, ValueError, TypeError, SyntaxError, UnidentifiedImageError,
            Image.DecompressionBombError):  # fmt: skip
        return "", 1
