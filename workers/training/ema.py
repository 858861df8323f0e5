"""An exponential moving average of the weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

_Pairs = tuple[list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]


class Ema:
    """Moving average of a network's weights and buffers, with a short memory at first."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._decay = decay
        self._pairs: _Pairs | None = None

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Take in the weights after ``step`` (from 1)."""
        # Early on the average would otherwise be mostly the random start.
        decay = min(self._decay, step / (step + 10))
        floats, current, rest = self._paired(network)
        torch._foreach_lerp_(floats, current, 1 - decay)
        for average, value in rest:
            average.copy_(value)

    def _paired(self, network: nn.Module) -> _Pairs:
        """Return averages and what they follow: floats in two lists, all else in pairs.

        Weights change in place, so the tensors stay the same ones; collecting them again for
        every step would take a tenth of a small network's step.
        """
        if self._pairs is None:
            current = network.state_dict()
            own = self.network.state_dict()
            floats = [name for name, value in own.items() if value.dtype.is_floating_point]
            rest = [(own[name], current[name]) for name in own.keys() - set(floats)]
            self._pairs = [own[n] for n in floats], [current[n] for n in floats], rest
        return self._pairs
