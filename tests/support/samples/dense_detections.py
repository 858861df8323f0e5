"""The reference for sparse decoding: one image's detections from every anchor it has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from storage.records import Detections
from workers.detectors.nms import NmsRules, Selected, detections_from_selected


def detections_from_dense(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    box_std: NDArray[np.float32],
    entropy: NDArray[np.float32],
    *,
    keep: Sequence[int],
    rules: NmsRules,
) -> Detections:
    """From the output of ``DenseDetector.forward`` for one image: [A, 4], [A, C], [A, 4], [A]."""
    anchors = np.arange(len(scores), dtype=np.int32)
    everything = (anchors, scores, boxes, box_std, entropy, np.float32(0))
    selected = Selected(*(np.asarray(one)[None] for one in everything))
    (found,) = detections_from_selected(selected, keep=keep, rules=rules)
    return found
