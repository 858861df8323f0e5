"""What each kind of knowledge adds to the loss: its formula, its gradients, where it is silent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.support.samples.gradients import check_gradient
from workers.training.batches import TrainingBatch
from workers.training.distillation.knowledge import (
    DistillWeights,
    StoredKnowledge,
    TeacherKnowledge,
)
from workers.training.distillation.losses import gaussian_bins
from workers.training.loss import Assignment

SIDE, STRIDES, BINS, CLASSES = 32, (8, 16), 5, 3
WEIGHTS = DistillWeights(classes=0.7, boxes=1.5, distributions=0.4, top_share=0.1)
Array = NDArray[np.float64]


def raw_outputs(seed: int) -> tuple[Any, ...]:
    """What a network returns for two images, with random values in float64: 20 anchors."""
    generator = torch.Generator().manual_seed(seed)
    points, strides = [], []
    for stride in STRIDES:
        places = (torch.arange(SIDE // stride, dtype=torch.float64) + 0.5) * stride
        y, x = torch.meshgrid(places, places, indexing="ij")
        points.append(torch.stack([x.flatten(), y.flatten()], dim=1))
        strides.append(torch.full((x.numel(), 1), float(stride), dtype=torch.float64))
    count = sum(map(len, points))
    logits = torch.randn((2, count, CLASSES), generator=generator, dtype=torch.float64)
    sides = torch.randn((2, count, 4 * BINS), generator=generator, dtype=torch.float64)
    return logits, sides, None, torch.cat(points), None, torch.cat(strides)


@dataclass(frozen=True)
class Case:
    """A batch of three boxes, two of them a model's, and their anchors."""

    outputs: tuple[Any, ...]
    assignment: Assignment
    batch: TrainingBatch

    def with_outputs(self, logits: Tensor, sides: Tensor) -> tuple[Any, ...]:
        return (logits, sides, *self.outputs[2:])


@pytest.fixture
def case() -> Case:
    outputs = raw_outputs(0)
    boxes = torch.tensor([[3, 5, 20, 19], [8, 8, 30, 30], [1, 2, 14, 12]], dtype=torch.float64)
    targets = torch.zeros((3, 6))
    targets[:, 0] = torch.tensor([0, 0, 1])
    target = torch.full((2, 20), -1)
    target[0, [0, 1, 5]] = 0
    target[0, [10, 19]] = 1
    target[1, [0, 4]] = 2
    labels = torch.tensor([1, 0, 2])
    scores = torch.zeros((2, 20, CLASSES), dtype=torch.float64)
    for (image, anchor), score in zip(
        torch.nonzero(target >= 0).tolist(), (0.8, 0.4, 0.2, 0.6, 0.3, 0.9, 0.5), strict=True
    ):
        scores[image, anchor, labels[target[image, anchor]]] = score
    nan = float("nan")
    batch = TrainingBatch(
        images=torch.zeros((2, 3, SIDE, SIDE)),
        targets=targets,
        ignore=torch.zeros((0, 5)),
        weights=torch.ones(3),
        checked=torch.zeros((0, 5)),
        soft_scores=torch.tensor([[0.1, 0.75, 0.05], [nan] * 3, [0.2, 0.0, 0.6]]),
        spread=torch.tensor([[4.0, 5, 6, nan], [nan] * 4, [8, 4, 12, 6]]),
    )
    return Case(outputs, Assignment(target, boxes[target.clamp(min=0)], scores), batch)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    found: Array = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    return found


def qfl(logits: Array, y: Array) -> float:
    p = sigmoid(logits)
    return float((-((y - p) ** 2) * (y * np.log(p) + (1 - y) * np.log(1 - p))).sum())


def stored_loss(case: Case) -> float:
    """The formula of ``StoredKnowledge``, anchor by anchor."""
    logits, raw, _, points, _, strides = (
        None if x is None else x.detach().numpy() for x in case.outputs
    )
    assert case.batch.soft_scores is not None
    assert case.batch.spread is not None
    soft, spread = case.batch.soft_scores.double().numpy(), case.batch.spread.double().numpy()
    target = case.assignment.target.numpy()
    aligned = case.assignment.scores.sum(-1).numpy()
    classes = confidence = sides = weights = 0.0
    for image, anchor in zip(*np.nonzero(target >= 0), strict=True):
        row, score = target[image, anchor], aligned[image, anchor]
        if np.isfinite(soft[row]).all():
            wanted = soft[row] * score / aligned[target == row].max()
            classes += qfl(logits[image, anchor], wanted)
            confidence += wanted.max()
        x, y = points[anchor]
        stride = strides[anchor, 0]
        x1, y1, x2, y2 = case.assignment.boxes[image, anchor].numpy()
        distances = np.array([x - x1, y - y1, x2 - x, y2 - y]) / stride
        p = softmax(raw[image, anchor].reshape(4, BINS))
        for side in range(4):
            if np.isfinite(spread[row, side]):
                q = gaussian_bins(
                    torch.tensor(min(max(distances[side], 0), BINS - 1.01)).double(),
                    torch.tensor(spread[row, side] / stride).double(), BINS,
                ).numpy()  # fmt: skip
                sides += score / 4 * -(q * np.log(p[side])).sum()
                weights += score / 4
    return float(
        WEIGHTS.classes * classes / max(confidence, 1)
        + WEIGHTS.distributions * sides / max(weights, 1)
    )


