"""A teacher network that can be asked what it makes of a student's input."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from storage.errors import ConfigError
from storage.objects.protocols import StorageOptions
from workers.checkpoints.cache import fetch_checkpoint
from workers.checkpoints.file import read_checkpoint
from workers.images.preprocessing import Preprocessing
from workers.spec import ModelSpec
from workers.yolo_nas.network import build_network, fuse, load_weights

# What makes the same image another input; how an image is fitted in is varied by augmentation.
_SAME_INPUT = ("size", "channels", "scale", "mean", "std", "pad_value", "keep_aspect",
               "value_range")  # fmt: skip


def check_teacher(spec: ModelSpec, classes: tuple[str, ...], student: Preprocessing) -> None:
    """Refuse a teacher of other classes or another input than the student's.

    Raises:
        ConfigError: saying what differs.
    """
    name = spec.checkpoint.rpartition("/")[2]
    if spec.classes != classes:
        raise ConfigError(
            f"the teacher {name} knows the classes {_listed(spec.classes)}; the student learns "
            f"{_listed(classes)}",
            hint="a teacher has the student's classes in the student's order; train one on them",
        )
    for field in _SAME_INPUT:
        theirs, own = getattr(spec.preprocessing, field), getattr(student, field)
        if theirs != own:
            raise ConfigError(
                f"the teacher {name} was trained with {field} {theirs}; the student's is {own}",
                hint="both see the same batch: train the student with the teacher's input",
            )


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:5])
    return f"[{shown}, …: {len(names)}]" if len(names) > 5 else f"[{shown}]"


def load_teacher(spec: ModelSpec, student: nn.Module, options: StorageOptions) -> nn.Module:
    """Return the teacher fused, frozen, in eval mode, on the CPU, for inputs of any size.

    Args:
        spec: a YOLO-NAS; the checkpoint's bytes must have the digest it names.
        student: the network it will teach, from ``build_network``.

    Raises:
        ConfigError: its anchors or DFL bins are not the student's.
        CheckpointError: the checkpoint cannot be had, read, or fitted to its architecture.
    """
    teacher = build_network(spec.name, spec.arch_params, len(spec.classes))
    theirs, own = _anchors(teacher), _anchors(student)
    for what, value in own.items():
        if theirs[what] != value:
            raise ConfigError(
                f"the teacher {spec.checkpoint.rpartition('/')[2]} has {what} {theirs[what]}; the "
                f"student has {value}",
                hint="a teacher and its student differ in width and depth only",
            )
    path = fetch_checkpoint(spec.checkpoint, options, sha256=spec.sha256)
    load_weights(teacher, read_checkpoint(path))
    fused = fuse(teacher, spec.preprocessing.size)
    heads: Any = fused.heads
    heads.eval_size = None  # anchors of each input's own size
    return fused.requires_grad_(False)


def _anchors(network: nn.Module) -> dict[str, object]:
    heads: Any = network.heads
    return {
        "strides": tuple(int(stride) for stride in heads.fpn_strides),
        "reg_max": int(heads.reg_max),
        "grid_cell_offset": float(heads.grid_cell_offset),
    }


def torch_dtype(precision: str) -> torch.dtype:
    """Return the dtype that the forward pass of a training runs in."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
