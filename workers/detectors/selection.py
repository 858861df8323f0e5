"""The best anchors of dense network output, selected inside the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from workers.detectors.nms import PRE_NMS_CANDIDATES


class DenseNetwork(Protocol):
    """What is needed of ``DenseDetector``."""

    points: Tensor
    strides: Tensor

    def raw(self, images: Tensor) -> tuple[Tensor, Tensor]: ...

    def decode(
        self, distri: Tensor, points: Tensor, strides: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class SelectedDetector(nn.Module):
    """uint8 NHWC RGB batch → the up to 1,024 best anchors of each image; this is what is exported.

    An image's best 1,024 (anchor, class) pairs lie on the 1,024 anchors whose best class scores
    highest, so no candidate of NMS is lost, and neither 8,400 × 80 scores nor their DFL logits
    leave the device. All shapes but the batch's are fixed.
    """

    def __init__(self, dense: DenseNetwork, keep: Sequence[int], classes: int) -> None:
        """``keep``: ids of the classes that may be detected, of ``classes`` in all."""
        super().__init__()
        self.dense = dense
        self._all = sorted(keep) == list(range(classes))
        kept = torch.tensor(list(keep), dtype=torch.long, device=dense.points.device)
        self.register_buffer("kept", kept, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """K = min(1024, anchors), in no order.

        Returns:
            anchors int32 [B, K]; scores [B, K, C]; boxes [B, K, 4] and box_std [B, K, 4] in
            input pixels; entropy [B, K] in nats; total [B], which is finite when everything is.
        """
        return self.select(*self.dense.raw(images))

    def select(self, logits: Tensor, distri: Tensor) -> tuple[Tensor, ...]:
        """Return the same, from what ``DenseDetector.raw`` gives."""
        count, (anchors_n, classes) = logits.shape[0], logits.shape[1:]
        k = min(PRE_NMS_CANDIDATES, anchors_n)
        seen = logits if self._all else logits.index_select(2, self.kept)  # type: ignore[arg-type]
        _, anchors = seen.amax(-1).topk(k, dim=1, sorted=False)
        # Whole rows of one flat table: runtimes copy them as such.
        offsets = torch.arange(count, device=logits.device).unsqueeze(1) * anchors_n
        rows = (anchors + offsets).flatten()
        places = anchors.flatten()
        boxes, spread, entropy = self.dense.decode(
            distri.flatten(0, 1).index_select(0, rows),
            self.dense.points.index_select(0, places),
            self.dense.strides.index_select(0, places),
        )
        scores = logits.flatten(0, 1).index_select(0, rows).sigmoid()
        total = logits.mean((1, 2)) + distri.mean((1, 2, 3))
        return (
            anchors.int(),
            scores.reshape(-1, k, classes),
            boxes.reshape(-1, k, 4),
            spread.reshape(-1, k, 4),
            entropy.reshape(-1, k),
            total,
        )


class ExportedDetector(SelectedDetector):
    """With the raw logits as two more outputs, so that the graph can be cut there."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        raw = self.dense.raw(images)
        return (*self.select(*raw), *raw)
