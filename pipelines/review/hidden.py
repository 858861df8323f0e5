"""Find what answers do not cover: model boxes that their reviewers were not shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.policy.one_object import winners
from pipelines.review.tasks import Queued
from pipelines.routing.showing import ONE_PLACE
from pipelines.truth.judge import within
from pipelines.truth.matching import covered
from storage.records import Xyxy
from storage.review.answers import Answer
from storage.runs.annotation_rows import table_to_rows
from storage.runs.live_rows import live_tables
from storage.runs.manifest import Manifest


def with_hidden(
    manifest: Manifest, wanted: Sequence[Queued], answers: Sequence[Answer]
) -> list[Answer]:
    """Return the answers with ``Answer.hidden`` filled in.

    An audit image gives a full answer: annotators are asked to draw what is missing, and estimates
    would be worthless if the model's own boxes counted in them. So does a task without boxes, which
    is drawn from scratch. Any other task whose routing hides boxes leaves those to the policy,
    regardless of which run's boxes it showed: a later round may have shown its own.

    Args:
        manifest: the run; its live rows hold all boxes.
        wanted: its queue.
        answers: as they were read from Label Studio.
    """
    partial = {q.item.sha256: q for q in wanted if q.rule.hides and q.item.part != "audit"}
    asked = {a.sha256 for a in answers if a.sha256 in partial and not (a.skipped or a.was_blind)}
    boxes = _boxes(manifest, [partial[sha256] for sha256 in asked])
    return [
        replace(a, hidden=_hidden(a, boxes[a.sha256]))
        if a.sha256 in boxes and not (a.skipped or a.was_blind) else a
        for a in answers
    ]  # fmt: skip


def _boxes(manifest: Manifest, wanted: Sequence[Queued]) -> dict[str, NDArray[np.float32]]:
    """Return all boxes of live images by sha256, the likeliest first."""
    identities = {(q.item.image_id, q.item.sha256) for q in wanted}
    ids = pa.array([image_id for image_id, _ in identities], pa.string())
    found = {}
    for _, table in live_tables(manifest, only={q.item.shard_id for q in wanted}):
        for row in table_to_rows(table.filter(pc.is_in(table.column("image_id"), ids))):
            if (row.image_id, row.sha256) in identities and row.status == "ok":
                found[row.sha256] = within(row).detections.boxes
    return found


def _hidden(answer: Answer, boxes: NDArray[np.float32]) -> tuple[Xyxy, ...]:
    """Return the boxes at places that the answer says nothing about, one a place."""
    left = [*answer.shown, *(box.bbox for box in answer.boxes)]
    unsaid = boxes[~covered(boxes, np.array(left, np.float64).reshape(-1, 4))]
    n = len(unsaid)
    order = np.arange(n)
    first = winners(np.zeros(n, np.int64), unsaid, order, np.ones(n, np.bool_), ONE_PLACE) < 0
    return tuple((float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in unsaid[first])
