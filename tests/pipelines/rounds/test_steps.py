"""Single steps of a round, on what earlier steps have left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.yaml_files import parse_config
from pipelines.demo.run import checkpoint_path
from pipelines.policy.policy import Policy
from pipelines.rounds.round import Selection, run_round
from pipelines.rounds.round_config import RoundConfig
from pipelines.rounds.state import RoundState, StepName, StepRecord
from pipelines.rounds.steps.student import first_weights
from pipelines.rounds.work import RoundWork
from pipelines.routing.route import route_run
from storage.errors import ConfigError, SourceEmpty
from storage.labels.versions import read_version
from storage.review.answers import append_answers
from storage.review.queue import read_queue
from storage.stores.memory import MemoryStore
from storage.stores.open import open_store
from tests.pipelines.policy.test_fit import answer, some_run
from tests.support.samples.training_samples import CATEGORIES, box, write_coco

DIGITS = tuple({"id": digit, "name": str(digit)} for digit in range(10))


def config(
    folder: Path, categories: Sequence[dict[str, Any]] = CATEGORIES, **more: Any
) -> RoundConfig:
    sizes = [(32, 32)] * 2
    boxes = [box(1, 7, 1, 1, 9, 9)]
    truth = write_coco(folder / "truth", sizes, boxes, categories=list(categories))
    data = {"annotations": str(truth), "images": str(truth.parent)}
    fields = {
        "name": "cells", "output": str(folder / "out"), "pool": {"url": str(folder / "pool")},
        "truth": data, "val": data, "test": data, **more,
    }  # fmt: skip
    return parse_config(RoundConfig, fields, where="round")


def left(config: RoundConfig, step: StepName, result: dict[str, Any]) -> None:
    """Record that a step of the round is done."""
    state = RoundState(open_store(config.output))
    state.write(StepRecord(step, "done", 1, {}, result))


@pytest.mark.slow  # bounds over many thresholds
@pytest.mark.parametrize(("target", "shown"), [(0.9, True), (0.999, False)])
def test_decide_proves_the_share_that_the_config_asks_for(
    tmp_path: Path, target: float, shown: bool
) -> None:
    run, right = some_run(str(tmp_path / "out" / "label"), 120)
    route_run(run, budget="120 images", policy=Policy(), invocation="one", audit=1.0)
    items = list(read_queue(run.store))[:60]
    append_answers(run.store, [answer(i, right[i.image_id], "RBC") for i in items])
    review = {"url": "http://127.0.0.1:8080", "project": "cells"}
    asked = config(tmp_path, fit={"guarantee": target}, review=review)
    left(asked, "label", {"run": run.url})
    left(asked, "pull", {"answers": ["x"]})
    assert run_round(asked, Selection(only="decide")).new == ("decide",)
    found = RoundState(open_store(asked.output)).result("decide")
    version = read_version(run.store)
    assert found["guarantee"] == version.guarantee
    if shown:
        assert "At least 90% of all accepted boxes" in version.guarantee
        assert found["not_proven"] == ""
    else:
        assert version.guarantee == ""
        assert "does not show 0.999" in found["not_proven"]


def test_the_teacher_of_a_second_round_is_the_student_of_the_first(tmp_path: Path) -> None:
    student = {"model": {"checkpoint": str(checkpoint_path())}, "licence": "MIT"}
    first = MemoryStore("rounds", "first")
    RoundState(first).write(StepRecord("student", "done", 1, {}, student))
    asked = config(tmp_path, DIGITS, previous="memory://rounds/first")
    run_round(asked, Selection(only="teacher"))
    found = RoundState(open_store(asked.output)).result("teacher")
    assert (found["model"], found["trained"]) == (student["model"], False)
    assert found["licence"] == "Apache-2.0"  # the checkpoint's own word
    assert run_round(asked, Selection(only="teacher")).new == ()


def test_a_student_starts_from_its_teacher_as_the_config_describes_it(tmp_path: Path) -> None:
    asked = config(tmp_path)

    def start(**model: Any) -> dict[str, Any]:
        teacher = {"checkpoint": str(checkpoint_path()), **model}
        left(asked, "teacher", {"model": teacher, "licence": "MIT"})
        return first_weights(RoundWork.of(asked))

    own = start()
    assert own["model"]["checkpoint"] == str(checkpoint_path())
    assert own["image_size"] == [320, 320]  # the file's own word
    stated = start(arch="small.yaml", name="yolo_nas_m", image_size=256)
    assert stated["model"] == {**own["model"], "arch": "small.yaml", "name": "yolo_nas_m"}
    assert stated["image_size"] == 256
    assert start(family="yolox") == {}


def test_an_earlier_round_without_a_student_is_no_teacher(tmp_path: Path) -> None:
    asked = config(tmp_path, previous="memory://rounds/none")
    with pytest.raises(ConfigError, match=r"memory://rounds/none has no student yet"):
        run_round(asked, Selection(only="teacher"))


def test_an_empty_pool_is_refused_before_a_teacher_is_trained(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    with pytest.raises(SourceEmpty, match=r"no images or tar shards at .*/pool; there is nothing"):
        run_round(config(tmp_path, train={"steps": 2}))
    assert not (tmp_path / "out" / "state").exists()