def test_stored_knowledge_is_what_its_docstring_says(case: Case) -> None:
    found = StoredKnowledge(WEIGHTS).loss(case.outputs, None, case.assignment, case.batch)
    assert found.item() == pytest.approx(stored_loss(case), rel=1e-6)
    assert found.item() > 0.1


@pytest.mark.slow
def test_the_gradients_of_stored_knowledge_are_finite_differences(case: Case) -> None:
    logits, sides = case.outputs[:2]
    knowledge = StoredKnowledge(WEIGHTS)

    def loss(logits: Tensor, sides: Tensor) -> Tensor:
        outputs = case.with_outputs(logits, sides)
        return knowledge.loss(outputs, None, case.assignment, case.batch)

    check_gradient(lambda x: loss(x, sides), logits)
    check_gradient(lambda x: loss(logits, x), sides)


def test_boxes_of_people_and_anchors_without_a_box_hear_nothing_stored(case: Case) -> None:
    logits, sides = (x.clone().requires_grad_() for x in case.outputs[:2])
    outputs = case.with_outputs(logits, sides)
    StoredKnowledge(WEIGHTS).loss(outputs, None, case.assignment, case.batch).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert sides.grad is not None
    moved = (logits.grad != 0).any(-1) & (sides.grad != 0).any(-1)
    assert moved.nonzero().tolist() == [[0, 0], [0, 1], [0, 5], [1, 0], [1, 4]]
    bottom = sides.grad.unflatten(-1, (4, BINS))[0, :, 3]
    assert not bottom.any(), "the spread of that side is not known"


def test_a_box_of_weight_zero_hears_nothing_stored(case: Case) -> None:
    scores = case.assignment.scores.clone()
    scores[0] = 0
    logits = case.outputs[0].clone().requires_grad_()
    outputs = case.with_outputs(logits, case.outputs[1])
    assignment = replace(case.assignment, scores=scores)
    StoredKnowledge(WEIGHTS).loss(outputs, None, assignment, case.batch).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert not logits.grad[0].any()
    assert logits.grad[1].any()


@pytest.mark.parametrize("stored", [False, True])
def test_a_batch_without_knowledge_or_objects_adds_zero(case: Case, stored: bool) -> None:
    logits = case.outputs[0].clone().requires_grad_()
    outputs = case.with_outputs(logits, case.outputs[1])
    nothing = replace(case.assignment, target=torch.full((2, 20), -1))
    batch = case.batch if stored else replace(case.batch, soft_scores=None, spread=None)
    assignment = nothing if stored else case.assignment
    loss = StoredKnowledge(WEIGHTS).loss(outputs, None, assignment, batch)
    assert loss.item() == 0
    loss.backward()  # type: ignore[no-untyped-call]


def teacher_loss(case: Case, seen: tuple[Any, ...], silent: Array) -> float:
    """The formula of ``TeacherKnowledge``, anchor by anchor."""
    logits, raw = (x.numpy() for x in case.outputs[:2])
    theirs, their_raw = sigmoid(seen[0].numpy()), seen[1].numpy()
    confidence = theirs.max(-1)
    total = norm = 0.0
    for image in range(2):
        heard = np.flatnonzero(~silent[image])
        best = heard[np.argsort(-confidence[image, heard])][:2]  # a tenth of 20 anchors
        for anchor in heard:
            total += WEIGHTS.classes * qfl(logits[image, anchor], theirs[image, anchor])
            if case.assignment.target[image, anchor] < 0 and anchor not in best:
                continue
            weight = confidence[image, anchor]
            norm += weight
            p = softmax(raw[image, anchor].reshape(4, BINS))
            q = softmax(their_raw[image, anchor].reshape(4, BINS))
            cross = -(q * np.log(p)).sum(-1).mean()
            own, other = (d @ np.arange(BINS) for d in (p, q))
            total += weight * (WEIGHTS.distributions * cross + WEIGHTS.boxes * giou(own, other))
    return total / max(norm, 1)


