"""Answers that no longer count: annotations, tasks and projects that were deleted, or by hand.

A withdrawn answer stays where it is; a tombstone is appended, see ``storage.review.answers``.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pipelines.label_studio.client import LabelStudio, Project, TaskRef
from storage.errors import ReviewError
from storage.review.answers import (
    Annotation,
    Answer,
    append_answers,
    latest_versions,
    read_answers,
    standing,
)
from storage.review.kept import read_kept
from storage.review.settings import ReviewSettings
from storage.runs.manifest import Manifest

# What a person says about many answers that were deleted there, or a whole project: nothing yet,
# that they no longer count, or that they count on.
Deletions = Literal["ask", "withdraw", "keep"]
DECIDE = (
    "say once what that means: pull with --keep-answers to go on counting them, or with "
    "--accept-withdrawals to withdraw them"
)
RETRACTED = "retracted"
PROJECT_DELETED = "project deleted"
_FEW = 5  # withdrawals that are never held back


def missing_there(
    records: Iterable[Answer],
    project: Project,
    refs: Sequence[TaskRef],
    annotations: Mapping[int, frozenset[int] | None],
) -> list[Answer]:
    """Tombstones for the answers whose annotation or task is no longer in the project.

    Args:
        records: of the run, in the order of pulling.
        project: where they were looked for. Answers from other projects are left alone; where an
            answer does not say (older versions), its task must still be there.
        refs: all tasks of the project that carry a key.
        annotations: ids of annotations by task.
    """
    there = {ref.task_id: ref.key for ref in refs}
    gone = []
    for record in latest_versions(records).values():
        same_task = there.get(record.task_id) == record.sha256
        if record.withdrawn or not (record.project == project.identity or _old(record, same_task)):
            continue
        left = annotations.get(record.task_id, frozenset())
        if not same_task:
            gone.append(replace(record, withdrawn="task deleted"))
        elif left is not None and record.annotation_id not in left:
            gone.append(replace(record, withdrawn="deleted"))
    return gone


def _old(record: Answer, same_task: bool) -> bool:
    return not record.project and same_task


def came_back(
    records: Iterable[Answer], project: Project, annotations: Mapping[int, frozenset[int] | None]
) -> set[str]:
    """Return keys of images whose missing answer is there again, as after a restored backup."""
    return {
        record.sha256
        for record in latest_versions(records).values()
        if record.withdrawn not in ("", RETRACTED)
        and record.project == project.identity
        and record.annotation_id in (annotations.get(record.task_id) or ())
    }


def too_many(gone: Sequence[Answer], records: Iterable[Answer], project: Project) -> bool:
    """Return whether more than half is missing: likelier a mistake than a decision.

    Half of the answers from this project, that is: those of others say nothing about it.
    """
    own = [a for a in standing(records) if a.project in ("", project.identity)]
    return len(gone) > max(_FEW, len(own) / 2)


def last_project(server: LabelStudio, settings: ReviewSettings) -> Project | None:
    """Return the project that was last used, whatever its title is by now; None: it is gone."""
    return server.project(settings.project_id) if settings.project_id else None


def refuse_renamed(server: LabelStudio, settings: ReviewSettings) -> None:
    """Raise ReviewError where the project, not found by its title, has another one now."""
    if (known := last_project(server, settings)) is not None:
        raise ReviewError(
            f"the project {settings.project!r} is called {known.title!r} now",
            hint=f"give --project {shlex.quote(known.title)}",
        )


def project_is_gone(
    manifest: Manifest, server: LabelStudio, settings: ReviewSettings, *, deletions: Deletions
) -> list[Answer]:
    """Return every answer that counts of a project that was deleted.

    Raises:
        ReviewError: the project never was there, has another title now, or a person has to say
            what its deletion means.
    """
    refuse_renamed(server, settings)
    records = list(read_answers(manifest.store))
    answers = standing(records)
    mine = given_in(answers, settings.project_id)
    if settings.project_id:
        mine += [answer for answer in answers if not answer.project]
    before = given_in(records, settings.project_id)
    if not mine and not any(a.withdrawn == PROJECT_DELETED for a in before):
        raise ReviewError(
            f"there is no project {settings.project!r} at {server.http.url}",
            hint="push first, or give --project",
        )
    left = len(not_kept(manifest, mine))
    if left and deletions == "ask":
        raise ReviewError(
            f"the project {settings.project!r} was deleted at {server.http.url}; "
            f"{left} answers from it still count",
            hint=DECIDE,
        )
    return mine


def not_kept(manifest: Manifest, gone: Sequence[Answer]) -> list[Answer]:
    """Return those of the deleted answers that no person said to keep."""
    kept = read_kept(manifest.store) if gone else frozenset()
    return [answer for answer in gone if answer.annotation not in kept]


def returned(
    manifest: Manifest, project: Project, annotations: Mapping[int, frozenset[int] | None]
) -> set[Annotation]:
    """Return those that a person said to keep, and that are in the project again."""
    return {
        kept
        for kept in read_kept(manifest.store)
        if kept[0] == project.identity and kept[3] in (annotations.get(kept[2]) or ())
    }


def given_in(answers: Iterable[Answer], project_id: int) -> list[Answer]:
    """Return the answers from the project of this number; older versions name none."""
    return [answer for answer in answers if answer.project.startswith(f"{project_id}@")]


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which answers to retract: those that meet every condition given.

    Attributes:
        task: a task's number in Label Studio.
        annotator: a person, as ``review status`` names them.
        image: an image id or a sha256.
    """

    task: int | None = None
    annotator: str | None = None
    image: str | None = None

    def takes(self, answer: Answer) -> bool:
        """Return whether an answer meets every condition."""
        return (
            self.task in (None, answer.task_id)
            and self.annotator in (None, answer.annotator)
            and self.image in (None, answer.image_id, answer.sha256)
        )


