"""The step teacher: the model that the config or an earlier round names, or a training."""

from __future__ import annotations

from typing import Any

from pipelines.rounds.state import StepRecord
from pipelines.rounds.steps.machine import trained, training_inputs
from pipelines.rounds.work import RoundWork, previous_student
from pipelines.training.config import TrainConfig
from workers.checkpoints.cache import checkpoint_suffix, fetch_checkpoint, file_sha256

Fields = dict[str, Any]


def teacher_inputs(work: RoundWork, record: StepRecord) -> Fields:
    """Return the checkpoint that is taken, or all that decides the training."""
    model = taken(work)
    if model is not None:
        return {"model": model, "sha256": _sha256(work, model)}
    return training_inputs(work, _training(work, record))


def take_or_train(work: RoundWork, record: StepRecord) -> Fields:
    """Take the teacher that the config names, or train it on the labelled images."""
    model = taken(work)
    if model is None:
        return trained(work, record, _training(work, record))
    found = {"model": model, "sha256": _sha256(work, model), "trained": False}
    if _is_graph(model):  # it says nothing about itself
        return {**found, "licence": model.get("licence"), "provenance": None}
    checkpoint = work.checkpoint(model["checkpoint"])
    licence = model.get("licence") or checkpoint.licence
    return {**found, "licence": licence, "provenance": checkpoint.provenance}


def taken(work: RoundWork) -> Fields | None:
    """Return the teacher that is there already, as ``model`` of a run; None: it is trained."""
    config = work.config
    if config.previous is not None:
        return dict(previous_student(config.previous, work.options)["model"])
    if config.teacher is not None:
        return config.teacher.model_dump(mode="json", exclude_unset=True)
    return None


def _is_graph(model: Fields) -> bool:
    return checkpoint_suffix(model["checkpoint"]) == ".onnx"


def _sha256(work: RoundWork, model: Fields) -> str:
    return file_sha256(fetch_checkpoint(model["checkpoint"], work.options))


def _training(work: RoundWork, record: StepRecord) -> TrainConfig:
    return work.train_config("teacher", record, train=work.labelled.train.model_dump())
