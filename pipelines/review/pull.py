"""``labelfleet review pull``: fetch people's answers, each one once.

Incremental: only tasks touched since the last answer (less an hour, for clocks and slow commits)
are read, and an annotation comes again only when it was edited. Re-runnable: pulling twice adds
nothing. Twins that a lost reply left behind are looked for here again. A run that was pushed to
several projects is pulled from all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np

from pipelines.label_studio.answers import to_answer
from pipelines.label_studio.client import (
    KEY,
    MOST_KEYS,
    LabelStudio,
    Project,
    changed_since,
    with_keys,
)
from pipelines.label_studio.send import delete_twins
from pipelines.review.hidden import with_hidden
from pipelines.review.tasks import Queued, queued
from pipelines.review.withdrawals import (
    PROJECT_DELETED,
    RETRACTED,
    Deletions,
    came_back,
    given_in,
    missing_there,
    not_kept,
    project_is_gone,
    returned,
    too_many,
)
from pipelines.truth.usable import told
from storage.errors import ReviewError
from storage.review.answers import (
    Annotation,
    Answer,
    append_answers,
    latest_versions,
    read_answers,
    standing,
)
from storage.review.kept import forget_kept, keep_answers
from storage.review.queue import ReviewItem
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
    """Result of a pull.

    Attributes:
        answers: new or edited since the last pull; ``skipped`` of them declined.
        images: that they are about. ``people``: who gave them.
        kept, moved, relabelled, added, deleted: boxes in them.
        unusable: answers with something that cannot become a box; they settle nothing.
        set_aside: where those are: task, image, person and what was drawn.
        withdrawn: answers that no longer count: they or their tasks were deleted since.
        held_back: withdrawals that were not applied, see ``pull_run``.
        kept_on: answers that count although they or their project were deleted, as a person said.
        deleted_projects: by title of an earlier project that is no longer there, how many answers
            from it still count.
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
    unusable: int
    set_aside: tuple[str, ...]
    withdrawn: int
    held_back: int
    kept_on: int
    deleted_projects: dict[str, int]
    unknown: int
    unreadable: int
    twins_deleted: int
    part: str

    @property
    def whole(self) -> bool:
        """Return whether nothing waits for a person to look at it."""
        left = (self.unusable, self.held_back, self.deleted_projects, self.unreadable)
        return not any(left)

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def pull_run(
    manifest: Manifest,
    server: LabelStudio,
    settings: ReviewSettings,
    *,
    everything: bool = False,
    margin: timedelta = MARGIN,
    deletions: Deletions = "ask",
) -> PullSummary:
    """Append what is new to ``review/answers``. The caller holds the run's lock.

    Reads the settings' project, and before it the others that they name (``settings.projects``).
    Answers whose annotation or task was deleted since are withdrawn. Where that would be more than
    half of all answers, or a whole project, it is a person who says what it means: ``withdraw``, or
    ``keep`` (they count on, and no later pull asks again); until then they count and are told. Who
    says ``keep`` loses no answer, however few are gone.

    Args:
        manifest: the run.
        server: a client.
        settings: which project.
        everything: read all tasks, not only those touched since the last answer, and compare
            what is there with what was pulled.
        margin: how much before the last answer to begin, for clocks that differ and commits that
            are slow.
        deletions: what it means that most answers, or a project, are gone.

    Raises:
        ReviewError: the project does not exist, or the server does not answer.
    """
    server.version()
    pulled = _Pulled()
    wanted = queued(manifest, closed=True)
    pull = _Pull(manifest, server, everything, margin, deletions, wanted, pulled)
    project = server.find_project(settings.project)
    now = settings.project_id if project is None else project.project_id
    for number, title in settings.projects.items():
        if int(number) != now:
            pull.earlier(int(number), title)
    if project is None:
        pull.whole_project(project_is_gone(manifest, server, settings, deletions=deletions))
    else:
        pull.read(project)
    return _summary(pulled)


@dataclass(slots=True)
class _Pulled:
    """What one pull found, over all projects."""

    new: list[Answer] = field(default_factory=list)
    withdrawn: int = 0
    held_back: int = 0
    kept_on: int = 0
    deleted_projects: dict[str, int] = field(default_factory=dict)
    unknown: int = 0
    unreadable: int = 0
    twins: int = 0
    part: str = ""


