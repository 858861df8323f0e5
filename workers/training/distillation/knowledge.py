"""The loss terms of both kinds of knowledge, beside the ordinary loss and on its assignment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from workers.training.batches import TrainingBatch
from workers.training.distillation.losses import (
    decayed,
    decode_boxes,
    gaussian_bins,
    giou_loss,
    most_confident,
    quality_focal_loss,
    soft_cross_entropy,
)
from workers.training.distributed import summed
from workers.training.loss import Assignment, anchors_inside, classes_silent

Outputs = tuple[Any, ...]
"""What the network returns in training: class logits [B, A, C], DFL logits [B, A, 4 · bins],
anchors, their points [A, 2] in input pixels, anchors a level, strides [A, 1]."""


@dataclass(frozen=True, slots=True)
class DistillWeights:
    """How much distillation counts beside the ordinary loss, whose terms weigh 1, 2.5 and 0.5.

    Attributes:
        weight: of all of it, at the first step.
        final_share: of ``weight``, at the last step; a half cosine lies between.
        classes, boxes, distributions: of the terms. The defaults are those of PP-YOLOE+'s
            distillation (PaddleDetection's DistillPPYOLOELoss).
        top_share: share of each image's anchors that a teacher chooses by its confidence.
    """

    weight: float = 1.0
    final_share: float = 0.01
    classes: float = 1.0
    boxes: float = 2.5
    distributions: float = 0.5
    top_share: float = 0.01

    def at(self, step: int, steps: int) -> float:
        """Return the weight of ``step`` (from 0) of ``steps``."""
        return self.weight * decayed(step, steps, self.final_share)


class Knowledge(Protocol):
    """Something a student can be distilled from."""

    @property
    def weights(self) -> DistillWeights:
        """How much it counts."""

    def look(self, images: Tensor) -> Outputs | None:
        """Return what it makes of a batch's images; before the student's graph takes memory."""

    def loss(
        self,
        outputs: Outputs,
        seen: Outputs | None,
        assignment: Assignment,
        batch: TrainingBatch,
    ) -> Tensor:
        """Return the scalar loss, without the weight of the step.

        With several processes it is this one's share: the sum of all is that of the whole batch.

        Args:
            outputs: of the student, float32.
            seen: what ``look`` returned for the same images.
            assignment: of the batch's targets to the student's anchors.
        """


class StoredKnowledge:
    """What a label version stored about its boxes: class scores, and the spread of their sides.

    At each anchor that learns such a box:

    - class scores: quality focal loss towards the stored scores, in proportion to the alignment
      of the anchor: the box's best anchor learns the scores themselves. The sum is divided by
      that of the targets' largest scores.
    - sides: soft cross-entropy towards ``gaussian_bins`` of the distance from anchor to side and
      of the side's spread in strides, weighted as the ordinary DFL loss is, by the target score,
      and divided by the sum of the weights.

    Boxes of people, and boxes and sides without stored knowledge, add nothing.
    """

    def __init__(self, weights: DistillWeights) -> None:
        self.weights = weights

    def look(self, images: Tensor) -> None:
        """Return None: nothing is computed from the images."""

    def loss(
        self,
        outputs: Outputs,
        seen: Outputs | None,
        assignment: Assignment,
        batch: TrainingBatch,
    ) -> Tensor:
        """See ``Knowledge``."""
        logits, raw, points, strides = _of_student(outputs)
        image, anchor = torch.nonzero(assignment.positive, as_tuple=True)
        target = assignment.target[image, anchor]
        aligned = assignment.scores[image, anchor].sum(-1)
        nothing = (logits.sum() * 0.0, logits.new_zeros(()))  # a gradient exists all the same
        classes = sides = nothing
        if batch.soft_scores is not None:
            soft = batch.soft_scores.to(logits)[target]
            best = aligned.new_zeros(len(batch.targets)).scatter_reduce(0, target, aligned, "amax")
            share = aligned / best[target].clamp(min=torch.finfo(best.dtype).tiny)
            known = soft.isfinite().all(-1) & (aligned > 0)
            classes = _class_term(logits[image, anchor][known], (soft * share[:, None])[known])
        if batch.spread is not None:
            spread = batch.spread.to(logits)[target] / strides[anchor]
            distances = _distances(assignment.boxes[image, anchor], points[anchor], strides[anchor])
            sides = _side_term(_by_side(raw)[image, anchor], distances, spread, aligned)
        norms = _normaliser(torch.stack([classes[1], sides[1]]))
        of = self.weights
        return of.classes * classes[0] / norms[0] + of.distributions * sides[0] / norms[1]


def _class_term(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed quality focal loss of logits [P, C], and the targets' confidence."""
    return quality_focal_loss(logits, wanted).sum(), wanted.max(-1).values.sum()


def _side_term(
    logits: Tensor, distances: Tensor, spread: Tensor, aligned: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the summed soft cross-entropy of the sides [P, 4] of known spread (in strides), and
    the sum of their weights."""
    bins = logits.shape[-1]
    known = spread.isfinite() & (spread > 0)
    # The same limit as the ordinary DFL target has.
    wanted = gaussian_bins(
        distances.clamp(0, bins - 1 - 0.01), torch.where(known, spread, 1.0), bins
    )
    weight = known * aligned[:, None] / 4  # the ordinary loss, too, is the mean of the four sides
    return (soft_cross_entropy(logits, wanted) * weight).sum(), weight.sum()


def _distances(boxes: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """Return left, top, right, bottom [P, 4] in strides from points to boxes in pixels."""
    return torch.cat([points - boxes[:, :2], boxes[:, 2:] - points], -1) / strides


class TeacherKnowledge:
    """What a frozen teacher sees on the student's own, augmented images.

    Outside the regions that people checked, and without the classes that a region is silent about
    (what the fit found too little known to teach, the teacher does not know either):

    - class scores: quality focal loss towards the teacher's, at all anchors, so that it also
      says what is background and what is doubtful.
    - boxes: GIoU with the teacher's, and sides: soft cross-entropy towards its DFL
      distributions, both weighted by the teacher's confidence, at the anchors that learn an
      object and at the teacher's most confident ``top_share``.

    Each sum is divided by the teacher's confidence, summed over the anchors of the last two.

    Args:
        network: takes the student's input, and returns (decoded, raw outputs); frozen.
        precision: of its forward pass.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        weights: DistillWeights,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.weights = weights
        self._network = network.eval().requires_grad_(False)
        self._precision = precision

    @torch.no_grad()
    def look(self, images: Tensor) -> Outputs:
        """Return the teacher's raw outputs, as float32."""
        lower = self._precision != torch.float32
        with torch.autocast(images.device.type, self._precision, enabled=lower):
            _, raw = self._network(images)
        return (raw[0].float(), raw[1].float(), *raw[2:])

    def loss(
        self,
        outputs: Outputs,
        seen: Outputs | None,
        assignment: Assignment,
        batch: TrainingBatch,
    ) -> Tensor:
        """See ``Knowledge``."""
        if seen is None:
            raise ValueError("look() first")
        logits, raw, points, strides = _of_student(outputs)
        scores: Tensor = seen[0].sigmoid()
        said = torch.ones_like(scores, dtype=torch.bool)
        if batch.silent is not None and len(batch.silent):
            said = ~classes_silent(points, batch.silent.to(points), scores.shape)
        confidence = (scores * said).amax(-1)
        heard = ~anchors_inside(points, batch.checked.to(points), len(logits))
        chosen = assignment.positive | most_confident(confidence * heard, self.weights.top_share)
        image, anchor = torch.nonzero(chosen & heard, as_tuple=True)
        weight = confidence[image, anchor]
        own, teachers = _by_side(raw)[image, anchor], _by_side(seen[1])[image, anchor]
        at = points[anchor] / strides[anchor]
        classes = (quality_focal_loss(logits[heard], scores[heard]) * said[heard]).sum()
        boxes = giou_loss(decode_boxes(own, at), decode_boxes(teachers, at)) * weight
        sides = soft_cross_entropy(own, teachers.softmax(-1)).mean(-1) * weight
        of = self.weights
        total = of.classes * classes + of.boxes * boxes.sum() + of.distributions * sides.sum()
        return total / _normaliser(weight.sum())


def _of_student(outputs: Outputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return class logits, DFL logits, anchor points and strides."""
    return outputs[0], outputs[1], outputs[3], outputs[5]


def _by_side(raw: Tensor) -> Tensor:
    """Return DFL logits [B, A, 4 · bins] as [B, A, 4, bins]."""
    return raw.reshape(*raw.shape[:-1], 4, -1)


def _normaliser(confidence: Tensor) -> Tensor:
    """Return sums of confidences over all processes that train together, at least 1."""
    return summed(confidence).clamp(min=1.0)
