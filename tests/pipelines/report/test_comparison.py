"""`compare`: counts of boxes by change, the page with pictures, and the same as JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.evaluation.compare import compare_runs
from pipelines.report.comparison import (
    COMPARISON_JSON_KEY,
    COMPARISON_KEY,
    comparison_table,
    write_comparison,
)
from storage.errors import ConfigError
from storage.objects.protocols import ObjectStore
from storage.records import Detections
from storage.runs.live_rows import live_rows
from storage.runs.manifest import Manifest
from storage.stores.memory import MemoryStore
from storage.stores.open import open_store
from tests.support.samples.review_samples import committed_run, loose_run
from tests.support.samples.synthetic_run import boxes, image_shard, make_run, row

A, B, C = (10.0, 10.0, 90.0, 90.0), (100.0, 10.0, 140.0, 40.0), (5.0, 100.0, 25.0, 120.0)


def before(at: int) -> Detections:
    return boxes([A, B], [0.9, 0.8], [0, 1])


def after(at: int) -> Detections:
    """Image 0 as before; in image 1 the box B is another class, and C is new; A is lost in 2."""
    if at == 1:
        return boxes([A, B, C], [0.9, 0.8, 0.7], [0, 2, 2])
    return boxes([B], [0.8], [1]) if at == 2 else before(at)


def two_runs(folder: Path) -> tuple[ObjectStore, Manifest, Manifest]:
    """(source, old run, new run) over the same three pictures."""
    source = open_store(str(folder / "source"))
    old = loose_run(source, open_store(str(folder / "old")), 3, found=before)
    rows = {
        one.image_id: replace(one, detections=after(at)) for at, one in enumerate(live_rows(old))
    }
    return source, old, committed_run(source, open_store(str(folder / "new")), rows)


def test_boxes_are_counted_by_change_class_and_size(tmp_path: Path) -> None:
    _, old, new = two_runs(tmp_path)
    found = compare_runs(old, new)
    assert found.changes.images == 3
    assert found.changes.total() == {"matched": 4, "other_class": 1, "new": 1, "lost": 1}
    assert found.changes.by_class["RBC"] == {"matched": 2, "lost": 1}
    assert found.changes.by_class["WBC"] == {"matched": 2}
    assert found.changes.by_class["Platelets"] == {"other_class": 1, "new": 1}
    assert found.changes.by_size["small"] == {"new": 1}
    assert [(c.new.image_id, c.changes) for c in found.changes.largest] == [
        ("00001.jpg", 2.0), ("00002.jpg", 1.0),
    ]  # fmt: skip
    assert (found.drift.kind, found.drift.alarm) == ("same images", False)
    url = write_comparison(found, old, new)
    page = new.store.get(COMPARISON_KEY).decode()
    assert url.endswith(COMPARISON_KEY)
    assert page.count("data:image/jpeg") == 4  # two images, as both runs see them
    assert "00001.jpg" in page
    assert "<script" not in page
    fields = json.loads(new.store.get(COMPARISON_JSON_KEY))
    assert fields["boxes"] == {"matched": 4, "other_class": 1, "moved": 0, "lost": 1, "new": 1}
    assert comparison_table(found, url)


def test_a_source_that_is_gone_leaves_the_page_without_pictures(tmp_path: Path) -> None:
    source, old, new = two_runs(tmp_path)
    for listed in list(source.list()):
        source.delete(listed.key)
    write_comparison(compare_runs(old, new), old, new)
    page = new.store.get(COMPARISON_KEY).decode()
    assert "data:image/jpeg" not in page
    assert "00001.jpg" in page


def test_runs_without_a_common_class_or_without_labels_are_refused() -> None:
    shard = image_shard("a.jpg")
    rows = [replace(row("a.jpg", shard.shard_id), sha256="ab" * 32)]
    one = make_run(MemoryStore(), {shard: rows})
    other = make_run(MemoryStore(), {shard: rows}, classes=("car",))
    with pytest.raises(ConfigError, match="no class in common"):
        compare_runs(one, other)
    empty = make_run(MemoryStore(), {}, unlabelled=[shard])
    with pytest.raises(ConfigError, match="no labelled image to compare"):
        compare_runs(one, empty)
