"""Prepare what a student is distilled from: checked, loaded, and on the training's device."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from pipelines.training.config import TrainConfig
from pipelines.training.distillation.config import DistillConfig
from pipelines.training.start import Machine, first_network
from storage.errors import ConfigError
from storage.objects.protocols import StorageOptions
from workers.images.preprocessing import Preprocessing
from workers.models.resolve import resolve_model
from workers.spec import ModelRequest
from workers.training.coco_set import TrainingSet
from workers.training.distillation.knowledge import (
    DistillWeights,
    Knowledge,
    StoredKnowledge,
    TeacherKnowledge,
)
from workers.training.distillation.teacher import check_teacher, load_teacher, torch_dtype
from workers.training.samples import Mixture, Samples
from workers.yolo_nas.network import fuse, load_dense


def knowledge_of(
    config: TrainConfig, training: Samples, student: nn.Module, machine: Machine
) -> Knowledge | None:
    """Return what ``distill`` asks for; None where it is left out.

    A finish for INT8 without ``distill`` learns from what the network was before: its float32
    outputs are what the deployed model is measured against.

    Args:
        training: the set that is learned.
        student: its network, unfused.

    Raises:
        ConfigError: the teacher has other classes, another input, strides or reg_max, or nothing
            is stored about the labels.
        CheckpointError: the teacher's checkpoint cannot be had or read.
    """
    distill = config.distill
    if distill is None and config.int8 is not None:
        before = fuse(copy.deepcopy(student), config.preprocessing.size)
        weights = _weights(DistillConfig(mode="teacher", teacher="itself", final_share=1.0))
        return TeacherKnowledge(before.to(machine.device), weights)
    if distill is None:
        return None
    weights = _weights(distill)
    if distill.teacher is None:
        if not _stores(training):
            raise ConfigError(
                "distill.mode: stored, but no source in `train` is a label version: COCO sets "
                "store neither class scores nor spreads",
                hint="add a label version to `train`, or use mode: teacher",
            )
        return StoredKnowledge(weights)
    teacher = checked_teacher(
        distill.teacher,
        training.classes,
        config.preprocessing,
        student,
        config.storage.options(),
    )
    return TeacherKnowledge(teacher.to(machine.device), weights, torch_dtype(machine.precision))


def checked_teacher(
    url: str,
    classes: tuple[str, ...],
    preprocessing: Preprocessing,
    student: nn.Module,
    options: StorageOptions,
) -> nn.Module:
    """Return the network at ``url`` as a teacher of ``student``, whose input and classes these
    are. Raises as ``knowledge_of``."""
    spec = resolve_model(ModelRequest(checkpoint=url, precision="fp32"), options, device="cpu")
    check_teacher(spec, classes, preprocessing)
    return load_teacher(spec, student, options)


def check_models_given(config: TrainConfig, classes: tuple[str, ...]) -> None:
    """Load the first weights and the teacher of a training and drop them again.

    Args:
        classes: those that it will learn.

    Raises:
        ConfigError, CheckpointError: as ``knowledge_of``, or the first weights do not fit.
    """
    teacher = None if config.distill is None else config.distill.teacher
    if teacher is None and config.model.checkpoint is None:
        return
    student = first_network(config, classes)
    if teacher is not None:
        checked_teacher(teacher, classes, config.preprocessing, student, config.storage.options())


def check_later_teachers(stages: Sequence[TrainConfig]) -> None:
    """Load the teachers of all stages but the first, which is checked when it begins.

    Raises:
        ConfigError, CheckpointError: one of them cannot be used; nothing was trained yet.
    """
    for config in stages[1:]:
        if config.distill is not None and config.distill.teacher is not None:
            options = config.storage.options()
            asked = ModelRequest(checkpoint=config.distill.teacher, precision="fp32")
            load_dense(resolve_model(asked, options, device="cpu"), options)


def _stores(training: Samples) -> bool:
    """Whether any part of a set may know more of its boxes than their place and class."""
    if isinstance(training, Mixture):
        return any(_stores(part) for part in training.parts)
    return not isinstance(training, TrainingSet)


def _weights(distill: DistillConfig) -> DistillWeights:
    final = distill.final_share
    if final is None:
        final = 0.01 if distill.mode == "teacher" else 1.0
    return DistillWeights(
        weight=distill.weight,
        final_share=final,
        classes=distill.class_weight,
        boxes=distill.box_weight,
        distributions=distill.side_weight,
        top_share=distill.top_share,
    )
