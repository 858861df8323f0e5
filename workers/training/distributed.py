"""What several processes that train one network share: statistics, sums, gradients, decisions.

Each process (a rank) sees its part of the global batch; all of this makes the step that they take
together the one that a single process would take. In a process without a group every function
here returns what it was given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


def group_size() -> int:
    """Return the number of processes that train together; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(value: Tensor) -> Tensor:
    """Return the sum of ``value`` over all ranks, detached; the same tensor without a group."""
    if group_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


@dataclass(frozen=True, slots=True)
class Team:
    """This process's place among those that train together.

    Attributes:
        rank: from 0; rank 0 leads: it validates, keeps, saves and decides when to stop.
        size: the number of processes; 1: this one alone.
    """

    rank: int = 0
    size: int = 1

    @staticmethod
    def joined() -> Team:
        """Return the place in the process group of torch; alone where there is none."""
        size = group_size()
        return Team(dist.get_rank() if size > 1 else 0, size)

    @property
    def leads(self) -> bool:
        """Whether this process decides for all."""
        return self.rank == 0

    def share(self, network: nn.Module) -> nn.Module:
        """Return what to call in training: gradients and batch statistics are over all ranks.

        The weights stay those of ``network``, whose batch norms are exchanged in place; the names
        in its state dict do not change. Parameters that are not to be trained must be frozen
        before; one that takes no part in a step's loss gets no gradient there.
        """
        if self.size == 1:
            return network
        on_gpu = next(network.parameters()).is_cuda
        share_statistics(network, on_gpu=on_gpu)
        return DistributedDataParallel(
            network,
            broadcast_buffers=False,  # the statistics are equal everywhere already
            # YOLO-NAS has such parameters: branches of its blocks that only fusing uses.
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
        )

    def agree(self, value: float) -> float:
        """Return rank 0's value to all; the other ranks' values do not matter."""
        if self.size == 1:
            return value
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        told = torch.tensor([value], dtype=torch.float64, device=device)
        dist.broadcast(told, src=0)
        return float(told.item())

    def told(self, value: T | None) -> T | None:
        """Return rank 0's value, any that can be pickled, to all."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let rank 0 pass the block before the others enter it."""
        if not self.leads:
            self.agree(0.0)
        yield
        if self.leads:
            self.agree(0.0)


def share_statistics(network: nn.Module, *, on_gpu: bool) -> None:
    """Let every batch norm below ``network`` take its statistics over all ranks, in place."""
    for name, child in network.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(network, name, _sharing(child, on_gpu=on_gpu))
        else:
            share_statistics(child, on_gpu=on_gpu)


def _sharing(norm: nn.BatchNorm2d, *, on_gpu: bool) -> nn.Module:
    if on_gpu:  # torch's own has a kernel of its own, for GPUs only
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(norm)  # type: ignore[no-untyped-call]  # torch: no types
        return converted
    shared = GlobalBatchNorm2d(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )
    shared.weight, shared.bias = norm.weight, norm.bias
    shared.running_mean, shared.running_var = norm.running_mean, norm.running_var
    shared.num_batches_tracked = norm.num_batches_tracked
    return shared.train(norm.training)


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics in training are over the batches of all ranks, on CPUs.

    The mathematics of torch's SyncBatchNorm, which refuses CPU tensors: means and variances of
    parts of different sizes are combined as in Chan, Golub and LeVeque 1979; one gather forward,
    one sum backward.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [B, C, H, W]; in eval mode as a plain batch norm."""
        if not self.training or group_size() == 1:
            return super().forward(x)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else self._cumulative()
        found = _Normalise.apply(x, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]  # as above
        normalised, mean, variance, count = found
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                # As torch does: the unbiased variance is what inference uses.
                unbiased = variance * (count / (count - 1).clamp(min=1))
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(unbiased, momentum)
        return normalised  # type: ignore[no-any-return]  # torch types no Function

    def _cumulative(self) -> float:
        seen = self.num_batches_tracked
        return 1.0 if seen is None else 1.0 / float(seen)


class _Normalise(torch.autograd.Function):
    """(x, weight, bias, eps) → (normalised, mean [C], variance [C], count), over all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
        # bf16 would round the statistics.
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        count = torch.full((1,), x.numel() / x.shape[1], dtype=wide.dtype)
        variance, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
        mine = torch.cat([mean, variance, count])
        parts = [torch.empty_like(mine) for _ in range(group_size())]
        dist.all_gather(parts, mine)
        channels = x.shape[1]
        means = torch.stack([part[:channels] for part in parts])
        variances = torch.stack([part[channels:-1] for part in parts])
        counts = torch.stack([part[-1:] for part in parts])
        total = counts.sum(dim=0)
        mean = (means * counts).sum(dim=0) / total
        variance = ((variances + (means - mean) ** 2) * counts).sum(dim=0) / total
        inverse = torch.rsqrt(variance + eps)
        shape = (1, channels, 1, 1)
        unit = (wide - mean.view(shape)) * inverse.view(shape)
        ctx.save_for_backward(unit, weight, inverse, total)
        ctx.mark_non_differentiable(mean, variance, total)
        normalised = unit * weight.view(shape) + bias.view(shape)
        return normalised.to(x.dtype), mean, variance, total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        unit, weight, inverse, total = ctx.saved_tensors
        dtype, gradient = gradients[0].dtype, gradients[0].to(ctx.saved_tensors[0].dtype)
        shape, channels = (1, -1, 1, 1), unit.shape[1]
        of_bias = gradient.sum(dim=(0, 2, 3))
        of_weight = (gradient * unit).sum(dim=(0, 2, 3))
        both = torch.cat([of_bias, of_weight])
        dist.all_reduce(both)
        mean_gradient = (both[:channels] / total).view(shape)
        mean_product = (both[channels:] / total).view(shape)
        of_x = (gradient - mean_gradient - unit * mean_product) * (weight * inverse).view(shape)
        # Those of weight and bias are this rank's share: the gradients' average adds them up.
        return of_x.to(dtype), of_weight, of_bias, None
