"""``labelfleet review push``: what was routed becomes tasks in Label Studio, each image once.

Idempotent whatever happens: the tasks that are there are listed first, by a key that is the
sha256 of the image; only what is missing is sent, and ``review_send`` sees to lost replies. An
image that another round pushed before is not shown twice: an unanswered one gets this model's
prediction too, an answered one keeps its answer.
"""

from __future__ import annotations

import difflib
import itertools
import logging
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.label_studio.client import TITLE_LENGTH, LabelStudio, Project, TaskRef
from pipelines.label_studio.errors import OutcomeUnknown, ReviewRefused
from pipelines.label_studio.interface import interface_of, label_config
from pipelines.label_studio.regions import ShownBox
from pipelines.label_studio.send import Sender, SendRules, delete_twins
from pipelines.label_studio.serving import Serving
from pipelines.review.copies import Copies, copy_images, unseen
from pipelines.review.desk import prepare_desk
from pipelines.review.tasks import (
    Queued,
    TaskMaker,
    in_order,
    model_version_of,
    queued,
    shown_boxes,
)
from pipelines.review.withdrawals import refuse_renamed
from pipelines.truth.settle import settle
from pipelines.truth.usable import usable_answers
from storage.errors import ReviewError
from storage.objects.protocols import ObjectStore
from storage.review.not_shown import write_not_shown
from storage.review.settings import ReviewSettings
from storage.runs.manifest import Manifest

log = logging.getLogger("labelfleet.review")
_PREDICTIONS = 500  # a request
_SETTLE_S = 5.0


class PushWatcher:
    """Receives the progress of a push; this base class ignores it."""

    def stage(self, name: str, total: int) -> None:
        """A stage begins."""

    def advance(self, count: int) -> None:
        """Count ``count`` more as done."""


@dataclass(frozen=True, slots=True)
class PushOptions:
    """How to push.

    Attributes:
        create: make the project if there is none of its title.
        again: push images that people answered already, too.
        earlier: other runs whose answers count, see ``pipelines.review.rounds``.
        watcher: receives progress.
        rules: how tasks are sent.
    """

    create: bool = True
    again: bool = False
    earlier: Sequence[Manifest] = ()
    watcher: PushWatcher = field(default_factory=PushWatcher)
    rules: SendRules = field(default_factory=SendRules)


