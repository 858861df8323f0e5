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

from pipelines.label_studio.answers import to_answer, unlabelled
from pipelines.label_studio.client import (
    KEY,
    MOST_KEYS,
    LabelStudio,
    Project,
    changed_since,
    with_keys,
)
from pipelines.label_studio.send import delete_twins
from pipelines.label_studio.tasks import queued
from storage.errors import ReviewError
from storage.review.answers import Answer, append_answers, read_answers
from storage.review.settings import ReviewSettings
from storage.runs.manifest import Manifest

log = logging.getLogger("labelfleet.review")
MARGIN = timedelta(hours=1)
_PAGE = 100  # with all their regions
_FIELDS = (
    "id,data,annotations,predictions,result,completed_by,was_cancelled,lead_time,updated_at,"
    "parent_prediction,model_version,ground_truth"
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
        unreadable: annotations that are not what Label Studio's page makes, left out; the log
            says which. The others are not held up by them.
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
    unreadable: int
    twins_deleted: int
    part: str

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def pull_run(
    manifest: Manifest,
    server: LabelStudio,
    settings: ReviewSettings,
    *,
    everything: bool = False,
    margin: timedelta = MARGIN,
) -> PullSummary:
    """Append what is new to ``review/answers``. The caller holds the run's lock.

    Args:
        manifest: the run.
        server: a client.
        settings: which project.
        everything: read all tasks, and not only those touched since the last answer.
        margin: how much before it to begin, for clocks that differ and commits that are slow.

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
    refs = [ref for ref in server.task_refs(project.project_id) if ref.key in items]
    twins, people = delete_twins(server, refs), server.people()
    pulled = [] if everything else list(read_answers(manifest.store))
    since = max((a.submitted_at - margin for a in pulled), default=None)
    # An image may have been answered long ago, in a round before this run queued it.
    new_keys = {ref.key for ref in refs if ref.touched} - {a.sha256 for a in pulled}
    seen = {(a.annotation_id, a.submitted_at) for a in read_answers(manifest.store)}
    unknown, unlabelled_boxes, unreadable, new = 0, 0, 0, []
    for task in _touched(server, project, since, sorted(new_keys)):
        item = items.get(str(task.get("data", {}).get(KEY)))
        found = task.get("annotations") or []
        annotations = found if isinstance(found, list) else [found]
        if item is None:
            unknown += len(annotations)
            continue
        readable = []
        for annotation in annotations:
            try:
                readable.append((to_answer(task, annotation, item, people), annotation))
            except ReviewError as exc:
                unreadable += 1
                log.warning("%s", exc.message)
        for answer, annotation in sorted(readable, key=_when_given):
            if (answer.annotation_id, answer.submitted_at) not in seen:
                new.append(answer)
                unlabelled_boxes += unlabelled(annotation)
    part = append_answers(manifest.store, new)
    return _summary(new, part, twins, unknown, unlabelled_boxes, unreadable)


def _when_given(pair: tuple[Answer, Any]) -> tuple[datetime, int]:
    return pair[0].submitted_at, pair[0].annotation_id


def _touched(
    server: LabelStudio, project: Project, since: datetime | None, keys: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Whole tasks, each once: all of them, or those touched since then and those with a key."""
    asked: list[list[dict[str, Any]]] = [[]]
    if since is not None:
        batches = [keys[i : i + MOST_KEYS] for i in range(0, len(keys), MOST_KEYS)]
        asked = [[changed_since(since)], *([with_keys(batch)] for batch in batches)]
    seen = set()
    for filters in asked:
        for task in server.tasks(
            project.project_id, filters, include=_FIELDS, whole=True, page=_PAGE
        ):
            if task["id"] not in seen:
                seen.add(task["id"])
                yield task


def _summary(
    new: Sequence[Answer],
    part: str | None,
    twins: int,
    unknown: int,
    unlabelled_boxes: int,
    unreadable: int,
) -> PullSummary:
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
        unlabelled=unlabelled_boxes,
        unknown=unknown,
        unreadable=unreadable,
        twins_deleted=twins,
        part=part or "",
    )
