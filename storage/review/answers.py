"""People's answers at rest: append-only Parquet parts below review/answers/."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
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

Annotation = tuple[str, str, int, int]  # project, sha256, task, annotation


@dataclass(frozen=True, slots=True)
class ReviewedBox:
    """A box as the person left it; ``score`` is the prediction's, None for a drawn box."""

    bbox: Xyxy
    category: str
    origin: Origin
    score: float | None = None


@dataclass(frozen=True, slots=True)
class DeletedBox:
    """A predicted box that the person deleted."""

    bbox: Xyxy
    category: str
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One submitted (or skipped) annotation of one image by one person.

    Attributes:
        image_id, sha256: the image as it was pushed; answers are joined by sha256.
        task_id, annotation_id: Label Studio's; an annotation edited later keeps its id and
            gets a later ``submitted_at``.
        annotator: a stable name for the person.
        lead_time_s: seconds the person took; None where Label Studio does not say.
        submitted_at: UTC, of the last edit.
        skipped: the person declined; the answer has no boxes and replaces nothing.
        boxes: all boxes of the image; empty and not skipped: the image has no objects.
        deleted: predicted boxes that were shown and deleted.
        model_version: of the predictions that were shown.
        was_blind: no predictions were shown.
        unusable: annotation types that cannot become a box, such as ``keypointlabels``; such an
            answer settles nothing.
        withdrawn: why the answer no longer counts ('' while it does): ``deleted`` (the annotation),
            ``task deleted``, ``project deleted`` or ``retracted`` (by hand). Such a record is a
            tombstone: a copy of the withdrawn answer.
        project: Label Studio's project as it identifies itself; '' in answers of older versions.
        ground_truth: the annotation is starred in Label Studio as ground truth.
        shown: boxes that the person started from.
        hidden: model boxes in places where the person was shown none and drew none. The answer
            says nothing about them; everywhere else it is authoritative. Empty for audit images,
            which are labelled completely, for tasks without boxes, and in answers of older
            versions, whose tasks hid nothing.
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
    unusable: tuple[str, ...] = ()
    withdrawn: str = ""
    project: str = ""
    ground_truth: bool = False
    shown: tuple[Xyxy, ...] = ()
    hidden: tuple[Xyxy, ...] = ()

    @property
    def annotation(self) -> Annotation:
        """Identity of the annotation; includes the project, since every server counts from 1."""
        return self.project, self.sha256, self.task_id, self.annotation_id


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
        pa.field("unusable", pa.list_(pa.string())),  # null in parts of older versions, as below
        pa.field("withdrawn", pa.string()),
        pa.field("project", pa.string()),
        pa.field("ground_truth", pa.bool_()),
        pa.field("shown", pa.list_(pa.list_(pa.float32(), 4))),
        pa.field("hidden", pa.list_(pa.list_(pa.float32(), 4))),
    ]
)


def answer_parts(store: SupportsList) -> list[str]:
    """Return the keys of the answer parts, oldest first."""
    return part_keys(store, ANSWERS)


def append_answers(store: SupportsAppend, answers: Sequence[Answer]) -> str | None:
    """Add answers as a new part; return its key, or None if there is nothing to add."""
    if not answers:
        return None
    table = pa.Table.from_pylist([asdict(a) for a in answers], schema=ANSWER_SCHEMA)
    return append_part(store, ANSWERS, table, {"schema_version": VERSION, "answers": len(answers)})


def read_answers(store: SupportsParts, keys: Sequence[str] | None = None) -> Iterator[Answer]:
    """Yield all records in pull order: every version of each answer, tombstones included.

    ``standing`` returns those that count now.
    """
    parts = answer_parts(store) if keys is None else keys
    yield from read_parts(store, parts, ANSWER_SCHEMA, _answer)


def _answer(row: dict[str, Any]) -> Answer:
    boxes = tuple(ReviewedBox(**_with_tuple(box)) for box in row["boxes"])
    deleted = tuple(DeletedBox(**_with_tuple(box)) for box in row["deleted"])
    unusable = tuple(row["unusable"] or ())
    added: dict[str, Any] = {name: row[name] or "" for name in ("withdrawn", "project")}
    added["ground_truth"] = bool(row["ground_truth"])
    added |= {name: tuple(map(tuple, row[name] or ())) for name in ("shown", "hidden")}
    fields = {**row, **added, "boxes": boxes, "deleted": deleted, "unusable": unusable}
    return Answer(**fields)


def latest_versions(records: Iterable[Answer]) -> dict[Annotation, Answer]:
    """Return the last record of each annotation of one run, tombstones included.

    Records of older versions name no project. They count as versions of the same annotation in
    the project that the other records name for it, see ``_named``.

    Args:
        records: of one run, in the order of pulling.
    """
    last: dict[Annotation, tuple[datetime, int, Answer]] = {}
    for order, record in enumerate(records):
        known = last.get(record.annotation)
        if known is None or record.submitted_at >= known[0]:
            last[record.annotation] = (record.submitted_at, order, record)
    names = _named(record for _, _, record in last.values())
    latest: dict[Annotation, tuple[datetime, int, Answer]] = {}
    for key, found in last.items():
        key = names.get(key, key)
        if key not in latest or found[:2] > latest[key][:2]:
            latest[key] = found
    return {key: record for key, (_, _, record) in latest.items()}


def standing(*runs: Iterable[Answer]) -> list[Answer]:
    """Return the answers that count: the last version of each annotation, unless withdrawn.

    An annotation pulled by several runs is withdrawn as soon as one run has seen the withdrawal.

    Args:
        runs: the records of each run, in the order of pulling.
    """
    latest = [latest_versions(records) for records in runs]
    names = _named(
        replace(record, project=key[0]) for found in latest for key, record in found.items()
    )
    merged: dict[Annotation, Answer] = {}
    for found in latest:
        for key, record in found.items():
            key = names.get(key, key)
            known = merged.get(key)
            if known is None or _rank(record) > _rank(known):
                merged[key] = record
    return [record for record in merged.values() if not record.withdrawn]


def _named(records: Iterable[Answer]) -> dict[Annotation, Annotation]:
    """Map annotations without a project to the same annotation in the one project that has it.

    Where several projects have those numbers for those pixels, the annotator decides; where that
    leaves more than one, the annotation stays by itself.
    """
    nameless: list[Answer] = []
    named: dict[tuple[str, int, int], list[Answer]] = defaultdict(list)
    for record in records:
        if record.project:
            named[record.annotation[1:]].append(record)
        else:
            nameless.append(record)
    found = {}
    for record in nameless:
        alike = named.get(record.annotation[1:], [])
        theirs = [other for other in alike if other.annotator == record.annotator]
        for candidates in (alike, theirs):
            projects = {other.project for other in candidates}
            if len(projects) == 1:
                found[record.annotation] = (projects.pop(), *record.annotation[1:])
                break
    return found


def _rank(record: Answer) -> tuple[datetime, bool, bool]:
    # If two runs pulled an answer, the run whose boxes were shown knows what was hidden.
    return record.submitted_at, bool(record.withdrawn), bool(record.hidden)


def _with_tuple(box: dict[str, Any]) -> dict[str, Any]:
    return {**box, "bbox": tuple(box["bbox"])}
