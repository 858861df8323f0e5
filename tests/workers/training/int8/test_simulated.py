"""Simulated INT8 computes what integers would, and lets gradients through."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from workers.training.int8.simulated import (
    WEIGHT_GRIDS,
    InputGrid,
    SimulatedConv2d,
    find_ranges,
    rounded_weight,
    simulate,
)

TENSORRT = WEIGHT_GRIDS["tensorrt"]


def conv(seed: int = 0) -> nn.Conv2d:
    torch.manual_seed(seed)
    return nn.Conv2d(3, 4, 3, padding=1)


def images(count: int = 2) -> Tensor:
    return torch.randn((count, 3, 6, 6), generator=torch.Generator().manual_seed(1))


def test_a_simulated_convolution_is_that_of_the_integers() -> None:
    plain = conv()
    simulated = SimulatedConv2d(plain, TENSORRT)
    find_ranges(simulated, [images()])
    low, high = float(simulated.grid.low), float(simulated.grid.high)
    step = (high - low) / 255
    zero = round(-low / step)
    activations = (images() / step).round().add(zero).clamp(0, 255) - zero  # whole numbers
    steps = plain.weight.detach().abs().amax((1, 2, 3)) / 127
    weights = (plain.weight.detach() / steps.view(-1, 1, 1, 1)).round()
    assert plain.bias is not None
    sums = nn.functional.conv2d(activations.double(), weights.double(), padding=1)
    wanted = sums * step * steps.view(-1, 1, 1) + plain.bias.detach().view(-1, 1, 1)
    assert torch.allclose(simulated(images()), wanted.float(), atol=1e-5)
    assert not torch.allclose(simulated(images()), plain(images()), atol=1e-4)


def test_ranges_are_averaged_over_images_and_hold_zero() -> None:
    grid = InputGrid()
    grid.watch()
    assert (grid(torch.tensor([[2.0, 4.0], [3.0, 8.0]])) == torch.tensor([[2, 4], [3, 8]])).all()
    grid.settle()
    assert (float(grid.low), float(grid.high)) == (0.0, 6.0)


def test_a_weight_on_the_grid_stays() -> None:
    weight = conv().weight.detach()
    once = rounded_weight(weight, 0, TENSORRT)
    assert not torch.equal(once, weight)
    assert torch.allclose(rounded_weight(once, 0, TENSORRT), once, atol=1e-7)


@pytest.mark.parametrize(("runtime", "largest"), [("openvino", 63 / 63.5), ("onnx", 64 / 63.5)])
def test_the_largest_weight_is_rounded_as_the_runtime_does(runtime: str, largest: float) -> None:
    weight = torch.tensor([[[[1.0]], [[-0.5]]], [[[0.0]], [[0.0]]]])
    rounded = rounded_weight(weight, 0, WEIGHT_GRIDS[runtime])  # type: ignore[index]
    assert float(rounded[0, 0]) == pytest.approx(largest)
    assert (rounded[1] == 0).all()


def test_gradients_pass_the_rounding_but_not_the_ends_of_the_range() -> None:
    simulated = SimulatedConv2d(conv(), TENSORRT)
    find_ranges(simulated, [images()])
    beyond = images()
    beyond[0, 0, 0, 0] = 100.0
    beyond.requires_grad_()
    simulated(beyond).square().sum().backward()
    assert beyond.grad is not None
    assert beyond.grad[0, 0, 0, 0] == 0
    assert (beyond.grad[1] != 0).any()
    assert simulated.weight.grad is not None
    assert (simulated.weight.grad != 0).all()


def test_the_heads_last_convolutions_stay_as_they_are() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.cls_pred = conv(), nn.Conv2d(4, 2, 1)
            self.upsample = nn.ConvTranspose2d(4, 4, 2, 2)

        def forward(self, values: Tensor) -> Tensor:
            found: Tensor = self.cls_pred(self.upsample(self.stem(values)))
            return found

    plain = Head().requires_grad_(False)
    made = simulate(copy.deepcopy(plain), "openvino")
    assert [type(m).__name__ for m in made.children()] == [
        "SimulatedConv2d", "Conv2d", "SimulatedConvTranspose2d"
    ]  # fmt: skip
    assert all(p.requires_grad for p in made.parameters())
    assert set(plain.state_dict()) < set(made.state_dict())
    find_ranges(made, [images()])
    assert torch.allclose(made(images()), plain(images()), atol=0.1)
