"""The annotation Parquet: what goes in comes out, and nothing untrue goes in."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from storage.errors import InvalidRow, StorageError
from storage.parquet.files import METADATA_KEY
from storage.records import STATUSES, AnnotationRow, Detections
from storage.runs.annotation_rows import SCHEMA
from storage.runs.annotations import (
    ROW_GROUP_ROWS,
    RowWriter,
    read_footer,
    read_identity,
    read_rows,
    read_tables,
)
from storage.stores.memory import MemoryStore
from tests.support.samples.synthetic_run import boxes, identity, random_boxes, row

WIDTH, HEIGHT = 640, 480


def written(
    rows: list[AnnotationRow], folder: Path, key: str = "annotations/a.parquet"
) -> MemoryStore:
    """A store that holds these rows as one annotation object."""
    writer = RowWriter(folder / "spool", identity())
    for one in rows:
        writer.write(one)
    writer.finish("a", "a.tar", "attempt")
    store = MemoryStore()
    store.put(key, folder / "spool")
    return store


def assert_same(a: AnnotationRow, b: AnnotationRow) -> None:
    for f in fields(AnnotationRow):
        if f.name != "detections":
            assert getattr(a, f.name) == getattr(b, f.name), f.name
    assert len(a.detections) == len(b.detections)
    if len(a.detections):
        for f in fields(Detections):
            one, other = getattr(a.detections, f.name), getattr(b.detections, f.name)
            if one is None or other is None:
                assert one is other, f.name
                continue
            assert one.dtype == other.dtype, f.name
            np.testing.assert_array_equal(one, other, err_msg=f.name)


@st.composite
def detections(draw: st.DrawFn) -> Detections:
    n = draw(st.integers(0, 5))
    f32 = st.floats(0, 1, width=32)

    def array(shape: tuple[int, ...], elements: st.SearchStrategy[float]) -> np.ndarray:
        return draw(hnp.arrays(np.float32, shape, elements=elements))

    corners = array((n, 2, 2), f32) * np.array([WIDTH, HEIGHT], np.float32)
    return Detections(
        boxes=np.sort(corners, axis=1).reshape(n, 4),
        scores=array((n,), f32),
        category_ids=draw(hnp.arrays(np.int16, n, elements=st.integers(0, 2))),
        topk_ids=draw(hnp.arrays(np.int16, (n, 3), elements=st.integers(0, 2))),
        topk_scores=array((n, 3), f32),
        box_std=array((n, 4), st.floats(0, 100, width=32)),
        box_entropy=array((n,), st.floats(0, 3, width=32)),
        anchor=draw(hnp.arrays(np.int32, n, elements=st.integers(0, 8400))),
    )


@st.composite
def annotation_rows(draw: st.DrawFn) -> AnnotationRow:
    status = draw(st.sampled_from(STATUSES))
    names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
    if status != "ok":
        why = draw(names)
        return row(draw(names), status=status, error=why, offset=draw(st.none() | st.just(7)))
    return replace(
        row(draw(names), detections=draw(detections()), size=(WIDTH, HEIGHT)),
        offset=draw(st.none() | st.integers(0, 2**40)),
        phash=draw(st.none() | st.integers(0, 2**64 - 1)),
        exif_orientation=draw(st.integers(1, 8)),
    )


@settings(max_examples=50)
@given(rows=st.lists(annotation_rows(), max_size=6))
def test_rows_come_back_as_they_were(
    rows: list[AnnotationRow], tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = written(rows, tmp_path_factory.mktemp("spool"))
    again = list(read_rows(store, "annotations/a.parquet"))
    assert len(again) == len(rows)
    for a, b in zip(rows, again, strict=True):
        assert_same(a, b)


def test_more_rows_than_a_row_group(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        row(f"{i}.jpg", detections=random_boxes(rng, i % 4, WIDTH, HEIGHT))
        for i in range(2 * ROW_GROUP_ROWS + 5)
    ]
    store = written(rows, tmp_path)
    assert len(list(read_tables(store, "annotations/a.parquet"))) == 3
    again = list(read_rows(store, "annotations/a.parquet"))
    assert [r.image_id for r in again] == [r.image_id for r in rows]
    for a, b in zip(rows, again, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("rows", [[], [row("a.jpg")], [row("a.jpg", status="missing")] * 3])
def test_without_a_box(rows: list[AnnotationRow], tmp_path: Path) -> None:
    store = written(rows, tmp_path)
    again = list(read_rows(store, "annotations/a.parquet"))
    assert [r.image_id for r in again] == [r.image_id for r in rows]
    assert all(len(r.detections) == 0 for r in again)
    assert pq.read_schema(tmp_path / "spool").remove_metadata().equals(SCHEMA)


def test_schema_is_the_documented_one(tmp_path: Path) -> None:
    written([row("a.jpg", detections=boxes([(1, 2, 3, 4)], [0.5], [1]))], tmp_path)
    assert pq.read_schema(tmp_path / "spool").remove_metadata().equals(SCHEMA)
    metadata = json.loads(pq.read_metadata(tmp_path / "spool").metadata[METADATA_KEY])
    assert metadata["schema_version"] == 3
    assert metadata["box"] == "xyxy, pixels of the upright image"
    assert metadata["run"]["categories"][2] == {"id": 2, "name": "Platelets", "official_id": 3}
    assert metadata["shard"]["counts"] == {
        "ok": 1, "undecodable": 0, "too_large": 0, "unsupported": 0, "missing": 0,
        "not_finite": 0,
    }  # fmt: skip


ONE = boxes([(10, 10, 20, 20)], [0.9], [0])


def changed(**arrays: object) -> Detections:
    typed = {name: np.asarray(v, getattr(ONE, name).dtype) for name, v in arrays.items()}
    return replace(ONE, **typed)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (replace(row("x"), status="fine"), "unknown status 'fine'"),
        (replace(row("x"), error="but why"), "status ok with error"),
        (replace(row("x", status="missing"), error=None), "status missing with error None"),
        (row("x", size=(0, 480)), "without a size"),
        (row("x", status="undecodable", detections=ONE), "detections on an image of status"),
        (row("x", detections=changed(boxes=[[1, 2, np.nan, 4]])), "not finite"),
        (row("x", detections=changed(box_std=[[1, 2, np.inf, 4]])), "not finite"),
        (row("x", detections=changed(box_entropy=[np.nan])), "not finite"),
        (row("x", detections=changed(scores=[1.5])), "score outside"),
        (row("x", detections=changed(scores=[np.nan])), "score outside"),
        (row("x", detections=changed(scores=[-0.1])), "score outside"),
        (row("x", detections=changed(topk_scores=[[np.nan] * 3])), "not finite"),
        (row("x", detections=changed(boxes=[[20, 10, 10, 20]])), "negative extent"),
        (row("x", detections=changed(boxes=[[10, 20, 20, 10]])), "negative extent"),
        (row("x", detections=changed(category_ids=[3])), "category id outside 0..2"),
        (row("x", detections=changed(category_ids=[-1])), "category id outside 0..2"),
        (row("x", detections=replace(ONE, anchor=np.zeros(2, np.int32))), "anchor"),
        (row("x", detections=replace(ONE, boxes=np.zeros((1, 3), np.float32))), "boxes"),
    ],
)
def test_untrue_rows_are_refused(bad: AnnotationRow, says: str, tmp_path: Path) -> None:
    writer = RowWriter(tmp_path / "spool", identity())
    writer.write(row("before", detections=ONE))
    writer.write(bad)
    writer.write(row("behind"))
    with pytest.raises(InvalidRow, match=says) as refused:
        writer.finish("a", "a.tar", "attempt-1")
    assert "'x' in shard" in str(refused.value)


def test_an_untrue_row_of_a_full_row_group_is_refused_at_once(tmp_path: Path) -> None:
    writer = RowWriter(tmp_path / "spool", identity())
    writer.write(row("x", detections=changed(scores=[1.5])))
    for i in range(ROW_GROUP_ROWS - 2):
        writer.write(row(f"{i}.jpg", detections=ONE))
    with pytest.raises(InvalidRow, match="'x' in shard"):
        writer.write(row("last.jpg", detections=ONE))
    writer.abandon()


def test_rows_of_one_shard_may_differ_in_topk_only_by_being_empty(tmp_path: Path) -> None:
    with_box = row("a", detections=ONE)
    store = written([row("b", detections=Detections.empty(1)), with_box], tmp_path)
    assert_same(list(read_rows(store, "annotations/a.parquet"))[1], with_box)


class CountingStore(MemoryStore):
    """Notes how many bytes were read in ranges; refuses whole reads."""

    read_nbytes = 0

    def get_range(
        self, key: str, offset: int, nbytes: int, *, if_match: str | None = None
    ) -> bytes:
        self.read_nbytes += nbytes
        return super().get_range(key, offset, nbytes, if_match=if_match)

    def get(self, key: str, *, if_match: str | None = None) -> bytes:
        raise AssertionError("a footer is read by its range")


def test_footer_is_read_without_the_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    writer = RowWriter(tmp_path / "spool", identity())
    for i in range(400):
        writer.write(row(f"{i}.jpg", detections=random_boxes(rng, 60, WIDTH, HEIGHT)))
    writer.write(row("bad.jpg", status="too_large"))
    said = writer.finish(
        "a", "a.tar", "attempt-7", source_truncated="at byte 9", seconds={"infer": 1.25}
    )
    store = CountingStore()
    store.put("annotations/a.parquet", tmp_path / "spool")
    listed = store.head("annotations/a.parquet")
    footer = read_footer(store, listed)
    assert footer == said
    assert footer.images == 401
    assert footer.counts["too_large"] == 1
    assert footer.detections == 400 * 60
    assert (footer.attempt, footer.source_truncated) == ("attempt-7", "at byte 9")
    assert store.read_nbytes < listed.nbytes / 10


def test_identity_comes_with_every_object(tmp_path: Path) -> None:
    assert read_identity(written([], tmp_path), "annotations/a.parquet") == identity()


def foreign(kind: str) -> bytes:
    if kind == "not Parquet":
        return b"PAR1 but not really"
    if kind == "empty":
        return b""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"image_id": ["x"]}), sink)
    whole = sink.getvalue().to_pybytes()
    return whole[: len(whole) // 2] if kind == "half" else whole


@pytest.mark.parametrize("kind", ["not Parquet", "empty", "half", "somebody else's"])
def test_a_foreign_object_is_named(kind: str) -> None:
    store = MemoryStore()
    store.put("annotations/x.parquet", foreign(kind))
    with pytest.raises(StorageError, match=r"annotations/x\.parquet"):
        read_footer(store, store.head("annotations/x.parquet"))
    with pytest.raises(StorageError, match=r"annotations/x\.parquet"):
        list(read_rows(store, "annotations/x.parquet"))
    with pytest.raises(StorageError, match=r"annotations/x\.parquet"):
        read_identity(store, "annotations/x.parquet")


def test_a_newer_schema_is_refused_not_misread(tmp_path: Path) -> None:
    store = written([row("a.jpg")], tmp_path)
    table = pq.read_table(tmp_path / "spool")
    metadata = json.loads(pq.read_metadata(tmp_path / "spool").metadata[METADATA_KEY])
    metadata["schema_version"] = 4
    metadata.pop("seal")
    newer = table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata)})
    pq.write_table(newer, tmp_path / "newer")
    store.put("annotations/n.parquet", tmp_path / "newer")
    for read in (lambda k: read_footer(store, store.head(k)), lambda k: list(read_rows(store, k))):
        with pytest.raises(StorageError, match="schema version 4"):
            read("annotations/n.parquet")


def test_frames_and_warnings_come_back_and_are_counted(tmp_path: Path) -> None:
    rows = [
        row("a.tif", frames=12),
        row("b.jpg", warning="trailing bytes: 9 after the end; ignored colour profile: P3"),
        row("c.jpg", warning="trailing bytes: 1 after the end"),
        row("d.jpg", status="undecodable"),
    ]
    store = written(rows, tmp_path)
    again = list(read_rows(store, "annotations/a.parquet"))
    assert [r.frames for r in again] == [12, 1, 1, None]
    assert [r.warning for r in again] == [r.warning for r in rows]
    footer = read_footer(store, store.head("annotations/a.parquet"))
    assert footer.warnings == {"trailing bytes": 2, "ignored colour profile": 1}


def test_an_object_of_schema_version_1_reads_as_rows_without_warnings(tmp_path: Path) -> None:
    store = written([row("a.jpg", warning="premature end: x"), row("b.jpg")], tmp_path)
    metadata = json.loads(pq.read_metadata(tmp_path / "spool").metadata[METADATA_KEY])
    metadata["schema_version"] = 1
    del metadata["shard"]["warnings"], metadata["seal"]
    table = pq.read_table(tmp_path / "spool").drop_columns(["frames", "warning"])
    older = table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata)})
    pq.write_table(older, tmp_path / "older")
    store.put("annotations/o.parquet", tmp_path / "older")
    again = list(read_rows(store, "annotations/o.parquet"))
    assert [(r.image_id, r.frames, r.warning) for r in again] == [
        ("a.jpg", None, None), ("b.jpg", None, None)
    ]  # fmt: skip
    (part,) = read_tables(store, "annotations/o.parquet", ["image_id", "warning"])
    assert part.to_pydict() == {"image_id": ["a.jpg", "b.jpg"], "warning": [None, None]}
    assert read_footer(store, store.head("annotations/o.parquet")).warnings == {}
