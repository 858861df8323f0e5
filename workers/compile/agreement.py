"""Measure how far two runtimes' outputs differ on the same images, before NMS."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storage.errors import ArtefactError
from workers.detectors.graph import Session

BOX_PX, SCORE = 0.05, 1e-3  # up to this difference two runs count as equal


@dataclass(frozen=True, slots=True)
class Disagreement:
    """The largest difference over all anchors that score above a floor in the reference; of an
    image without any, over all that both selected.

    Attributes:
        anchors: how many there were.
        missing: of those, how many the other did not select.
        box_px, std_px: pixels of the input. ``score``: any class. ``entropy``: nats.
    """

    anchors: int
    missing: int
    box_px: float
    score: float
    std_px: float
    entropy: float

    @property
    def same(self) -> bool:
        """Within the limits in which two runs count as equal."""
        compared = self.anchors > 0 and self.missing == 0
        return compared and self.box_px <= BOX_PX and self.score <= SCORE


def difference(
    reference: Session, other: Session, batch: NDArray[np.uint8], floor: float
) -> Disagreement:
    """Run both on ``batch``, uint8 [B, H, W, 3], and compare.

    Anchors within ``SCORE`` of the floor are skipped: they may fall on either side of it.
    """
    a, b = reference.run(batch), other.run(batch)
    found = missing = 0
    largest = np.zeros(4)
    for i in range(len(batch)):
        mine, theirs, lacking = _pairs(a.scores[i], a.anchors[i], b.anchors[i], floor)
        found += len(mine) + lacking
        missing += lacking
        pairs = ((a.boxes, b.boxes), (a.scores, b.scores), (a.box_std, b.box_std))
        for k, (x, y) in enumerate((*pairs, (a.entropy, b.entropy))):
            if x is None or y is None:  # no such output in this family
                continue
            apart = np.abs(x[i][mine] - y[i][theirs])
            largest[k] = np.maximum(largest[k], apart.max(initial=0))  # NaN propagates
    box, score, std, entropy = (float(f"{value:.3g}") for value in largest)
    return Disagreement(found, missing, box, score, std, entropy)


def _pairs(
    scores: NDArray[np.float32],
    anchors: NDArray[np.int32],
    others: NDArray[np.int32],
    floor: float,
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Return one image's compared anchors: their indices in both, and how many the other lacks."""
    place = {int(anchor): k for k, anchor in enumerate(others)}
    there = np.array([place.get(int(anchor), -1) for anchor in anchors], np.int64)
    likely = scores.max(1) > floor + SCORE
    lacking = int((likely & (there < 0)).sum())
    if not likely.any():  # no object; which of the unlikely are selected may be a tie
        likely[:] = True
    mine = np.flatnonzero(likely & (there >= 0))
    return mine, there[mine], lacking


def refuse_difference(found: Disagreement, what: str, reference: str = "torch") -> None:
    """Raise ArtefactError if ``found`` exceeds the allowed difference of two runs."""
    if not found.same:
        raise ArtefactError(
            f"{what} does not agree with {reference}: boxes differ by up to {found.box_px} px and "
            f"scores by up to {found.score}; {found.missing} of {found.anchors} anchors missing",
            hint=f"use `runtime: {'torch' if reference == 'torch' else 'onnx'}`, and report this "
            "with the versions that doctor shows",
        )