@dataclass(frozen=True, slots=True)
class RetractSummary:
    """What was retracted.

    Attributes:
        answers: retracted now. ``images``, ``people``: whose.
        deleted_there: annotations deleted in Label Studio, so that their tasks are open again.
        not_reopened: answers whose task stays as it is: another project, or not asked for.
    """

    answers: int
    images: int
    people: int
    deleted_there: int
    not_reopened: int

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def retract(
    manifest: Manifest, chosen: Chosen, server: LabelStudio | None, settings: ReviewSettings
) -> RetractSummary:
    """Withdraw answers by hand and reopen their tasks. The caller holds the run's lock.

    The answers stay in ``review/answers`` with a tombstone; ``decide`` gives their images back to
    the model. Only then are the annotations deleted in Label Studio.

    Args:
        manifest: the run.
        chosen: which answers.
        server: where to open the tasks again; None: leave them as they are.
        settings: which project.

    Raises:
        ReviewError: no answer that counts is meant, or Label Studio does not answer.
    """
    if chosen == Chosen():
        raise ReviewError(
            "choose which answers to retract", hint="give --task, --annotator or --image"
        )
    latest = [a for a in latest_versions(read_answers(manifest.store)).values() if chosen.takes(a)]
    mine = [a for a in latest if not a.withdrawn]
    again = [a for a in latest if a.withdrawn == RETRACTED]  # deleting them may have failed
    if not mine and not again:
        raise ReviewError(
            "no answer of this run matches",
            hint="`labelfleet review status` lists the people; pull first if it was given lately",
        )
    append_answers(manifest.store, [replace(a, withdrawn=RETRACTED) for a in mine])
    here = []
    if server is not None:
        here = _in_project([*mine, *again], server, settings)
        for answer in here:
            server.delete_annotation(answer.annotation_id)
    return RetractSummary(
        answers=len(mine),
        images=len({a.sha256 for a in mine}),
        people=len({a.annotator for a in mine}),
        deleted_there=len(here),
        not_reopened=len(mine) + len(again) - len(here),
    )


def _in_project(
    answers: Sequence[Answer], server: LabelStudio, settings: ReviewSettings
) -> list[Answer]:
    """Return those whose task is in the project: another server counts its tasks alike."""
    project = server.find_project(settings.project) or last_project(server, settings)
    if project is None:
        return []
    keys = sorted({a.sha256 for a in answers})
    there = {ref.task_id: ref.key for ref in server.task_refs(project.project_id, keys)}
    known = ("", project.identity)
    return [a for a in answers if a.project in known and there.get(a.task_id) == a.sha256]
