"""What a fused network learned, put back into the network that it was fused from."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from workers.yolo_nas.network import fuse

# Below this, a channel's weights are multiplied by next to nothing when they are fused: what the
# fused one learned would take weights that no format holds.
_LEAST = 1e-6


class _Origin(NamedTuple):
    """Where a fused convolution comes from.

    Attributes:
        fused: its name in the fused network.
        weight: what its weight is a multiple of, plus something constant; ``scale`` by channel.
        bias: what its bias is a sum with; None: it has none.
    """

    fused: str
    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None


@torch.no_grad()
def unfused(network: nn.Module, fused: nn.Module, size: tuple[int, int]) -> nn.Module:
    """Return a copy of ``network`` that fuses to the weights of ``fused``, up to rounding.

    Of a re-parameterised block (3×3, 1×1 and identity, then a batch norm) the 3×3 branch takes
    over the change of the weights, and the last batch norm that of the bias; of a convolution
    with a batch norm, these two. A channel that its batch norm scales to zero keeps its weights.

    Args:
        network: from ``build_network``; left as it is.
        fused: ``fuse`` of it, with other weights; it may hold modules and buffers besides.
        size: [height, width] of the input.
    """
    made = copy.deepcopy(network).eval()
    before = dict(fuse(copy.deepcopy(network), size).named_parameters())
    after = dict(fused.named_parameters())
    for one in _origins(made):
        weight, bias = f"{one.fused}.weight", f"{one.fused}.bias"
        change = after.pop(weight).to(one.weight) - before[weight]
        if one.scale is not None:
            scale = one.scale.view(-1, *[1] * (change.ndim - 1))
            change = torch.where(scale.abs() > _LEAST, change / scale, 0.0)
        one.weight.add_(change)
        if one.bias is not None:
            one.bias.add_(after.pop(bias).to(one.bias) - before[bias])
    for name, rest in after.items():  # of no convolution, such as the weight of a shortcut
        made.get_parameter(name).copy_(rest)
    return made


def _origins(network: nn.Module) -> Iterator[_Origin]:
    """Yield the origin of every convolution of the fused network."""
    done: set[nn.Module] = set()
    for name, module in network.named_modules():
        if hasattr(module, "branch_3x3"):
            done |= set(module.modules())
            yield _of_block(name, module)
        elif module not in done:
            yield from _of_pairs(name, module, done)


def _of_block(name: str, block: Any) -> _Origin:
    scale, last = _scale(block.branch_3x3.bn), block.branch_3x3.bn
    if isinstance(block.post_bn, nn.BatchNorm2d):
        scale, last = scale * _scale(block.post_bn), block.post_bn
    return _Origin(f"{name}.rbr_reparam", block.branch_3x3.conv.weight, last.bias, scale)


def _of_pairs(name: str, module: nn.Module, done: set[nn.Module]) -> Iterator[_Origin]:
    """The convolutions right below a module: with a batch norm behind them, or alone."""
    children = list(module.named_children())
    for (own, conv), (_, norm) in itertools.pairwise([*children, ("", None)]):
        if not isinstance(conv, nn.Conv2d | nn.ConvTranspose2d) or conv in done:
            continue
        where = f"{name}.{own}" if name else own
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            yield _Origin(where, conv.weight, norm.bias, _scale(norm))
        else:
            yield _Origin(where, conv.weight, conv.bias, None)


def _scale(norm: nn.BatchNorm2d) -> Tensor:
    """Return the factor of each channel."""
    variance = norm.running_var
    assert variance is not None  # noqa: S101 - of a trained network
    return norm.weight / torch.sqrt(variance + norm.eps)
