"""A round on a real Label Studio: it waits for people, and goes on when they are done."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from pipelines.config.yaml_files import parse_config
from pipelines.label_studio.token import VARIABLE
from pipelines.rounds.round import RoundSummary, Selection, run_round
from pipelines.rounds.round_config import RoundConfig
from pipelines.rounds.state import RoundState, StepName, StepRecord
from storage.errors import WaitingForPeople
from storage.labels.versions import read_version
from storage.review.settings import ReviewSettings
from storage.stores.open import open_store
from tests.e2e.test_review import answer, tasks_of
from tests.support.samples.review_samples import loose_run
from tests.support.samples.training_samples import box, write_coco
from tests.support.servers.label_studio import LabelStudioServer

pytestmark = pytest.mark.slow


def test_a_round_waits_for_its_reviewers_and_takes_what_they_said(
    label_studio: LabelStudioServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(VARIABLE, label_studio.token)
    place, project = label_studio.folder / uuid4().hex, f"round {uuid4().hex}"
    run = loose_run(open_store(str(place / "source")), open_store(str(place / "out" / "label")), 6)
    truth = write_coco(tmp_path / "truth", [(32, 32)] * 10, [box(1, 7, 1, 1, 9, 9)])
    data = {"annotations": str(truth), "images": str(truth.parent)}
    fields = {
        "name": "cells",
        "output": str(place / "out"),
        "pool": {"url": str(place / "source")},
        "truth": data,
        "test": data,
        "review": {"url": label_studio.url, "project": project, "budget": "4 images"},
    }
    state = RoundState(open_store(str(place / "out")))
    state.write(StepRecord("label", "done", 1, {}, {"run": run.url}))

    def take(step: StepName, **review: bool) -> RoundSummary:
        changed = {**fields, "review": {**fields["review"], **review}}  # type: ignore[dict-item]
        config = parse_config(RoundConfig, changed, where="round")
        return run_round(config, Selection(only=step))

    take("route")
    take("push")
    with pytest.raises(WaitingForPeople, match="0 of 4 images") as waiting:
        take("pull")
    assert waiting.value.exit_code == 5
    record = state.read("pull")
    assert record is not None
    assert (record.status, record.result) == ("waiting", {})
    ann = label_studio.person(f"ann{uuid4().hex[:6]}")
    tasks = tasks_of(label_studio.client(), ReviewSettings(label_studio.url, project))
    for task in tasks[:3]:
        answer(ann, task, task["predictions"][0]["result"], lead_time=30.0)
    with pytest.raises(WaitingForPeople, match="3 of 4 images"):
        take("pull")
    assert take("pull", wait=False).new == ("pull",)  # `wait` decides no label, and may change
    pulled = state.result("pull")
    assert (pulled["answered"], pulled["human_minutes"]) == (3, pytest.approx(1.5))
    assert take("decide").new == ("decide",)
    version = read_version(run.store)
    assert version.counts["images_human"] == 3
    decided = state.result("decide")
    assert decided["counts"]["images_human"] == 3
    assert decided["version"] == version.version
    assert take("decide").new == ()
