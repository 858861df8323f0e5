"""What a reviewer was not shown stays the model's word; an audit image is answered whole."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from pipelines.labels.decide import decide_run
from pipelines.policy.policy import Policy
from pipelines.review.hidden import with_hidden
from pipelines.review.tasks import queued, shown_boxes
from pipelines.routing.route import route_run
from pipelines.truth.compared import from_jsonl
from pipelines.truth.judge import answered_images
from storage.labels.rows import Label, label_rows
from storage.labels.versions import read_label_tables
from storage.review.answers import Answer, DeletedBox, ReviewedBox, append_answers, read_answers
from storage.runs.manifest import Manifest
from storage.stores.memory import MemoryStore
from tests.support.samples.review_runs import distinct_row
from tests.support.samples.synthetic_run import boxes, make_run, tar_shard

POLICY = Policy(accept=0.7, reject=0.1)
SURE, UNSURE = (10.0, 10.0, 110.0, 110.0), (300.0, 10.0, 400.0, 110.0)
FAINT, TWIN = (10.0, 300.0, 60.0, 350.0), (12.0, 10.0, 112.0, 110.0)


@pytest.fixture
def manifest() -> Manifest:
    """One image: a box that is shown, its twin of another class, an unsure box, a faint one."""
    found = boxes([SURE, TWIN, UNSURE, FAINT], [0.9, 0.8, 0.4, 0.06], [0, 1, 1, 2])
    shard = tar_shard("a.tar")
    return make_run(MemoryStore(), {shard: [distinct_row("a.tar/0.jpg", shard, found)]})


def answered(manifest: Manifest, *left: ReviewedBox, audit: float = 0.0, **changes: Any) -> Answer:
    """Route the image, answer it as read from Label Studio, and keep what a pull would keep."""
    route_run(manifest, budget="1 image", policy=POLICY, invocation="i1", audit=audit)
    (one,) = wanted = queued(manifest)
    shown = tuple(box.bbox for box in shown_boxes(manifest, wanted)[one.item.sha256])
    assert shown == (SURE,)
    made = Answer(
        one.item.image_id, one.item.sha256, 1, 1, "ann", 20.0, datetime(2026, 1, 1, tzinfo=UTC),
        False, left, (), "m", False, shown=shown,
    )  # fmt: skip
    (made,) = with_hidden(manifest, wanted, [replace(made, **changes)])
    append_answers(manifest.store, [made])
    (kept_there,) = read_answers(manifest.store)
    assert (kept_there.shown, kept_there.hidden) == (made.shown, made.hidden)
    return made


def labels(manifest: Manifest, policy: Policy = POLICY) -> tuple[Label, ...]:
    version = decide_run(manifest, policy)
    (row,) = [r for t in read_label_tables(manifest.store, version) for r in label_rows(t)]
    assert row.source == "human"
    return row.labels


def kept(box: tuple[float, float, float, float] = SURE) -> ReviewedBox:
    return ReviewedBox(box, "RBC", "kept", 0.9)


def told(made: tuple[Label, ...]) -> list[tuple[Any, ...]]:
    return [(label.bbox, label.category_id, label.ignore, label.origin) for label in made]


def test_an_unchanged_submit_says_what_was_shown_and_leaves_the_rest_to_the_policy(
    manifest: Manifest,
) -> None:
    assert set(answered(manifest, kept()).hidden) == {UNSURE, FAINT}
    assert told(labels(manifest)) == [(SURE, 0, False, "kept"), (UNSURE, 1, True, "model")]
    lower = Policy(accept=0.3, reject=0.05)
    assert told(labels(manifest, lower)) == [
        (SURE, 0, False, "kept"), (UNSURE, 1, False, "model"), (FAINT, 2, True, "model"),
    ]  # fmt: skip


def test_taking_the_shown_box_away_answers_its_place_for_every_class(manifest: Manifest) -> None:
    gone = (DeletedBox(SURE, "RBC", 0.9),)
    assert set(answered(manifest, deleted=gone).hidden) == {UNSURE, FAINT}
    assert told(labels(manifest)) == [(UNSURE, 1, True, "model")]


def test_a_hidden_neighbour_does_not_bring_back_a_shown_box_that_was_removed() -> None:
    """The second box overlaps both the deleted one and the hidden one by 0.6."""
    between, hidden = (35.0, 10.0, 135.0, 110.0), (60.0, 10.0, 160.0, 110.0)
    shard = tar_shard("a.tar")
    found = boxes([SURE, between, hidden], [0.9, 0.4, 0.35], [0, 1, 1])
    run = make_run(MemoryStore(), {shard: [distinct_row("a.tar/0.jpg", shard, found)]})
    gone = (DeletedBox(SURE, "RBC", 0.9),)
    assert answered(run, deleted=gone).hidden == (hidden,)
    lower = Policy(accept=0.3, reject=0.05)
    assert told(labels(run, lower)) == [(hidden, 1, False, "model")]


def test_a_hidden_box_that_the_person_drew_is_theirs(manifest: Manifest) -> None:
    drawn = ReviewedBox((301, 10, 399, 110), "RBC", "added")
    assert answered(manifest, kept(), drawn).hidden == (FAINT,)
    assert told(labels(manifest)) == [
        (SURE, 0, False, "kept"), ((301, 10, 399, 110), 0, False, "added"),
    ]  # fmt: skip


def test_hidden_boxes_are_neither_right_nor_wrong_in_what_an_answer_is_compared_with(
    manifest: Manifest,
) -> None:
    answered(manifest, kept())
    version = decide_run(manifest, Policy(accept=0.3, reject=0.05))
    (line,) = from_jsonl(manifest.store.get(f"{version.prefix}answered.jsonl"))
    assert (line.part, line.right, line.errors) == ("value", 1, 0)


def test_an_audit_image_is_answered_whole(manifest: Manifest) -> None:
    assert answered(manifest, kept(), audit=1.0).hidden == ()
    assert told(labels(manifest)) == [(SURE, 0, False, "kept")]
    ((row, true, _),) = answered_images(manifest)
    assert true.right(row.detections.boxes, row.detections.category_ids).tolist() == [
        True, False, False, False,
    ]  # fmt: skip
    version = decide_run(manifest, Policy(accept=0.3, reject=0.05))
    (line,) = from_jsonl(manifest.store.get(f"{version.prefix}answered.jsonl"))
    assert (line.part, line.right, line.spurious) == ("audit", 1, 1)


def test_an_image_without_boxes_was_drawn_from_scratch(manifest: Manifest) -> None:
    assert answered(manifest, was_blind=True).hidden == ()
    assert labels(manifest) == ()


def test_answers_of_older_versions_are_about_the_whole_image(manifest: Manifest) -> None:
    row = queued_before(manifest)
    append_answers(manifest.store, [row])
    assert told(labels(manifest)) == [(SURE, 0, False, "kept")]


def queued_before(manifest: Manifest) -> Answer:
    """An answer as parts of older versions hold it."""
    route_run(manifest, budget="1 image", policy=POLICY, invocation="i1", audit=0.0)
    (one,) = queued(manifest)
    return Answer(
        one.item.image_id, one.item.sha256, 1, 1, "ann", 20.0, datetime(2026, 1, 1, tzinfo=UTC),
        False, (kept(),), (), "m", False,
    )  # fmt: skip
