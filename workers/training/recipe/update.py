"""One update of the weights: gradients over the parts of a batch, scaled, clipped, applied."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from workers.training.batches import TrainingBatch
from workers.training.distributed import summed
from workers.training.options import FitOptions
from workers.training.recipe.parts import parameter_groups


class Update:
    """AdamW with a rate for each part of the network, clipping, and loss scaling in fp16."""

    def __init__(self, network: nn.Module, options: FitOptions) -> None:
        # On a CPU torch's default goes through the weights one operation and tensor at a time.
        fused = True if options.device == "cpu" else None
        groups = parameter_groups(network, options)
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, fused=fused)
        self._scaler = torch.amp.GradScaler("cuda", enabled=options.precision == "fp16")
        self._clip_norm = options.clip_norm

    def begin(self, rate: float) -> None:
        """Forget the last step's gradients; ``rate`` is the one before the parts' factors."""
        for group in self.optimizer.param_groups:
            # State files of earlier versions know no factor.
            group["lr"] = rate * group.get("lr_factor", 1.0)
        self.optimizer.zero_grad(set_to_none=True)

    def add(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch has no type

    def apply(self, divisor: float = 1.0) -> None:
        """Change the weights by the summed gradient, divided by ``divisor`` and clipped.

        In fp16 a gradient that overflowed changes nothing, and lowers the scale.
        """
        if divisor != 1.0 or self._clip_norm is not None:
            self._scaler.unscale_(self.optimizer)
            learning = [p for g in self.optimizer.param_groups for p in g["params"]]
            if divisor != 1.0:
                for parameter in learning:
                    if parameter.grad is not None:
                        parameter.grad.div_(divisor)
            if self._clip_norm is not None:
                nn.utils.clip_grad_norm_(learning, self._clip_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()

    def state(self) -> dict[str, Any]:
        """Return what a continued training needs, for the state file."""
        scaler = self._scaler.state_dict()
        return {"optimizer": self.optimizer.state_dict(), **({"scaler": scaler} if scaler else {})}

    def load(self, state: dict[str, Any]) -> None:
        """Take in what ``state`` gave, in this version or an earlier one."""
        self.optimizer.load_state_dict(state["optimizer"])
        if state.get("scaler"):
            self._scaler.load_state_dict(state["scaler"])


def split(batch: TrainingBatch, parts: int) -> Iterator[TrainingBatch]:
    """Yield ``parts`` parts of a batch; the rows of each carry their index within it.

    They are equal where the batch splits evenly, else they differ by one image.
    """
    count = len(batch.images)
    edges = [count * k // parts for k in range(parts + 1)]
    for first, end in itertools.pairwise(edges):
        size = end - first
        rows = _within(batch.targets, first, size)
        yield TrainingBatch(
            batch.images[first : first + size],
            _renumbered(batch.targets, first, size),
            _renumbered(batch.ignore, first, size),
            batch.weights[rows],
            _renumbered(batch.checked, first, size),
            None if batch.soft_scores is None else batch.soft_scores[rows],
            None if batch.spread is None else batch.spread[rows],
            None if batch.silent is None else _renumbered(batch.silent, first, size),
        )


def _within(rows: Tensor, first: int, size: int) -> Tensor:
    return (rows[:, 0] >= first) & (rows[:, 0] < first + size)


def _renumbered(rows: Tensor, first: int, size: int) -> Tensor:
    found = rows[_within(rows, first, size)].clone()
    found[:, 0] -= first
    return found


def assigned_score(scores: Tensor) -> float:
    """Return the sum of target scores over all processes, by which the loss is normalised."""
    return float(summed(scores.detach().sum()))
