"""YOLO-NAS's loss, with regions to ignore, silent classes and a weight for each box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.training.distributed import group_size, summed
from workers.yolo_nas.network import import_super_gradients
from workers.yolo_nas.sg_environment import undisturbed

import_super_gradients()  # before any other import of it: without its side effects

with undisturbed():
    from super_gradients.training.losses.ppyolo_loss import PPYoloELoss, TaskAlignedAssigner


@dataclass(frozen=True, slots=True)
class Assignment:
    """The targets that the anchors of one batch learn.

    Attributes:
        target: int64 [B, A], the row of ``targets`` that an anchor learns; -1: none.
        boxes: float32 [B, A, 4], that row's xyxy in input pixels; meaningless where none.
        scores: float32 [B, A, C], target scores after the weights.
    """

    target: Tensor
    boxes: Tensor
    scores: Tensor

    @property
    def positive(self) -> Tensor:
        """bool [B, A]: anchors that learn an object."""
        return self.target >= 0


class IndexedAssigner(TaskAlignedAssigner):  # type: ignore[misc]  # super_gradients: no types
    """The task-aligned assigner, which also tells the target of each anchor and weights it.

    Set ``targets`` and ``weights`` to the batch's before each call; ``assignment`` is the result.
    """

    targets: Tensor
    weights: Tensor | None = None
    assignment: Assignment

    @torch.no_grad()
    def forward(self, *, gt_labels, gt_bboxes, bg_index, **rest):  # type: ignore[no-untyped-def]  # overrides an untyped one
        """Return labels [B, A], boxes [B, A, 4] and scores [B, A, C], the scores weighted."""
        labels, boxes, scores = super().forward(
            gt_labels=gt_labels, gt_bboxes=gt_bboxes, bg_index=bg_index, **rest
        )
        target = torch.full_like(labels, -1)
        batch, anchor = torch.nonzero(labels != bg_index, as_tuple=True)
        if len(batch):
            # The base class tells box and class, not the row they come from. Rows that agree in
            # both have the same candidates, of which it takes the first: so does argmax.
            same = (gt_bboxes[batch] == boxes[batch, anchor][:, None]).all(dim=-1)
            same &= gt_labels[batch, :, 0] == labels[batch, anchor][:, None]
            place = same.to(torch.uint8).argmax(dim=1)
            target[batch, anchor] = _rows(self.targets, len(labels), batch, place)
            if self.weights is not None:
                scores[batch, anchor] *= self.weights[target[batch, anchor]][:, None]
        self.assignment = Assignment(target, boxes, scores)
        return labels, boxes, scores


def _rows(targets: Tensor, images: int, batch: Tensor, place: Tensor) -> Tensor:
    """Return the rows of ``targets`` of the ``place``-th boxes of the images ``batch``."""
    of_image = targets[:, 0].long()
    order = torch.argsort(of_image, stable=True)
    counts = torch.bincount(of_image, minlength=images)
    return order[(counts.cumsum(0) - counts)[batch] + place]


class RegionLoss(PPYoloELoss):  # type: ignore[misc]  # super_gradients ships no types
    """PPYoloELoss with the task-aligned assigner, box weights, and silence in regions to ignore.

    An anchor that no object claimed, and whose centre lies in a region, adds nothing to the
    varifocal classification loss: neither "object" nor "background" is taught there. In a region
    that is silent about a class only that class is spared, as the federated loss spares the
    categories that an image was not exhaustively annotated for (LVIS, Gupta et al., arXiv
    1908.03195; Zhou et al., arXiv 2103.07461). The weight
    of a box scales the target scores of its anchors, and with them its part of every term: an
    anchor of a box of weight 0 teaches nothing about its class and place, and that it is of no
    other class.

    ``assignment`` is that of the last batch.
    """

    assigner: IndexedAssigner

    def __init__(self, classes: int) -> None:
        # The default assigner is the static ATSS, which is meant for the first epochs only.
        super().__init__(num_classes=classes, use_static_assigner=False)
        base = self.assigner
        self.assigner = IndexedAssigner(topk=base.topk, alpha=base.alpha, beta=base.beta)
        self._silent: Tensor | None = None

    @property
    def assignment(self) -> Assignment:
        """The targets that the anchors of the last batch learned."""
        return self.assigner.assignment

    def forward(
        self,
        outputs: tuple[Any, ...],
        targets: Tensor,
        ignore: Tensor | None = None,
        weights: Tensor | None = None,
        silent: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Loss and its parts.

        Args:
            outputs: the raw outputs of the network in training mode, float32.
            targets: [N, 6] batch index, class, cx, cy, w, h in input pixels.
            ignore: [M, 5] batch index, x1, y1, x2, y2 in input pixels.
            weights: [N], of the targets; None: all 1.
            silent: [S, 6] batch index, class, x1, y1, x2, y2: where a class is not told absent.

        Returns:
            The scalar loss, and float [4]: classification, IoU, DFL and their sum.
        """
        scores, anchor_points = outputs[0], outputs[3]
        self._silent = None
        if ignore is not None and len(ignore):
            self._silent = anchors_inside(anchor_points, ignore, scores.shape[0])[..., None]
        if silent is not None and len(silent):
            by_class = classes_silent(anchor_points, silent, scores.shape)
            self._silent = by_class if self._silent is None else self._silent | by_class
        self.assigner.targets, self.assigner.weights = targets, weights
        return self._combined(*self._forward_batched(outputs, targets))

    def _combined(
        self, classification: Tensor, iou: Tensor, dfl: Tensor, assigned: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss and its parts from this rank's sums, as one process would have them.

        ``assigned`` is summed over all ranks before its lower limit applies. The gradient is that
        of this rank's share times the number of ranks, since gradients are averaged over ranks;
        the parts are of the global batch.
        """
        scale = torch.clip(summed(assigned), min=1.0)
        weighted = (
            self.classification_loss_weight * classification / scale,
            self.iou_loss_weight * iou / scale,
            self.dfl_loss_weight * dfl / scale,
        )
        loss = weighted[0] + weighted[1] + weighted[2]
        parts = summed(torch.stack([*(part.detach() for part in weighted), loss.detach()]))
        size = group_size()
        return loss if size == 1 else loss * size, parts

    def _varifocal_loss(  # type: ignore[no-untyped-def]  # overrides an untyped static method
        self, pred_logits, gt_score, label, alpha=0.75, gamma=2.0
    ):
        weight = alpha * pred_logits.sigmoid().pow(gamma) * (1 - label) + gt_score * label
        if self._silent is not None:
            unclaimed = label.sum(dim=-1) == 0
            weight = weight * ~(self._silent & unclaimed[..., None])
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


def classes_silent(anchor_points: Tensor, regions: Tensor, shape: Sequence[int]) -> Tensor:
    """Which classes are silent at which anchors: bool [B, A, C], which is ``shape``.

    Args:
        anchor_points: [A, 2] centres.
        regions: [S, 6] batch index, class, x1, y1, x2, y2.
    """
    batch, _, classes = shape
    found = torch.zeros(tuple(shape), dtype=torch.bool, device=anchor_points.device)
    for number in range(classes):
        rows = regions[regions[:, 1] == number]
        if len(rows):
            found[..., number] = anchors_inside(anchor_points, rows[:, [0, 2, 3, 4, 5]], batch)
    return found
