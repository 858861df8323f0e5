"""The loss with weights: gradients, and what an ignored region, a weight of 0 and no box teach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from workers.training.loss import RegionLoss, anchors_inside

from super_gradients.training.losses.ppyolo_loss import (  # isort: skip
    PPYoloELoss,
    TaskAlignedAssigner,
)

SIDE, STRIDES, BINS, CLASSES = 32, (8, 16), 5, 3
# Two images; a box of a class, and the same box in another class.
TARGETS = torch.tensor(
    [
        [1, 2, 16.0, 16, 14, 12],
        [0, 1, 10.0, 11, 14, 16],
        [1, 0, 16.0, 16, 14, 12],
        [0, 0, 22.0, 20, 15, 15],
    ]
)
WEIGHTS = torch.tensor([0.6, 0.3, 1.0, 0.8])


def raw_outputs(images: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """What a network in training mode returns, with random values."""
    generator = torch.Generator().manual_seed(1)
    points, strides, counts = [], [], []
    for stride in STRIDES:
        places = (torch.arange(SIDE // stride) + 0.5) * stride
        y, x = torch.meshgrid(places, places, indexing="ij")
        points.append(torch.stack([x.flatten(), y.flatten()], dim=1))
        strides.append(torch.full((x.numel(), 1), float(stride)))
        counts.append(x.numel())
    anchor_points, stride = torch.cat(points).to(dtype), torch.cat(strides).to(dtype)
    anchors = torch.cat([anchor_points - stride * 2.5, anchor_points + stride * 2.5], dim=1)
    scores = torch.randn((images, len(stride), CLASSES), generator=generator).to(dtype)
    distances = torch.randn((images, len(stride), 4 * BINS), generator=generator).to(dtype)
    return scores, distances, anchors, anchor_points, counts, stride


@pytest.mark.slow
def test_weights_of_one_change_no_bit() -> None:
    outputs = raw_outputs()
    region = torch.tensor([[0, 0.0, 0, 12, 32]])
    for ignore in (None, region):
        expected, parts = RegionLoss(CLASSES)(outputs, TARGETS, ignore)
        ones = torch.ones(len(TARGETS))
        weighted, its_parts = RegionLoss(CLASSES)(outputs, TARGETS, ignore, ones)
        assert torch.equal(expected, weighted)
        assert torch.equal(parts, its_parts)
    plain = PPYoloELoss(CLASSES, use_static_assigner=False)
    expected, _ = plain(outputs, TARGETS)
    own, _ = RegionLoss(CLASSES)(outputs, TARGETS)
    assert torch.equal(own, expected)


def test_each_anchor_is_told_its_row_of_the_targets() -> None:
    loss = RegionLoss(CLASSES)
    loss(raw_outputs(), TARGETS)
    found = loss.assignment
    assert found.positive.any(dim=1).all()
    assert set(found.target[0].tolist()) <= {-1, 1, 3}
    assert set(found.target[1].tolist()) <= {-1, 0, 2}
    assert {1, 3} <= set(found.target[0].tolist())
    rows = TARGETS[found.target[found.positive]]
    low, size = rows[:, 2:4] - rows[:, 4:] / 2, rows[:, 4:]
    assert torch.equal(found.boxes[found.positive], torch.cat([low, low + size], dim=1))
    assert torch.equal(found.scores[found.positive].argmax(dim=1), rows[:, 1].long())
    assert (found.scores[~found.positive] == 0).all()


def test_weights_scale_the_target_scores_of_their_boxes_alone() -> None:
    loss = RegionLoss(CLASSES)
    loss(raw_outputs(), TARGETS)
    plain = loss.assignment
    loss(raw_outputs(), TARGETS, None, WEIGHTS)
    weighted = loss.assignment
    assert torch.equal(weighted.target, plain.target)
    expected = plain.scores.clone()
    for row, weight in enumerate(WEIGHTS):
        expected[plain.target == row] *= weight
    assert torch.equal(weighted.scores, expected)


class _Fixed(TaskAlignedAssigner):  # type: ignore[misc]  # super_gradients ships no types
    """Returns one assignment, as finite differences need: the loss treats it as a constant."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = given

    def forward(self, **_: Any) -> tuple[Tensor, ...]:
        return self.given


