"""Which classes a model's labels are silent about: where none is labelled, one may well be.

A label version is not annotated exhaustively for every class (the setting of LVIS, Gupta et al.,
arXiv 1908.03195). Where the policy accepts no box of a class, or labels and undecided boxes cover
too few of its objects, its absence from a model's image is no evidence, and training must not
learn it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipelines.policy.policy import Policy
from storage.records import Category


def silent_classes(
    policy: Policy, categories: Sequence[Category], absence_from: float
) -> dict[int, str]:
    """Return the classes whose absence the model's images do not show, and why, by category id.

    Args:
        absence_from: least known share of a class's objects for its absence to mean something.
            Classes whose share was not measured are judged by their thresholds alone.
    """
    thresholds = policy.thresholds(categories)
    found = {}
    for category in categories:
        own = policy.classes.get(category.name)
        known = None if own is None else own.known
        curve = None if thresholds.curves is None else thresholds.curves[category.id]
        highest = 1.0 if curve is None else float(np.float32(curve.probabilities[-1]))
        accept = float(thresholds.accept[category.id])
        least = 0.0 if thresholds.accept_score is None else thresholds.accept_score[category.id]
        if accept >= 1 or highest < accept or least > 1:
            found[category.id] = "the policy accepts no box of it"
        elif known is not None and known < absence_from:
            found[category.id] = (
                f"labels and undecided boxes cover {known:.0%} of its objects, "
                f"less than {absence_from:.0%}"
            )
    return found
