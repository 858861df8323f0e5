"""All boxes of many images as flat arrays, for computing signals without a Python loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.policy.one_object import winners
from pipelines.policy.policy import Decision, Thresholds
from storage.boxes import clipped, has_area

_SIZE = ("width", "height")


@dataclass(frozen=True, slots=True)
class BoxBatch:
    """N boxes of M images.

    Attributes:
        images: M.
        image: int64 [N], which image (0 to M - 1) a box is in.
        boxes: float32 [N, 4], xyxy, pixels of the upright image, clipped to it.
        scores: float32 [N], raw.
        category_ids: int16 [N].
        topk_scores: float32 [N, K], descending scores of the anchor's best classes.
        box_std: float32 [N, 4], DFL standard deviation per side, pixels; not a number where the
            detector has none, and likewise
        box_entropy: float32 [N], DFL entropy, nats, mean over the sides.
        right: float64 [N], probability that the box is right; 0 outside the image.
        decisions: int8 [N], ``Decision`` if a person were asked (band: REVIEW); REJECT for boxes
            outside the image, and for those that yield to a likelier box of the same object.
        outside: bool [N], boxes without area in their image.
        agreement: float32 [N], how much the runs of a fused run agree on the box, in [0, 1]; not a
            number in any other run.
        winner: int64 [N], index of the box that stands for the same object; -1: it stands itself.
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
    outside: NDArray[np.bool_]
    winner: NDArray[np.int64]
    agreement: NDArray[np.float32]

    @property
    def alternative(self) -> NDArray[np.bool_]:
        """bool [N]: boxes that yield to a likelier box of the same object."""
        return np.asarray(self.winner >= 0)

    @property
    def accepted(self) -> NDArray[np.bool_]:
        """bool [N]: boxes that become labels."""
        return np.asarray(self.decisions == Decision.ACCEPT)

    @property
    def uncertain(self) -> NDArray[np.bool_]:
        """bool [N]: boxes between the thresholds."""
        return np.asarray(self.decisions == Decision.REVIEW)

    @property
    def standing(self) -> NDArray[np.bool_]:
        """bool [N]: accepted or uncertain: what becomes a label or an ignore box."""
        return self.accepted | self.uncertain

    def per_image(self, amounts: NDArray[Any]) -> NDArray[np.float64]:
        """Sum of a per-box amount by image: float64 [M]."""
        return np.bincount(self.image, weights=amounts, minlength=self.images).astype(np.float64)


def box_batch(table: pa.Table, thresholds: Thresholds) -> BoxBatch:
    """Return a table's boxes as flat arrays, clipped to their images and judged.

    Args:
        table: with the columns ``detections``, ``width`` and ``height``.
        thresholds: the policy for the run's classes.
    """
    column = table.column("detections").combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # what pyarrow gives for no rows at all
        column = pa.concat_arrays(column.chunks)
    lengths = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    flat = column.flatten()
    n = len(flat)
    scores = flat.field("score").to_numpy().astype(np.float32)
    category_ids = flat.field("category_id").to_numpy().astype(np.int16)
    image = np.repeat(np.arange(len(lengths)), lengths)
    sizes = [table.column(name).to_numpy().astype(np.float32)[image] for name in _SIZE]
    boxes = clipped(_matrix(flat.field("bbox"), n), *sizes)
    inside = has_area(boxes)
    right = np.where(inside, thresholds.probability(scores, category_ids), 0.0)
    decisions = thresholds.decide(scores, category_ids, queued=True)
    decisions[~inside] = Decision.REJECT
    winner = _winners(image, boxes, decisions, right, thresholds.one_object)
    decisions[winner >= 0] = Decision.REJECT
    return BoxBatch(
        images=len(lengths),
        image=image,
        boxes=boxes,
        scores=scores,
        category_ids=category_ids,
        topk_scores=_matrix(flat.field("topk_scores"), n),
        box_std=_spread(flat.field("box_std"), n),
        box_entropy=flat.field("box_entropy").to_numpy(zero_copy_only=False).astype(np.float32),
        right=right,
        decisions=decisions,
        outside=~inside,
        winner=winner,
        agreement=_agreement(flat, n),
    )


def _agreement(flat: pa.StructArray, n: int) -> NDArray[np.float32]:
    """[N]; not a number where null, and in rows of schema versions before 3."""
    if flat.type.get_field_index("agreement") < 0:
        return np.full(n, np.nan, np.float32)
    return np.asarray(flat.field("agreement").to_numpy(zero_copy_only=False), np.float32)


def _winners(
    image: NDArray[np.int64],
    boxes: NDArray[np.float32],
    decisions: NDArray[np.int8],
    right: NDArray[np.float64],
    iou: float | None,
) -> NDArray[np.int64]:
    """See ``BoxBatch.winner``: labels before uncertain boxes, then by probability."""
    if iou is None:
        return np.full(len(image), -1, np.int64)
    rank = np.empty(len(image), np.int64)
    rank[np.lexsort((-right, -decisions))] = np.arange(len(image))
    return winners(image, boxes, rank, decisions > Decision.REJECT, iou)


def _spread(values: pa.Array, n: int) -> NDArray[np.float32]:
    """[N, 4]; rows that are null are not numbers."""
    found = np.full((n, 4), np.nan, np.float32)
    known = values.is_valid().to_numpy(zero_copy_only=False)
    found[known] = _matrix(values.drop_null(), int(known.sum()))
    return found


def _matrix(values: pa.Array, n: int) -> NDArray[np.float32]:
    flat: NDArray[np.float32] = values.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    return flat.reshape(n, -1) if n else np.zeros((0, 4), np.float32)
