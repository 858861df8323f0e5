"""The network as every runtime sees it: uint8 images in, each image's best anchors out, decoded.

Nothing here knows super-gradients or a runtime; a graph is exported from ``SelectedDetector``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from workers.images.preprocessing import Preprocessing
from workers.spec import PrecisionName

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DenseDetector(nn.Module):
    """uint8 NHWC RGB batch → boxes, scores, box_std, entropy for every anchor.

    Normalisation is inside; a network trained on BGR gets its first convolution's input weights
    reversed instead of its images. Everything after the heads' last convolution is float32.

    Attributes:
        cast_first: pixels become numbers before anything else is done to them, as TensorRT asks;
            elsewhere bytes are transposed, for a quarter of the traffic.
    """

    points: Tensor
    strides: Tensor
    bins: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        heads: Any = network.heads
        self.reg_max = int(heads.reg_max)
        self.head_strides = tuple(int(s) for s in heads.fpn_strides)
        points, strides = _anchors(
            preprocessing.size, self.head_strides, float(heads.grid_cell_offset)
        )
        self.register_buffer("points", points, persistent=False)
        self.register_buffer("strides", strides, persistent=False)
        bins = torch.arange(self.reg_max + 1, dtype=torch.float32)
        self.register_buffer("bins", bins, persistent=False)
        self.size = preprocessing.size
        self.scale = preprocessing.scale
        self.cast_first = False
        self._set_channels(preprocessing)

    def _set_channels(self, preprocessing: Preprocessing) -> None:
        step = -1 if preprocessing.channels == "BGR" else 1
        if step == -1:
            first = next(m for m in self.network.modules() if isinstance(m, nn.Conv2d))
            first.weight.data = first.weight.data.flip(1).contiguous()
        mean = (preprocessing.mean or (0.0, 0.0, 0.0))[::step]
        std = (preprocessing.std or (1.0, 1.0, 1.0))[::step]
        self.normalises = preprocessing.mean is not None or preprocessing.std is not None
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def set_precision(self, precision: PrecisionName) -> None:
        """Cast the network; the heads' last convolutions stay float32, boxes depend on them."""
        dtype = _DTYPES[precision]
        self.network.to(dtype)
        for head in self._heads():
            head.cls_pred.float()
            head.reg_pred.float()

    def _heads(self) -> list[Any]:
        heads: Any = self.network.heads
        return [getattr(heads, f"head{i + 1}") for i in range(len(self.head_strides))]

    def raw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits [B, A, C] and DFL logits [B, A, 4, bins], both float32.

        Args:
            images: uint8 [B, H, W, 3], RGB.
        """
        network: Any = self.network
        feats = network.neck(network.backbone(self._normalised(images)))
        logits, distri = [], []
        for head, feat in zip(self._heads(), feats, strict=False):
            stem = head.stem(feat)
            cls = head.cls_pred(head.cls_convs(stem).float())
            reg = head.reg_pred(head.reg_convs(stem).float())
            logits.append(cls.permute(0, 2, 3, 1).flatten(1, 2))
            distri.append(reg.permute(0, 2, 3, 1).flatten(1, 2))
        joined = torch.cat(distri, 1)
        return torch.cat(logits, 1), joined.reshape(*joined.shape[:2], 4, self.reg_max + 1)

    def _normalised(self, images: Tensor) -> Tensor:
        channels = (0, 3, 1, 2)  # NHWC seen as channels_last
        pixels = images.float().permute(channels) if self.cast_first else images.permute(channels)
        pixels = pixels.float() * self.scale
        if self.normalises:
            pixels = (pixels - self.mean) / self.std
        return pixels.to(self._heads()[0].stem.seq.conv.weight.dtype)

    def decode(
        self, distri: Tensor, points: Tensor, strides: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes, their spread and their entropy from DFL logits (Generalized Focal Loss,
        2020).

        Args:
            distri: float32 [..., 4, bins]: left, top, right, bottom, in strides from the point.
            points: float32 [..., 2], xy in strides.
            strides: float32 [..., 1], pixels.

        Returns:
            xyxy [..., 4] and standard deviations per side [..., 4] in input pixels; entropy
            [...] in nats, mean over the four sides.
        """
        log_p = distri.log_softmax(-1)
        p = log_p.exp()
        mean = (p * self.bins).sum(-1)
        lt, rb = mean[..., :2], mean[..., 2:]
        boxes = torch.cat([points - lt, points + rb], -1) * strides
        spread = (p * (self.bins - mean.unsqueeze(-1)) ** 2).sum(-1).sqrt() * strides
        entropy = -(p * log_p).sum(-1).mean(-1)
        return boxes, spread, entropy

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return all anchors: boxes [B, A, 4], scores [B, A, C], box_std [B, A, 4], entropy [B,
        A]."""
        logits, distri = self.raw(images)
        boxes, spread, entropy = self.decode(distri, self.points, self.strides)
        return boxes, logits.sigmoid(), spread, entropy


def _anchors(size: tuple[int, int], strides: Sequence[int], offset: float) -> tuple[Tensor, Tensor]:
    """Anchor points [A, 2] (xy, in strides) and strides [A, 1] of all levels, row by row."""
    points, widths = [], []
    for stride in strides:
        ys = torch.arange(size[0] // stride, dtype=torch.float32) + offset
        xs = torch.arange(size[1] // stride, dtype=torch.float32) + offset
        grid_y, grid_x = torch.meshgrid(ys, xs, indexing="ij")
        points.append(torch.stack([grid_x, grid_y], -1).reshape(-1, 2))
        widths.append(torch.full((len(points[-1]), 1), float(stride)))
    return torch.cat(points), torch.cat(widths)
