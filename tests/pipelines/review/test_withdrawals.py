"""Answers that are gone: how many at once are believed, and what a person says about the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import cast

import pytest
from rich.console import Console, RenderableType

from pipelines.label_studio.client import LabelStudio, Project, TaskRef
from pipelines.review.pull import PullSummary, pull_run
from pipelines.review.status import review_status
from pipelines.review.view import render_pull
from pipelines.review.withdrawals import Deletions, too_many
from storage.errors import ReviewError
from storage.review.answers import Answer, append_answers, read_answers, standing
from storage.review.settings import ReviewSettings
from storage.runs.manifest import Manifest
from storage.stores.memory import MemoryStore
from tests.support.samples.review_samples import loose_run, routed

HERE = Project(1, "cells", {}, "", 0, 0, made_at="2026-01-01")


def answer(number: int, project: str) -> Answer:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    return Answer(
        f"{number}.jpg", f"{number:064x}", number, number, "ann", 20.0, at, False, (), (), "m",
        False, project=project,
    )  # fmt: skip


@pytest.mark.parametrize(("elsewhere", "old"), [(0, False), (1000, False), (0, True)])
def test_most_of_a_project_is_too_many_whatever_other_projects_hold(
    elsewhere: int, old: bool
) -> None:
    mine = [answer(n, "" if old else HERE.identity) for n in range(20)]
    records = mine + [answer(100 + n, "7@2025-01-01") for n in range(elsewhere)]
    gone = [replace(a, withdrawn="deleted") for a in mine]
    assert not too_many(gone[:10], records, HERE)
    assert too_many(gone[:11], records, HERE)


def test_a_few_are_always_believed() -> None:
    mine = [answer(n, HERE.identity) for n in range(5)]
    assert not too_many([replace(a, withdrawn="deleted") for a in mine], mine, HERE)


class Server:
    """A Label Studio with these projects, of which the first holds these tasks."""

    http = SimpleNamespace(url="http://127.0.0.1:1")

    def __init__(self, *projects: Project, tasks: Sequence[Answer] = ()) -> None:
        self.projects, self.answered = projects, tasks

    def version(self) -> str:
        return "1.23.2"

    def find_project(self, title: str) -> Project | None:
        return next((p for p in self.projects if p.title == title), None)

    def project(self, number: int) -> Project | None:
        return next((p for p in self.projects if p.project_id == number), None)

    def task_refs(self, _project: int, _keys: object = None) -> Iterator[TaskRef]:
        return (TaskRef(a.task_id, a.sha256, True) for a in self.answered)

    def annotation_ids(self, _project: int) -> dict[int, frozenset[int]]:
        return {a.task_id: frozenset([a.annotation_id]) for a in self.answered}

    def people(self) -> dict[int, str]:
        return {}

    def tasks(self, *_given: object, **_more: object) -> Iterator[dict[str, object]]:
        return iter(())


def pull(
    manifest: Manifest, server: Server, settings: ReviewSettings, deletions: Deletions = "ask"
) -> PullSummary:
    return pull_run(manifest, cast(LabelStudio, server), settings, deletions=deletions)


def text_of(shown: RenderableType) -> str:
    console = Console(width=200, record=True)
    console.print(shown)
    return console.export_text()


def reviewed(answers: Sequence[Answer]) -> Manifest:
    manifest = routed(loose_run(MemoryStore(), MemoryStore(), 3))
    append_answers(manifest.store, answers)
    return manifest


def test_an_earlier_project_that_was_deleted_is_told_until_a_person_keeps_its_answers() -> None:
    manifest = reviewed([answer(n, "7@2025-01-01") for n in range(3)])
    known = {"7": "june", "1": HERE.title}
    settings = ReviewSettings(project=HERE.title, project_id=1, projects=known)
    server = Server(HERE)
    for _ in range(2):
        told = pull(manifest, server, settings)
        assert (told.deleted_projects, told.kept_on, told.whole) == ({"june": 3}, 0, False)
        asked = review_status(manifest, settings, cast(LabelStudio, server)).problem
        assert "no longer there: 'june'" in asked
    assert "--keep-answers" in text_of(render_pull(told))
    for deletions in ("keep", "ask", "ask"):
        told = pull(manifest, server, settings, deletions)
        assert (told.deleted_projects, told.kept_on, told.whole) == ({}, 3, True)
    assert len(standing(read_answers(manifest.store))) == 3
    assert review_status(manifest, settings, cast(LabelStudio, server)).problem == ""
    assert pull(manifest, server, settings, "withdraw").withdrawn == 3  # after all
    told = pull(manifest, server, settings)
    assert (told.withdrawn, told.kept_on, told.whole) == (0, 0, True)
    assert standing(read_answers(manifest.store)) == []


@pytest.mark.parametrize("deletions", ["keep", "withdraw"])
def test_what_the_deletion_of_the_project_itself_means_is_said_once(deletions: Deletions) -> None:
    manifest = reviewed([answer(n, HERE.identity) for n in range(3)])
    settings = ReviewSettings(project=HERE.title, project_id=1)
    with pytest.raises(ReviewError, match="3 answers from it still count") as refused:
        pull(manifest, Server(), settings)
    assert "--keep-answers" in str(refused.value.hint)
    left = 3 if deletions == "keep" else 0
    told = pull(manifest, Server(), settings, deletions)
    assert (told.withdrawn, told.kept_on) == (3 - left, left)
    told = pull(manifest, Server(), settings)
    assert (told.withdrawn, told.kept_on, told.whole) == (0, left, True)
    assert len(standing(read_answers(manifest.store))) == left
    with pytest.raises(ReviewError, match="there is no project 'other'"):
        pull(manifest, Server(), ReviewSettings(project="other"))


def test_many_deleted_tasks_are_kept_and_a_later_deletion_is_seen() -> None:
    answers = [answer(n, HERE.identity) for n in range(10)]
    manifest = reviewed(answers)
    settings = ReviewSettings(project=HERE.title, project_id=1)
    tidied = Server(HERE, tasks=answers[8:])
    told = pull(manifest, tidied, settings)
    assert (told.held_back, told.withdrawn, told.whole) == (8, 0, False)
    for deletions in ("keep", "ask"):
        told = pull(manifest, tidied, settings, deletions)
        assert (told.held_back, told.kept_on, told.whole) == (0, 8, True)
    told = pull(manifest, Server(HERE, tasks=answers[9:]), settings)
    assert (told.withdrawn, told.kept_on, told.whole) == (1, 8, True)
    assert len(standing(read_answers(manifest.store))) == 9


@pytest.mark.parametrize("left", [1, 6, 10])
def test_who_says_that_answers_count_on_loses_none_however_few_are_gone(left: int) -> None:
    answers = [answer(n, HERE.identity) for n in range(10)]
    manifest = reviewed(answers)
    settings = ReviewSettings(project=HERE.title, project_id=1)
    for deletions in ("keep", "ask"):
        told = pull(manifest, Server(HERE, tasks=answers[:left]), settings, deletions)
        assert (told.withdrawn, told.kept_on, told.whole) == (0, 10 - left, True)
    assert len(standing(read_answers(manifest.store))) == 10


@pytest.mark.parametrize("said", ["keep", "withdraw"])
def test_answers_that_came_back_and_are_deleted_again_are_told_anew(said: Deletions) -> None:
    answers = [answer(n, HERE.identity) for n in range(10)]
    manifest = reviewed(answers)
    settings = ReviewSettings(project=HERE.title, project_id=1)
    tidied = Server(HERE, tasks=answers[8:])
    assert pull(manifest, tidied, settings, "keep").kept_on == 8
    assert pull(manifest, tidied, settings, said).whole
    append_answers(manifest.store, answers)  # as pulled again
    assert pull(manifest, Server(HERE, tasks=answers), settings).kept_on == 0  # a restored backup
    told = pull(manifest, tidied, settings)
    assert (told.held_back, told.kept_on, told.whole) == (8, 0, False)
