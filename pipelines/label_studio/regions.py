"""Convert boxes to Label Studio's form and back.

Rows: xyxy in pixels of the upright image. Label Studio: left, top, width and height in percent of
the upright image (its page applies EXIF). Other shapes become their hulls, see shapes.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.label_studio.interface import Interface
from pipelines.label_studio.shapes import hull_of
from storage.records import Xyxy

_SLIVER_PX = 0.01


@dataclass(frozen=True, slots=True)
class ShownBox:
    """A predicted box to be shown.

    Attributes:
        region: names it within its image, and survives edits.
        bbox, category, score: as the model has it.
        agreement: how much the runs of a fused run agree on it, in [0, 1]; None: not fused.
    """

    region: str
    bbox: Xyxy
    category: str
    score: float
    agreement: float | None = None


@dataclass(frozen=True, slots=True)
class Region:
    """A labelled box of an answer or a prediction; ``score`` is None where there is none."""

    region: str
    bbox: Xyxy
    category: str
    score: float | None


def clip(bbox: Xyxy, width: int, height: int) -> Xyxy | None:
    """Return the part of a box inside its image; None where there is none, or none to be seen."""
    x1, y1, x2, y2 = bbox
    inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    seen = min(inside[2] - inside[0], inside[3] - inside[1]) >= _SLIVER_PX
    return inside if seen else None


def to_result(box: ShownBox, width: int, height: int, names: Interface) -> dict[str, Any] | None:
    """Return one region of a prediction; None where the box lies outside its image."""
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


@dataclass(frozen=True, slots=True)
class Drawn:
    """What an annotation or a prediction holds.

    Attributes:
        regions: labelled boxes, hulls of other shapes among them.
        unusable: what cannot become a box, by kind: ``keypointlabels``, ``rectangle without a
            label``, ``two labels on one region``, …; and, where nothing was drawn at all, what was
            said instead of drawing (``choices``, ``textarea``, …).
        flat: shapes without area, left out.
    """

    regions: tuple[Region, ...]
    unusable: tuple[str, ...] = ()
    flat: int = 0


def read_results(results: Sequence[Mapping[str, Any]], width: int, height: int) -> Drawn:
    """Return everything in an annotation's or a prediction's results.

    Results with one id describe one region: its shape, its labels, what else was said of it.

    Args:
        results: as Label Studio has them.
        width, height: of the upright image, in pixels.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: they are malformed.
    """
    by_region: dict[str, list[Mapping[str, Any]]] = {}
    said = []
    for at, result in enumerate(results):
        if _is_drawn(result):
            by_region.setdefault(str(result.get("id", f"#{at}")), []).append(result)
        else:
            said.append(str(result.get("type", "unknown")))
    regions, unusable, flat = [], [], 0
    for name, parts in by_region.items():
        found = _region(name, parts, width, height)
        if isinstance(found, str):
            unusable.append(found)
        elif found.bbox[2] <= found.bbox[0] or found.bbox[3] <= found.bbox[1]:
            flat += 1
        else:
            regions.append(found)
    if not by_region:
        unusable = said
    return Drawn(tuple(regions), tuple(unusable), flat)


def _is_drawn(result: Mapping[str, Any]) -> bool:
    """Return whether a result is a region on the image, not a statement about either."""
    kind = str(result.get("type", ""))
    return kind.endswith("labels") or kind in _DRAWN


# Shapes of controls without labels of their own; anything else is an answer to a question.
_DRAWN = frozenset(
    ["rectangle", "ellipse", "polygon", "brush", "magicwand", "bitmask", "keypoint", "vector"]
)


def _region(name: str, parts: Sequence[Mapping[str, Any]], width: int, height: int) -> Region | str:
    """Return a region made of its parts, or the kind of thing that cannot become a labelled box."""
    labels = {str(label) for part in parts for label in _labels(part)}
    kind = str(parts[0]["type"])
    hulls = [hull for part in parts if (hull := hull_of(part, width, height)) is not None]
    if not hulls:
        return kind
    if len(labels) != 1:
        return f"{kind} without a label" if not labels else f"{len(labels)} labels on one region"
    score = next((float(p["score"]) for p in parts if p.get("score") is not None), None)
    return Region(region=name, bbox=hulls[0], category=labels.pop(), score=score)


def _labels(part: Mapping[str, Any]) -> Sequence[str]:
    """Return the labels that a result carries: under the name of its kind."""
    kind, value = str(part["type"]), part.get("value") or {}
    return value.get(kind) or [] if kind.endswith("labels") else []
