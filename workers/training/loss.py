"""YOLO-NAS's loss, with ignore regions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from workers.yolo_nas.network import import_super_gradients
from workers.yolo_nas.sg_environment import undisturbed

import_super_gradients()  # before any other import of it: without its side effects

with undisturbed():
    import super_gradients
    from super_gradients.training.losses.ppyolo_loss import PPYoloELoss

    # The loss asks for this at every step. Its first look-up imports modules that put their own
    # streams in place of stdout and stderr, and print; here that ends with the block.
    _ = super_gradients.is_distributed


class RegionLoss(PPYoloELoss):  # type: ignore[misc]  # super_gradients ships no types
    """PPYoloELoss with the task-aligned assigner, silent in regions to ignore.

    An anchor that no object claimed, and whose centre lies in a region, adds nothing to the
    varifocal classification loss: neither "object" nor "background" is taught there.
    """

    def __init__(self, classes: int) -> None:
        # The default assigner is the static ATSS, which is meant for the first epochs only.
        super().__init__(num_classes=classes, use_static_assigner=False)
        self._silent: Tensor | None = None

    def forward(
        self, outputs: tuple[Any, ...], targets: Tensor, ignore: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss and its parts.

        Args:
            outputs: the raw outputs of the network in training mode, float32.
            targets: [N, 6] batch index, class, cx, cy, w, h in input pixels.
            ignore: [M, 5] batch index, x1, y1, x2, y2 in input pixels.

        Returns:
            The scalar loss, and float [4]: classification, IoU, DFL and their sum.
        """
        scores, anchor_points = outputs[0], outputs[3]
        if ignore is None or len(ignore) == 0:
            self._silent = None
        else:
            self._silent = anchors_inside(anchor_points, ignore, scores.shape[0])
        loss, parts = super().forward(outputs, targets)
        return loss, parts

    def _varifocal_loss(  # type: ignore[no-untyped-def]  # overrides an untyped static method
        self, pred_logits, gt_score, label, alpha=0.75, gamma=2.0
    ):
        weight = alpha * pred_logits.sigmoid().pow(gamma) * (1 - label) + gt_score * label
        if self._silent is not None:
            unclaimed = label.sum(dim=-1) == 0
            weight = weight * (~(self._silent & unclaimed))[..., None]
        entropy = nn.functional.binary_cross_entropy_with_logits(
            pred_logits, gt_score, reduction="none"
        )
        return (weight * entropy).sum()


def anchors_inside(anchor_points: Tensor, regions: Tensor, batch_size: int) -> Tensor:
    """Which anchor centres [A, 2] lie in which image's regions [M, 5]: bool [B, A]."""
    x, y = anchor_points[:, 0], anchor_points[:, 1]
    inside = torch.zeros((batch_size, len(anchor_points)), dtype=torch.bool, device=x.device)
    for index, x1, y1, x2, y2 in regions.tolist():
        inside[int(index)] |= (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
    return inside
