"""The network in training on a CPU, in float32, with less work: the same mathematics and weights.

``lean`` changes the classes of a network's modules, not their parameters or names. What differs is
rounding alone. Where a module is not as expected (fused, in eval mode, compiled, lower precision),
its own forward runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from workers.yolo_nas.network import import_super_gradients
from workers.yolo_nas.sg_environment import undisturbed

import_super_gradients()  # before any other import of it: without its side effects

with undisturbed():
    from super_gradients.modules import QARepVGGBlock
    from super_gradients.training.models.detection_models.pp_yolo_e.pp_yolo_head import (
        generate_anchors_for_grid_cell,
    )
    from super_gradients.training.models.detection_models.yolo_nas.dfl_heads import NDFLHeads

# A sum of squares loses as many digits as (mean / spread)² has: there torch's slower one is taken.
_CANCELLATION = 64.0
# Numbers that are summed in float32; the sums of these are summed in float64.
_PIECE = 1024


def lean(network: nn.Module) -> None:
    """Let ``network`` do less in each training step, in place.

    Its state dict stays as it is, and so does what it computes in eval mode.
    """
    for module in network.modules():
        if (found := _LEAN.get(type(module))) is not None:
            module.__class__ = found


class LeanBlock(QARepVGGBlock):  # type: ignore[misc]  # super_gradients: no types
    """The block with its identity branch and its factor inside the kernel of its 1×1 branch.

    Four passes over feature maps less each way. A strided 1×1 convolution becomes one of every
    second pixel: oneDNN is several times slower at the former, and its gradient by a kernel of
    three input channels writes out of bounds in channels_last (torch 2.13), which is also the
    layout that a compiled network chooses.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the block's output [B, C, H, W]."""
        built = not (self.fully_fused or self.partially_fused)
        if not (self.training and built and inputs.dtype == torch.float32):
            return super().forward(inputs)  # type: ignore[no-any-return]  # as above
        branch = self.branch_1x1
        kernel = self.alpha * branch.weight
        if self.identity is not None:
            kernel = kernel + self.id_tensor[:, :, 1:2, 1:2]
        bias = None if branch.bias is None else self.alpha * branch.bias
        step = self.stride
        seen = inputs if step == 1 else inputs[:, :, ::step, ::step].contiguous()
        added = torch.conv2d(seen, kernel, bias, groups=self.groups)
        out = self.nonlinearity(self.post_bn(self.branch_3x3(inputs).add_(added)))
        return self.se(out)  # type: ignore[no-any-return]  # as above


class LeanPool(nn.MaxPool2d):
    """Max pooling in channels_last, which torch vectorises on a CPU: ten times faster."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the same maxima, [B, C, H, W] and contiguous."""
        if not x.is_contiguous() or x.device.type != "cpu":
            return super().forward(x)  # type: ignore[no-any-return]  # torch: no types
        pooled: Tensor = super().forward(x.contiguous(memory_format=torch.channels_last))
        return pooled.contiguous()


class LeanHeads(NDFLHeads):  # type: ignore[misc]  # super_gradients: no types
    """The heads without boxes and scores decoded, of which the loss in training knows nothing."""

    def forward(self, feats: tuple[Tensor, ...]) -> Any:
        """Return (None, the raw outputs) in training; in eval mode as the heads do."""
        if not self.training:
            return super().forward(feats)
        feats = feats[: self.num_heads]
        found = [getattr(self, f"head{i + 1}")(feat) for i, feat in enumerate(feats)]
        distances = torch.cat([reg.flatten(2) for reg, _ in found], dim=2).permute(0, 2, 1)
        scores = torch.cat([cls.flatten(2) for _, cls in found], dim=2).permute(0, 2, 1)
        anchors = generate_anchors_for_grid_cell(
            feats, self.fpn_strides, self.grid_cell_scale, self.grid_cell_offset
        )
        return None, (scores, distances.contiguous(), *anchors)


class LeanNorm(nn.BatchNorm2d):
    """Batch norm whose statistics are taken with vector instructions: torch 2.13 has none there."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` [B, C, H, W] normalised; in training the running statistics follow."""
        if not self._is_plain(x):
            return super().forward(x)
        sizes = x.shape
        count = sizes[0] * sizes[2] * sizes[3]
        mean, variance = _statistics(x.detach())
        if bool((mean.square() > _CANCELLATION * variance).any()):
            return super().forward(x)
        self._follow(mean, variance * (count / (count - 1)))
        normalised: Tensor = _Normalise.apply(  # type: ignore[no-untyped-call]  # torch: no types
            x, self.weight, self.bias, torch.stack((mean, variance)), self.eps
        )
        return normalised

    @torch.no_grad()
    def _follow(self, mean: Tensor, unbiased: Tensor) -> None:
        own: Any = self  # torch: a norm may be without running statistics; a plain one is not
        own.num_batches_tracked.add_(1)
        own.running_mean.lerp_(mean.float(), own.momentum)
        own.running_var.lerp_(unbiased.float(), own.momentum)

    def _is_plain(self, x: Tensor) -> bool:
        usual = self.training and self.affine and self.track_running_stats
        usual = usual and self.momentum is not None and not torch.compiler.is_compiling()
        fits = x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous()
        return usual and fits and x.numel() > x.shape[1]


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of the channels of ``x`` [B, C, H, W]: float64 [C] each."""
    batch, channels, height, width = x.shape
    pieces = 1
    while height * width // pieces > _PIECE and height * width % (2 * pieces) == 0:
        pieces *= 2
    cut = x.view(batch, channels, pieces, -1)
    count = batch * height * width
    mean = cut.sum(dim=3).double().sum(dim=(0, 2)) / count
    squares = torch.linalg.vector_norm(cut, dim=3).double().square().sum(dim=(0, 2)) / count
    return mean, (squares - mean.square()).clamp(min=0)


class _Normalise(torch.autograd.Function):
    """(x, weight, bias, [mean, variance] of x, eps) → normalised, differentiated through both."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, eps: float
    ) -> Tensor:
        mean, variance = moments.float()
        inverse = (moments[1] + eps).rsqrt().float()
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.eps = eps
        found = torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)
        return found[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, mean, inverse = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        of_all = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, None, None, mean, inverse, True, ctx.eps, wanted
        )
        return (*of_all, None, None)


_LEAN: dict[type[nn.Module], type[nn.Module]] = {
    QARepVGGBlock: LeanBlock,
    NDFLHeads: LeanHeads,
    nn.BatchNorm2d: LeanNorm,
    nn.MaxPool2d: LeanPool,
}