def giou(own: Array, other: Array) -> float:
    """1 − GIoU of two boxes around the same point, from their distances to it."""
    a, b = ((d[0] + d[2]) * (d[1] + d[3]) for d in (own, other))
    low, high = np.minimum(own, other), np.maximum(own, other)
    inner = (low[0] + low[2]) * (low[1] + low[3])
    hull = (high[0] + high[2]) * (high[1] + high[3])
    union = a + b - inner
    return float(1 - inner / union + (hull - union) / hull)


class Fixed(nn.Module):
    """A teacher that always says the same."""

    def __init__(self, raw: tuple[Any, ...]) -> None:
        super().__init__()
        self.raw = raw

    def forward(self, images: Tensor) -> tuple[None, tuple[Any, ...]]:
        return None, self.raw


CHECKED = torch.tensor([[0, 0.0, 0, 14, 14], [1, 16.0, 0, 32, 32]])


@pytest.mark.parametrize("people", [False, True])
def test_a_teacher_adds_what_its_docstring_says(case: Case, people: bool) -> None:
    seen = raw_outputs(5)
    batch = replace(case.batch, checked=CHECKED) if people else case.batch
    x, y = case.outputs[3].numpy().T
    silent = np.stack([(x < 14) & (y < 14), x >= 16]) & people
    found = TeacherKnowledge(Fixed(seen), WEIGHTS).loss(case.outputs, seen, case.assignment, batch)
    assert found.item() == pytest.approx(teacher_loss(case, seen, silent), rel=1e-6)


@pytest.mark.slow
def test_the_gradients_of_a_teachers_loss_are_finite_differences(case: Case) -> None:
    logits, sides = case.outputs[:2]
    seen = raw_outputs(5)
    knowledge = TeacherKnowledge(Fixed(seen), WEIGHTS)
    batch = replace(case.batch, checked=CHECKED)

    def loss(logits: Tensor, sides: Tensor) -> Tensor:
        return knowledge.loss(case.with_outputs(logits, sides), seen, case.assignment, batch)

    check_gradient(lambda x: loss(x, sides), logits)
    check_gradient(lambda x: loss(logits, x), sides)


def test_a_teacher_is_silent_where_people_labelled(case: Case) -> None:
    logits, sides = (x.clone().requires_grad_() for x in case.outputs[:2])
    seen = raw_outputs(5)
    batch = replace(case.batch, checked=torch.tensor([[1, 0.0, 0, 32, 32], [0, 0, 0, 14, 14]]))
    TeacherKnowledge(Fixed(seen), WEIGHTS).loss(
        case.with_outputs(logits, sides), seen, case.assignment, batch
    ).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert sides.grad is not None
    inside = (case.outputs[3] < 14).all(-1)
    assert inside.sum() == 5  # four centres of stride 8 below 14 pixels, one of stride 16
    assert not logits.grad[1].any()
    assert not sides.grad[1].any()
    assert not logits.grad[0, inside].any()
    assert not sides.grad[0, inside].any()
    assert (logits.grad[0, ~inside] != 0).any(-1).all()


def test_a_student_that_agrees_with_its_teacher_has_nothing_to_learn(case: Case) -> None:
    logits, sides = (x.clone().requires_grad_() for x in case.outputs[:2])
    TeacherKnowledge(Fixed(case.outputs), WEIGHTS).loss(
        case.with_outputs(logits, sides), case.outputs, case.assignment, case.batch
    ).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert sides.grad is not None
    assert logits.grad.abs().max() == 0
    assert sides.grad.abs().max() < 1e-7


def test_the_teacher_is_frozen_and_looks_in_the_training_s_precision() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> tuple[None, tuple[Tensor, Tensor]]:
            y = self.norm(self.layer(x))
            assert y.dtype == torch.bfloat16
            return None, (y, y)

    network = Small()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    knowledge = TeacherKnowledge(network, WEIGHTS, torch.bfloat16)
    scores, sides = knowledge.look(torch.randn(4, 3))
    assert scores.dtype == sides.dtype == torch.float32
    assert not scores.requires_grad
    assert not any(p.requires_grad for p in network.parameters())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_a_teacher_says_nothing_about_a_silent_class(case: Case) -> None:
    logits = case.outputs[0].clone().requires_grad_()
    seen = raw_outputs(5)
    batch = replace(case.batch, silent=torch.tensor([[0, 1, 0.0, 0, 32, 32]]))
    TeacherKnowledge(Fixed(seen), WEIGHTS).loss(
        case.with_outputs(logits, case.outputs[1]), seen, case.assignment, batch
    ).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert not logits.grad[0, :, 1].any()
    assert (logits.grad[0][:, [0, 2]] != 0).all()
    assert (logits.grad[1] != 0).all()