@dataclass(frozen=True, slots=True)
class _Pull:
    """The steps of one pull, see ``pull_run``; ``into`` collects what they find."""

    manifest: Manifest
    server: LabelStudio
    everything: bool
    margin: timedelta
    deletions: Deletions
    wanted: Sequence[Queued]
    into: _Pulled

    def read(self, project: Project) -> None:
        """Read one project."""
        items = {q.item.sha256: q.item for q in self.wanted}
        records = list(read_answers(self.manifest.store))
        refs = list(self.server.task_refs(project.project_id))
        there = self.server.annotation_ids(project.project_id)
        mine = [ref for ref in refs if ref.key in items]
        self.into.twins += delete_twins(self.server, mine)
        forget_kept(self.manifest.store, returned(self.manifest, project, there))
        gone = self._fresh(missing_there(records, project, refs, there))
        if self.deletions == "keep" or too_many(gone, records, project):
            gone, asked = self._decided(gone)
            self.into.held_back += asked
        # An image may have been answered long ago, in a round before this run queued it. What
        # another project or server gave says nothing about what was read from this one.
        read = [a for a in records if a.project in ("", project.identity)]
        keys = {ref.key for ref in mine if ref.touched} - {a.sha256 for a in read}
        keys |= came_back(records, project, there) & items.keys()
        since = max((a.submitted_at - self.margin for a in read), default=None)
        tasks = _touched(self.server, project, None if self.everything else since, sorted(keys))
        seen = _Seen.of(records, self.everything)
        reader = _Reader(items, self.server.people(), project.identity, seen)
        self.keep(with_hidden(self.manifest, self.wanted, reader.read(tasks, self.into)), gone)

    def earlier(self, project_id: int, title: str) -> None:
        """Read a project that the run was pushed to before; it may be renamed or deleted since."""
        project = self.server.project(project_id)
        if project is not None:
            self.read(project)
            return
        left = given_in(standing(read_answers(self.manifest.store)), project_id)
        asked = self.whole_project(left)
        if asked:
            self.into.deleted_projects[title] = asked

    def whole_project(self, answers: Sequence[Answer]) -> int:
        """Withdraw or keep the answers of a deleted project; return how many wait for a person."""
        gone, asked = self._decided(self._fresh(answers))
        self.keep([], [replace(answer, withdrawn=PROJECT_DELETED) for answer in gone])
        return asked

    def _fresh(self, gone: Sequence[Answer]) -> list[Answer]:
        """Leave out what a person kept before; all of it may be withdrawn after all."""
        if self.deletions == "withdraw":
            forget_kept(self.manifest.store, {answer.annotation for answer in gone})
        fresh = not_kept(self.manifest, gone)
        self.into.kept_on += len(gone) - len(fresh)
        return fresh

    def _decided(self, gone: list[Answer]) -> tuple[list[Answer], int]:
        """Return which of many answers to withdraw, and about how many a person has to say."""
        if self.deletions == "withdraw":
            return gone, 0
        if self.deletions == "ask":
            return [], len(gone)
        keep_answers(self.manifest.store, {answer.annotation for answer in gone})
        self.into.kept_on += len(gone)
        return [], 0

    def keep(self, new: Sequence[Answer], tombstones: Sequence[Answer]) -> None:
        """Append: an answer that came back goes after its tombstone."""
        part = append_answers(self.manifest.store, [*tombstones, *new])
        self.into.new += new
        self.into.withdrawn += len(tombstones)
        self.into.part = part or self.into.part


@dataclass(frozen=True, slots=True)
class _Seen:
    """Which answers a pull need not append again.

    Attributes:
        versions: (project, annotation, time) of every record, but for those that were withdrawn
            because they were missing: they may come back.
        latest: by annotation, to be compared with; None where nothing is.
    """

    versions: set[tuple[str, int, datetime]]
    latest: dict[Annotation, Answer] | None

    @staticmethod
    def of(records: Sequence[Answer], compare: bool) -> _Seen:
        latest = latest_versions(records)
        versions = {(a.project, a.annotation_id, a.submitted_at) for a in records}
        for (project, *_), a in latest.items():
            if a.withdrawn not in ("", RETRACTED):
                for named in ("", project):
                    versions.discard((named, a.annotation_id, a.submitted_at))
        return _Seen(versions, latest if compare else None)

    def has(self, answer: Answer) -> bool:
        # A record of an older version names no project.
        nameless = replace(answer, project="")
        if not any(
            (a.project, a.annotation_id, a.submitted_at) in self.versions
            for a in (answer, nameless)
        ):
            return False
        latest = self.latest or {}
        before = latest.get(answer.annotation) or latest.get(nameless.annotation)
        if before is None or before.withdrawn:
            return True
        return _said(before) == _said(answer)


def _said(answer: Answer) -> tuple[Any, ...]:
    """Return what an answer says, in the precision that it is stored in."""
    boxes = [(b.category, *(float(np.float32(n)) for n in b.bbox)) for b in answer.boxes]
    return boxes, answer.skipped, answer.unusable


@dataclass(frozen=True, slots=True)
class _Reader:
    """Turns tasks into answers of one run and one project."""

    items: dict[str, ReviewItem]
    people: dict[int, str]
    project: str
    seen: _Seen

    def read(self, tasks: Iterable[dict[str, Any]], into: _Pulled) -> list[Answer]:
        """Return what is new, task by task in the order of answering; count the rest."""
        new: list[Answer] = []
        for task in tasks:
            item = self.items.get(str(task.get("data", {}).get(KEY)))
            found = task.get("annotations") or []
            annotations = found if isinstance(found, list) else [found]
            if item is None:
                into.unknown += len(annotations)
                continue
            answers = []
            for annotation in annotations:
                try:
                    answer = to_answer(task, annotation, item, self.people)
                    answers.append(replace(answer, project=self.project))
                except ReviewError as exc:
                    into.unreadable += 1
                    log.warning("%s", exc.message)
            answers.sort(key=lambda a: (a.submitted_at, a.annotation_id))
            new += [a for a in answers if not self.seen.has(a)]
        return new


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


def _summary(pulled: _Pulled) -> PullSummary:
    new = pulled.new
    boxes = [box.origin for answer in new for box in answer.boxes]
    unusable = [answer for answer in new if answer.unusable]
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
        unusable=len(unusable),
        set_aside=tuple(
            f"task {a.task_id} ({a.image_id}) by {a.annotator}: {told(a.unusable)}"
            for a in unusable
        ),
        withdrawn=pulled.withdrawn,
        held_back=pulled.held_back,
        kept_on=pulled.kept_on,
        deleted_projects=pulled.deleted_projects,
        unknown=pulled.unknown,
        unreadable=pulled.unreadable,
        twins_deleted=pulled.twins,
        part=pulled.part,
    )
