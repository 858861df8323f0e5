"""``labelfleet review pull``: what people answered comes back, each answer once.

Incremental: only tasks touched since the last answer (less an hour, for clocks and slow commits)
are read, and an annotation comes again only when it was edited. Re-runnable: pulling twice adds
nothing. Twins that a lost reply left behind are looked for here again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from pipelines.review_answers import to_answer, unlabelled, when
from pipelines.review_send import delete_twins
from pipelines.review_tasks import queued
from storage.errors import ReviewError
from storage.label_studio import KEY, LabelStudio, Project, changed_since
from storage.manifest import Manifest
from storage.review_queue import Answer, ReviewItem, append_answers, read_answers
from storage.review_settings import ReviewSettings

log = logging.getLogger("labelfleet.review")
_MARGIN = timedelta(hours=1)
_PAGE = 100  # with all their regions
_FIELDS = (
    "id,data,annotations,predictions,result,completed_by,was_cancelled,lead_time,updated_at,"
    "parent_prediction,model_version"
)


@dataclass(frozen=True, slots=True)
class PullSummary:
    """What a pull brought.

    Attributes:
        answers: new or edited since the last pull; ``skipped`` of them declined.
        images: that they are about. ``people``: who gave them.
        kept, moved, relabelled, added, deleted: boxes in them.
        unlabelled: boxes drawn without choosing a label, left out.
        unknown: annotations of tasks that this run never queued, left alone.
        twins_deleted: tasks that a lost reply had doubled.
        part: key of the new part of answers; '' where there was nothing new.
    """

    answers: int
    skipped: int
    images: int
    people: int
    kept: int
    moved: int
    relabelled: int
    added: int
    deleted: int
    unlabelled: int
    unknown: int
    twins_deleted: int
    part: str

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


@dataclass(slots=True)
class _Tally:
    unknown: int = 0
    unlabelled: int = 0


def pull_run(
    manifest: Manifest, server: LabelStudio, settings: ReviewSettings, *, everything: bool = False
) -> PullSummary:
    """Append what is new to ``review/answers``. The caller holds the run's lock.

    Args:
        manifest: the run.
        server: a client.
        settings: which project.
        everything: read all tasks, and not only those touched since the last answer.

    Raises:
        ReviewError: there is no such project, or the server does not answer.
    """
    server.version()
    project = server.find_project(settings.project)
    if project is None:
        raise ReviewError(
            f"there is no project {settings.project!r} at {server.http.url}",
            hint="push first, or give --project",
        )
    items = {q.item.sha256: q.item for q in queued(manifest)}
    seen, last = _already(manifest)
    twins = _delete_twins(server, project, items)
    since = None if everything or last is None else last - _MARGIN
    tally = _Tally()
    new = [
        answer
        for answer in _answers(server, project, items, since, tally)
        if (answer.annotation_id, answer.submitted_at) not in seen
    ]
    part = append_answers(manifest.store, new)
    return _summary(new, part, twins, tally)


def _already(manifest: Manifest) -> tuple[set[tuple[int, datetime]], datetime | None]:
    """Answers that were pulled before, and when the last of them was given."""
    seen = {(a.annotation_id, a.submitted_at) for a in read_answers(manifest.store)}
    return seen, max((at for _, at in seen), default=None)


def _delete_twins(server: LabelStudio, project: Project, items: dict[str, ReviewItem]) -> int:
    # More tasks than images: only then can there be a twin of ours (other tasks count too).
    refs = server.task_refs(project.project_id) if project.tasks > 0 else ()
    return delete_twins(server, [ref for ref in refs if ref.key in items])


def _answers(
    server: LabelStudio,
    project: Project,
    items: dict[str, ReviewItem],
    since: datetime | None,
    tally: _Tally,
) -> Iterator[Answer]:
    people = server.people()
    filters = [] if since is None else [changed_since(since)]
    tasks = server.tasks(project.project_id, filters, include=_FIELDS, whole=True, page=_PAGE)
    for task in tasks:
        annotations = task.get("annotations") or []
        item = items.get(str(task["data"].get(KEY)))
        if item is None:
            tally.unknown += len(annotations)
            continue
        for annotation in sorted(annotations, key=lambda a: (when(a["updated_at"]), a["id"])):
            tally.unlabelled += unlabelled(annotation)
            yield to_answer(task, annotation, item, people)


def _summary(new: Sequence[Answer], part: str | None, twins: int, tally: _Tally) -> PullSummary:
    boxes = [box.origin for answer in new for box in answer.boxes]
    return PullSummary(
        answers=len(new),
        skipped=sum(answer.skipped for answer in new),
        images=len({answer.sha256 for answer in new}),
        people=len({answer.annotator for answer in new}),
        kept=boxes.count("kept"),
        moved=boxes.count("moved"),
        relabelled=boxes.count("relabelled"),
        added=boxes.count("added"),
        deleted=sum(len(answer.deleted) for answer in new),
        unlabelled=tally.unlabelled,
        unknown=tally.unknown,
        twins_deleted=twins,
        part=part or "",
    )
