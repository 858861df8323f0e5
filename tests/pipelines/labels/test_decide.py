"""Merging: people's word stands, the model's is judged by policy, nothing is lost or mixed up."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from pipelines.labels.decide import decide_run, read_set_aside
from pipelines.labels.diff import diff_versions
from pipelines.policy.policy import Calibration, Curve, Policy
from pipelines.routing.route import route_run
from pipelines.truth.compared import from_jsonl
from storage.errors import ConfigError
from storage.labels.rows import LabelRow, label_rows
from storage.labels.versions import LabelVersion, read_label_tables, read_version
from storage.records import AnnotationRow, Detections
from storage.review.answers import Answer, ReviewedBox, append_answers
from storage.review.queue import read_queue
from storage.review.settings import ReviewSettings, write_settings
from storage.runs.live_rows import live_rows
from storage.runs.manifest import Manifest
from storage.stores.memory import MemoryStore
from tests.support.samples.review_runs import (
    add_shards,
    distinct_row,
    one_box,
    random_run,
    random_shards,
)
from tests.support.samples.synthetic_run import boxes, make_run, tar_shard

POLICY = Policy(accept=0.7, reject=0.1)
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def answer(
    row: AnnotationRow,
    *made: ReviewedBox,
    by: str = "ann",
    minute: int = 0,
    skipped: bool = False,
    annotation_id: int = 1,
) -> Answer:
    return Answer(
        row.image_id, row.sha256, 1, annotation_id, by, 20.0, NOON + timedelta(minutes=minute),
        skipped, made, (), "m", False,
    )  # fmt: skip


def drawn(x: float = 10, category: str = "RBC", size: float = 100) -> ReviewedBox:
    return ReviewedBox((x, 10, x + size, 10 + size), category, "added")


def rows_of(manifest: Manifest, version: LabelVersion) -> list[LabelRow]:
    return [r for t in read_label_tables(manifest.store, version) for r in label_rows(t)]


def test_without_answers_every_box_is_label_ignored_or_rejected() -> None:
    manifest = random_run(MemoryStore(), 5, 30)
    version = decide_run(manifest, POLICY)
    labelled = rows_of(manifest, version)
    live = list(live_rows(manifest))
    assert [(r.image_id, r.sha256, r.width) for r in labelled] == [
        (r.image_id, r.sha256, r.width) for r in live
    ]
    for made, row in zip(labelled, live, strict=True):
        assert len(made.labels) + made.rejected == len(row.detections)
        scores = np.array([x.score for x in made.labels], np.float32)
        ignored = np.array([x.ignore for x in made.labels], np.bool_)
        np.testing.assert_array_equal(ignored, scores < np.float32(0.7))
        assert (scores >= np.float32(0.1)).all()
    counts = version.counts
    assert counts["images_model"] == 150
    total = sum(len(r.detections) for r in live)
    assert counts["labels"] + counts["ignored"] + counts["rejected"] == total


def test_an_answer_replaces_the_whole_image_and_says_whose_it_is() -> None:
    shard = tar_shard("a.tar")
    rows = [distinct_row(f"a.tar/{i}.jpg", shard, one_box(0.95)) for i in range(3)]
    manifest = make_run(MemoryStore(), {shard: rows})
    append_answers(manifest.store, [answer(rows[1], drawn(200, "WBC"), drawn(400))])
    version = decide_run(manifest, POLICY)
    first, second, third = rows_of(manifest, version)
    assert [r.source for r in (first, second, third)] == ["model", "human", "model"]
    assert [(x.bbox, x.category_id, x.score, x.ignore, x.origin) for x in second.labels] == [
        ((200, 10, 300, 110), 1, None, False, "added"),
        ((400, 10, 500, 110), 0, None, False, "added"),
    ]
    assert (second.annotator, second.labelled_at) == ("ann", NOON)
    assert (first.annotator, first.model, first.policy) == (None, "ab" * 32, POLICY.digest())
    assert version.counts["answers_used"] == 1


def test_an_image_that_a_person_found_empty_stays_and_is_empty() -> None:
    shard = tar_shard("a.tar")
    rows = [distinct_row(f"a.tar/{i}.jpg", shard, one_box(0.95)) for i in range(2)]
    manifest = make_run(MemoryStore(), {shard: rows})
    append_answers(manifest.store, [answer(rows[0])])
    version = decide_run(manifest, POLICY)
    empty = rows_of(manifest, version)[0]
    assert (empty.source, empty.labels) == ("human", ())
    assert version.counts["images_human_empty"] == 1


def test_a_skip_replaces_nothing_and_takes_nothing_away() -> None:
    shard = tar_shard("a.tar")
    rows = [distinct_row(f"a.tar/{i}.jpg", shard, one_box(0.95)) for i in range(2)]
    manifest = make_run(MemoryStore(), {shard: rows})
    append_answers(
        manifest.store,
        [
            answer(rows[0], skipped=True),
            answer(rows[1], drawn(300)),
            answer(rows[1], by="bob", minute=5, skipped=True, annotation_id=2),
        ],
    )
    first, second = rows_of(manifest, decide_run(manifest, POLICY))
    assert (first.source, len(first.labels)) == ("model", 1)
    assert (second.source, second.labels[0].bbox[0]) == ("human", 300)


def test_an_answer_that_was_withdrawn_or_skipped_afterwards_gives_the_image_back() -> None:
    shard = tar_shard("a.tar")
    rows = [distinct_row(f"a.tar/{i}.jpg", shard, one_box(0.95)) for i in range(3)]
    manifest = make_run(MemoryStore(), {shard: rows})
    given = [answer(row, drawn(300)) for row in rows]
    append_answers(manifest.store, given)
    changed = [replace(given[0], withdrawn="deleted"), answer(rows[1], minute=5, skipped=True)]
    append_answers(manifest.store, changed)
    made = rows_of(manifest, decide_run(manifest, POLICY))
    assert [r.source for r in made] == ["model", "model", "human"]


def test_an_answer_that_cannot_become_boxes_settles_nothing() -> None:
    shard = tar_shard("a.tar")
    rows = [distinct_row(f"a.tar/{i}.jpg", shard, one_box(0.95)) for i in range(2)]
    manifest = make_run(MemoryStore(), {shard: rows})
    points = replace(answer(rows[0]), unusable=("keypointlabels",))
    append_answers(manifest.store, [points, answer(rows[1], drawn(300), drawn(50, size=0))])
    version = decide_run(manifest, POLICY)
    first, second = rows_of(manifest, version)
    assert (first.source, len(first.labels)) == ("model", 1)
    assert [x.bbox[0] for x in second.labels] == [300]
    assert version.counts["answers_unusable"] == 1
    (line,) = from_jsonl(manifest.store.get(f"{version.prefix}answered.jsonl"))
    assert (line.image_id, line.missed, line.spurious) == (rows[1].image_id, 1, 1)


def test_the_last_submission_counts_wherever_it_was_pulled() -> None:
    shard = tar_shard("a.tar")
    row = distinct_row("a.tar/0.jpg", shard)
    manifest = make_run(MemoryStore(), {shard: [row]})
    append_answers(manifest.store, [answer(row, drawn(30), minute=9, by="bob", annotation_id=2)])
    append_answers(manifest.store, [answer(row, drawn(10)), answer(row, drawn(20), minute=3)])
    (made,) = rows_of(manifest, decide_run(manifest, POLICY))
    assert [x.bbox[0] for x in made.labels] == [30]
    assert made.annotator == "bob"


def test_by_agreement_the_majority_counts_and_the_rest_is_ignored() -> None:
    shard = tar_shard("a.tar")
    row = distinct_row("a.tar/0.jpg", shard)
    manifest = make_run(MemoryStore(), {shard: [row]})
    append_answers(
        manifest.store,
        [
            answer(row, drawn(10), drawn(300), by="ann"),
            answer(row, drawn(12), by="bob", minute=1, annotation_id=2),
            answer(row, drawn(14), drawn(300, "WBC"), by="cy", minute=2, annotation_id=3),
        ],
    )
    (made,) = rows_of(manifest, decide_run(manifest, POLICY, settling="agreement"))
    assert [(x.bbox[0], x.category_id) for x in made.labels if not x.ignore] == [(14, 0)]
    assert sorted((x.bbox[0], x.category_id) for x in made.labels if x.ignore) == [
        (300, 0), (300, 1),
    ]  # fmt: skip


def test_answers_survive_a_new_checkpoint_whose_classes_are_numbered_otherwise() -> None:
    shard = tar_shard("a.tar")
    row = distinct_row("a.tar/0.jpg", shard, one_box(0.9))
    old = make_run(MemoryStore(), {shard: [row]})
    append_answers(old.store, [answer(row, drawn(50, "Platelets"))])
    new = make_run(MemoryStore(), {shard: [row]}, classes=("Platelets", "WBC", "RBC"))
    version = decide_run(new, POLICY, answers_from=[old])
    (made,) = rows_of(new, version)
    assert made.source == "human"
    assert version.categories[made.labels[0].category_id].name == "Platelets"
    assert version.answers == {old.url: ["review/answers/000000.parquet"]}


def test_an_answer_never_reaches_other_pixels_under_an_old_name() -> None:
    shard = tar_shard("a.tar")
    old = distinct_row("a.tar/0.jpg", shard, one_box(0.9))
    manifest = make_run(MemoryStore(), {shard: [old]})
    append_answers(manifest.store, [answer(old, drawn(50))])
    changed = tar_shard("a.tar", etag="2")
    new = replace(old, shard_id=changed.shard_id, sha256="ef" * 32)
    add_shards(manifest, [], {changed: [new]})
    version = decide_run(manifest, POLICY)
    (made,) = rows_of(manifest, version)
    assert (made.sha256, made.source) == ("ef" * 32, "model")
    assert version.counts["answers_unused"] == 1


def test_a_copy_under_another_name_takes_the_answer_too() -> None:
    shard = tar_shard("a.tar")
    row = distinct_row("a.tar/0.jpg", shard, one_box(0.9))
    manifest = make_run(MemoryStore(), {shard: [row, replace(row, image_id="a.tar/copy.jpg")]})
    append_answers(manifest.store, [answer(row, drawn(50))])
    assert [r.source for r in rows_of(manifest, decide_run(manifest, POLICY))] == ["human"] * 2


def test_images_that_could_not_be_labelled_are_counted_not_called_empty() -> None:
    shard = tar_shard("a.tar")
    good = distinct_row("a.tar/0.jpg", shard)
    bad = replace(distinct_row("a.tar/1.jpg", shard), status="undecodable", error="cut short")
    manifest = make_run(MemoryStore(), {shard: [good, bad]})
    version = decide_run(manifest, POLICY)
    assert [r.image_id for r in rows_of(manifest, version)] == ["a.tar/0.jpg"]
    assert version.counts["left_out_undecodable"] == 1


def test_boxes_drawn_past_the_edge_end_at_the_edge() -> None:
    shard = tar_shard("a.tar")
    row = distinct_row("a.tar/0.jpg", shard)
    manifest = make_run(MemoryStore(), {shard: [row]})
    outside = ReviewedBox((700, 10, 800, 20), "RBC", "added")
    across = ReviewedBox((-5, 470, 20, 500), "RBC", "moved", 0.4)
    append_answers(manifest.store, [answer(row, outside, across)])
    (made,) = rows_of(manifest, decide_run(manifest, POLICY))
    assert [x.bbox for x in made.labels] == [(0, 470, 20, 480)]


def test_an_answer_with_a_class_that_the_run_lacks_is_set_aside_and_holds_up_no_other() -> None:
    shard = tar_shard("a.tar")
    rows = [distinct_row(f"a.tar/{i}.jpg", shard, one_box(0.95)) for i in range(3)]
    manifest = make_run(MemoryStore(), {shard: rows})
    smudged = answer(rows[0], drawn(10, "Basophil"), drawn(300))
    append_answers(manifest.store, [smudged, answer(rows[1], drawn(300))])
    points = replace(answer(rows[2]), unusable=("keypointlabels",) * 2)
    append_answers(manifest.store, [points])
    version = decide_run(manifest, POLICY)
    assert [r.source for r in rows_of(manifest, version)] == ["model", "human", "model"]
    assert version.counts["answers_set_aside"] == 2
    assert [str(one) for one in read_set_aside(manifest, version)] == [
        "task 1 (a.tar/0.jpg) by ann: unknown class Basophil",
        "task 1 (a.tar/2.jpg) by ann: 2 keypointlabels",
    ]


def test_classes_of_answers_are_renamed_or_dropped_as_the_review_says() -> None:
    shard = tar_shard("a.tar")
    row = distinct_row("a.tar/0.jpg", shard)
    manifest = make_run(MemoryStore(), {shard: [row]})
    given = answer(row, drawn(10, "smudge"), drawn(200, "Leukocyte"), drawn(400, "RBC"))
    append_answers(manifest.store, [given])
    renamed = {"smudge": None, "Leukocyte": "WBC"}
    write_settings(manifest.store, ReviewSettings(classes=renamed))
    (made,) = rows_of(manifest, decide_run(manifest, POLICY))
    assert [(x.bbox[0], x.category_id) for x in made.labels] == [(200, 1), (400, 0)]


def test_a_new_version_leaves_the_old_one_as_it_was() -> None:
    manifest = random_run(MemoryStore(), 3, 10)
    first = decide_run(manifest, POLICY)
    before = {o.key: manifest.store.get(o.key) for o in manifest.store.list(first.prefix)}
    second = decide_run(manifest, Policy(accept=0.5, reject=0.2))
    assert (first.version, second.version) == ("v0001", "v0002")
    assert {o.key: manifest.store.get(o.key) for o in manifest.store.list(first.prefix)} == before
    assert read_version(manifest.store).version == "v0002"
    assert read_version(manifest.store, "v0001") == first
    assert Policy.from_config({"accept": 0.5, "reject": 0.2}).to_yaml().encode() == (
        manifest.store.get("labels/v0002/policy.yaml")
    )


def test_many_shards_become_several_parts_in_listing_order() -> None:
    manifest = random_run(MemoryStore(), 7, 10)
    whole = decide_run(manifest, POLICY, rows_per_part=25)
    assert [part.rows for part in whole.parts] == [30, 30, 10]
    assert [r.image_id for r in rows_of(manifest, whole)] == [
        r.image_id for r in live_rows(manifest)
    ]


def test_the_queue_and_the_answers_meet_in_answered_jsonl() -> None:
    shard = tar_shard("a.tar")
    right = distinct_row("a.tar/right.jpg", shard, one_box(0.9))
    two = boxes([[10, 10, 110, 110], [300, 300, 340, 340]], [0.9, 0.3], [0, 0])
    wrong = distinct_row("a.tar/wrong.jpg", shard, two)
    waiting = distinct_row("a.tar/open.jpg", shard, one_box(0.5))
    manifest = make_run(MemoryStore(), {shard: [right, wrong, waiting]})
    route_run(manifest, budget="3 images", policy=POLICY, invocation="i1", audit=1.0)
    truth = ReviewedBox((300, 300, 340, 340), "RBC", "kept", 0.3)
    append_answers(manifest.store, [answer(right, drawn(10)), answer(wrong, truth)])
    version = decide_run(manifest, POLICY)
    noted = {
        a.image_id: a for a in from_jsonl(manifest.store.get(f"{version.prefix}answered.jsonl"))
    }
    assert set(noted) == {i.image_id for i in read_queue(manifest.store)}
    assert noted["a.tar/right.jpg"].right == 1
    assert noted["a.tar/right.jpg"].errors == 0
    found = noted["a.tar/wrong.jpg"]
    assert (found.spurious, found.missed, found.missed_ignored) == (1, 1, 1)
    assert (found.part, found.stratum_images, found.lead_time_s) == ("audit", 3, 20.0)
    assert noted["a.tar/open.jpg"].state == "open"


def test_diff_says_what_changed() -> None:
    shard = tar_shard("a.tar")
    two = boxes([[10, 10, 110, 110], [300, 300, 400, 400]], [0.9, 0.6], [0, 1])
    rows = [distinct_row(f"a.tar/{i}.jpg", shard, two) for i in range(4)]
    manifest = make_run(MemoryStore(), {shard: rows})
    decide_run(manifest, POLICY)
    append_answers(
        manifest.store,
        [
            answer(rows[1], ReviewedBox((12, 10, 112, 110), "RBC", "moved", 0.9)),
            answer(rows[2], ReviewedBox((10, 10, 110, 110), "WBC", "relabelled", 0.9),
                   drawn(500)),
        ],
    )  # fmt: skip
    decide_run(manifest, POLICY)
    found = diff_versions(manifest, "v0001", "latest")
    assert found.images == {
        "added": 0, "removed": 0, "changed": 2, "unchanged": 2, "to_human": 2, "to_model": 0,
    }  # fmt: skip
    assert found.boxes == {
        "added": 1, "removed": 2, "moved": 1, "relabelled": 1, "to_label": 0, "to_ignore": 0,
        "unchanged": 4,
    }  # fmt: skip
    assert found.labels_by_class == {"RBC": (4, 4), "WBC": (0, 1), "Platelets": (0, 0)}
    assert found.examples == ("a.tar/1.jpg", "a.tar/2.jpg")


def test_diff_follows_the_policy_and_new_shards() -> None:
    store = MemoryStore()
    first = random_shards(3, 20)
    manifest = make_run(store, first)
    decide_run(manifest, POLICY)
    add_shards(manifest, list(first)[1:], random_shards(2, 20, seed=5, first=3))
    decide_run(manifest, Policy(accept=0.9, reject=0.1))
    found = diff_versions(manifest, "v0001", "v0002")
    assert (found.images["removed"], found.images["added"]) == (20, 40)
    assert found.boxes["to_ignore"] > 0
    assert found.boxes["to_label"] == found.boxes["added"] == found.boxes["removed"] == 0
    same = diff_versions(manifest, "v0002", "v0002")
    assert same.images["unchanged"] == 80
    assert same.boxes["moved"] == same.boxes["to_ignore"] == 0


def test_a_version_that_is_not_there_names_those_that_are() -> None:
    manifest = random_run(MemoryStore(), 1, 1)
    with pytest.raises(ConfigError, match="no label version yet"):
        diff_versions(manifest, "latest", "latest")
    decide_run(manifest, POLICY)
    with pytest.raises(ConfigError, match="v0009") as caught:
        diff_versions(manifest, "v0001", "v0009")
    assert "v0001" in str(caught.value.hint)


def alternatives_of(manifest: Manifest, version: LabelVersion) -> list[dict[str, Any]]:
    raw = manifest.store.get(f"{version.prefix}alternatives.jsonl")
    return [json.loads(line) for line in raw.splitlines()]


def one_image(found: Detections) -> Manifest:
    shard = tar_shard("a.tar")
    return make_run(MemoryStore(), {shard: [distinct_row("a.tar/0.jpg", shard, found)]})


def test_boxes_are_clipped_and_what_lies_outside_is_counted() -> None:
    manifest = one_image(
        boxes(
            [(-9, -4, 30, 40), (600, 400, 700, 490), (650, 5, 700, 50)], [0.9, 0.8, 0.75], [0, 1, 2]
        )
    )
    version = decide_run(manifest, POLICY)
    (row,) = rows_of(manifest, version)
    assert [x.bbox for x in row.labels] == [(0, 0, 30, 40), (600, 400, 640, 480)]
    assert row.rejected == 1
    assert (version.counts["rejected"], version.counts["rejected_outside"]) == (1, 1)


def test_one_object_has_one_label_and_the_loser_is_kept_as_an_alternative() -> None:
    at = [(10, 10, 110, 110), (12, 10, 110, 110), (300, 10, 400, 110), (302, 10, 402, 110)]
    manifest = one_image(boxes(at, [0.9, 0.8, 0.75, 0.5], [0, 1, 1, 2]))
    version = decide_run(manifest, POLICY)
    (row,) = rows_of(manifest, version)
    assert [(x.category_id, x.ignore) for x in row.labels] == [(0, False), (1, False)]
    assert (row.rejected, version.counts["rejected_alternative"]) == (2, 2)
    first, second = alternatives_of(manifest, version)
    assert (first["box"]["category"], first["label"]["category"]) == ("WBC", "RBC")
    assert (second["box"]["category"], second["label"]["category"]) == ("Platelets", "WBC")
    assert first["image_id"] == "a.tar/0.jpg"
    assert first["iou"] == pytest.approx(0.98)


def test_the_step_can_be_turned_off_and_keeps_objects_that_only_touch() -> None:
    at = [(10, 10, 110, 110), (12, 10, 110, 110)]
    manifest = one_image(boxes(at, [0.9, 0.8], [0, 1]))
    off = decide_run(manifest, Policy(accept=0.7, reject=0.1, one_object=None))
    assert off.counts["labels"] == 2
    apart = one_image(boxes([(0, 0, 100, 100), (0, 12, 100, 112)], [0.9, 0.8], [0, 1]))  # IoU 0.79
    assert decide_run(apart, POLICY).counts["labels"] == 2


def test_the_likelier_class_wins_by_calibrated_probability() -> None:
    low = Curve(scores=(0.0, 1.0), probabilities=(0.0, 0.5))
    high = Curve(scores=(0.0, 1.0), probabilities=(0.5, 1.0))
    calibration = Calibration(all=high, classes={"RBC": low}, iou=0.5)
    manifest = one_image(boxes([(10, 10, 110, 110)] * 2, [0.9, 0.8], [0, 1]))
    version = decide_run(manifest, Policy(accept=0.4, reject=0.1, calibration=calibration))
    (row,) = rows_of(manifest, version)
    assert [x.category_id for x in row.labels] == [1]  # 0.45 against 0.9


def test_a_contested_class_is_a_reason_for_review() -> None:
    manifest = one_image(boxes([(10, 10, 110, 110)] * 2, [0.99, 0.98], [0, 1]))
    route_run(manifest, budget="1 images", policy=POLICY, invocation="i1", audit=0.0)
    (item,) = read_queue(manifest.store)
    assert item.reasons[0].signal == "contested_class"
