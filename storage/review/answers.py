"""People's answers at rest: append-only Parquet parts below review/answers/."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

import pyarrow as pa

from storage.objects.protocols import SupportsList
from storage.parquet.parts import (
    SupportsAppend,
    SupportsParts,
    append_part,
    part_keys,
    read_parts,
)
from storage.records import Xyxy
from storage.review.queue import VERSION

ANSWERS = "review/answers/"


Origin = Literal["kept", "moved", "relabelled", "added"]


ORIGINS: tuple[Origin, ...] = ("kept", "moved", "relabelled", "added")


@dataclass(frozen=True, slots=True)
class ReviewedBox:
    """A box as the person left it; ``score`` is the prediction's, None where they drew it."""

    bbox: Xyxy
    category: str
    origin: Origin
    score: float | None = None


@dataclass(frozen=True, slots=True)
class DeletedBox:
    """A predicted box that the person took away."""

    bbox: Xyxy
    category: str
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One submitted (or skipped) annotation of one image by one person.

    Attributes:
        image_id, sha256: the image as it was pushed; the sha256 is what answers are joined by.
        task_id, annotation_id: Label Studio's; an annotation edited later comes back with the
            same id and a later ``submitted_at``.
        annotator: a stable name of the person.
        lead_time_s: seconds the person took; None where Label Studio does not say.
        submitted_at: UTC, of the last edit.
        skipped: the person declined; there are no boxes, and it replaces nothing.
        boxes: all boxes of the image; empty and not skipped: a person says nothing is there.
        deleted: predicted boxes that were shown and taken away.
        model_version: of the predictions that were shown.
        was_blind: no predictions were shown.
    """

    image_id: str
    sha256: str
    task_id: int
    annotation_id: int
    annotator: str
    lead_time_s: float | None
    submitted_at: datetime
    skipped: bool
    boxes: tuple[ReviewedBox, ...]
    deleted: tuple[DeletedBox, ...]
    model_version: str
    was_blind: bool


_BBOX = pa.field("bbox", pa.list_(pa.float32(), 4), nullable=False)


_CATEGORY = pa.field("category", pa.string(), nullable=False)


_SCORE = pa.field("score", pa.float32())


_ORIGIN = pa.field("origin", pa.string(), nullable=False)


ANSWER_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("task_id", pa.int64(), nullable=False),
        pa.field("annotation_id", pa.int64(), nullable=False),
        pa.field("annotator", pa.string(), nullable=False),
        pa.field("lead_time_s", pa.float64()),
        pa.field("submitted_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("skipped", pa.bool_(), nullable=False),
        pa.field("boxes", pa.list_(pa.struct([_BBOX, _CATEGORY, _ORIGIN, _SCORE])), nullable=False),
        pa.field("deleted", pa.list_(pa.struct([_BBOX, _CATEGORY, _SCORE])), nullable=False),
        pa.field("model_version", pa.string(), nullable=False),
        pa.field("was_blind", pa.bool_(), nullable=False),
    ]
)


def answer_parts(store: SupportsList) -> list[str]:
    """Keys of the answers' parts, oldest first."""
    return part_keys(store, ANSWERS)


def append_answers(store: SupportsAppend, answers: Sequence[Answer]) -> str | None:
    """Add answers as a new part; returns its key, None where there is nothing to add."""
    if not answers:
        return None
    table = pa.Table.from_pylist([asdict(a) for a in answers], schema=ANSWER_SCHEMA)
    return append_part(store, ANSWERS, table, {"schema_version": VERSION, "answers": len(answers)})


def read_answers(store: SupportsParts, keys: Sequence[str] | None = None) -> Iterator[Answer]:
    """All answers as they were pulled, oldest part first; one image may have several."""
    for row in read_parts(store, answer_parts(store) if keys is None else keys, ANSWER_SCHEMA):
        boxes = tuple(ReviewedBox(**_with_tuple(box)) for box in row.pop("boxes"))
        deleted = tuple(DeletedBox(**_with_tuple(box)) for box in row.pop("deleted"))
        yield Answer(**row, boxes=boxes, deleted=deleted)


def _with_tuple(box: dict[str, Any]) -> dict[str, Any]:
    return {**box, "bbox": tuple(box["bbox"])}
