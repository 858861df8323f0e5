"""All boxes of many images as flat arrays: what signals are computed on, without a Python loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.policy.policy import Decision, Thresholds


@dataclass(frozen=True, slots=True)
class BoxBatch:
    """N boxes of M images.

    Attributes:
        images: M.
        image: int64 [N], which image (0 to M - 1) a box is in.
        boxes: float32 [N, 4], xyxy, pixels of the upright image.
        scores: float32 [N], raw.
        category_ids: int16 [N].
        topk_scores: float32 [N, K], descending scores of the anchor's best classes.
        box_std: float32 [N, 4], DFL standard deviation per side, pixels.
        box_entropy: float32 [N], DFL entropy, nats, mean over the sides.
        right: float64 [N], probability that the box is right.
        decisions: int8 [N], ``Decision`` if a person were asked (band: REVIEW).
    """

    images: int
    image: NDArray[np.int64]
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    category_ids: NDArray[np.int16]
    topk_scores: NDArray[np.float32]
    box_std: NDArray[np.float32]
    box_entropy: NDArray[np.float32]
    right: NDArray[np.float64]
    decisions: NDArray[np.int8]

    @property
    def accepted(self) -> NDArray[np.bool_]:
        """bool [N]: boxes that become labels."""
        return np.asarray(self.decisions == Decision.ACCEPT)

    @property
    def uncertain(self) -> NDArray[np.bool_]:
        """bool [N]: boxes between the thresholds."""
        return np.asarray(self.decisions == Decision.REVIEW)

    @property
    def shown(self) -> NDArray[np.bool_]:
        """bool [N]: boxes that a reviewer would see."""
        return self.accepted | self.uncertain

    def per_image(self, amounts: NDArray[Any]) -> NDArray[np.float64]:
        """Sum of a per-box amount by image: float64 [M]."""
        return np.bincount(self.image, weights=amounts, minlength=self.images).astype(np.float64)


def box_batch(detections: pa.ChunkedArray, thresholds: Thresholds) -> BoxBatch:
    """The detections column of an annotation table as flat arrays, judged by a policy."""
    column = detections.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # what pyarrow gives for no rows at all
        column = pa.concat_arrays(column.chunks)
    lengths = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    flat = column.flatten()
    n = len(flat)
    scores = flat.field("score").to_numpy().astype(np.float32)
    category_ids = flat.field("category_id").to_numpy().astype(np.int16)
    return BoxBatch(
        images=len(lengths),
        image=np.repeat(np.arange(len(lengths)), lengths),
        boxes=_matrix(flat.field("bbox"), n),
        scores=scores,
        category_ids=category_ids,
        topk_scores=_matrix(flat.field("topk_scores"), n),
        box_std=_matrix(flat.field("box_std"), n),
        box_entropy=flat.field("box_entropy").to_numpy().astype(np.float32),
        right=thresholds.probability(scores, category_ids),
        decisions=thresholds.decide(scores, category_ids, queued=True),
    )


def _matrix(values: pa.Array, n: int) -> NDArray[np.float32]:
    flat: NDArray[np.float32] = values.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    return flat.reshape(n, -1) if n else np.zeros((0, 4), np.float32)