class _Doubles(RegionLoss):
    """In float64: super-gradients makes the bins' numbers in float32."""

    def get_proj_conv_for_reg_max(self, reg_max: int, device: torch.device) -> Tensor:
        made: Tensor = super().get_proj_conv_for_reg_max(reg_max, device)
        return made.double()


@pytest.mark.slow
@pytest.mark.parametrize("part", [0, 1])
def test_gradients_agree_with_finite_differences(part: int) -> None:
    """With weights, a region and a silent class: ``part`` 0 the class scores, 1 the distances."""
    outputs = raw_outputs(dtype=torch.float64)
    targets, weights = TARGETS.double(), WEIGHTS.double()
    region = torch.tensor([[0, 0.0, 0, 20, 32], [1, 0, 20, 32, 32]]).double()
    silent = torch.tensor([[0, 2, 8.0, 0, 32, 32]]).double()
    loss = _Doubles(CLASSES)
    loss(outputs, targets, region, weights, silent)
    found = loss.assignment
    labels = torch.where(found.positive, targets[found.target, 1].long(), CLASSES)
    loss.assigner = _Fixed(labels, found.boxes, found.scores)  # type: ignore[assignment]

    def at(values: Tensor) -> Tensor:
        changed = [*outputs]
        changed[part] = values
        total: Tensor = loss(tuple(changed), targets, region, weights, silent)[0]
        return total

    assert torch.autograd.gradcheck(at, outputs[part].clone().requires_grad_(), atol=1e-7)


def gradients(
    targets: Tensor, ignore: Tensor | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, RegionLoss]:
    """Gradients for class scores and distances of one image."""
    scores, distances, *rest = raw_outputs(images=1)
    scores, distances = scores.requires_grad_(), distances.requires_grad_()
    loss = RegionLoss(CLASSES)
    total, _ = loss((scores, distances, *rest), targets, ignore, weights)
    return (*torch.autograd.grad(total, (scores, distances)), loss)


def test_an_ignored_region_a_weight_of_zero_and_an_absent_box_are_told_apart() -> None:
    box = torch.tensor([[0, 1, 16.0, 16, 20, 20]])
    none, region = torch.zeros((0, 6)), torch.tensor([[0, 6.0, 6, 26, 26]])
    _, boxed, loss = gradients(box)
    claimed = loss.assignment.positive[0]
    assert claimed.any()
    assert (boxed[0, claimed] != 0).any()

    scores, distances, _ = gradients(box, None, torch.zeros(1))
    assert (scores[0, claimed, 1] == 0).all(), "weight 0: nothing is said about its class"
    assert (scores[0, claimed][:, [0, 2]] > 0).all(), "but that it is of no other"
    assert (scores[0, ~claimed] > 0).all(), "and background is background"
    assert (distances == 0).all()

    scores, distances, _ = gradients(none, region)
    inside = anchors_inside(raw_outputs()[3], region, 1)[0]
    assert (scores[0, inside] == 0).all(), "a region: nothing is said about any class"
    assert (scores[0, ~inside] > 0).all()
    assert (distances == 0).all()

    scores, distances, _ = gradients(none)
    assert (scores > 0).all(), "no box: everything is background"
    assert (distances == 0).all()


@pytest.mark.parametrize("ignored", [False, True])
def test_a_silent_class_is_not_told_absent_and_all_else_is_as_before(ignored: bool) -> None:
    targets = TARGETS[TARGETS[:, 0] == 0]
    region = torch.tensor([[0, 0.0, 0, 9, 9]]) if ignored else None
    silent = torch.tensor([[0, 2, 0.0, 0, 20, 32], [0, 1, 24, 24, 32, 32], [0, 2, 1, 1, 5, 5]])

    def gradient(silent: Tensor | None) -> tuple[Tensor, Tensor]:
        scores, *rest = raw_outputs(images=1)
        loss = RegionLoss(CLASSES)
        total, _ = loss((scores.requires_grad_(), *rest), targets, region, None, silent)
        return torch.autograd.grad(total, scores)[0][0], loss.assignment.positive[0]

    before, positive = gradient(None)
    found, _ = gradient(silent)
    expected = before.clone()
    x, y = raw_outputs()[3].T
    expected[(x < 20) & ~positive, 2] = 0
    expected[(x >= 24) & (y >= 24) & ~positive, 1] = 0
    assert torch.equal(found, expected)
    assert (found[positive] != 0).all(), "an object is of no other class, silent or not"
    assert not torch.equal(found, before)
