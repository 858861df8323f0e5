"""Letterbox: an upright image to the network's input size, and boxes back again."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from storage.records import Detections
from workers.images.pixels import lies_on_disk, shrunk_from_disk
from workers.images.preprocessing import Preprocessing


class LetterboxTransform(NamedTuple):
    """The placement of an upright image in the network's input.

    Attributes:
        scale_x, scale_y: input pixels per upright pixel. Equal where the aspect is kept; the
            resized sides are rounded to whole pixels, and as in super-gradients' ``predict()``
            that rounding is not part of the scale.
        pad_left, pad_top: where its top-left corner lies, in input pixels.
        width, height: of the upright image in pixels.
        mirrored_width: None, or the width in upright pixels of what the network saw mirrored left
            to right; boxes are turned back by it.
    """

    scale_x: float
    scale_y: float
    pad_left: int
    pad_top: int
    width: int
    height: int
    mirrored_width: float | None = None

    def invert(self, detections: Detections) -> Detections:
        """Return boxes and their standard deviations from input pixels to upright pixels.

        Nothing is clipped, as in ``predict()``: a box at the border may reach past the image by
        some pixels (readers that need it clip to width and height, which are in the row).
        """
        scale, shift = _way_back(self.scale_x, self.scale_y, self.pad_left, self.pad_top)
        boxes = (detections.boxes - shift) * scale
        spread = None if detections.box_std is None else detections.box_std * scale
        if self.mirrored_width is not None:
            boxes = boxes[:, _MIRRORED]
            boxes[:, [0, 2]] = self.mirrored_width - boxes[:, [0, 2]]
            spread = None if spread is None else spread[:, _MIRRORED]
        return Detections(
            boxes, detections.scores, detections.category_ids, detections.topk_ids,
            detections.topk_scores, spread, detections.box_entropy, detections.anchor,
            detections.run_scores, detections.agreement,
        )  # fmt: skip


_MIRRORED = [2, 1, 0, 3]  # left and right change places


@lru_cache(maxsize=1024)
def _way_back(
    scale_x: float, scale_y: float, left: int, top: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return float32 [4] factors and shifts of xyxy; images of one size share them."""
    x, y = 1 / scale_x, 1 / scale_y
    return np.array([x, y, x, y], np.float32), np.array([left, top] * 2, np.float32)


def shrink(height: int, width: int, preprocessing: Preprocessing) -> float:
    """Return the factor by which the letterbox shrinks the side that it shrinks least."""
    return 1 / max(_scales(height, width, preprocessing))


def _scales(height: int, width: int, preprocessing: Preprocessing) -> tuple[float, float]:
    scale_y, scale_x = preprocessing.resize_to[0] / height, preprocessing.resize_to[1] / width
    if preprocessing.keep_aspect:
        scale_y = scale_x = min(scale_y, scale_x)
    return scale_y, scale_x


def letterbox(
    pixels: NDArray[np.uint8],
    preprocessing: Preprocessing,
    out: NDArray[np.uint8] | None = None,
    *,
    size: tuple[int, int] | None = None,
    factor: int = 1,
) -> tuple[NDArray[np.uint8], LetterboxTransform]:
    """Scale to fit ``resize_to`` with the aspect kept (bilinear), pad to ``size``.

    The same pixels as super-gradients' DetectionLongestMaxSizeRescale (without ``keep_aspect``:
    DetectionRescale) followed by DetectionCenterPadding or DetectionBottomRightPadding. Channel
    order is not touched.

    Args:
        pixels: uint8 [H, W, 3], upright.
        size: (height, width) of the upright image where ``pixels`` are smaller by ``factor``, as
            ``DecodedImage`` has them; boxes come back in pixels of the image.
        out: uint8 [h, w, 3] of ``preprocessing.size`` to write into (a slot of a batch), or
            None for a new array.

    With ``flip`` the image is mirrored where it lies; the padding stays.

    Returns:
        (uint8 [h, w, 3], the way back); the array is ``out`` where given.
    """
    height, width = size or pixels.shape[:2]
    input_height, input_width = preprocessing.size
    scale_y, scale_x = _scales(height, width, preprocessing)
    # A side of an extremely long image may round to nothing; one pixel of it stays.
    whole = round if preprocessing.rounding == "nearest" else int
    new_height, new_width = max(1, whole(height * scale_y)), max(1, whole(width * scale_x))
    top = left = 0
    if preprocessing.padding == "center":
        top, left = (input_height - new_height) // 2, (input_width - new_width) // 2
    canvas = np.empty((input_height, input_width, 3), np.uint8) if out is None else out
    _pad(canvas, top, left, new_height, new_width, preprocessing.pad_value)
    inner = canvas[top : top + new_height, left : left + new_width]
    _resize_into(inner, pixels, preprocessing)
    if preprocessing.flip:
        inner[:] = inner[:, ::-1].copy()
    if factor > 1:  # the last row and column of ``pixels`` may reach past the image
        scale_y *= height / (pixels.shape[0] * factor)
        scale_x *= width / (pixels.shape[1] * factor)
    mirrored = float(max(width, pixels.shape[1] * factor)) if preprocessing.flip else None
    return canvas, LetterboxTransform(scale_x, scale_y, left, top, width, height, mirrored)


def _pad(
    canvas: NDArray[np.uint8], top: int, left: int, height: int, width: int, value: int
) -> None:
    bottom, right = top + height, left + width
    if top:
        canvas[:top] = value
    if bottom < canvas.shape[0]:
        canvas[bottom:] = value
    if left:
        canvas[top:bottom, :left] = value
    if right < canvas.shape[1]:
        canvas[top:bottom, right:] = value


_LARGE = 64 * 1024 * 1024
_METHODS = {
    "linear": (cv2.INTER_LINEAR, Image.Resampling.BILINEAR),
    "cubic": (cv2.INTER_CUBIC, Image.Resampling.BICUBIC),
    "nearest": (cv2.INTER_NEAREST, Image.Resampling.NEAREST),
}


def _resize_into(
    inner: NDArray[np.uint8], pixels: NDArray[np.uint8], preprocessing: Preprocessing
) -> None:
    if inner.shape == pixels.shape:
        inner[:] = pixels
        return
    size = (inner.shape[1], inner.shape[0])
    plain, averaged = _METHODS[preprocessing.interpolation]
    if preprocessing.antialias:
        inner[:] = np.asarray(Image.fromarray(pixels).resize(size, averaged))
        return
    # A tile shares the file with its image, and is small.
    if preprocessing.interpolation == "linear" and pixels.nbytes >= _LARGE and lies_on_disk(pixels):
        inner[:] = shrunk_from_disk(pixels, *size)
        return
    resized = cv2.resize(pixels, size, dst=inner, interpolation=plain)
    if resized is not inner and not np.shares_memory(resized, inner):
        inner[:] = resized  # OpenCV could not write into that memory layout
