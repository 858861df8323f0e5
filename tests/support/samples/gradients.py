"""Gradients against finite differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def check_gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> None:
    """Compare autograd with central differences, value by value."""
    at = at.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(function(at).sum(), at)
    step = 1e-6
    flat = at.detach().clone().flatten()
    for i in range(len(flat)):
        sides = []
        for sign in (1, -1):
            moved = flat.clone()
            moved[i] += sign * step
            sides.append(function(moved.view_as(at)).sum().item())
        wanted = (sides[0] - sides[1]) / (2 * step)
        assert found.flatten()[i].item() == pytest.approx(wanted, rel=1e-5, abs=1e-7), i
