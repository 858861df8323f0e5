"""The formulas of distillation, against numpy written from the papers and finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.samples.gradients import check_gradient
from workers.training.distillation.losses import (
    decayed,
    decode_boxes,
    gaussian_bins,
    giou_loss,
    most_confident,
    quality_focal_loss,
    soft_cross_entropy,
)

BINS = 17


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def boxes(count: int, seed: int) -> Tensor:
    corners = 10 * random(count, 2, 2, seed=seed)
    low, high = corners.min(dim=1).values, corners.max(dim=1).values
    return torch.cat([low, high + 0.5], dim=1)


def test_quality_focal_loss_is_the_papers() -> None:
    logits, target = random(6, 3), torch.sigmoid(random(6, 3, seed=1))
    sigma, y = 1 / (1 + np.exp(-logits.numpy())), target.numpy()
    wanted = -(np.abs(y - sigma) ** 2) * ((1 - y) * np.log(1 - sigma) + y * np.log(sigma))
    np.testing.assert_allclose(quality_focal_loss(logits, target).numpy(), wanted, rtol=1e-12)
    check_gradient(lambda x: quality_focal_loss(x, target), logits)


def test_quality_focal_loss_ends_where_student_and_teacher_agree() -> None:
    logits = random(4, 2)
    assert quality_focal_loss(logits, logits.sigmoid()).abs().max() == 0
    assert quality_focal_loss(logits + 1, logits.sigmoid()).min() > 0


def _giou(a: np.ndarray, b: np.ndarray) -> float:  # type: ignore[type-arg]
    """Rezatofighi et al., algorithm 1, for one pair."""
    area_a, area_b = ((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b))
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    inner = wide * high if wide > 0 and high > 0 else 0.0
    union = area_a + area_b - inner
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return inner / union - (hull - union) / hull


def test_giou_loss_is_the_papers_and_pulls_boxes_that_do_not_touch() -> None:
    own, theirs = boxes(20, 2), boxes(20, 3)
    wanted = [1 - _giou(a, b) for a, b in zip(own.numpy(), theirs.numpy(), strict=True)]
    np.testing.assert_allclose(giou_loss(own, theirs).numpy(), wanted, rtol=1e-12)
    assert max(wanted) > 1, "some pair is apart"
    check_gradient(lambda x: giou_loss(x, theirs), own)
    assert giou_loss(own, own).abs().max() < 1e-12


def test_soft_cross_entropy_is_localisation_distillation_up_to_a_constant() -> None:
    own, teachers = random(5, 4, BINS), random(5, 4, BINS, seed=1)
    q = np.exp(teachers.numpy()) / np.exp(teachers.numpy()).sum(-1, keepdims=True)
    p = np.exp(own.numpy()) / np.exp(own.numpy()).sum(-1, keepdims=True)
    found = soft_cross_entropy(own, teachers.softmax(-1))
    divergence, entropy = (q * np.log(q / p)).sum(-1), -(q * np.log(q)).sum(-1)
    np.testing.assert_allclose(found.numpy(), divergence + entropy, rtol=1e-12)
    check_gradient(lambda x: soft_cross_entropy(x, teachers.softmax(-1)), own)


def _triangles(distance: float, spread: float) -> np.ndarray:  # type: ignore[type-arg]
    """The ordinary two-bin target, averaged over 200,001 values of a normal distribution."""
    s = math.sqrt(max(spread**2 - 1 / 6, 0))
    z = np.linspace(-8, 8, 200_001)
    density = np.exp(-(z**2) / 2)
    x = distance + s * z
    weights = [(density * np.clip(1 - np.abs(k - x), 0, None)).sum() for k in range(BINS)]
    return np.array(weights) / sum(weights)


@pytest.mark.parametrize(
    ("distance", "spread"), [(3.3, 0.55), (0.2, 0.7), (7.5, 2.0), (15.99, 0.6), (4.25, 1.0)]
)
def test_a_gaussian_is_rendered_as_the_mean_of_the_ordinary_target(
    distance: float, spread: float
) -> None:
    made = torch.tensor([distance, spread], dtype=torch.float64)
    found = gaussian_bins(made[0], made[1], BINS)
    np.testing.assert_allclose(found.numpy(), _triangles(distance, spread), atol=1e-6)


@given(st.floats(4, 12), st.floats(0.45, 1.2))
def test_a_rendered_side_decodes_to_its_place_and_spread(distance: float, spread: float) -> None:
    found = gaussian_bins(torch.tensor(distance), torch.tensor(spread), BINS)
    bins = torch.arange(BINS)
    mean = (found * bins).sum().item()
    assert mean == pytest.approx(distance, abs=2e-3)
    variance = (found * (bins - mean) ** 2).sum().item()
    assert variance == pytest.approx(spread**2, abs=0.11)  # the triangle's own part varies


@pytest.mark.parametrize("distance", [0.0, 2.0, 2.3, 7.75, 15.99])
def test_without_spread_it_is_the_ordinary_target(distance: float) -> None:
    found = gaussian_bins(torch.tensor(distance, dtype=torch.float64),
                          torch.tensor(1e-3, dtype=torch.float64), BINS)  # fmt: skip
    low = math.floor(distance)
    assert found[low].item() == pytest.approx(low + 1 - distance, abs=0.01)
    assert found[low + 1].item() == pytest.approx(distance - low, abs=0.01)
    assert found.sum().item() == pytest.approx(1)


def test_the_weight_falls_on_a_cosine_from_one_to_its_last_share() -> None:
    steps = 100
    values = [decayed(step, steps) for step in range(steps + 1)]
    assert values[0] == 1
    assert values[steps] == pytest.approx(0.01)
    assert values[50] == pytest.approx(0.505)  # (1 − cos(π/2)) / 2 · (0.01 − 1) + 1
    assert values == sorted(values, reverse=True)
    assert {decayed(step, steps, final=1.0) for step in range(steps)} == {1.0}


def test_the_most_confident_anchors_are_chosen_image_by_image() -> None:
    confidence = torch.stack([torch.linspace(0, 1, 300), torch.linspace(0.01, 0, 300)])
    found = most_confident(confidence, 0.01)
    assert found[0].nonzero()[:, 0].tolist() == [297, 298, 299]
    assert found[1].nonzero()[:, 0].tolist() == [0, 1, 2]
    assert most_confident(confidence, 1e-6).sum(dim=1).tolist() == [1, 1]


def test_boxes_are_decoded_from_the_means_of_their_sides() -> None:
    raw, points = random(3, 4, BINS), 20 * torch.sigmoid(random(3, 2, seed=1))
    p = np.exp(raw.numpy()) / np.exp(raw.numpy()).sum(-1, keepdims=True)
    left, top, right, bottom = (p * np.arange(BINS)).sum(-1).T
    x, y = points.numpy().T
    wanted = np.stack([x - left, y - top, x + right, y + bottom], axis=1)
    np.testing.assert_allclose(decode_boxes(raw, points).numpy(), wanted, rtol=1e-12)
    check_gradient(lambda value: decode_boxes(value, points), raw)
