"""Review items become Label Studio tasks: the image, why it is here, and one prediction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.label_studio.client import KEY
from pipelines.label_studio.interface import Interface
from pipelines.label_studio.regions import ShownBox, to_result
from pipelines.policy.box_batch import box_batch
from pipelines.policy.policy import Policy, Thresholds
from pipelines.routing.showing import ShowRule
from storage.review.queue import QueueHead, ReviewItem, queue_parts, read_head, read_queue
from storage.review.refreshed import read_refreshed
from storage.runs.live_rows import live_tables
from storage.runs.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Queued:
    """A routed image with the routing that drew it."""

    item: ReviewItem
    head: QueueHead

    @property
    def rule(self) -> ShowRule:
        """Which of its boxes people see."""
        return ShowRule.from_fields(self.head.show)


ASSIGNED = "assigned_to"  # the field of a task's data that a person's tab filters by
SHOWN = "boxes_shown"  # the field that says which boxes are shown


@dataclass(frozen=True, slots=True)
class TaskMaker:
    """Turns queued images into tasks of one project.

    Attributes:
        names: the project's interface.
        model_version: of the predictions.
        run: name of the run, for people.
        audit_blind: audit images come without a prediction.
        people: assigned to the tasks in turn; empty: tasks are not assigned.
    """

    names: Interface
    model_version: str
    run: str
    audit_blind: bool = False
    people: tuple[str, ...] = ()

    def is_blind(self, one: Queued) -> bool:
        """Return whether this image is shown without boxes."""
        return one.rule.how == "none" or (self.audit_blind and one.item.part == "audit")

    def task(self, one: Queued, url: str, boxes: Sequence[ShownBox]) -> dict[str, Any]:
        """Return what is imported. Audit and gold are not marked, since that could bias.

        Every task has all fields, in one order: Label Studio orders the columns of its data manager
        as it first met them.
        """
        item = one.item
        agreed = [box.agreement for box in boxes if box.agreement is not None]
        fields = {
            self.names.field: url,
            "why": why(item),
            SHOWN: one.rule.says(Policy.from_config(one.head.policy)),
            "agreement": round(float(np.mean(agreed)), 2) if agreed else None,
            "expected_corrections": round(item.value, 2),
            ASSIGNED: self.people[item.order % len(self.people)] if self.people else "",
            "image_id": item.image_id,
            "run": self.run,
            KEY: item.sha256,
        }
        made: dict[str, Any] = {"data": fields}
        if not self.is_blind(one):
            made["predictions"] = [self.prediction(item, boxes)]
        return made

    def prediction(self, item: ReviewItem, boxes: Sequence[ShownBox]) -> dict[str, Any]:
        """Return all boxes of an image; an empty one says that the model sees nothing."""
        results = (to_result(box, item.width, item.height, self.names) for box in boxes)
        score = float(np.mean([box.score for box in boxes])) if boxes else 0.0
        return {
            "model_version": self.model_version,
            "score": score,
            "result": [result for result in results if result is not None],
        }


def why(item: ReviewItem) -> str:
    """Say for people why an image was chosen; the same for audit images and others."""
    told = (reason.note or reason.signal.replace("_", " ") for reason in item.reasons
            if reason.signal != "audit")  # fmt: skip
    return "; ".join(told) or "a look in passing"


def model_version_of(manifest: Manifest) -> str:
    """Return the name of the run's predictions in Label Studio, with the weights' digest."""
    identity = manifest.record.identity
    return f"{identity.name}-{identity.model_sha256[:12]}"


def queued(manifest: Manifest, *, closed: bool = False) -> list[Queued]:
    """Return everything routed so far that is to be shown, in order, no pixels twice.

    Policy and rule are those of the last refresh where that came after the routing.

    Args:
        manifest: the run.
        closed: also images that a refresh closed.
    """
    found: dict[str, Queued] = {}
    refreshed = read_refreshed(manifest.store)
    for key in queue_parts(manifest.store):
        head = read_head(manifest.store, key)
        if refreshed and head.made_at <= refreshed.made_at:
            head = replace(head, policy=refreshed.policy, show=refreshed.show)
        for item in read_queue(manifest.store, [key]):
            found.setdefault(item.sha256, Queued(item, head))
    shut = refreshed.closed if refreshed and not closed else {}
    return [one for key, one in found.items() if key not in shut]


def shown_boxes(manifest: Manifest, wanted: Sequence[Queued]) -> dict[str, list[ShownBox]]:
    """Return the boxes to show, by sha256: those that the routing's rule picks.

    Boxes keep their place among the row's detections as their name. An image whose row is no
    longer live is missing.
    """
    by_image = {(q.item.image_id, q.item.sha256): q for q in wanted}
    judges = _Judges(manifest)
    found: dict[str, list[ShownBox]] = {}
    columns = ["image_id", "sha256", "width", "height", "detections"]
    shards = {q.item.shard_id for q in wanted}
    for _, table in live_tables(manifest, columns, only=shards):
        ids = zip(*(table.column(name).to_pylist() for name in columns[:2]), strict=True)
        for row, identity in enumerate(ids):
            if (here := by_image.get(identity)) is not None:
                found[here.item.sha256] = judges.boxes(table.slice(row, 1), here)
    return found


class _Judges:
    """The thresholds of each routing, made once."""

    def __init__(self, manifest: Manifest) -> None:
        self._identity = manifest.record.identity
        self._made: dict[str, Thresholds] = {}

    def boxes(self, row: pa.Table, one: Queued) -> list[ShownBox]:
        batch = box_batch(row, self._of(one.head))
        names = [c.name for c in self._identity.categories]
        return [
            ShownBox(
                region=f"box{at}",
                bbox=_xyxy(batch.boxes[at]),
                category=names[batch.category_ids[at]],
                score=float(batch.scores[at]),
                agreement=None if np.isnan(batch.agreement[at]) else float(batch.agreement[at]),
            )
            for at in np.flatnonzero(one.rule.shown(batch))
        ]

    def _of(self, head: QueueHead) -> Thresholds:
        if head.invocation not in self._made:
            policy = Policy.from_config(head.policy, where="the queue's policy")
            self._made[head.invocation] = policy.thresholds(self._identity.categories)
        return self._made[head.invocation]


def _xyxy(box: np.ndarray[Any, Any]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (float(side) for side in box)
    return x1, y1, x2, y2


def in_order(
    wanted: Sequence[Queued],
    boxes: Mapping[str, Sequence[ShownBox]],
    urls: Mapping[str, str],
    maker: TaskMaker,
) -> Iterator[dict[str, Any]]:
    """Yield tasks of the images that have both boxes and an address, in the order of the queue."""
    for one in wanted:
        sha256 = one.item.sha256
        if sha256 in boxes and sha256 in urls:
            yield maker.task(one, urls[sha256], boxes[sha256])
