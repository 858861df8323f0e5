"""The queue's and the answers' Parquet: what is written comes back, parts are only ever added."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from storage.errors import ReviewError, StorageError
from storage.objects.protocols import ObjectStore
from storage.review.answers import (
    ANSWERS,
    Answer,
    DeletedBox,
    ReviewedBox,
    answer_parts,
    append_answers,
    latest_versions,
    read_answers,
    standing,
)
from storage.review.frames import Frames, read_frame, shard_numbers, write_frame
from storage.review.queue import (
    QueueHead,
    Reason,
    ReviewItem,
    Stratum,
    queue_parts,
    read_head,
    read_queue,
    write_queue,
)
from storage.stores.open import open_store


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path))


HEAD = QueueHead(
    invocation="20260131T120000Z-1f3a9c",
    made_at="2026-01-31T12:00:00+00:00",
    seed=7,
    budget="500 images",
    audit=0.2,
    cost={"per_image_s": 7.8},
    policy={"accept": 0.7, "reject": 0.1},
    model_sha256="ab" * 32,
    strata=(Stratum("20260131T120000Z-1f3a9c", 1000, 100),),
    frame="review/frames/x.parquet",
    passed_over={"near_duplicate": 3},
)

Folders = pytest.TempPathFactory
text = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
coordinate = st.floats(0, 1e4, width=32)
box = st.tuples(coordinate, coordinate, coordinate, coordinate)
score = st.none() | st.floats(0, 1, width=32)
answers = st.builds(
    Answer,
    image_id=text,
    sha256=text,
    task_id=st.integers(0, 2**62),
    annotation_id=st.integers(0, 2**62),
    annotator=text,
    lead_time_s=st.none() | st.floats(0, 1e5),
    submitted_at=st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),
    skipped=st.booleans(),
    boxes=st.lists(
        st.builds(
            ReviewedBox, box, text, st.sampled_from(["kept", "moved", "relabelled", "added"]), score
        ),
        max_size=3,
    ).map(tuple),
    deleted=st.lists(st.builds(DeletedBox, box, text, score), max_size=2).map(tuple),
    model_version=text,
    was_blind=st.booleans(),
    unusable=st.lists(text, max_size=2).map(tuple),
    withdrawn=st.sampled_from(["", "deleted", "retracted"]),
    project=text,
)
items = st.builds(
    ReviewItem,
    image_id=text,
    shard_id=text,
    offset=st.none() | st.integers(0, 2**50),
    nbytes=st.integers(0, 2**50),
    sha256=text,
    phash=st.none() | st.integers(0, 2**64 - 1),
    width=st.integers(1, 2**30),
    height=st.integers(1, 2**30),
    order=st.integers(0, 2**30),
    part=st.sampled_from(["audit", "value"]),
    show=st.booleans(),
    stratum=text,
    audit_rank=st.integers(-1, 2**40),
    inclusion=st.floats(0, 1),
    value=st.floats(0, 1e6),
    seconds=st.floats(0, 1e6),
    reasons=st.lists(st.builds(Reason, text, st.floats(0, 1e3), text), max_size=3).map(tuple),
)


@settings(max_examples=40, deadline=None)
@given(drawn=st.lists(items, max_size=5))
def test_queue_comes_back(tmp_path_factory: Folders, drawn: list[ReviewItem]) -> None:
    store = open_store(str(tmp_path_factory.mktemp("run")))
    key = write_queue(store, 0, HEAD, drawn)
    assert list(read_queue(store, hidden=True)) == drawn
    assert list(read_queue(store)) == [item for item in drawn if item.show]
    assert read_head(store, key) == HEAD


@settings(max_examples=40, deadline=None)
@given(given_answers=st.lists(answers, min_size=1, max_size=4))
def test_answers_come_back(tmp_path_factory: Folders, given_answers: list[Answer]) -> None:
    store = open_store(str(tmp_path_factory.mktemp("run")))
    append_answers(store, given_answers)
    assert list(read_answers(store)) == given_answers


def _answer(image: str, minute: int = 0) -> Answer:
    return Answer(
        image, "s" + image, 1, minute, "ann", 12.5,
        datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=minute),
        False, (ReviewedBox((1, 2, 3, 4), "RBC", "kept", 0.5),), (), "m", False,
    )  # fmt: skip


def test_answers_are_only_ever_added(store: ObjectStore) -> None:
    assert append_answers(store, []) is None
    first = append_answers(store, [_answer("a")])
    before = store.get(str(first))
    second = append_answers(store, [_answer("b"), _answer("c")])
    assert answer_parts(store) == [first, second]
    assert store.get(str(first)) == before
    assert [a.image_id for a in read_answers(store)] == ["a", "b", "c"]


def test_parts_of_an_older_version_are_read(store: ObjectStore, tmp_path: Path) -> None:
    key = str(append_answers(store, [_answer("a")]))
    table = pq.read_table(tmp_path / key).drop_columns(["unusable", "withdrawn", "project"])
    with pq.ParquetWriter(tmp_path / key, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"labelfleet": '{"schema_version": 1, "answers": 1}'})
    assert list(read_answers(store)) == [_answer("a")]


def test_the_last_version_of_an_annotation_stands_unless_it_was_withdrawn() -> None:
    first, edited = _answer("a", 1), replace(_answer("a", 2), annotation_id=1)
    other = _answer("b", 1)
    gone = replace(edited, withdrawn="deleted")
    assert standing([first, edited, other]) == [edited, other]
    assert standing([first, edited, other, gone]) == [other]
    assert standing([edited, other, gone, edited]) == [edited, other]  # it came back


def test_an_answer_that_one_of_two_runs_saw_withdrawn_does_not_stand() -> None:
    answer = _answer("a", 1)
    gone = replace(answer, withdrawn="deleted")
    assert standing([answer, gone], [answer]) == []
    assert standing([answer], [answer, gone]) == []
    later = replace(_answer("a", 2), annotation_id=1)  # edited after that
    assert standing([answer, gone], [later]) == [later]


def test_parts_are_ordered_by_number_and_strangers_are_passed_over(store: ObjectStore) -> None:
    for n in range(12):
        append_answers(store, [_answer(str(n))])
    store.put(f"{ANSWERS}notes.txt", b"mine")
    store.put(f"{ANSWERS}x1.parquet", b"mine")
    assert [a.image_id for a in read_answers(store)] == [str(n) for n in range(12)]


def test_two_routings_cannot_both_write_the_next_part(store: ObjectStore) -> None:
    write_queue(store, 0, HEAD, [])
    with pytest.raises(ReviewError, match="another routing"):
        write_queue(store, 0, HEAD, [])
    assert len(queue_parts(store)) == 1


def test_a_part_that_is_not_ours_is_an_error_with_its_key(store: ObjectStore) -> None:
    store.put(f"{ANSWERS}000000.parquet", b"not parquet")
    with pytest.raises(StorageError, match=r"answers/000000\.parquet"):
        list(read_answers(store))


def test_other_tools_read_the_answers(store: ObjectStore, tmp_path: Path) -> None:
    key = append_answers(store, [_answer("a")])
    row = pq.read_table(tmp_path / str(key)).to_pylist()[0]
    assert row["boxes"][0]["bbox"] == [1, 2, 3, 4]
    assert row["boxes"][0]["category"] == "RBC"


def test_frames_give_each_shard_its_first_stratum(store: ObjectStore) -> None:
    old = [f"{n:016x}" for n in (3, 2**64 - 1, 0)]
    new = [f"{n:016x}" for n in (3, 5)]
    key = write_frame(store, shard_numbers(old))
    frames = Frames([("first", read_frame(store, key)), ("second", shard_numbers(new))])
    assert [frames.stratum_of(s) for s in old] == ["first"] * 3
    assert frames.stratum_of(f"{5:016x}") == "second"
    assert frames.stratum_of(f"{6:016x}") is None
    assert read_frame(store, key).dtype == np.uint64


def test_annotations_of_two_servers_with_equal_numbers_are_two() -> None:
    anna = replace(_answer("a", 1), annotator="anna", project="1@monday")
    ben = replace(_answer("a", 2), annotation_id=1, annotator="ben", project="1@tuesday")
    withdrawn = replace(ben, withdrawn="retracted")
    assert standing([anna], [ben]) == [anna, ben]
    assert standing([anna, ben]) == [anna, ben]
    assert standing([anna], [withdrawn]) == [anna]
    assert standing([anna, ben, withdrawn]) == [anna]
    assert list(latest_versions([anna, ben])) == [anna.annotation, ben.annotation]


def test_a_record_without_a_project_is_a_version_of_the_one_annotation_that_fits() -> None:
    old = replace(_answer("a", 1), annotator="anna")
    named = replace(old, project="1@monday")
    edited = replace(named, submitted_at=_answer("a", 2).submitted_at)
    assert standing([old, edited]) == standing([old], [edited]) == [edited]
    assert standing([old, replace(old, withdrawn="deleted"), named]) == [named]  # it came back
    assert standing([old], [named, replace(named, withdrawn="retracted")]) == []
    assert latest_versions([old, edited]) == {edited.annotation: edited}
    ben = replace(edited, annotator="ben", project="1@tuesday")
    gone = replace(edited, withdrawn="deleted")
    assert standing([old], [gone], [ben]) == [ben]  # of two projects, the annotator tells which
    stranger = replace(old, annotator="eve")
    assert standing([stranger], [edited], [ben]) == [stranger, edited, ben]
    # Which project an old record belongs to is known from its own run first.
    assert standing([old, gone], [ben]) == [ben]
