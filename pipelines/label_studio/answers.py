"""Turn a Label Studio annotation into an ``Answer``: what was done to each box."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pipelines.label_studio.regions import Region, read_results
from storage.errors import ReviewError
from storage.review.answers import Answer, DeletedBox, Origin, ReviewedBox
from storage.review.queue import ReviewItem

# What parsing raises for an annotation with missing parts or parts of a wrong type.
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
_LARGEST_ID = 1 << 62
_SAME_PX = 0.5  # the page computes in percent and may move an edge by less; a person cannot


def to_answer(
    task: Mapping[str, Any],
    annotation: Mapping[str, Any],
    item: ReviewItem,
    people: Mapping[int, str],
) -> Answer:
    """Return the answer that one annotation of a task holds.

    Args:
        task: with its id and predictions, as Label Studio shows it.
        annotation: one of its annotations.
        item: what was routed; gives the size of the image and whose answer this is.
        people: names by user id.

    Raises:
        ReviewError: Label Studio's page would not make it. The server stores what any annotator
            sends, and checks little of it.
    """
    try:
        answer = _answer(task, annotation, item, people)
        _check(answer)
    except _MALFORMED as exc:
        said = " ".join(str(exc).split())[:200]
        raise ReviewError(
            f"an annotation of {item.image_id!r} cannot be read: {type(exc).__name__}: {said}",
            hint="look at it in Label Studio, submit it again or delete it; then pull again",
        ) from exc
    return answer


def _answer(
    task: Mapping[str, Any],
    annotation: Mapping[str, Any],
    item: ReviewItem,
    people: Mapping[int, str],
) -> Answer:
    predictions = task.get("predictions") or []
    prediction = prediction_shown(predictions, annotation)
    replaced = shown_was_replaced(predictions, annotation)
    width, height = item.width, item.height
    shown = read_results(prediction["result"] if prediction else [], width, height)
    left = read_results(annotation.get("result") or [], width, height)
    # What a deleted prediction showed is only known where the annotation still has it.
    there = {region.region for region in left.regions}
    began = [r for r in shown.regions if not replaced or r.region in there]
    skipped = bool(annotation.get("was_cancelled"))
    boxes, deleted = ((), ()) if skipped else compare(began, left.regions)
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
        was_blind=prediction is None and not replaced,
        ground_truth=annotation.get("ground_truth") is True,
        unusable=() if skipped else left.unusable,
        shown=tuple(region.bbox for region in began),
    )


def _check(answer: Answer) -> None:
    """Raise ValueError for values that Parquet would not return unchanged."""
    boxes: list[ReviewedBox | DeletedBox] = [*answer.boxes, *answer.deleted]
    numbers = [n for box in boxes for n in (*box.bbox, box.score or 0.0)]
    if not all(math.isfinite(n) and abs(n) < 1e9 for n in (*numbers, answer.lead_time_s or 0.0)):
        raise ValueError("a number in it is not finite, or far outside of any image")
    if max(answer.task_id, answer.annotation_id) > _LARGEST_ID:
        raise ValueError("an id that is too large")
    for text in (answer.annotator, answer.model_version, *(box.category for box in boxes)):
        text.encode()  # half a surrogate pair is not text


def compare(
    shown: Sequence[Region], left: Sequence[Region]
) -> tuple[tuple[ReviewedBox, ...], tuple[DeletedBox, ...]]:
    """Return what became of the shown boxes, by region id, and what was added."""
    before = {region.region: region for region in shown}
    boxes, gone = [], dict(before)
    for region in left:
        was = gone.pop(region.region, None)
        score = None if was is None else was.score
        boxes.append(ReviewedBox(region.bbox, region.category, _origin(was, region), score))
    deleted = tuple(DeletedBox(r.bbox, r.category, r.score) for r in gone.values())
    return tuple(boxes), deleted


def prediction_shown(
    predictions: Sequence[Mapping[str, Any]], annotation: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """Return the prediction an annotation began with; None: there was none to be seen.

    The page says which; of those made through the API the one that shares most regions counts, and
    of equal ones the newest. One that came after the annotation was begun was not seen. Where a
    later round had to show a prediction under its own name, the older original is returned: it
    names the model.
    """
    began = annotation.get("created_at")
    seen = [p for p in predictions if not _is_later(p.get("created_at"), began)]
    if not seen:
        return None
    parent = annotation.get("parent_prediction")
    regions = {r.get("id") for r in annotation.get("result") or []}

    def likely(prediction: Mapping[str, Any]) -> tuple[bool, int, int]:
        shared = sum(r.get("id") in regions for r in prediction["result"])
        return prediction["id"] == parent, shared, int(prediction["id"])

    shown = max(seen, key=likely)
    alike = [p for p in seen if p["result"] == shown["result"]]
    return min(alike, key=lambda p: int(p["id"]))


def shown_was_replaced(
    predictions: Sequence[Mapping[str, Any]], annotation: Mapping[str, Any]
) -> bool:
    """Whether the prediction that an annotation began with is gone.

    A refresh replaces the prediction of an open task. A person who had the task open at that
    moment never saw the new boxes: those that the annotation lacks were not deleted.
    """
    parent = annotation.get("parent_prediction")
    return parent is not None and all(p["id"] != parent for p in predictions)


def _is_later(made: Any, began: Any) -> bool:
    return bool(made and began) and when(str(made)) > when(str(began))


def annotator_of(annotation: Mapping[str, Any], people: Mapping[int, str]) -> str:
    """Return a stable name for the annotator."""
    by = annotation.get("completed_by")
    if isinstance(by, dict):
        return str(by.get("email") or f"user {by.get('id')}")
    return people.get(int(by), f"user {by}") if by is not None else "unknown"


def when(text: str) -> datetime:
    """Parse an ISO 8601 time, as UTC."""
    return datetime.fromisoformat(text).astimezone(UTC)


def _origin(was: Region | None, now: Region) -> Origin:
    if was is None:
        return "added"
    if was.category != now.category:
        return "relabelled"
    near = all(abs(a - b) <= _SAME_PX for a, b in zip(was.bbox, now.bbox, strict=True))
    return "kept" if near else "moved"
