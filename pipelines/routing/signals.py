"""Signals that an image is worth reviewing, each short enough to read in a minute.

A signal gives every box an amount of expected corrections, float64 [N] >= 0; an image's value is
the weighted sum over its boxes. To add one: write a function here, give it a line in ``SIGNALS``,
and run ``benchmarks/review_value.py`` to see what it is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.policy.box_batch import BoxBatch

Amounts = NDArray[np.float64]


def uncertain_band(batch: BoxBatch) -> Amounts:
    """Boxes between the thresholds are not labels: each right one is a missed object."""
    return np.where(batch.uncertain, batch.right, 0.0)


def doubtful_label(batch: BoxBatch) -> Amounts:
    """Accepted boxes are labels: each wrong one has to be deleted or corrected."""
    return np.where(batch.accepted, 1.0 - batch.right, 0.0)


def faint_box(batch: BoxBatch) -> Amounts:
    """Boxes below the reject threshold that may be right all the same: objects missed."""
    return np.where(batch.standing | batch.alternative, 0.0, batch.right)


def contested_class(batch: BoxBatch) -> Amounts:
    """Boxes that yielded to a box of another class on the same object: theirs may be right."""
    other = batch.category_ids != batch.category_ids[batch.winner]
    return np.where(batch.alternative & other, batch.right, 0.0)


def class_margin(batch: BoxBatch) -> Amounts:
    """Share of the second-best class in the best two: up to 0.5, where either could be right.

    Margin sampling (Scheffer et al. 2001), on the scores of the box's own anchor.
    """
    top = batch.topk_scores
    if top.shape[1] < 2:
        return np.zeros(len(top))
    share = top[:, 1] / np.maximum(top[:, 0] + top[:, 1], 1e-9)
    return np.where(batch.standing, share, 0.0).astype(np.float64)


def score_entropy(batch: BoxBatch) -> Amounts:
    """Entropy of right or wrong, in bits: 1 where either is equally likely."""
    p = np.clip(batch.right, 1e-9, 1 - 1e-9)
    bits = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    return np.where(batch.standing, bits, 0.0)


def box_spread(batch: BoxBatch) -> Amounts:
    """DFL spread relative to the side: twice the mean over four sides, up to 1 (GFLv2, 2021).

    A side that spreads over a quarter of the box is as likely below IoU 0.5 as not. 0 where the
    detector does not say.
    """
    sides = np.maximum(batch.boxes[:, 2:] - batch.boxes[:, :2], 1.0)
    relative = batch.box_std / np.tile(sides, 2)
    spread = np.nan_to_num(np.minimum(2.0 * relative.mean(axis=1), 1.0), nan=0.0)
    return np.where(batch.standing, spread, 0.0).astype(np.float64)


def disagreement(batch: BoxBatch) -> Amounts:
    """How little the runs of a fused run agree on a shown box: 1 where one of them drew it alone.

    0 in a run that was not fused.
    """
    apart = np.nan_to_num(1.0 - batch.agreement, nan=0.0)
    return np.where(batch.standing, apart, 0.0).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Weighted:
    """A signal, how much of its amount counts, and what it says to a person."""

    amount: Callable[[BoxBatch], Amounts]
    weight: float
    says: str = ""


SIGNALS: Mapping[str, Weighted] = {
    "uncertain_band": Weighted(uncertain_band, 1.0, "boxes between the thresholds"),
    "doubtful_label": Weighted(doubtful_label, 1.0, "accepted boxes that may be wrong"),
    "faint_box": Weighted(faint_box, 0.5, "dropped boxes that may be objects"),
    "contested_class": Weighted(contested_class, 1.0, "one object with boxes of two classes"),
    "class_margin": Weighted(class_margin, 0.25, "two classes nearly alike"),
    "score_entropy": Weighted(score_entropy, 0.25, "boxes the model is undecided about"),
    "box_spread": Weighted(box_spread, 0.25, "edges the model is unsure of"),
    "disagreement": Weighted(disagreement, 0.25, "boxes that the models do not agree on"),
}


def measure(batch: BoxBatch, signals: Mapping[str, Weighted] = SIGNALS) -> tuple[Amounts, Amounts]:
    """Weighted amounts per box and per image.

    Returns:
        float64 [N], the value of each box over all signals; float64 [M, signals], per image, in
        the order of ``signals``. Summed over signals that is the image's value.
    """
    per_box = [np.asarray(s.weight * s.amount(batch)) for s in signals.values()]
    per_image = np.column_stack([batch.per_image(amounts) for amounts in per_box])
    total: NDArray[Any] = np.sum(per_box, axis=0)
    return total, per_image
