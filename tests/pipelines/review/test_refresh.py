"""What a refresh leaves behind: closed images, and the policy and rule that the queue has."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.label_studio.client import Project
from pipelines.policy.policy import Policy
from pipelines.review.refresh import TaskChanges
from pipelines.review.tasks import model_version_of, queued
from pipelines.routing.cost import CostModel
from pipelines.routing.route import route_run
from pipelines.routing.showing import ShowRule
from pipelines.runs.verify import verify_run
from storage.errors import StorageError
from storage.review.refreshed import REFRESHED_KEY, Refreshed, read_refreshed, write_refreshed
from storage.review.settings import ReviewSettings
from storage.stores.memory import MemoryStore
from tests.support.samples.review_runs import random_run

AUTO = ShowRule.choose("auto", CostModel())
LATER = "2999-01-01T00:00:00+00:00"


def test_a_queue_is_read_as_the_last_refresh_left_it() -> None:
    manifest = random_run(MemoryStore(), 2, 20)
    route_run(manifest, budget="10 images", policy=Policy(), invocation="a", show="none")
    before = queued(manifest)
    assert {q.rule.how for q in before} == {"none"}
    shut = before[0].item
    new = Policy(accept=0.6, reject=0.2)
    refreshed = Refreshed(LATER, new.to_fields(), AUTO.to_fields(), {shut.sha256: shut.image_id})
    write_refreshed(manifest.store, refreshed)
    assert read_refreshed(manifest.store) == refreshed
    assert [q.item for q in queued(manifest)] == [q.item for q in before[1:]]
    assert {q.rule for q in queued(manifest)} == {AUTO}
    assert all(Policy.from_config(q.head.policy) == new for q in queued(manifest))
    assert len(queued(manifest, closed=True)) == 10


def test_a_routing_after_the_refresh_keeps_its_own_rule() -> None:
    manifest = random_run(MemoryStore(), 2, 20)
    early = "2000-01-01T00:00:00+00:00"
    write_refreshed(manifest.store, Refreshed(early, Policy().to_fields(), AUTO.to_fields()))
    route_run(manifest, budget="10 images", policy=Policy(), invocation="a", show="score")
    assert {q.rule.how for q in queued(manifest)} == {"score"}


def test_a_damaged_record_is_an_error_that_verify_sees() -> None:
    manifest = random_run(MemoryStore(), 1, 5)
    route_run(manifest, budget="2 images", policy=Policy(), invocation="a")
    write_refreshed(manifest.store, Refreshed(LATER, Policy().to_fields(), AUTO.to_fields()))
    raw = manifest.store.get(REFRESHED_KEY)
    manifest.store.put(REFRESHED_KEY, raw.replace(b"auto", b"none"))
    with pytest.raises(StorageError, match="refreshed"):
        queued(manifest)
    assert REFRESHED_KEY in repr(verify_run(manifest))


class Predictions:
    """Records what is done to one task, which a person opens after it was listed or does not."""

    def __init__(self, touched: bool) -> None:
        self.touched = touched
        self.done: list[str] = []

    def is_touched(self, task_id: int) -> bool:
        return self.touched

    def delete_prediction(self, prediction_id: int) -> None:
        self.done.append(f"deleted {prediction_id}")

    def import_predictions(self, project_id: int, predictions: list[dict[str, Any]]) -> None:
        self.done += [f"made for task {p['task']}" for p in predictions]


@pytest.mark.parametrize(
    ("touched", "done"), [(True, []), (False, ["deleted 5", "made for task 1"])]
)
def test_a_task_opened_since_it_was_listed_keeps_its_prediction(
    touched: bool, done: list[str]
) -> None:
    manifest = random_run(MemoryStore(), 1, 1)
    server = Predictions(touched)
    project = Project(1, "cells", {}, "", 1, 0)
    changes = TaskChanges(manifest, server, project, ReviewSettings())  # type: ignore[arg-type]
    shown = {"model_version": model_version_of(manifest), "result": []}
    other = {"value": {"x": 1, "y": 1, "width": 5, "height": 5, "rectanglelabels": ["RBC"]}}
    made = {**shown, "result": [other]}
    assert changes.predict({"id": 1, "predictions": [{"id": 5, **shown}]}, made) is not touched
    assert server.done == done
