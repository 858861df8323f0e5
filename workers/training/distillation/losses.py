"""The formulas of distillation, as pure functions of tensors; each names its paper.

All of them are differentiable in the student's outputs and work in the dtype they are given.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_LEAST_SPREAD = 1e-2  # bins; a narrower triangle is the ordinary two-bin target to 1e-2 of a bin


def quality_focal_loss(logits: Tensor, target: Tensor, beta: float = 2.0) -> Tensor:
    """Return the quality focal loss of each score, in the shape of ``logits``.

    QFL(σ) = −|y − σ|^β ((1 − y) log(1 − σ) + y log σ), with σ = sigmoid(logit) and a soft target
    y in [0, 1] (Li et al., Generalized Focal Loss, arXiv 2006.04388, equation 4, β = 2).
    """
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (target - logits.sigmoid()).abs().pow(beta) * entropy


def giou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """Return 1 − GIoU of each pair of xyxy boxes [..., 4].

    GIoU = IoU − |C ∖ (A ∪ B)| / |C|, C being the smallest box around A and B (Rezatofighi et al.,
    arXiv 1902.09630).
    """
    tiny = torch.finfo(boxes.dtype).eps
    inner = _sides(
        torch.maximum(boxes[..., :2], targets[..., :2]),
        torch.minimum(boxes[..., 2:], targets[..., 2:]),
    ).prod(-1)
    outer = _sides(
        torch.minimum(boxes[..., :2], targets[..., :2]),
        torch.maximum(boxes[..., 2:], targets[..., 2:]),
    ).prod(-1)
    union = _area(boxes) + _area(targets) - inner
    return 1 - inner / (union + tiny) + (outer - union) / (outer + tiny)


def _sides(low: Tensor, high: Tensor) -> Tensor:
    return (high - low).clamp(min=0)


def _area(boxes: Tensor) -> Tensor:
    return _sides(boxes[..., :2], boxes[..., 2:]).prod(-1)


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy −Σ_k q_k log softmax(logits)_k over the last axis.

    With q = the teacher's distribution over the DFL bins of a side this is localisation
    distillation (Zheng et al., LD, arXiv 2102.12252) at temperature 1: its KL divergence plus
    the teacher's entropy, which has no gradient.
    """
    return -(target * logits.log_softmax(-1)).sum(-1)


def gaussian_bins(distance: Tensor, spread: Tensor, bins: int) -> Tensor:
    """Render distances and their standard deviations, both in strides, as DFL distributions.

    The ordinary DFL target of a distance x puts the weights max(0, 1 − |k − x|) on the bins k
    (arXiv 2006.04388, equation 6). This is its expectation over x ~ N(distance, s²), the second
    difference of G(x) = (x − d) Φ((x − d) / s) + s φ((x − d) / s). Its mean is the distance
    itself, so that it decodes to the very box, which samples of a Gaussian's density at the bins
    do not. The triangle adds a variance of 1/6 (the average over distances), hence
    s² = spread² − 1/6; a spread of less than that gives the ordinary target.

    Args:
        distance: [...], from the anchor to the side, in [0, bins − 1].
        spread: [...], positive.
        bins: of the distribution, reg_max + 1.

    Returns:
        Probabilities [..., bins].
    """
    centre = distance.unsqueeze(-1)
    width = (spread.square() - 1 / 6).clamp(min=_LEAST_SPREAD**2).sqrt().unsqueeze(-1)
    edges = torch.arange(-1, bins + 1, dtype=distance.dtype, device=distance.device)
    z = (edges - centre) / width
    cumulated = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    integral = width * (z * cumulated + density)
    weights = (integral[..., 2:] - 2 * integral[..., 1:-1] + integral[..., :-2]).clamp(min=0)
    return weights / weights.sum(-1, keepdim=True)


def decayed(step: int, steps: int, final: float = 0.01) -> float:
    """Return the share of the distillation's weight at ``step`` (from 0) of ``steps``.

    w = (1 − cos(π e / E)) / 2 · (final − 1) + 1, which falls from 1 to ``final``: YOLOv6's
    schedule (Li et al., arXiv 2209.02976 and its code, final = 0.01), by steps here. Only the
    schedule is theirs: their code puts scores that are sigmoids already through a softmax as if
    they were logits, which is not done here.
    """
    return (1 - math.cos(math.pi * step / max(1, steps))) / 2 * (final - 1) + 1


def most_confident(confidence: Tensor, share: float) -> Tensor:
    """Return bool [B, A]: the ``share`` of each image's anchors where the teacher is surest.

    At least one anchor an image; the selection of Dense Teacher (arXiv 2207.05597, 1 %).
    """
    count = max(1, math.ceil(share * confidence.shape[1]))
    found = torch.zeros_like(confidence, dtype=torch.bool)
    return found.scatter_(1, confidence.topk(count, dim=1).indices, True)


def decode_boxes(distributions: Tensor, points: Tensor) -> Tensor:
    """Return xyxy [..., 4] in strides from DFL logits [..., 4, bins] and points [..., 2]."""
    bins = torch.arange(
        distributions.shape[-1], dtype=distributions.dtype, device=distributions.device
    )
    distances = (distributions.softmax(-1) * bins).sum(-1)
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], -1)
