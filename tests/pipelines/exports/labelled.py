"""Runs over real files with one label version, and their exports."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import cv2
import numpy as np

from pipelines.exports.export import ExportFormat, ExportRequest, ExportSummary, export_version
from pipelines.labels.decide import decide_run
from pipelines.policy.policy import Policy
from storage.labels.rows import LabelRow, label_rows
from storage.labels.versions import read_label_tables, read_version
from storage.records import AnnotationRow, Shard
from storage.review.answers import Answer, ReviewedBox, append_answers
from storage.runs.listing import Listing
from storage.runs.manifest import Manifest
from storage.shards.reading import read_shard
from storage.stores.open import open_store
from tests.support.samples.review_runs import distinct_row
from tests.support.samples.synthetic_run import boxes, commit_rows, make_run

POLICY = Policy(accept=0.7, reject=0.1)
FORMATS: tuple[ExportFormat, ...] = ("coco", "yolo", "hf")
FOUND = boxes(
    [[10.5, 20.25, 30, 40], [0, 0, 64, 48], [5, 5, 9, 9], [1, 1, 3, 3]],
    [0.9, 0.8, 0.3, 0.05], [0, 2, 1, 1],
)  # fmt: skip


def jpeg(shade: int) -> bytes:
    ok, raw = cv2.imencode(".jpg", np.full((48, 64, 3), shade, np.uint8))
    assert ok
    return bytes(raw)


@dataclass(frozen=True)
class Labelled:
    """A run over real files, with one label version: a model's, a person's, an empty image."""

    manifest: Manifest
    raw: dict[str, bytes]

    def rows(self) -> list[LabelRow]:
        lineage = read_version(self.manifest.store)
        return [r for t in read_label_tables(self.manifest.store, lineage) for r in label_rows(t)]


def labelled_run(tmp_path: Path, shard: Shard) -> Labelled:
    source = open_store(str(tmp_path / "source"))
    rows, raw = [], {}
    for n, record in enumerate(read_shard(source, shard, max_image_bytes=10**9)):
        assert record.data is not None
        raw[record.image_id] = record.data
        found = FOUND if n != 1 else None
        row = distinct_row(record.image_id, shard, found, width=64, height=48)
        digest = hashlib.sha256(record.data).hexdigest()
        rows.append(replace(row, sha256=digest, offset=record.offset, nbytes=record.nbytes))
    manifest = make_run(open_store(str(tmp_path / "run")), {}, source=str(tmp_path / "source"))
    Listing(manifest.store).refresh(shard.objects, lambda objects: _only(shard, objects))
    commit_rows(manifest, shard, rows)
    append_answers(manifest.store, [_answer(rows[-1])])
    decide_run(manifest, POLICY)
    return Labelled(manifest, raw)


def _only(shard: Shard, objects: object) -> object:
    assert list(objects)  # type: ignore[call-overload]
    return iter([shard])


def _answer(row: AnnotationRow) -> Answer:
    made = ReviewedBox((8, 8, 20, 24), "WBC", "added")
    return Answer(
        row.image_id, row.sha256, 1, 1, "ann", 9.0, datetime(2026, 1, 1, tzinfo=UTC), False,
        (made,), (), "m", False,
    )  # fmt: skip


def export_to(
    labelled: Labelled, dest: Path, format: ExportFormat, images: str = "none"
) -> ExportSummary:
    return export_version(labelled.manifest, str(dest), ExportRequest(format, images=images))  # type: ignore[arg-type]
