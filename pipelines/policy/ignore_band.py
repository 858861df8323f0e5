"""Measure and bound the image area that boxes between the thresholds cover.

A box between the thresholds is neither a label nor background: training learns nothing there. A
wide band of faint boxes can cover most of an image, so its share of the area is measured, and can
be bounded by dropping the faintest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.policy.policy import ClassThresholds, Decision, Policy
from storage.records import Category, Detections

_GRID = 64  # cells a side: an image's area is known to about 1 %
_HALVINGS = 12


@dataclass(frozen=True, slots=True)
class JudgedImage:
    """One image of a fit: its boxes, its size in pixels, the images that it stands for."""

    found: Detections
    width: int
    height: int
    weight: float


def ignored_share(
    images: Sequence[JudgedImage], policy: Policy, categories: Sequence[Category]
) -> float:
    """Return mean share of the image area, weighted, that boxes between the thresholds cover."""
    thresholds = policy.thresholds(categories)
    shares = []
    for image in images:
        decided = thresholds.decide(image.found.scores, image.found.category_ids)
        band = image.found.boxes[decided == Decision.IGNORE]
        shares.append(_covered(band, image.width, image.height))
    weights = [image.weight for image in images]
    return float(np.average(shares, weights=weights)) if shares else 0.0


def bound_band(
    policy: Policy, images: Sequence[JudgedImage], categories: Sequence[Category], at_most: float
) -> Policy:
    """Raise ``reject``, for all classes alike, until the band fits the bound.

    ``accept`` stays as it is, so labels do not change.
    """
    if ignored_share(images, policy, categories) <= at_most:
        return policy
    low, high = 0.0, 1.0  # at 1, every reject meets its accept and the band is empty
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = ignored_share(images, _with_reject(policy, middle), categories) <= at_most
        low, high = (low, middle) if fits else (middle, high)
    return _with_reject(policy, high)


def _with_reject(policy: Policy, least: float) -> Policy:
    """Return every reject threshold at ``least`` or more, and never above its accept."""

    def raised(accept: float, reject: float) -> float:
        return min(accept, max(reject, least))

    classes = {}
    for name in policy.classes:
        accept, reject = policy.of(name)
        classes[name] = ClassThresholds(accept=accept, reject=raised(accept, reject))
    reject = raised(policy.accept, policy.reject)
    return policy.model_copy(update={"reject": reject, "classes": classes})


def _covered(boxes: NDArray[Any], width: int, height: int) -> float:
    """Return the image share covered by the union of boxes [N, 4], on a grid of cell centres."""
    if not len(boxes):
        return 0.0
    cells = np.zeros((_GRID, _GRID), np.bool_)
    scale = np.array([_GRID / width, _GRID / height] * 2)
    for x1, y1, x2, y2 in np.clip(np.rint(boxes * scale), 0, _GRID).astype(int):
        cells[y1:y2, x1:x2] = True
    return float(cells.mean())
