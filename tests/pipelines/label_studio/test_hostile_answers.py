"""What anybody who may annotate can put into Label Studio, and what a pull makes of it."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from pipelines.label_studio.client import LabelStudio
from pipelines.review.pull import PullSummary, pull_run
from pipelines.review.tasks import queued
from storage.errors import ReviewError
from storage.review.answers import read_answers
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
    with pytest.raises(ReviewError, match="tasks that are none"):
        pull(manifest, tasks)
    assert list(read_answers(manifest.store)) == []
