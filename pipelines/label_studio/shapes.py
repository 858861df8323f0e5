"""Upright hulls of the shapes that Label Studio's page can draw: xyxy in pixels.

Label Studio gives positions and sizes in percent of the upright image, turned clockwise: rectangles
about their top left corner, ellipses about their centre. Brush masks are run-length encoded RGBA,
bitmasks are PNG.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from storage.records import Xyxy

Result = Mapping[str, Any]
_MOST_MASK_PIXELS = 4  # times those of the image; a mask has the image's size


def hull_of(result: Result, width: int, height: int) -> Xyxy | None:
    """Return the upright hull of one result, or None where its kind has none, such as a keypoint.

    A shape without area has a hull without area. An empty mask is one of those.

    Args:
        result: of an annotation or a prediction.
        width, height: of the upright image, in pixels.

    Raises:
        ValueError, LookupError, TypeError: the result is malformed.
    """
    shape = _SHAPES.get(str(result.get("type", "")).removesuffix("labels"))
    value = result.get("value") or {}
    if shape is None or not shape.fields <= value.keys():
        return None
    return shape.hull(result, width, height)


def _rectangle(result: Result, width: int, height: int) -> Xyxy:
    value, across, down = result["value"], width / 100, height / 100
    x, y = float(value["x"]) * across, float(value["y"]) * down
    w, h = float(value["width"]) * across, float(value["height"]) * down
    turn = math.radians(float(value.get("rotation") or 0.0))
    if not turn:
        return (x, y, x + w, y + h)
    cos, sin = math.cos(turn), math.sin(turn)
    return _around([(x + a * cos - b * sin, y + a * sin + b * cos) for a in (0, w) for b in (0, h)])


def _ellipse(result: Result, width: int, height: int) -> Xyxy:
    value, across, down = result["value"], width / 100, height / 100
    x, y = float(value["x"]) * across, float(value["y"]) * down
    a, b = float(value["radiusX"]) * across, float(value["radiusY"]) * down
    turn = math.radians(float(value.get("rotation") or 0.0))
    dx = math.hypot(a * math.cos(turn), b * math.sin(turn))
    dy = math.hypot(a * math.sin(turn), b * math.cos(turn))
    return (x - dx, y - dy, x + dx, y + dy)


def _polygon(result: Result, width: int, height: int) -> Xyxy:
    value, across, down = result["value"], width / 100, height / 100
    points = [(float(x) * across, float(y) * down) for x, y in value["points"]]
    if len(points) < 3:
        x, y = points[0] if points else (0.0, 0.0)
        return (x, y, x, y)
    return _around(points)


def _around(points: Sequence[tuple[float, float]]) -> Xyxy:
    xs, ys = zip(*points, strict=True)
    return (min(xs), min(ys), max(xs), max(ys))


def _brush(result: Result, width: int, height: int) -> Xyxy:
    # Label Studio's own decoder; importing it takes seconds, and only masks need it.
    from label_studio_sdk.converter.brush import decode_rle

    rle = bytes(result["value"]["rle"])
    across, down = int(result["original_width"]), int(result["original_height"])
    _check_size(across, down, width, height)
    if int.from_bytes(rle[:4], "big") != 4 * across * down:
        raise ValueError("a brush mask of another size than its image")
    opaque = np.asarray(decode_rle(rle)).reshape(down, across, 4)[:, :, 3]
    return _of_mask(Image.fromarray(opaque), width, height)


def _bitmask(result: Result, width: int, height: int) -> Xyxy:
    _, comma, encoded = str(result["value"]["imageDataURL"]).partition(";base64,")
    if not comma:
        raise ValueError("a bitmask that is not a data URL")
    with Image.open(io.BytesIO(base64.b64decode(encoded)), formats=("PNG",)) as image:
        _check_size(*image.size, width, height)
        mask = image.getchannel("A") if "A" in image.getbands() else image.convert("L")
    return _of_mask(mask, width, height)


def _check_size(across: int, down: int, width: int, height: int) -> None:
    """Refuse masks that would exhaust memory."""
    if not 0 < across * down <= _MOST_MASK_PIXELS * width * height:
        raise ValueError(f"a mask of {across} by {down} pixels on an image of {width} by {height}")


def _of_mask(mask: Image.Image, width: int, height: int) -> Xyxy:
    found = mask.getbbox()
    if found is None:
        return (0.0, 0.0, 0.0, 0.0)
    across, down = width / mask.width, height / mask.height
    return (found[0] * across, found[1] * down, found[2] * across, found[3] * down)


@dataclass(frozen=True, slots=True)
class _Shape:
    """How the hull of one kind of shape is computed, and the fields of its value that it needs."""

    fields: frozenset[str]
    hull: Callable[[Result, int, int], Xyxy]


_SHAPES = {
    "rectangle": _Shape(frozenset({"x", "y", "width", "height"}), _rectangle),
    "ellipse": _Shape(frozenset({"x", "y", "radiusX", "radiusY"}), _ellipse),
    "polygon": _Shape(frozenset({"points"}), _polygon),
    "brush": _Shape(frozenset({"rle"}), _brush),
    "magicwand": _Shape(frozenset({"rle"}), _brush),
    "bitmask": _Shape(frozenset({"imageDataURL"}), _bitmask),
}
