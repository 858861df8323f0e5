"""From dense output to detections: the rules of predict(), exact and deterministic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from storage.errors import ModelError
from storage.records import Detections
from tests.support.samples.dense_detections import detections_from_dense
from workers.detectors.nms import NmsRules, best_candidates, suppress
from workers.images.preprocessing import Preprocessing
from workers.runtimes.torch_session import torch_detector
from workers.spec import ModelSpec

SIZE = 64
CLASSES = ("a", "b", "c", "d", "e", "f")


def dense_output(seed: int, anchors: int = 84, classes: int = 6) -> tuple[NDArray[Any], ...]:
    """Crowded boxes, so that NMS has something to do: boxes, scores, box_std, entropy."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 4, (anchors, 2)) * 16 + rng.uniform(0, 6, (anchors, 2))
    sides = rng.uniform(8, 24, (anchors, 2))
    boxes = np.concatenate([centres - sides / 2, centres + sides / 2], 1).astype(np.float32)
    scores = rng.beta(0.4, 1.5, (anchors, classes)).astype(np.float32)
    std = rng.uniform(0.1, 4, (anchors, 4)).astype(np.float32)
    return boxes, scores, std, rng.uniform(0, 2, anchors).astype(np.float32)


def reference(
    boxes: NDArray[Any], scores: NDArray[Any], floor: float, iou: float, most: int
) -> list[tuple[int, int]]:
    """(anchor, class) of predict()'s survivors, written out as plainly as possible."""
    candidates = [
        (-float(scores[a, c]), a, c)
        for a in range(scores.shape[0])
        for c in range(scores.shape[1])
        if scores[a, c] > floor
    ]
    kept: list[tuple[int, int]] = []
    for _, a, c in sorted(candidates)[:1024]:
        if all(k != c or overlap(boxes[a], boxes[b]) <= iou for b, k in kept):
            kept.append((a, c))
    return kept[:most]


def overlap(a: NDArray[Any], b: NDArray[Any]) -> float:
    a, b = a.astype(float), b.astype(float)
    w, h = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    inner = max(w, 0) * max(h, 0)
    return float(inner / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inner))


def pairs(found: Detections) -> list[tuple[int, int]]:
    return list(zip(found.anchor.tolist(), found.category_ids.tolist(), strict=True))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    floor=st.sampled_from([0.01, 0.05, 0.25, 0.9]),
    iou=st.sampled_from([0.3, 0.65, 0.7, 1.0]),
    most=st.sampled_from([3, 300]),
)
def test_survivors_are_the_references(seed: int, floor: float, iou: float, most: int) -> None:
    boxes, scores, std, entropy = dense_output(seed)
    rules = NmsRules(floor, iou, most)
    found = detections_from_dense(boxes, scores, std, entropy, keep=range(6), rules=rules)
    assert pairs(found) == reference(boxes, scores, floor, iou, most)
    anchor = found.anchor
    np.testing.assert_array_equal(found.boxes, boxes[anchor])
    np.testing.assert_array_equal(found.box_std, std[anchor])
    np.testing.assert_array_equal(found.box_entropy, entropy[anchor])
    np.testing.assert_array_equal(found.scores, scores[anchor, found.category_ids])
    assert (np.diff(found.scores) <= 0).all()
    assert found.topk_ids.shape == (len(found), 5)
    np.testing.assert_array_equal(found.topk_scores, -np.sort(-scores[anchor])[:, :5])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_lower_floor_only_adds(seed: int) -> None:
    """What predict() finds at 0.25 is there in the same order when 0.05 is asked for."""
    dense = dense_output(seed, anchors=600)
    low, high = (
        detections_from_dense(*dense, keep=range(6), rules=NmsRules(floor, 0.7, 300))
        for floor in (0.05, 0.25)
    )
    confident = [p for p, s in zip(pairs(low), low.scores, strict=True) if s > 0.25]
    assert confident == pairs(high)[: len(confident)]
    assert len(confident) == len(high) or len(low) == 300


def test_ties_go_to_the_lower_anchor_then_class() -> None:
    scores = np.array([0.5, 0.5, 0.7, 0.5], np.float32)
    order = best_candidates(scores, np.array([9, 3, 5, 3]), np.array([0, 2, 0, 1]))
    assert order.tolist() == [2, 3, 1, 0]
    same = np.zeros((3, 4), np.float32) + [0, 0, 8, 8]
    rules = NmsRules(0.0, 0.7, 300)
    kept = suppress(same.astype(np.float32), np.full(3, 0.5, np.float32), np.zeros(3, int), rules)
    assert kept.tolist() == [0]


def test_only_the_best_1024_enter() -> None:
    scores = np.linspace(1, 0.1, 3000, dtype=np.float32)
    assert best_candidates(scores, np.arange(3000), np.zeros(3000, int)).tolist() == list(
        range(1024)
    )


