"""Training with the rounding of INT8 simulated, so that the weights learn to live on its grid.

Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference (2018, arXiv 1712.05877), section 3: the forward pass rounds weights and activations to
their grid, and gradients pass the rounding as if it were not there, but for values outside of the
grid. Batch norms keep their statistics and are folded into the weights that are rounded.

What is trained is therefore the fused network. A re-parameterised block is one convolution there,
the one that is deployed: the sum of its branches, whose spread is what INT8 costs such networks
(Chu et al., Make RepVGG Greater Again: A Quantization-aware Approach, 2022, arXiv 2212.01593).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workers.spec import RuntimeName

_STEPS = 255  # 8 bits between the ends of an activation's range
# The heads' last convolutions stay in float32, as in post-training quantization.
_FLOAT = ("cls_pred", "reg_pred")


@dataclass(frozen=True, slots=True)
class WeightGrid:
    """The values that a channel's weights are rounded to: whole steps around zero.

    Attributes:
        steps: from zero to the channel's largest weight.
        most: steps that are used; with ``steps`` between two whole numbers the largest weight is
            rounded towards one of them, and each runtime has its own.
    """

    steps: float
    most: int


# As NNCF quantises for each runtime (measured on its graphs): 7 bits on CPUs, see Quantiser.
WEIGHT_GRIDS: Mapping[RuntimeName, WeightGrid] = {
    "openvino": WeightGrid(63.5, 63),
    "onnx": WeightGrid(63.5, 64),
    "tensorrt": WeightGrid(127.0, 127),
}


class InputGrid(nn.Module):
    """The 256 values that a convolution's input is rounded to; its range is found on images.

    Attributes:
        low, high: ends of the range, around zero; scalars.
    """

    low: Tensor
    high: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self._seen: list[tuple[float, float]] | None = None

    def watch(self) -> None:
        """Round nothing from here on, and note the range of each image."""
        self._seen = []

    def settle(self) -> None:
        """Take the mean of the ranges that were noted, and round from here on."""
        ranges = torch.tensor(self._seen or [(0.0, 0.0)])
        self.low.copy_(ranges[:, 0].mean().clamp(max=0))
        self.high.copy_(ranges[:, 1].mean().clamp(min=0))
        self._seen = None

    def forward(self, values: Tensor) -> Tensor:
        """Return ``values``, float [B, ...], rounded."""
        if self._seen is not None:
            self._seen += [(float(one.min()), float(one.max())) for one in values.detach()]
            return values
        step = ((self.high - self.low) / _STEPS).clamp(min=torch.finfo(torch.float32).eps)
        zero = (-self.low / step).round().to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(values.float(), step, zero, 0, _STEPS)


def rounded_weight(weight: Tensor, axis: int, grid: WeightGrid) -> Tensor:
    """Return weights rounded to the grid, for each channel along ``axis`` as wide as its largest
    weight. The gradient is that of doing nothing."""
    others = [dim for dim in range(weight.ndim) if dim != axis]
    largest = weight.detach().abs().amax(others)
    step = (largest / grid.steps).clamp(min=torch.finfo(torch.float32).eps)
    zero = torch.zeros_like(step, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, step, zero, axis, -grid.most, grid.most)


class SimulatedConv2d(nn.Conv2d):
    """A convolution as INT8 computes it; its state is a plain one's, and the grid of its input."""

    def __init__(self, plain: nn.Conv2d, weights: WeightGrid) -> None:
        super().__init__(
            plain.in_channels, plain.out_channels, plain.kernel_size,  # type: ignore[arg-type]  # torch
            plain.stride, plain.padding, plain.dilation, plain.groups,  # type: ignore[arg-type]  # torch
            bias=plain.bias is not None,
        )  # fmt: skip
        self.load_state_dict(plain.state_dict())
        self.grid, self.weight_grid = InputGrid(), weights

    def forward(self, values: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C', H', W']."""
        found: Tensor = self._conv_forward(
            self.grid(values), rounded_weight(self.weight, 0, self.weight_grid), self.bias
        )
        return found


class SimulatedConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution as INT8 computes it; its state as ``SimulatedConv2d``'s."""

    def __init__(self, plain: nn.ConvTranspose2d, weights: WeightGrid) -> None:
        super().__init__(
            plain.in_channels, plain.out_channels, plain.kernel_size,  # type: ignore[arg-type]  # torch
            plain.stride, plain.padding, plain.output_padding, plain.groups,  # type: ignore[arg-type]  # torch
            bias=plain.bias is not None, dilation=plain.dilation,  # type: ignore[arg-type]  # torch
        )  # fmt: skip
        self.load_state_dict(plain.state_dict())
        self.grid, self.weight_grid = InputGrid(), weights

    def forward(self, values: Tensor, output_size: list[int] | None = None) -> Tensor:
        """[B, C, H, W] → [B, C', H', W']."""
        weight = rounded_weight(self.weight, 1, self.weight_grid)
        return nn.functional.conv_transpose2d(
            self.grid(values), weight, self.bias, self.stride, self.padding,  # type: ignore[arg-type]  # torch
            self.output_padding, self.groups, self.dilation,
        )  # fmt: skip


def simulate(fused: nn.Module, runtime: RuntimeName) -> nn.Module:
    """Replace the convolutions of a fused network by simulated ones, in place; return it.

    Its weights learn from here on. Call ``find_ranges`` before it is used.
    """
    weights = WEIGHT_GRIDS[runtime]
    for parent in list(fused.modules()):
        for name, child in list(parent.named_children()):
            if name in _FLOAT:
                continue
            if type(child) is nn.Conv2d:
                setattr(parent, name, SimulatedConv2d(child, weights))
            elif type(child) is nn.ConvTranspose2d:
                setattr(parent, name, SimulatedConvTranspose2d(child, weights))
    return fused.requires_grad_(True)


@torch.no_grad()
def find_ranges(simulated: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the range of each convolution's input to its mean over images, as NNCF does by default.

    Args:
        simulated: from ``simulate``.
        batches: float32 [B, 3, H, W], as in training.
    """
    grids = [module for module in simulated.modules() if isinstance(module, InputGrid)]
    for grid in grids:
        grid.watch()
    for images in batches:
        simulated(images)
    for grid in grids:
        grid.settle()
