"""COCO's text of many boxes against ``json.dumps`` of each."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.exports.export import ExportRequest, export_version
from pipelines.exports.formats import IgnoreBoxes
from pipelines.labels.decide import decide_run
from pipelines.policy.policy import Policy
from storage.labels.rows import Label, LabelRow, label_rows
from storage.labels.versions import read_label_tables, read_version
from storage.review.answers import Answer, ReviewedBox, append_answers
from storage.runs.manifest import Manifest
from storage.stores.memory import MemoryStore
from tests.support.samples.synthetic_run import image_shard, make_run, random_boxes, row

# More images and boxes than are written at once, on images with sides of one to five digits.
IMAGES, EACH = 2_300, 7
SIZES = ((640, 480), (9, 7), (12_000, 9_000), (1, 1))


@pytest.fixture(scope="module")
def labelled() -> tuple[Manifest, list[LabelRow]]:
    """A run whose boxes are labels, ignore boxes, and those that people drew; its label rows."""
    rng = np.random.default_rng(0)
    shard = image_shard(*(f"{n:05}.jpg" for n in range(IMAGES)))
    rows = [
        replace(row(listed.key, shard.shard_id, random_boxes(rng, EACH, *size), size=size),
                sha256=f"{n:064x}")
        for n, listed in enumerate(shard.objects)
        for size in (SIZES[n % len(SIZES)],)
    ]  # fmt: skip
    run = make_run(MemoryStore(), {shard: rows})
    when = datetime(2026, 1, 1, tzinfo=UTC)
    drawn = (ReviewedBox((0.0005, 0.25, 5, 6.1235), "WBC", "added"),)
    append_answers(
        run.store,
        [
            Answer(one.image_id, one.sha256, n, n, 'a"ünn', 9.0, when, False, drawn, (), "m", False)
            for n, one in enumerate(rows[:100:9])
        ],
    )
    decide_run(run, Policy(accept=0.7, reject=0.1))
    tables = read_label_tables(run.store, read_version(run.store))
    return run, [one for table in tables for one in label_rows(table)]


@pytest.mark.parametrize("ignore_boxes", ["in", "out"])
def test_every_line_is_what_json_writes_of_its_box(
    ignore_boxes: IgnoreBoxes, labelled: tuple[Manifest, list[LabelRow]], tmp_path: Path
) -> None:
    run, rows = labelled
    boxes = [(number, label) for number, r in enumerate(rows, 1) for label in r.labels]
    kept = [pair for pair in boxes if ignore_boxes == "in" or not pair[1].ignore]
    ignored = [pair for pair in boxes if pair[1].ignore]
    assert len(kept) > 4_000
    assert len(ignored) > 4_000
    assert any(label.score is None for _, label in kept)
    export_version(run, str(tmp_path / "out"), ExportRequest("coco", ignore_boxes=ignore_boxes))
    text = (tmp_path / "out" / "annotations.json").read_text()
    assert lines_of(text, "images") == [image(n, r) for n, r in enumerate(rows, 1)]
    outlined = [box(n, i, b, outlined=True) for n, (i, b) in enumerate(kept, 1)]
    assert lines_of(text, "annotations") == outlined
    plain = [box(n, i, b, outlined=False) for n, (i, b) in enumerate(ignored, 1)]
    assert lines_of(text, "ignore") == plain


def lines_of(text: str, name: str) -> list[str]:
    return text.partition(f'"{name}": [\n')[2].partition("\n]")[0].split(",\n")


def image(number: int, row: LabelRow) -> str:
    told = {"image_id": row.image_id, "sha256": row.sha256, "source": row.source,
            "annotator": row.annotator, "labelled_at": row.labelled_at.isoformat()}  # fmt: skip
    return json.dumps({"id": number, "file_name": row.image_id, "width": row.width,
                       "height": row.height, "labelfleet": told})  # fmt: skip


def box(number: int, image: int, label: Label, *, outlined: bool) -> str:
    x1, y1, x2, y2 = (round(side, 3) for side in label.bbox)
    width, height = round(x2 - x1, 3), round(y2 - y1, 3)
    right, bottom = round(x1 + width, 3), round(y1 + height, 3)
    made: dict[str, Any] = {
        "id": number,
        "image_id": image,
        "category_id": label.category_id + 1,
        "bbox": [x1, y1, width, height],
        "area": round(width * height, 3),
        "iscrowd": int(label.ignore),
        "origin": label.origin,
    }
    if label.score is not None:
        made["score"] = round(label.score, 6)
    if outlined:
        made["segmentation"] = [[x1, y1, right, y1, right, bottom, x1, bottom]]
    return json.dumps(made)
