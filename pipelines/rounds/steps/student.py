"""The steps around the student: train it, and compare it with its teacher on held-out images."""

from __future__ import annotations

from typing import Any

from pipelines.evaluation.evaluate import evaluate_run
from pipelines.rounds.costs import gpu_seconds
from pipelines.rounds.gain import compare_on
from pipelines.rounds.labelled import digest
from pipelines.rounds.state import StepName, StepRecord
from pipelines.rounds.steps.machine import labelled_run, trained, training_inputs
from pipelines.rounds.work import RoundWork
from pipelines.training.config import TrainConfig
from storage.coco.truth import read_truth

Fields = dict[str, Any]
COMPARISON = "comparison.json"


# student


def student_inputs(work: RoundWork, record: StepRecord) -> Fields:
    """Return the teacher, the label version, the truth, and the recipe."""
    decided = work.state.result("decide")
    fields = training_inputs(work, student_training(work, record))
    fields["training"].pop("model")  # its checkpoint may lie elsewhere; the digest says which it is
    return {
        **fields,
        "teacher": work.state.result("teacher")["sha256"],
        "labels": {key: decided[key] for key in ("version", "attempt")},
        "model": {**work.config.train, **work.config.student}.get("model"),
        "truth_share": work.config.truth_share,
    }


def train_student(work: RoundWork, record: StepRecord) -> Fields:
    """Train on the label version and the labelled images."""
    return trained(work, record, student_training(work, record))


def student_training(work: RoundWork, record: StepRecord) -> TrainConfig:
    """Return the config of the student's training."""
    decided, share = work.state.result("decide"), work.config.truth_share
    sources = [
        {**work.labelled.train.model_dump(), "share": share},
        {"labels": decided["run"], "version": decided["version"], "share": 1 - share},
    ]
    return work.train_config("student", record, train=sources, **first_weights(work))


def first_weights(work: RoundWork) -> Fields:
    """Return fields of a training that start it from the teacher, as a run's config describes it.

    There are none where the config names other weights, or the teacher is of another family.
    """
    teacher = work.state.result("teacher")
    return started_from(work, teacher["model"], teacher["licence"])


def started_from(work: RoundWork, teacher: Fields, licence: str | None = None) -> Fields:
    """Return ``first_weights`` of a teacher, described as ``model`` of a run."""
    stated = {**work.config.train, **work.config.student}
    if "model" in stated or teacher.get("family", "yolo_nas") != "yolo_nas":
        return {}
    checkpoint = work.checkpoint(teacher["checkpoint"])
    model = {"checkpoint": teacher["checkpoint"], **({"licence": licence} if licence else {})}
    name = teacher.get("name") or checkpoint.name
    model |= {"name": name} if name else {}
    model |= {"arch": teacher["arch"]} if teacher.get("arch") else {}
    # A file of super-gradients says none of it: then it is what the config says of the teacher.
    size = teacher.get("image_size") or list(checkpoint.image_size or ())
    return {"model": model, **({"image_size": size} if size else {})}


# evaluate


def evaluate_inputs(work: RoundWork, record: StepRecord) -> Fields:
    """Return both models and the held-out truth."""
    return {
        "teacher": work.state.result("teacher")["sha256"],
        "student": work.state.result("student")["sha256"],
        "test": digest(work.config.test),
    }


def evaluate_both(work: RoundWork, record: StepRecord) -> Fields:
    """Label the held-out images with teacher and student, and compare."""
    data, runs = work.config.test, {}
    models: tuple[StepName, ...] = ("teacher", "student")
    for who in models:
        model = work.state.result(who)["model"]
        config = work.measuring(f"{record.place}/{who}", data, model)
        runs[who] = labelled_run(work, config)
    path = str(data.annotations)
    one, other = (evaluate_run(run, path, allow_missing=True) for run in runs.values())
    truth = read_truth(data.annotations)
    found = compare_on(runs["teacher"], runs["student"], truth, (one, other))
    work.put_json(f"{record.place}/{COMPARISON}", found.to_fields())
    return {
        "comparison": found.to_fields(),
        "teacher": one.to_fields(),
        "student": other.to_fields(),
        "runs": {who: run.url for who, run in runs.items()},
        "gpu_seconds": sum(gpu_seconds(run) for run in runs.values()),
    }
