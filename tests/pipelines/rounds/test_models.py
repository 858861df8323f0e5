"""A model that a round cannot use is reported in one line before the round spends anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.rounds.models import check_models
from pipelines.rounds.round import Selection, run_round
from pipelines.rounds.round_config import RoundConfig
from pipelines.rounds.state import STEPS, RoundState, StepName
from pipelines.rounds.work import RoundWork
from storage.errors import ConfigError, LabelfleetError
from storage.stores.open import open_store
from tests.pipelines.rounds.test_steps import config
from tests.pipelines.training.test_distillation import ARCH, teacher_file, with_nan
from tests.support.samples.family_graphs import write_graph
from tests.support.samples.tiny_run import fill_folder
from tests.support.samples.training_samples import CATEGORIES

CLASSES = tuple(str(one["name"]) for one in CATEGORIES)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teacher_file(tmp_path_factory.mktemp("good") / "good.safetensors", classes=CLASSES)


@pytest.fixture
def asked(good: Path, tmp_path: Path) -> Callable[..., RoundConfig]:
    fill_folder(tmp_path / "pool", 1)
    train = {"steps": 2, "batch_size": 1, "image_size": 64, "model": {"arch": str(ARCH)}}

    def make(**more: Any) -> RoundConfig:
        return config(tmp_path, **{"teacher": {"checkpoint": str(good)}, "train": train, **more})

    return make


def refused(config: RoundConfig, until: StepName | None = None) -> LabelfleetError:
    with pytest.raises(LabelfleetError) as error:
        run_round(config, Selection(until=until))
    assert RoundState(open_store(config.output)).all() == []  # nothing was begun
    assert "\n" not in error.value.message
    return error.value


@pytest.mark.slow
def test_a_good_teacher_passes(asked: Callable[..., RoundConfig], good: Path) -> None:
    student = {"distill": {"mode": "teacher", "teacher": str(good)}}
    check_models(RoundWork.of(asked(student=student)), STEPS)


@pytest.mark.parametrize(
    "model",
    [{"runtime": "tensorrt"}, {"precision": "int8"}, {"runtime": "torch", "precision": "fp16"}],
)
def test_a_runtime_of_the_workers_needs_not_be_here(
    asked: Callable[..., RoundConfig], model: dict[str, str]
) -> None:
    check_models(RoundWork.of(asked(run={"model": model})), STEPS)


def test_a_step_that_needs_no_model_does_not_ask_for_the_earlier_round(
    asked: Callable[..., RoundConfig], tmp_path: Path
) -> None:
    moved = asked(teacher=None, previous=str(tmp_path / "moved"))
    check_models(RoundWork.of(moved), ("label", "page"))
    with pytest.raises(ConfigError, match="has no student yet"):
        check_models(RoundWork.of(moved), STEPS)


@pytest.mark.parametrize("until", [None, "teacher"])
def test_a_teacher_of_nan_weights_is_refused(
    asked: Callable[..., RoundConfig], good: Path, tmp_path: Path, until: StepName | None
) -> None:
    bad = with_nan(good, tmp_path / "nan.safetensors")
    found = refused(asked(teacher={"checkpoint": str(bad)}), until)
    assert found.message.startswith("teacher: nan.safetensors: ")
    assert found.message.endswith("holds values that are not finite")
    assert found.hint == "the training diverged; take an earlier checkpoint"


def test_a_teacher_that_is_not_there_or_of_other_classes_is_refused(
    asked: Callable[..., RoundConfig], tmp_path: Path
) -> None:
    absent = tmp_path / "absent.safetensors"
    message = refused(asked(teacher={"checkpoint": str(absent)})).message
    assert message == f"teacher: there is no checkpoint at {absent}"
    other = teacher_file(tmp_path / "other.safetensors", classes=("ring", "bar", "star"))
    found = refused(asked(teacher={"checkpoint": str(other)}))
    assert found.message == (
        "teacher: other.safetensors and `truth` differ in their classes: only the teacher has "
        "star; only the truth has blur"
    )
    assert isinstance(found, ConfigError)


@pytest.mark.slow
def test_first_weights_and_a_students_teacher_are_looked_at_too(
    asked: Callable[..., RoundConfig], good: Path, tmp_path: Path
) -> None:
    bad = str(with_nan(good, tmp_path / "nan.safetensors"))
    distilled = {"distill": {"mode": "teacher", "teacher": bad}}
    assert refused(asked(student=distilled)).message.startswith("student: nan.safetensors: ")
    started = {"steps": 2, "model": {"checkpoint": bad, "arch": str(ARCH)}}
    assert refused(asked(train=started)).message.startswith("train: nan.safetensors: ")
    staged = {"stages": [{"name": "a", "steps": 1}, {"name": "b", "steps": 1, **distilled}]}
    assert refused(asked(student=staged)).message.startswith("student: nan.safetensors: ")


def test_a_graph_of_another_family_is_a_teacher_too(
    asked: Callable[..., RoundConfig], tmp_path: Path
) -> None:
    rows = np.zeros((126, 5 + len(CLASSES)), np.float32)
    graph = write_graph(tmp_path / "graph.onnx", {"output": rows})
    teacher = {"checkpoint": str(graph), "family": "yolox", "classes": list(CLASSES)}
    config = asked(teacher=teacher)
    assert run_round(config, Selection(only="teacher")).new == ("teacher",)
    found = RoundState(open_store(config.output)).result("teacher")
    assert (found["trained"], len(found["sha256"]), found["licence"]) == (False, 64, None)
