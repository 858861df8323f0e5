"""``labelfleet review push``: what was routed becomes tasks in Label Studio, each image once.

Idempotent whatever happens: the tasks that are there are listed first, by a key that is the
sha256 of the image; only what is missing is sent, and ``review_send`` sees to lost replies. An
image that another round pushed before is not shown twice: an unanswered one gets this model's
prediction too, an answered one keeps its answer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.label_studio.client import TITLE_LENGTH, LabelStudio, Project, TaskRef
from pipelines.label_studio.errors import OutcomeUnknown, ReviewRefused
from pipelines.label_studio.interface import interface_of, label_config
from pipelines.label_studio.regions import ShownBox
from pipelines.label_studio.send import Sender, SendRules, delete_twins
from pipelines.label_studio.serving import Serving
from pipelines.label_studio.tasks import (
    Queued,
    TaskMaker,
    in_order,
    model_version_of,
    queued,
    shown_boxes,
)
from pipelines.review.copies import Copies, copy_images, unseen
from storage.errors import ReviewError
from storage.objects.protocols import ObjectStore
from storage.review.settings import ReviewSettings
from storage.runs.manifest import Manifest

log = logging.getLogger("labelfleet.review")
_PREDICTIONS = 500  # a request
_SETTLE_S = 5.0


class PushWatcher:
    """What a progress display may want to know; this one wants nothing."""

    def stage(self, name: str, total: int) -> None:
        """A stage begins."""

    def advance(self, count: int) -> None:
        """So many more are done."""


@dataclass(frozen=True, slots=True)
class PushSummary:
    """What a push did.

    Attributes:
        project, url: where people look.
        queued: images routed so far.
        created: tasks made now. ``there``: tasks that were there already.
        predicted: of those, unanswered ones that got this model's boxes now.
        twins_deleted: tasks that a lost reply had doubled.
        lost_replies: how often it had to be looked up what became of a request.
        not_shown: why an image could not be pushed, by image_id.
    """

    project: str
    url: str
    queued: int
    created: int
    there: int
    predicted: int
    twins_deleted: int
    lost_replies: int
    not_shown: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def push_run(
    manifest: Manifest,
    server: LabelStudio,
    settings: ReviewSettings,
    *,
    source: ObjectStore,
    serving: Serving,
    watcher: PushWatcher | None = None,
    rules: SendRules | None = None,
) -> PushSummary:
    """Push everything routed so far. The caller holds the run's lock.

    Args:
        manifest: the run.
        server: a client.
        settings: which project, and whether audit images come without boxes.
        source: where the images are.
        serving: how Label Studio gets at their copies.

    Raises:
        ReviewError: it cannot work, or stopped half-way; the same call continues.
    """
    watch = watcher or PushWatcher()
    server.version()
    server.me()
    wanted = queued(manifest)
    project = find_or_create(server, settings.project, _classes(manifest))
    maker = TaskMaker(
        names=interface_of(project.controls, _classes(manifest)),
        model_version=model_version_of(manifest),
        run=manifest.record.identity.name,
        audit_blind=settings.audit_blind,
    )
    refs = known_tasks(server, project, wanted)
    twins = delete_twins(server, refs)
    known = {ref.key: ref for ref in refs}
    missing = [q for q in wanted if q.item.sha256 not in known]
    copies = _copy(manifest, source, missing, watch)
    again = [q for q in wanted if q.item.sha256 in known]
    open_again = [
        q for q in again if not known[q.item.sha256].touched and not maker.is_blind(q.item)
    ]
    boxes = shown_boxes(manifest, [*missing, *open_again])
    urls = _connect(server, project, serving, missing, copies)
    sender = Sender(
        server, project.project_id, rules or SendRules(), on_sent=watch.advance,
        sleep=server.http.sleep, clock=server.http.clock,
    )  # fmt: skip
    watch.stage("pushing tasks", len(missing))
    created = sender.send(in_order(missing, boxes, urls, maker))
    open_again += _doubted(server, project, maker, missing, sender.doubted, known)
    open_again = [q for q in open_again if q.item.sha256 in boxes]
    predicted = _predict_again(server, project, maker, open_again, known, boxes)
    _show_predictions(server, project.project_id, maker.model_version)
    not_shown = dict(unseen([q.item for q in missing], copies))
    gone = "it is no longer in the source"
    not_shown |= {q.item.image_id: gone for q in missing if q.item.sha256 not in boxes}
    return PushSummary(
        project=project.title,
        url=f"{server.http.url}/projects/{project.project_id}/data",
        queued=len(wanted),
        created=created,
        there=len(again),
        predicted=predicted,
        twins_deleted=twins + sender.twins_deleted,
        lost_replies=sender.lost_replies,
        not_shown=not_shown,
    )


def find_or_create(server: LabelStudio, title: str, classes: Sequence[str]) -> Project:
    """The project of this title; made with an interface for these classes where there is none.

    An empty project without an interface, as Label Studio's page makes it, gets one too.
    """
    if not 3 <= len(title) <= TITLE_LENGTH:
        raise ReviewError(
            f"the project's title {title!r} has {len(title)} characters",
            hint=f"Label Studio takes 3 to {TITLE_LENGTH}: set review.project, or give --project",
        )
    found = server.find_project(title)
    if found is None:
        return server.create_project(title, label_config(classes))
    if not found.controls and not found.tasks:
        return server.update_project(found.project_id, label_config=label_config(classes))
    return found


def known_tasks(server: LabelStudio, project: Project, wanted: Sequence[Queued]) -> list[TaskRef]:
    """Tasks of the project that carry a wanted key."""
    if not project.tasks:
        return []
    keys = {q.item.sha256 for q in wanted}
    # A lookup by key scans the project for every 50 keys; a list walks it once.
    few = len(keys) * 20 < project.tasks
    found = server.task_refs(project.project_id, sorted(keys) if few else None)
    return [ref for ref in found if ref.key in keys]


def _classes(manifest: Manifest) -> list[str]:
    return [c.name for c in manifest.record.identity.categories]


def _copy(
    manifest: Manifest, source: ObjectStore, wanted: Sequence[Queued], watch: PushWatcher
) -> Copies:
    watch.stage("copying images", len(wanted))
    return copy_images(manifest, source, [q.item for q in wanted], watch.advance)


def _connect(
    server: LabelStudio,
    project: Project,
    serving: Serving,
    missing: Iterable[Queued],
    copies: Copies,
) -> dict[str, str]:
    """URLs by sha256, once one image has been seen through Label Studio."""
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
    return [q for q in here if not known[q.item.sha256].touched and not maker.is_blind(q.item)]


def _predict_again(
    server: LabelStudio,
    project: Project,
    maker: TaskMaker,
    waiting: Sequence[Queued],
    known: dict[str, TaskRef],
    boxes: dict[str, list[ShownBox]],
) -> int:
    """This model's boxes for unanswered tasks that have none of this model."""
    done, lost = 0, 0
    while waiting:
        have = server.predicted_by(project.project_id, maker.model_version)
        waiting = [q for q in waiting if known[q.item.sha256].task_id not in have]
        made = [
            {"task": known[q.item.sha256].task_id, **maker.prediction(q.item, boxes[q.item.sha256])}
            for q in waiting[:_PREDICTIONS]
        ]
        try:
            server.import_predictions(project.project_id, made)
        except OutcomeUnknown:
            lost += 1
            if lost >= SendRules().tries:
                raise
            server.http.sleep(_SETTLE_S)  # then it is looked up again which are there
        else:
            done, waiting = done + len(made), waiting[_PREDICTIONS:]
    return done


def _show_predictions(server: LabelStudio, project_id: int, model_version: str) -> None:
    """Without it, the page may show another round's boxes, or none."""
    try:
        server.update_project(project_id, model_version=model_version)
    except ReviewRefused as exc:  # no task has a prediction of it: all blind, or all answered
        log.info("predictions of %s are not chosen for display: %s", model_version, exc.message)