@dataclass(frozen=True, slots=True)
class PushSummary:
    """What a push did.

    Attributes:
        project, project_id, url: where people look.
        queued: images routed so far.
        created: tasks made now. ``there``: tasks that were there already.
        answered_before: images without a task here that people answered before; not pushed again.
        predicted: of the tasks that were there, unanswered ones that got this model's boxes now.
        kept_shown: other tasks that go on showing the boxes they had.
        twins_deleted: tasks that a lost reply had doubled.
        lost_replies: how often it had to be looked up what became of a request.
        not_shown: why an image could not be pushed, by image_id.
    """

    project: str
    project_id: int
    url: str
    queued: int
    created: int
    there: int
    answered_before: int
    predicted: int
    kept_shown: int
    twins_deleted: int
    lost_replies: int
    not_shown: dict[str, str] = field(default_factory=dict)

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def push_run(
    manifest: Manifest,
    server: LabelStudio,
    settings: ReviewSettings,
    *,
    source: ObjectStore,
    serving: Serving,
    options: PushOptions | None = None,
) -> PushSummary:
    """Push everything routed so far. The caller holds the run's lock.

    Args:
        manifest: the run.
        server: a client.
        settings: which project, and whether audit images come without boxes.
        source: where the images are.
        serving: how Label Studio gets at their copies.
        options: see ``PushOptions``.

    Raises:
        ReviewError: it cannot work, or it stopped half-way; the same call continues it.
    """
    chosen = options or PushOptions()
    server.version()
    server.me()
    wanted, classes = queued(manifest), _classes(manifest)
    project = _project(server, settings, classes, create=chosen.create)
    maker = TaskMaker(
        names=interface_of(project.controls, classes),
        model_version=model_version_of(manifest),
        run=manifest.record.identity.name,
        audit_blind=settings.audit_blind,
        people=settings.people,
    )
    prepare_desk(server, project, settings)
    refs = known_tasks(server, project, wanted)
    twins = delete_twins(server, refs)
    push = _Push(manifest, server, project, maker, {ref.key: ref for ref in refs}, chosen)
    plan = push.plan(wanted)
    copies = push.copy(source, plan.missing)
    boxes = shown_boxes(manifest, [*plan.missing, *plan.open])
    not_shown = _keep_not_shown(manifest, plan, copies, boxes)
    sender = push.create(plan, boxes, _connect(server, project, serving, plan.missing, copies))
    predicted = push.predict(plan, boxes, sender.doubted)
    kept_shown = push.keep_others_shown()
    _show_predictions(server, project.project_id, maker.model_version)
    return PushSummary(
        project=project.title,
        project_id=project.project_id,
        url=f"{server.http.url}/projects/{project.project_id}/data",
        queued=len(wanted),
        created=sender.created,
        there=plan.there,
        answered_before=plan.answered_before,
        predicted=predicted,
        kept_shown=kept_shown,
        twins_deleted=twins + sender.twins_deleted,
        lost_replies=sender.lost_replies,
        not_shown=not_shown,
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is to be done with the images of the queue.

    Attributes:
        missing: those that need a task.
        open: those whose task may get this model's boxes: not touched, not blind.
        there: how many have a task.
        answered_before: how many have no task here and need none.
    """

    missing: list[Queued]
    open: list[Queued]
    there: int
    answered_before: int


def _keep_not_shown(
    manifest: Manifest, plan: _Plan, copies: Copies, boxes: Container[str]
) -> dict[str, str]:
    """Record which images have no task, by sha256; return why, by image_id."""
    reasons = _not_shown(plan, copies, boxes)
    items = [q.item for q in plan.missing if q.item.image_id in reasons]
    write_not_shown(manifest.store, {item.sha256: reasons[item.image_id] for item in items})
    return reasons


def _not_shown(plan: _Plan, copies: Copies, boxes: Container[str]) -> dict[str, str]:
    """Return why images of the queue have no task, by image_id."""
    gone = "it is no longer in the source"
    lost = {q.item.image_id: gone for q in plan.missing if q.item.sha256 not in boxes}
    return {**dict(unseen([q.item for q in plan.missing], copies)), **lost}


@dataclass(frozen=True, slots=True)
class _Push:
    """The steps of one push."""

    manifest: Manifest
    server: LabelStudio
    project: Project
    maker: TaskMaker
    known: dict[str, TaskRef]
    options: PushOptions

    def plan(self, wanted: Sequence[Queued]) -> _Plan:
        """Sort the queue by what its images need."""
        answered: Container[str] = ()
        if not self.options.again:
            found = usable_answers([self.manifest, *self.options.earlier])
            answered = settle(found.answers).settled
        new = [q for q in wanted if q.item.sha256 not in self.known]
        missing = [q for q in new if q.item.part == "gold" or q.item.sha256 not in answered]
        there = [q for q in wanted if q.item.sha256 in self.known]
        is_open = [
            q for q in there
            if not self.known[q.item.sha256].touched and not self.maker.is_blind(q)
        ]  # fmt: skip
        return _Plan(missing, is_open, len(there), len(new) - len(missing))

    def copy(self, source: ObjectStore, wanted: Sequence[Queued]) -> Copies:
        """Copy the images that will be shown."""
        self.options.watcher.stage("copying images", len(wanted))
        items = [q.item for q in wanted]
        return copy_images(self.manifest, source, items, self.options.watcher.advance)

    def create(
        self, plan: _Plan, boxes: dict[str, list[ShownBox]], urls: Mapping[str, str]
    ) -> Sender:
        """Create the tasks that are missing; the sender tells what came of it."""
        sender = Sender(
            self.server, self.project.project_id, self.options.rules,
            on_sent=self.options.watcher.advance, sleep=self.server.http.sleep,
            clock=self.server.http.clock,
        )  # fmt: skip
        self.options.watcher.stage("pushing tasks", len(plan.missing))
        sender.send(in_order(plan.missing, boxes, urls, self.maker))
        return sender

    def predict(self, plan: _Plan, boxes: dict[str, list[ShownBox]], doubted: set[str]) -> int:
        """Give open tasks this model's boxes; returns how many."""
        known = dict(self.known)
        late = _doubted(self.server, self.project, self.maker, plan.missing, doubted, known)
        waiting = {
            known[q.item.sha256].task_id: self.maker.prediction(q.item, boxes[q.item.sha256])
            for q in [*plan.open, *late]
            if q.item.sha256 in boxes
        }
        return self._import(waiting)

    def keep_others_shown(self) -> int:
        """Let every task go on showing boxes; returns how many needed it.

        Label Studio shows the predictions of one model version in a project. Tasks that lack one
        of this model, such as those of an earlier round, get a copy of what they showed under its
        name; ``label_studio.answers.prediction_shown`` finds the original again. Answered ones get
        it too: they are open again once their answer is deleted.
        """
        version = self.maker.model_version
        if self.project.model_version in ("", version):
            return 0
        shown = {}
        for task in self.server.predicted_without(self.project.project_id, version):
            predictions = task["predictions"]
            own = [p for p in predictions if p["model_version"] == self.project.model_version]
            latest = max(own or predictions, key=lambda p: int(p["id"]))
            shown[task["id"]] = {
                "model_version": version, "score": latest["score"], "result": latest["result"],
            }  # fmt: skip
        return self._import(shown)

    def _import(self, waiting: dict[int, dict[str, Any]]) -> int:
        """Add predictions by task, unless they are there; returns how many were added."""
        done, lost, version = 0, 0, self.maker.model_version
        while waiting:
            have = self.server.predicted_by(self.project.project_id, version)
            waiting = {task: made for task, made in waiting.items() if task not in have}
            batch = dict(itertools.islice(waiting.items(), _PREDICTIONS))
            made = [{"task": task, **prediction} for task, prediction in batch.items()]
            if not made:
                break
            try:
                self.server.import_predictions(self.project.project_id, made)
            except OutcomeUnknown:
                lost += 1
                if lost >= self.options.rules.tries:
                    raise
                self.server.http.sleep(_SETTLE_S)  # then it is looked up again which are there
            else:
                done += len(batch)
                waiting = {task: one for task, one in waiting.items() if task not in batch}
        return done


def _project(
    server: LabelStudio, settings: ReviewSettings, classes: Sequence[str], *, create: bool
) -> Project:
    title, why = settings.project, settings.show_why
    if not create and server.find_project(title) is None:
        refuse_renamed(server, settings)
    return find_or_create(server, title, classes, create=create, show_why=why)


def find_or_create(
    server: LabelStudio,
    title: str,
    classes: Sequence[str],
    *,
    create: bool = True,
    show_why: bool = False,
) -> Project:
    """Find the project of this title, or create it with an interface for these classes.

    An empty project without an interface, as Label Studio's page makes it, gets one too.

    Raises:
        ReviewError: there is none, and ``create`` is False; or the title cannot be one.
    """
    if not 3 <= len(title) <= TITLE_LENGTH:
        raise ReviewError(
            f"the project's title {title!r} has {len(title)} characters",
            hint=f"Label Studio takes 3 to {TITLE_LENGTH}: set review.project, or give --project",
        )
    found = server.find_project(title)
    if found is None and not create:
        near = difflib.get_close_matches(title, server.titles(), 1)
        raise ReviewError(
            f"there is no project {title!r} at {server.http.url}",
            hint=(f"did you mean {near[0]!r}? Or " if near else "") + "give --create to make it",
        )
    made = label_config(classes, show_why=show_why)
    if found is None:
        return server.create_project(title, made)
    if not found.controls and not found.tasks:
        return server.update_project(found.project_id, label_config=made)
    return found


def known_tasks(server: LabelStudio, project: Project, wanted: Sequence[Queued]) -> list[TaskRef]:
    """Return tasks of the project that carry a wanted key."""
    if not project.tasks:
        return []
    keys = {q.item.sha256 for q in wanted}
    # A lookup by key scans the project for every 50 keys; a list walks it once.
    few = len(keys) * 20 < project.tasks
    found = server.task_refs(project.project_id, sorted(keys) if few else None)
    return [ref for ref in found if ref.key in keys]


def _classes(manifest: Manifest) -> list[str]:
    return [c.name for c in manifest.record.identity.categories]


def _connect(
    server: LabelStudio,
    project: Project,
    serving: Serving,
    missing: Iterable[Queued],
    copies: Copies,
) -> dict[str, str]:
    """Return the URLs by sha256, once one image has been seen through Label Studio."""
    names = {
        q.item.sha256: copies.names[q.item.sha256] for q in missing if q.item.sha256 in copies.names
    }
    if names:
        serving.connect(server, project.project_id, next(iter(names.values())))
    return {sha256: serving.url(name) for sha256, name in names.items()}


def _doubted(
    server: LabelStudio,
    project: Project,
    maker: TaskMaker,
    sent: Sequence[Queued],
    keys: set[str],
    known: dict[str, TaskRef],
) -> list[Queued]:
    """Of the images just sent those whose reply was lost, unless touched or blind; into ``known``.

    Label Studio was seen to keep a task without its prediction when its import had no reply.
    """
    if not keys:
        return []
    known |= {ref.key: ref for ref in server.task_refs(project.project_id, sorted(keys))}
    here = [q for q in sent if q.item.sha256 in keys & known.keys()]
    return [q for q in here if not known[q.item.sha256].touched and not maker.is_blind(q)]


def _show_predictions(server: LabelStudio, project_id: int, model_version: str) -> None:
    """Set the project's model version, so that the page shows this round's boxes."""
    try:
        server.update_project(project_id, model_version=model_version)
    except ReviewRefused as exc:  # no task has a prediction of it: all blind, or all answered
        log.info("predictions of %s are not chosen for display: %s", model_version, exc.message)
