"""How a network is fitted: the options, and the learning rate over the steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

TrainPrecision = Literal["fp32", "bf16", "fp16"]
Frozen = Literal["none", "stem", "backbone"]


@dataclass(frozen=True, slots=True)
class LrFactors:
    """Factors on the learning rate, by part of the network."""

    backbone: float = 1.0
    neck: float = 1.0
    heads: float = 1.0


@dataclass(frozen=True, slots=True)
class FitOptions:
    """How a network is fitted.

    Attributes:
        steps: optimiser steps.
        lr: peak learning rate of AdamW; it ends at ``lr × final_lr_share``.
        warmup_steps: linear rise from 0 before the cosine.
        weight_decay: on weights of two or more dimensions; never on norms and biases.
        ema_decay: of the weight average that is validated and kept.
        eval_every: steps between validations.
        precision: of the forward pass; the loss is always float32.
        extended_at: step at which a finished training was given more steps; 0: it was not.
        early_stop: validations in a row without a better score after which the training is done;
            None: it runs to its last step.
        lr_factors: on the rate of each part of the network.
        freeze: the part that keeps its weights and BatchNorm statistics.
        clip_norm: largest norm of the gradient over all weights; None: it is not clipped.
        accumulate: equal parts that a batch passes the network in, one after the other.
        channels_last: memory layout of images and weights; CUDA only.
        compile: whether the network's forward pass is compiled by torch.
        save_every_s: seconds between state files beside those at validations, so that a killed
            training loses no more than this.
    """

    steps: int
    lr: float = 2e-3
    final_lr_share: float = 0.05
    warmup_steps: int = 100
    weight_decay: float = 1e-4
    ema_decay: float = 0.998
    eval_every: int = 500
    precision: TrainPrecision = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"
    early_stop: int | None = None
    lr_factors: LrFactors = LrFactors()
    freeze: Frozen = "none"
    clip_norm: float | None = None
    accumulate: int = 1
    channels_last: bool = False
    compile: bool = False
    save_every_s: float = 600.0
    extended_at: int = 0


def learning_rate(step: int, options: FitOptions) -> float:
    """Rate for ``step`` (from 0): linear warm-up, then a half cosine to its final share.

    An extended training follows the cosine of all its steps, as if it had been planned that long.
    It gets there from the final share, where it had ended, by a linear rise over ``warmup_steps``.
    """
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    rate = _cosine(step, options)
    since = step - options.extended_at
    if not options.extended_at or not 0 <= since < options.warmup_steps:
        return rate
    ended = options.lr * options.final_lr_share
    return ended + (rate - ended) * (since + 1) / options.warmup_steps


def _cosine(step: int, options: FitOptions) -> float:
    length = max(1, options.steps - options.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * (step - options.warmup_steps) / length))
    return options.lr * (options.final_lr_share + (1 - options.final_lr_share) * cosine)
