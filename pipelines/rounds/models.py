"""Look at the models that a round is given before anything is spent on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pipelines.models.requested import model_request
from pipelines.rounds.state import StepName, StepRecord
from pipelines.rounds.steps.student import started_from
from pipelines.rounds.steps.teacher import taken
from pipelines.rounds.work import RoundWork
from pipelines.training.config import TrainConfig
from pipelines.training.distillation.start import check_models_given
from pipelines.training.stages import stages_of
from storage.coco.truth import read_truth
from storage.errors import ConfigError, LabelfleetError
from workers.models.resolve import resolve_model
from workers.spec import ModelSpec
from workers.yolo_nas.network import load_dense

Fields = dict[str, Any]


def check_models(work: RoundWork, steps: Sequence[StepName]) -> None:
    """Look before the first of ``steps`` at the teacher, first weights and teachers of students.

    Raises:
        ConfigError: a model knows other classes than the truth, or cannot be used as the config
            states it.
        CheckpointError: its file is not there, damaged, or of another network.
    """
    roles: tuple[StepName, ...] = ("teacher", "student")
    due = [role for role in roles if is_due(work, role, steps)]
    if not due:
        return  # an earlier round may lie elsewhere by now
    teacher = taken(work)
    for role in due:
        if role == "teacher" and teacher is not None:
            check_teacher(work, teacher)
        else:
            _check_training(work, role, teacher)


def is_due(work: RoundWork, step: StepName, steps: Sequence[StepName]) -> bool:
    """Return whether a step is among those asked for, and not over yet."""
    old = work.state.read(step)
    return step in steps and (old is None or not old.over)


def check_teacher(work: RoundWork, model: Fields) -> None:
    """Refuse a teacher that labelling could not load, or whose labels no student could learn.

    Raises as ``check_models``.
    """
    with _named("teacher" if work.config.previous is None else "previous"):
        config = work.run_config("label", work.config.pool.model_dump(mode="json"), model)
        # Workers may have a GPU and runtimes that are not here: labelling asks for those.
        anywhere = replace(model_request(config), runtime="auto", precision="auto")
        spec = resolve_model(anywhere, work.options, device="cpu")
        _check_classes(work, spec)
        if spec.convention is None:
            load_dense(spec, work.options)


def _check_classes(work: RoundWork, spec: ModelSpec) -> None:
    learned = _classes(work, "student")
    if set(learned) == set(spec.classes):
        return
    apart = [
        f"only {whose} has {', '.join(sorted(only)[:5])}{', …' if len(only) > 5 else ''}"
        for whose, only in (
            ("the teacher", set(spec.classes) - set(learned)),
            ("the truth", set(learned) - set(spec.classes)),
        )
        if only
    ]
    raise ConfigError(
        f"{spec.checkpoint.rpartition('/')[2]} and `truth` differ in their classes: "
        f"{'; '.join(apart)}",
        hint="a round's teacher knows the classes of its truth: train one on them (leave `teacher` "
        "out), or name its classes as the truth does",
    )


def _classes(work: RoundWork, role: str) -> tuple[str, ...]:
    """Return the classes that a training of this round learns."""
    ignored = _training(work, role).ignore_categories
    truth = read_truth(work.config.truth.annotations)
    return tuple(name for name in truth.categories.values() if name not in ignored)


def _training(work: RoundWork, role: str, **fields: Any) -> TrainConfig:
    record = StepRecord("student", "begun", 1, {})
    return work.train_config(role, record, train=work.config.truth.model_dump(), **fields)


def _check_training(work: RoundWork, role: str, teacher: Fields | None) -> None:
    first = started_from(work, teacher) if role == "student" and teacher else {}
    section = "student" if role == "student" and work.config.student else "train"
    with _named(section):
        stages = [stage.config for stage in stages_of(_training(work, role, **first))]
        for stage in stages:  # a later one starts from weights that are not there yet
            config = stage.model_copy(update={"model": stages[0].model})
            check_models_given(config, _classes(work, role))


@contextmanager
def _named(section: str) -> Iterator[None]:
    """Say which section of the config an error is about."""
    try:
        yield
    except LabelfleetError as exc:
        raise type(exc)(f"{section}: {exc.message}", hint=exc.hint) from exc
