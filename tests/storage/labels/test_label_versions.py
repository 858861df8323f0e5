"""Label versions: numbers are taken once, a version exists whole or not at all, latest goes up."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import numpy as np
import pytest

from storage.errors import AlreadyExists, ConfigError
from storage.labels.rows import (
    Label,
    LabelRow,
    LabelWriter,
    label_rows,
    labels_array,
    rows_to_label_table,
)
from storage.labels.versions import (
    LATEST,
    LabelVersion,
    claim_version,
    finish_version,
    new_attempt,
    read_label_tables,
    read_version,
    versions,
)
from storage.objects.json_records import read_record
from storage.records import Category
from storage.stores.memory import MemoryStore
from storage.stores.open import open_store

ROW = LabelRow(
    "a.tar/0.jpg", "0" * 16, 512, 1000, "cd" * 32, 640, 480, "human",
    (
        Label((1.5, 2, 30, 40), 1, None, False, "added"),
        Label((5, 6, 7, 8), 0, 0.25, True, "kept"),
    ),
    0, "ab" * 32, "p" * 12, "ann", datetime(2026, 1, 1, tzinfo=UTC),
)  # fmt: skip


def _lineage(version: str, attempt: str) -> LabelVersion:
    return LabelVersion(
        version, attempt, "2026-01-01T00:00:00+00:00", {"name": "cells"},
        (Category(0, "RBC", 1),), "p" * 12, "latest", {}, {"labels": 1},
    )  # fmt: skip


def _finish(store: MemoryStore, version: str) -> LabelVersion:
    lineage = _lineage(version, new_attempt())
    finish_version(store, lineage)
    return lineage


def test_rows_come_back() -> None:
    rows = [ROW, replace(ROW, labels=(), offset=None, annotator=None, source="model")]
    assert list(label_rows(rows_to_label_table(rows))) == rows


def test_the_models_boxes_as_arrays_are_the_same_column() -> None:
    column = labels_array(
        np.array([1, 0, 1]),
        np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32),
        np.array([2, 0], np.int16),
        np.array([0.5, 0.25], np.float32),
        np.array([False, True]),
    )
    assert column.type == rows_to_label_table([ROW]).column("labels").type
    assert [len(labels) for labels in column.to_pylist()] == [1, 0, 1]
    assert column.to_pylist()[2][0] == {
        "bbox": [5, 6, 7, 8], "category_id": 0, "score": 0.25, "ignore": True, "origin": "model",
    }  # fmt: skip


def test_writers_that_race_get_a_number_each(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: claim_version(store, new_attempt()), range(16)))
    assert sorted(taken) == [f"v{n:04d}" for n in range(1, 17)]


def test_a_version_exists_when_its_lineage_does() -> None:
    store = MemoryStore()
    claim_version(store, "dead")  # a writer that died after its claim
    with pytest.raises(ConfigError, match="no label version yet"):
        read_version(store)
    version = claim_version(store, "b")
    assert version == "v0002"
    lineage = _finish(store, version)
    assert versions(store) == ["v0002"]
    assert read_version(store) == lineage
    assert read_version(store, "v0002") == lineage
    with pytest.raises(ConfigError, match="v0001"):
        read_version(store, "v0001")


def test_a_lost_reply_to_a_claim_or_a_lineage_is_recognised() -> None:
    store = MemoryStore()
    store.create("labels/v0001/claim.json", json.dumps({"attempt": "mine"}).encode())
    lineage = _lineage("v0001", "mine")
    finish_version(store, lineage)
    finish_version(store, lineage)
    with pytest.raises(AlreadyExists):
        finish_version(store, _lineage("v0001", "somebody"))


def test_latest_only_goes_up() -> None:
    store = MemoryStore()
    for version in ("v0002", "v0001", "v10000", "v9999"):
        _finish(store, version)
    assert read_record(store, LATEST) == {"version": "v10000"}
    assert versions(store) == ["v0001", "v0002", "v9999", "v10000"]


def test_racing_writers_leave_latest_at_the_newest(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    names = [f"v{n:04d}" for n in range(1, 13)]
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda v: finish_version(store, _lineage(v, v)), names))
    assert read_version(store).version == "v0012"


def test_no_name_leads_out_of_the_folder() -> None:
    with pytest.raises(ConfigError, match="no label version"):
        read_version(MemoryStore(), "../review")


def test_parts_are_written_as_they_fill_and_a_glob_reads_them(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    rows = [replace(ROW, image_id=f"{n}.jpg") for n in range(25)]
    with LabelWriter(store, "v0001", {}, rows_per_part=10) as writer:
        for at in range(0, 25, 5):
            writer.write(rows_to_label_table(rows[at : at + 5]))
        parts = writer.close()
    assert [p.rows for p in parts] == [10, 10, 5]
    lineage = replace(_lineage("v0001", "a"), parts=parts)
    read = [r for t in read_label_tables(store, lineage) for r in label_rows(t)]
    assert read == rows
    for at_once, sizes in ((1, [5] * 5), (9, [5] * 5), (10, [10, 10, 5]), (99, [10, 10, 5])):
        tables = list(read_label_tables(store, lineage, at_once=at_once))
        assert [table.num_rows for table in tables] == sizes
        assert [r for table in tables for r in label_rows(table)] == rows
    glob = tmp_path / "labels" / "v0001" / "*.parquet"
    boxes = duckdb.sql(f"select sum(len(labels)) from '{glob}'").fetchall()
    assert boxes == [(50,)]


def test_a_version_without_rows_can_be_read(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with LabelWriter(store, "v0001", {}) as writer:
        parts = writer.close()
    lineage = replace(_lineage("v0001", "a"), parts=parts)
    assert [t.num_rows for t in read_label_tables(store, lineage)] in ([], [0])
