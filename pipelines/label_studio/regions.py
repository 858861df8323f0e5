"""Boxes as Label Studio has them, and back.

Rows: xyxy in pixels of the upright image. Label Studio: left, top, width and height in percent of
the upright image (its page applies EXIF), turned clockwise about the left top corner.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.label_studio.interface import Interface
from storage.records import Xyxy

_SLIVER_PX = 0.01


@dataclass(frozen=True, slots=True)
class ShownBox:
    """A predicted box to be shown; ``region`` names it within its image, and survives edits."""

    region: str
    bbox: Xyxy
    category: str
    score: float


@dataclass(frozen=True, slots=True)
class Region:
    """A box of an answer or a prediction; ``category`` is '' where it carries no label."""

    region: str
    bbox: Xyxy
    category: str
    score: float | None


def clip(bbox: Xyxy, width: int, height: int) -> Xyxy | None:
    """The part of a box inside its image; None where there is none, or none to be seen."""
    x1, y1, x2, y2 = bbox
    inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    seen = min(inside[2] - inside[0], inside[3] - inside[1]) >= _SLIVER_PX
    return inside if seen else None


def to_result(box: ShownBox, width: int, height: int, names: Interface) -> dict[str, Any] | None:
    """One region of a prediction; None where the box lies outside its image."""
    inside = clip(box.bbox, width, height)
    if inside is None:
        return None
    x1, y1, x2, y2 = inside
    return {
        "id": box.region,
        "from_name": names.control,
        "to_name": names.image,
        "type": "rectanglelabels",
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "score": box.score,
        "value": {
            "x": 100 * x1 / width,
            "y": 100 * y1 / height,
            "width": 100 * (x2 - x1) / width,
            "height": 100 * (y2 - y1) / height,
            "rotation": 0,
            "rectanglelabels": [box.category],
        },
    }


def from_results(results: Sequence[Mapping[str, Any]], width: int, height: int) -> list[Region]:
    """The boxes among an annotation's or prediction's results; other kinds are passed over."""
    found = []
    for result in results:
        value = result.get("value") or {}
        if result.get("type") in ("rectanglelabels", "rectangle") and "width" in value:
            labels = value.get("rectanglelabels") or [""]
            score = result.get("score")
            found.append(
                Region(
                    region=str(result.get("id", "")),
                    bbox=_bbox(value, width, height),
                    category=str(labels[0]),
                    score=None if score is None else float(score),
                )
            )
    return found


def _bbox(value: Mapping[str, Any], width: int, height: int) -> Xyxy:
    """Upright hull of a region, xyxy in pixels."""
    x, y = float(value["x"]) * width / 100, float(value["y"]) * height / 100
    w, h = float(value["width"]) * width / 100, float(value["height"]) * height / 100
    turn = math.radians(float(value.get("rotation") or 0.0))
    if not turn:
        return (x, y, x + w, y + h)
    cos, sin = math.cos(turn), math.sin(turn)
    corners = [(x + a * cos - b * sin, y + a * sin + b * cos) for a in (0, w) for b in (0, h)]
    xs, ys = zip(*corners, strict=True)
    return (min(xs), min(ys), max(xs), max(ys))
