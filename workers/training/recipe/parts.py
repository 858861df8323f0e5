"""Parts of a YOLO-NAS that learn at their own rate, or not at all."""

from __future__ import annotations

from typing import Any

from torch import nn

from storage.errors import ConfigError
from workers.training.options import FitOptions, Frozen, LrFactors

_PARTS = ("backbone", "neck", "heads")
_FROZEN: dict[Frozen, str] = {"stem": "backbone.stem", "backbone": "backbone"}


def parameter_groups(network: nn.Module, options: FitOptions) -> list[dict[str, Any]]:
    """Return AdamW's groups, each with its ``lr_factor``; frozen weights are in none.

    Weights of two or more dimensions decay, norms and biases do not. While all factors are 1 there
    are two groups, in the order that state files of earlier versions have.
    """
    groups = []
    for factor, parameters in _by_factor(network, options.lr_factors).items():
        for decay, some in (
            (options.weight_decay, [p for p in parameters if p.ndim > 1]),
            (0.0, [p for p in parameters if p.ndim <= 1]),
        ):
            groups.append({"params": some, "weight_decay": decay, "lr_factor": factor})
    return groups


def _by_factor(network: nn.Module, factors: LrFactors) -> dict[float, list[nn.Parameter]]:
    """Return the parameters that learn, by the factor on their rate; 1 where no part is named."""
    found: dict[float, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            part = name.partition(".")[0]
            factor = getattr(factors, part) if part in _PARTS else 1.0
            found.setdefault(factor, []).append(parameter)
    return found


def freeze(network: nn.Module, frozen: Frozen) -> None:
    """Exclude a part's weights from learning, and keep its BatchNorm statistics.

    Raises:
        ConfigError: the network has no such part.
    """
    if frozen == "none":
        return
    part = frozen_part(network, frozen)
    part.requires_grad_(False)
    part.eval()  # BatchNorm normalises by its stored statistics, and leaves them as they are


def frozen_part(network: nn.Module, frozen: Frozen) -> nn.Module:
    """Return the module that ``frozen`` names. Raises ConfigError where there is none."""
    try:
        return network.get_submodule(_FROZEN[frozen])
    except AttributeError as exc:
        raise ConfigError(
            f"freeze: {frozen}, but the network has no part of that name",
            hint="use freeze: none",
        ) from exc
