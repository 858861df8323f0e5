"""What anybody who may annotate can put into Label Studio, and what a pull makes of it."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest

from pipelines.label_studio.client import LabelStudio
from pipelines.review.pull import PullSummary, pull_run
from pipelines.review.tasks import queued
from storage.errors import ReviewError
from storage.review.answers import append_answers, read_answers, standing
from storage.review.settings import ReviewSettings
from storage.runs.manifest import Manifest
from storage.stores.memory import MemoryStore
from tests.support.fuzz.seeds import task
from tests.support.fuzz.targets import Replies
from tests.support.samples.review_samples import loose_run, routed


@pytest.fixture
def manifest() -> Manifest:
    """A run of three images, all of them queued."""
    return routed(loose_run(MemoryStore(), MemoryStore(), 3))


def tasks_of(manifest: Manifest) -> list[dict[str, Any]]:
    return [task(i + 1, q.item.sha256) for i, q in enumerate(queued(manifest))]


def pull(manifest: Manifest, tasks: Any) -> PullSummary:
    server = LabelStudio(Replies(tasks))  # type: ignore[arg-type]  # its verbs suffice
    return pull_run(manifest, server, ReviewSettings(project="cells"))


@pytest.mark.parametrize(
    ("where", "what"),
    [
        (("result", 0, "value", "x"), float("nan")),
        (("result", 0, "value", "width"), 1e308),
        (("result", 0, "value", "rotation"), float("inf")),
        (("result", 0, "value", "rectanglelabels"), ["\ud800"]),
        (("result",), {"0": 1}),
        (("result", 1), None),
        (("updated_at",), "yesterday"),
        (("id",), 1 << 70),
        (("id",), None),
        (("lead_time",), [1]),
        (("completed_by",), {"email": "\udfff"}),
    ],
)
def test_one_hostile_answer_holds_up_no_other(
    manifest: Manifest, where: tuple[Any, ...], what: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tasks = tasks_of(manifest)
    holder: Any = tasks[1]["annotations"][0]
    for step in where[:-1]:
        holder = holder[step]
    holder[where[-1]] = what
    with caplog.at_level(logging.WARNING, "labelfleet.review"):
        done = pull(manifest, tasks)
    assert (done.answers, done.unreadable) == (5, 1)
    assert {a.annotation_id for a in read_answers(manifest.store)} == {10, 11, 21, 30, 31}
    (said,) = (r.getMessage() for r in caplog.records if "cannot be read" in r.getMessage())
    assert queued(manifest)[1].item.image_id in said
    assert pull(manifest, tasks).answers == 0  # and nothing is pulled twice


@pytest.mark.parametrize(
    "tasks",
    [
        "no list",
        [None],
        [{"id": "1", "data": {}}],
        [{"id": 1, "data": []}],
        [{"id": 2, "data": {}}, {"id": 1, "data": {}}],  # a walk by id would go in a circle
        [{"id": 0, "data": {}}],
    ],
)
def test_tasks_that_are_none_are_an_error(manifest: Manifest, tasks: Any) -> None:
    with pytest.raises(ReviewError, match="something that is not a task"):
        pull(manifest, tasks)
    assert list(read_answers(manifest.store)) == []


class MadeAt(Replies):
    """A server whose one project was made at another time than that of other servers."""

    def __init__(self, tasks: Any, made_at: str) -> None:
        super().__init__(tasks)
        self._made_at = made_at

    def get(self, path: str, params: Any = None) -> Any:
        found = super().get(path, params)
        if path == "/api/projects":
            found["results"][0]["created_at"] = self._made_at
        return found


def test_a_second_server_with_equal_numbers_and_times_is_pulled_too(manifest: Manifest) -> None:
    tasks = tasks_of(manifest)

    def pulled(made_at: str) -> int:
        server = LabelStudio(MadeAt(tasks, made_at))  # type: ignore[arg-type]
        return pull_run(manifest, server, ReviewSettings(project="cells")).answers

    first = pulled("2026-01-01")
    assert (first, pulled("2026-01-01")) == (6, 0)
    assert pulled("2026-02-02") == 6
    records = list(read_answers(manifest.store))
    assert [a.project for a in records] == ["1@2026-01-01"] * 6 + ["1@2026-02-02"] * 6
    assert len(standing(records)) == 12


def test_what_an_older_version_pulled_without_a_project_is_not_pulled_again(
    manifest: Manifest,
) -> None:
    other = routed(loose_run(MemoryStore(), MemoryStore(), 3))
    pull(other, tasks_of(other))
    old = [replace(a, project="") for a in read_answers(other.store)]
    append_answers(manifest.store, old)
    assert pull(manifest, tasks_of(manifest)).answers == 0
    assert standing(read_answers(manifest.store)) == old
