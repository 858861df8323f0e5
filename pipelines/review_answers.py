"""An annotation as Label Studio gives it back becomes an ``Answer``: what was done to each box."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pipelines.review_regions import Region, from_results
from storage.review_queue import Answer, DeletedBox, Origin, ReviewedBox, ReviewItem

_SAME_PX = 0.5  # a page that computes in percent may move an edge by less, nobody by hand


def to_answer(
    task: Mapping[str, Any],
    annotation: Mapping[str, Any],
    item: ReviewItem,
    people: Mapping[int, str],
) -> Answer:
    """One annotation of one task.

    Args:
        task: with its id and predictions, as Label Studio shows it.
        annotation: one of its annotations.
        item: what was routed; gives the size of the image and whose answer this is.
        people: names by user id.
    """
    prediction = prediction_shown(task.get("predictions") or [], annotation)
    width, height = item.width, item.height
    shown = from_results(prediction["result"], width, height) if prediction else []
    left = from_results(annotation.get("result") or [], width, height)
    skipped = bool(annotation.get("was_cancelled"))
    boxes, deleted = ((), ()) if skipped else compare(shown, left)
    lead_time = annotation.get("lead_time")
    return Answer(
        image_id=item.image_id,
        sha256=item.sha256,
        task_id=int(task["id"]),
        annotation_id=int(annotation["id"]),
        annotator=annotator_of(annotation, people),
        lead_time_s=None if lead_time is None else float(lead_time),
        submitted_at=when(annotation["updated_at"]),
        skipped=skipped,
        boxes=boxes,
        deleted=deleted,
        model_version=str(prediction.get("model_version") or "") if prediction else "",
        was_blind=prediction is None,
    )


def compare(
    shown: Sequence[Region], left: Sequence[Region]
) -> tuple[tuple[ReviewedBox, ...], tuple[DeletedBox, ...]]:
    """What became of the shown boxes, by their region ids, and what was added.

    Boxes that somebody drew without choosing a label are not labels, and are left out.
    """
    before = {region.region: region for region in shown}
    boxes, gone = [], dict(before)
    for region in left:
        was = gone.pop(region.region, None)
        if region.category:
            score = None if was is None else was.score
            boxes.append(ReviewedBox(region.bbox, region.category, _origin(was, region), score))
    deleted = tuple(DeletedBox(r.bbox, r.category, r.score) for r in gone.values())
    return tuple(boxes), deleted


def unlabelled(annotation: Mapping[str, Any]) -> int:
    """Boxes that somebody drew without choosing a label."""
    return sum(not r.category for r in from_results(annotation.get("result") or [], 100, 100))


def prediction_shown(
    predictions: Sequence[Mapping[str, Any]], annotation: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """The prediction an annotation began with; None: there was none to be seen.

    The page says which; of those made through the API the one that shares most regions counts.
    """
    if not predictions:
        return None
    parent = annotation.get("parent_prediction")
    regions = {r.get("id") for r in annotation.get("result") or []}

    def likely(prediction: Mapping[str, Any]) -> tuple[bool, int, int]:
        shared = sum(r.get("id") in regions for r in prediction["result"])
        return prediction["id"] == parent, shared, int(prediction["id"])

    return max(predictions, key=likely)


def annotator_of(annotation: Mapping[str, Any], people: Mapping[int, str]) -> str:
    """A stable name of who answered."""
    by = annotation.get("completed_by")
    if isinstance(by, dict):
        return str(by.get("email") or f"user {by.get('id')}")
    return people.get(int(by), f"user {by}") if by is not None else "unknown"


def when(text: str) -> datetime:
    """An ISO 8601 time as UTC."""
    return datetime.fromisoformat(text).astimezone(UTC)


def _origin(was: Region | None, now: Region) -> Origin:
    if was is None:
        return "added"
    if was.category != now.category:
        return "relabelled"
    near = all(abs(a - b) <= _SAME_PX for a, b in zip(was.bbox, now.bbox, strict=True))
    return "kept" if near else "moved"