class Replays:
    """A dense network whose output is given: what surrounds the network, tested without it."""

    def __init__(self, logits: torch.Tensor, distri: torch.Tensor) -> None:
        anchors = logits.shape[1]
        self.output = (logits, distri)
        grid = torch.arange(anchors, dtype=torch.float32)
        self.points = torch.stack([grid % 8 + 0.5, grid // 8 + 0.5], 1)
        self.strides = torch.full((anchors, 1), 8.0)

    def raw(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.output

    def decode(
        self, distri: torch.Tensor, points: torch.Tensor, strides: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        p = distri.softmax(-1)
        bins = torch.arange(p.shape[-1], dtype=torch.float32)
        mean = (p * bins).sum(-1)
        boxes = torch.cat([points - mean[..., :2], points + mean[..., 2:]], -1) * strides
        spread = (p * (bins - mean.unsqueeze(-1)) ** 2).sum(-1).sqrt() * strides
        return boxes, spread, -(p * p.log()).sum(-1).mean(-1)


def spec_of(keep: tuple[int, ...] = tuple(range(6)), floor: float = 0.05) -> ModelSpec:
    return ModelSpec(
        checkpoint="", sha256="", name="", arch_params=None, classes=CLASSES, keep=keep,
        preprocessing=Preprocessing(size=(SIZE, SIZE), resize_to=(SIZE, SIZE)), runtime="torch",
        precision="fp32", device="cpu", score_floor=floor, nms_iou=0.7, max_detections=300,
    )  # fmt: skip


def network_output(seed: int, images: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, 64, 6, generator=generator) * 2 - 2
    return logits, torch.randn(images, 64, 4, 17, generator=generator) * 2


def blank(images: int = 3) -> NDArray[np.uint8]:
    return np.zeros((images, SIZE, SIZE, 3), np.uint8)


@pytest.mark.parametrize("keep", [tuple(range(6)), (0, 3), (5,)])
@pytest.mark.parametrize("floor", [0.0, 0.05, 0.25])
def test_sparse_and_dense_decoding_agree(keep: tuple[int, ...], floor: float) -> None:
    logits, distri = network_output(1)
    network = Replays(logits, distri)
    found = torch_detector(network, spec_of(keep, floor)).detect(blank())
    boxes, std, entropy = network.decode(distri, network.points, network.strides)
    for i, one in enumerate(found):
        dense = (boxes[i].numpy(), logits[i].sigmoid().numpy(), std[i].numpy(), entropy[i].numpy())
        wanted = detections_from_dense(*dense, keep=keep, rules=NmsRules(floor, 0.7, 300))
        assert pairs(one) == pairs(wanted)
        assert set(one.category_ids.tolist()) <= set(keep)
        for field in ("boxes", "scores", "topk_scores", "box_std", "box_entropy"):
            np.testing.assert_allclose(
                getattr(one, field), getattr(wanted, field), rtol=1e-5, atol=1e-5
            )
        np.testing.assert_array_equal(one.topk_ids, wanted.topk_ids)
        for field in Detections.__dataclass_fields__:
            empty, mine = getattr(Detections.empty(5), field), getattr(one, field)
            if empty is None:  # what only fused runs have
                assert mine is None, field
            else:
                assert (mine.dtype, mine.shape[1:]) == (empty.dtype, empty.shape[1:]), field


def test_images_without_boxes_among_others() -> None:
    logits, distri = network_output(2)
    alone = [
        torch_detector(Replays(logits[i : i + 1], distri[i : i + 1]), spec_of()).detect(blank(1))[0]
        for i in (0, 2)
    ]
    logits[1] = -20
    found = torch_detector(Replays(logits, distri), spec_of()).detect(blank())
    assert [len(one) for one in found] == [len(alone[0]), 0, len(alone[1])]
    assert found[1].topk_ids.shape == (0, 5)
    assert pairs(found[0]) == pairs(alone[0])
    assert pairs(found[2]) == pairs(alone[1])
    nothing = torch_detector(Replays(logits[1:2], distri[1:2]), spec_of()).detect(blank(1))
    assert [len(one) for one in nothing] == [0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["scores", "boxes"])
def test_output_that_is_not_finite_is_loud(value: float, where: str) -> None:
    logits, distri = network_output(3)
    logits[1, 7, 2] = 3.0
    (logits if where == "scores" else distri)[1, 7] = value
    with pytest.raises(ModelError, match=r"not finite for image\(s\) \[1\]"):
        torch_detector(Replays(logits, distri), spec_of()).detect(blank())


@pytest.mark.parametrize(
    "batch",
    [
        np.zeros((1, SIZE, SIZE, 3), np.float32),
        np.zeros((SIZE, SIZE, 3), np.uint8),
        np.zeros((1, 3, SIZE, SIZE), np.uint8),
        np.zeros((1, SIZE, SIZE + 32, 3), np.uint8),
    ],
)
def test_batches_of_another_shape_are_refused(batch: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="not uint8"):
        torch_detector(Replays(*network_output(4)), spec_of()).detect(batch)
