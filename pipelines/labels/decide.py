"""Merge model, policy and answers into a label version: ``labelfleet decide``. Needs no GPU.

An answered image takes the whole answer, even an empty one, and the policy's word on boxes that
its reviewer was not shown (``Answer.hidden``); on every other image the policy judges
the model's boxes, and boxes between the thresholds become ignore boxes. Boxes are
clipped to their image; of boxes on one object the likeliest stays (``policy.one_object``). Answers
are joined by sha256, so they survive a new checkpoint and never reach other pixels under an old
name. Rows stream; only answers and queues are held.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.labels.alternatives import ALTERNATIVES, AlternativesWriter
from pipelines.policy.box_batch import BoxBatch, box_batch
from pipelines.policy.policy import Decision, Policy, Thresholds
from pipelines.policy.statement import said_for
from pipelines.truth.compared import AnsweredImage, ModelLabels, QueuePlaces, describe, to_jsonl
from pipelines.truth.matching import covered
from pipelines.truth.settle import AnswerBook, Settled, Settling, settle
from pipelines.truth.usable import SetAside, usable_answers
from storage.boxes import clipped
from storage.labels.rows import (
    ROWS_PER_PART,
    Label,
    LabelRow,
    LabelWriter,
    labels_array,
    rows_to_label_table,
)
from storage.labels.versions import (
    LABEL_SCHEMA,
    LabelVersion,
    PartFile,
    claim_version,
    finish_version,
    new_attempt,
    read_version_file,
    write_version_files,
)
from storage.objects.protocols import AtRest
from storage.records import Category, RunIdentity
from storage.review.answers import Answer, ReviewedBox, answer_parts
from storage.review.not_shown import read_not_shown
from storage.runs.live_rows import live_tables
from storage.runs.manifest import Manifest

_COPIED = ("image_id", "shard_id", "offset", "nbytes", "sha256", "width", "height")


def decide_run(
    manifest: Manifest,
    policy: Policy,
    *,
    answers_from: Sequence[Manifest] = (),
    settling: Settling = "latest",
    rows_per_part: int = ROWS_PER_PART,
) -> LabelVersion:
    """Write a new label version and point ``latest`` to it. The caller holds the run's lock.

    Args:
        manifest: the run whose live rows become labels.
        policy: judges the model's boxes on images without an answer.
        answers_from: other runs whose answers count too, joined by the images' sha256; of two
            answers to the same pixels the one submitted last counts.
        settling: how several people's answers to one image are settled, see ``answers.settle``.
        rows_per_part: images in one Parquet object, about.

    Raises:
        ConfigError: the policy does not fit the run.

    An answer that names a class which the run lacks is set aside: see ``read_set_aside``.
    """
    identity = manifest.record.identity
    thresholds = policy.for_run(identity)
    runs = list({run.url: run for run in (manifest, *answers_from)}.values())
    parts = {run.url: answer_parts(run.store) for run in runs}
    found = usable_answers(runs, parts)
    attempt, now = new_attempt(), datetime.now(UTC)
    version = claim_version(manifest.store, attempt)
    with AlternativesWriter([c.name for c in identity.categories]) as alternatives:
        merge = _Merge(
            thresholds=thresholds,
            categories=identity.categories,
            book=_book(manifest, found.answers, settling),
            places=QueuePlaces(runs),
            model=identity.model_sha256,
            policy=policy.digest(),
            now=now,
            alternatives=alternatives,
        )
        written = _write_rows(manifest, version, merge, rows_per_part)
        files = _files(merge, policy, found.set_aside)
        lineage = LabelVersion(
            version=version,
            attempt=attempt,
            created_at=now.isoformat(timespec="seconds"),
            run=_run_fields(identity),
            categories=identity.categories,
            policy=merge.policy,
            settling=settling,
            answers={url: keys for url, keys in parts.items() if keys},
            counts={**merge.totals(), "answers_set_aside": len(found.set_aside)},
            parts=written,
            files=write_version_files(manifest.store, version, files),
            guarantee=said_for(policy, identity, manifest.url),
        )
    finish_version(manifest.store, lineage)
    return lineage


def _book(manifest: Manifest, answers: Sequence[Answer], settling: Settling) -> AnswerBook:
    """Settle the answers; the book also knows what the last push could not show."""
    not_shown = frozenset(read_not_shown(manifest.store))
    return replace(settle(answers, settling), not_shown=not_shown)


def _write_rows(
    manifest: Manifest, version: str, merge: _Merge, rows_per_part: int
) -> tuple[PartFile, ...]:
    header = {"categories": [c.name for c in merge.categories], "policy": merge.policy}
    with LabelWriter(manifest.store, version, header, rows_per_part=rows_per_part) as writer:
        for _, table in live_tables(manifest, [*_COPIED, "status", "detections"]):
            writer.write(merge.table(table))
        return writer.close()


def _files(merge: _Merge, policy: Policy, set_aside: Sequence[SetAside]) -> dict[str, AtRest]:
    return {
        ALTERNATIVES: merge.alternatives.finish(),
        "policy.yaml": policy.to_yaml().encode(),
        "answered.jsonl": to_jsonl(merge.answered),
        "set_aside.jsonl": _lines(set_aside),
    }


def _run_fields(identity: RunIdentity) -> dict[str, str]:
    return {
        "name": identity.name,
        "model_sha256": identity.model_sha256,
        "config_hash": identity.config_hash,
        "licence": identity.licence,
    }


def _lines(set_aside: Sequence[SetAside]) -> bytes:
    return "".join(json.dumps(one.to_fields()) + "\n" for one in set_aside).encode()


def read_set_aside(manifest: Manifest, version: LabelVersion) -> list[SetAside]:
    """Return answers that a label version could not take, by task."""
    raw = read_version_file(manifest.store, version, "set_aside.jsonl")
    return [SetAside(**json.loads(line)) for line in raw.splitlines()]


@dataclass(slots=True)
class _Merge:
    """Turns annotation tables into label tables, and counts what becomes of everything."""

    thresholds: Thresholds
    categories: Sequence[Category]
    book: AnswerBook
    places: QueuePlaces
    model: str
    policy: str
    now: datetime
    alternatives: AlternativesWriter
    counts: Counter[str] = field(default_factory=Counter)
    answered: list[AnsweredImage] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def table(self, annotations: pa.Table) -> pa.Table:
        """Label rows of one annotation table, in its order; images that are not ok have none."""
        status = annotations.column("status").cast(pa.string())
        ok = annotations.filter(pc.equal(status, "ok"))
        for entry in pc.value_counts(status).to_pylist():
            if entry["values"] != "ok":
                self.counts[f"left_out_{entry['values']}"] += entry["counts"]
        if not ok.num_rows:
            return LABEL_SCHEMA.empty_table()
        batch = box_batch(ok, self.thresholds)
        sha256s = ok.column("sha256").to_pylist()
        self._note_answered(ok, batch, sha256s)
        by_people = np.array([s in self.book.settled for s in sha256s], np.bool_)
        machine = self._by_model(ok, batch, ~by_people)
        if not by_people.any():
            return machine
        people = rows_to_label_table(self._by_people(ok, batch, by_people))
        order = np.argsort(np.concatenate([np.flatnonzero(~by_people), np.flatnonzero(by_people)]))
        return pa.concat_tables([machine, people]).take(pa.array(order))

    def totals(self) -> dict[str, int]:
        """Return counts for the lineage, zeros included where their absence would be a question."""
        names = ("images_model", "images_human", "images_human_empty", "labels", "ignored",
                 "rejected", "rejected_outside", "rejected_alternative",
                 "labels_unseen", "ignored_unseen")  # fmt: skip
        return {
            **dict.fromkeys(names, 0),
            **self.counts,
            "answers_used": len(self.used),
            "answers_unused": len(self.book.settled.keys() - self.used),
            "answers_skipped": len(self.book.skipped),
            "answers_unusable": len(self.book.unusable),
        }

    def _by_model(self, ok: pa.Table, batch: BoxBatch, rows: NDArray[np.bool_]) -> pa.Table:
        judged = rows[batch.image]
        kept = judged & batch.standing
        ignore = (batch.decisions != Decision.ACCEPT)[kept]
        here = np.flatnonzero(rows)
        labels = labels_array(
            batch.per_image(kept)[here].astype(np.int64),
            batch.boxes[kept],
            batch.category_ids[kept],
            batch.scores[kept],
            ignore,
        )
        rejected = batch.per_image(judged & ~batch.standing)[here].astype(np.int32)
        self.counts["images_model"] += len(here)
        self.counts["labels"] += int((~ignore).sum())
        self.counts["ignored"] += int(ignore.sum())
        self.counts["rejected"] += int(rejected.sum())
        self.counts["rejected_outside"] += int((judged & batch.outside).sum())
        self.counts["rejected_alternative"] += int((judged & batch.alternative).sum())
        self.alternatives.add(
            batch, judged, ok.column("image_id").to_pylist(), ok.column("sha256").to_pylist()
        )
        copied = ok.select(list(_COPIED)).filter(pa.array(rows))
        n = len(here)
        added = {
            "source": pa.array(["model"] * n, pa.string()),
            "labels": labels,
            "rejected": pa.array(rejected),
            "model": pa.array([self.model] * n, pa.string()),
            "policy": pa.array([self.policy] * n, pa.string()),
            "annotator": pa.nulls(n, pa.string()),
            "labelled_at": pa.array([self.now] * n, LABEL_SCHEMA.field("labelled_at").type),
        }
        columns = [*copied.columns, *added.values()]
        names = [*copied.column_names, *added]
        return pa.table(columns, names=names).select(LABEL_SCHEMA.names).cast(LABEL_SCHEMA)

    def _by_people(self, ok: pa.Table, batch: BoxBatch, rows: NDArray[np.bool_]) -> list[LabelRow]:
        made = []
        copied = ok.select(list(_COPIED)).filter(pa.array(rows)).to_pylist()
        for image, row in zip(np.flatnonzero(rows), copied, strict=True):
            settled = self.book.settled[row["sha256"]]
            unseen = _unseen(batch, int(image), settled)
            labels = (*self._labels(settled, row["width"], row["height"]), *unseen)
            self.counts["labels_unseen"] += sum(not label.ignore for label in unseen)
            self.counts["ignored_unseen"] += sum(label.ignore for label in unseen)
            made.append(
                LabelRow(
                    **row,
                    source="human",
                    labels=labels,
                    rejected=0,
                    model=self.model,
                    policy=self.policy,
                    annotator=settled.answer.annotator,
                    labelled_at=settled.answer.submitted_at,
                )
            )
            self.used.add(row["sha256"])
            ignored = sum(label.ignore for label in labels)
            self.counts["images_human"] += 1
            self.counts["images_human_empty"] += not labels
            self.counts["labels"] += len(labels) - ignored
            self.counts["ignored"] += ignored
        return made

    def _labels(self, settled: Settled, width: int, height: int) -> tuple[Label, ...]:
        boxes = [(box, False) for box in settled.answer.boxes]
        boxes += [(box, True) for box in settled.disputed]
        made = (self._label(box, ignore, width, height) for box, ignore in boxes)
        return tuple(label for label in made if _has_area(label))

    def _label(self, box: ReviewedBox, ignore: bool, width: int, height: int) -> Label:
        # A person may draw past the edge; labels never lie outside their image.
        x1, y1, x2, y2 = clipped(np.array([box.bbox], np.float64), width, height)[0].tolist()
        names = [c.name for c in self.categories]
        return Label((x1, y1, x2, y2), names.index(box.category), box.score, ignore, box.origin)

    def _note_answered(self, ok: pa.Table, batch: BoxBatch, sha256s: Sequence[str]) -> None:
        ids = ok.column("image_id")
        names = [c.name for c in self.categories]
        for i, sha256 in enumerate(sha256s):
            if sha256 in self.places or sha256 in self.book.settled:
                image_id = ids[i].as_py()
                places = self.places.take(image_id, sha256)
                model = _model_labels(batch, i)
                self.answered += describe(image_id, sha256, places, self.book, model, names)


def _model_labels(batch: BoxBatch, image: int) -> ModelLabels:
    here = batch.image == image
    accepted, ignored = here & batch.accepted, here & batch.uncertain
    return ModelLabels(batch.boxes[accepted], batch.category_ids[accepted], batch.boxes[ignored])


def _unseen(batch: BoxBatch, image: int, settled: Settled) -> list[Label]:
    """Return what the policy makes of the model's boxes that an answer says nothing about.

    See ``Answer.hidden``. Model boxes at such a place (IoU >= 0.5) stay labels or ignore boxes,
    unless they overlap as much with a box that people left, or that they were shown: a box that
    they took away has been answered.
    """
    if not settled.answer.hidden:
        return []
    here = np.flatnonzero((batch.image == image) & batch.standing)
    drawn = [box.bbox for box in (*settled.answer.boxes, *settled.disputed)]
    people = [*drawn, *settled.answer.shown]
    at_hidden = covered(batch.boxes[here], np.array(settled.answer.hidden, np.float64))
    answered = covered(batch.boxes[here], np.array(people, np.float64).reshape(-1, 4))
    found = []
    for at in here[at_hidden & ~answered]:
        x1, y1, x2, y2 = batch.boxes[at].tolist()
        ignore = not bool(batch.accepted[at])
        category_id, score = int(batch.category_ids[at]), float(batch.scores[at])
        found.append(Label((x1, y1, x2, y2), category_id, score, ignore, "model"))
    return found


def _has_area(label: Label) -> bool:
    x1, y1, x2, y2 = label.bbox
    return x2 > x1 and y2 > y1
