"""Audit estimates: only random answers count, each prefix is honest, every doubt is said aloud."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from pipelines.evaluation.audit import AuditReport, audit_report, audit_sample, estimate
from pipelines.labels.decide import decide_run
from pipelines.policy.policy import Policy
from pipelines.routing.route import route_run
from pipelines.truth.compared import AnsweredImage, from_jsonl, to_jsonl
from storage.review.answers import Answer, ReviewedBox, append_answers
from storage.review.queue import read_queue
from storage.runs.live_rows import live_rows
from storage.runs.manifest import Manifest
from storage.stores.memory import MemoryStore
from tests.support.samples.review_runs import random_run

POLICY = Policy(accept=0.7, reject=0.1)


def line(rank: int, state: str = "answered", **more: object) -> AnsweredImage:
    fields: dict[str, object] = {
        "image_id": f"{rank}.jpg", "sha256": f"s{rank}", "part": "audit", "run": "r",
        "stratum": "i1", "stratum_images": 1000, "audit_rank": rank, "expected_s": 30.0,
        "state": state, "right": 9, "spurious": 1, "missed": 3, "blind": True,
        "lead_time_s": 30.0,
    }  # fmt: skip
    return AnsweredImage(**{**fields, **more})  # type: ignore[arg-type]


def test_precision_and_recall_are_those_of_the_sample() -> None:
    report = estimate([line(n) for n in range(40)])
    assert report.precision.value == pytest.approx(9 / 10)
    assert report.recall.value == pytest.approx(9 / 12)
    assert report.errors_per_100_images.value == pytest.approx(400)
    assert (report.images, report.sampled) == (1000, 40)
    assert not report.recall_is_upper_bound


def test_value_answers_enter_no_estimate() -> None:
    audit = [line(n) for n in range(40)]
    value = [line(-1, part="value", right=0, spurious=50, image_id=f"v{n}") for n in range(40)]
    with_value = estimate(audit + value)
    assert with_value.precision == estimate(audit).precision
    assert with_value.value.errors == 40 * 53


def test_another_runs_audit_is_not_waited_for() -> None:
    own = [line(n) for n in range(20)]
    other = [line(n, run="s", image_id=f"o{n}") for n in range(30)]
    report = estimate(own + other, own_run="r")
    assert report.sampled == 20
    assert not any("wait" in note for note in report.notes)
    gap = estimate([line(0), line(1, "open"), line(2), *other], own_run="r")
    assert any(note.startswith("1 audit answers wait") for note in gap.notes)


def test_answers_accepted_in_bulk_end_the_sample() -> None:
    lines = [line(n) for n in range(30)] + [line(n, bulk=True) for n in range(30, 40)]
    report = estimate(lines)
    assert (report.sampled, report.audit.answered) == (30, 30)
    assert any("10 audit images were accepted in bulk" in note for note in report.notes)
    assert not any("wait" in note for note in report.notes)


def test_only_the_answered_prefix_counts() -> None:
    lines = [line(n) for n in range(20)]
    lines[10] = line(10, "open")
    lines[3] = line(3, "skipped")
    lines[0] = line(0, "not_shown")
    (members,) = audit_sample(lines[::-1], "r").values()
    assert [m.audit_rank for m in members] == [1, 2, 4, 5, 6, 7, 8, 9]
    notes = " ".join(estimate(lines).notes)
    assert "skipped" in notes
    assert "wait for those before them" in notes
    assert "only 8 audit images" in notes


def test_strata_weigh_by_their_images() -> None:
    big = [line(n, stratum_images=9000, right=5, spurious=5) for n in range(30)]
    small = [
        line(n, stratum="i2", stratum_images=1000, right=10, spurious=0, image_id=f"b{n}")
        for n in range(30)
    ]
    assert estimate(big + small).precision.value == pytest.approx(0.9 * 0.5 + 0.1 * 1.0)


def test_images_of_a_stratum_without_answers_are_not_spoken_for() -> None:
    report = estimate([line(n) for n in range(30)], own_run="r", own_strata={"i1": 1000, "i2": 70})
    assert report.uncovered == 70
    assert "70 live images have no audit answer yet that speaks for them" in report.notes


def test_answers_that_wait_are_not_said_to_be_missing() -> None:
    """The first audit image is open, and others are answered; their stratum was sampled."""
    lines = [line(0, "open"), *(line(n) for n in range(1, 4))]
    notes = estimate(lines, own_run="r", own_strata={"i1": 1000}).notes
    assert notes == (
        "no audit answer counts yet: nothing can be said about the labels",
        "3 audit answers wait for those before them in random order",
    )


def test_answers_that_came_after_a_version_are_not_said_to_be_missing() -> None:
    manifest = random_run(MemoryStore(), 1, 40, seed=1)
    route_run(manifest, budget="30 images", policy=POLICY, invocation="i1", audit=1.0)
    decide_run(manifest, POLICY)
    assert not any("labelfleet decide" in note for note in audit_report(manifest).notes)
    _answer_queue(manifest, {row.image_id: () for row in live_rows(manifest)})
    first, *_ = audit_report(manifest).notes
    assert first.startswith("answers that came, or were withdrawn, after v0001 are not in these")
    assert f"`labelfleet decide {manifest.url}`" in first
    decide_run(manifest, POLICY)
    report = audit_report(manifest)
    assert report.sampled == 30
    assert not any("labelfleet decide" in note for note in report.notes)


def test_of_two_runs_samples_the_own_one_speaks() -> None:
    own = [line(n, run="new", right=10, spurious=0) for n in range(5)]
    old = [line(n, run="old") for n in range(50)]
    assert estimate(own + old, own_run="new").precision.value == 1.0
    assert estimate(old, own_run="new").precision.value == pytest.approx(0.9)


def test_people_who_saw_boxes_make_recall_an_upper_bound() -> None:
    report = estimate([line(n, blind=n > 0) for n in range(30)])
    assert report.recall_is_upper_bound
    assert any("upper bound" in note for note in report.notes)


def test_errors_per_minute_against_random_review() -> None:
    audit = [line(n) for n in range(30)]  # 4 errors in half a minute
    value = [
        line(-1, part="value", image_id=f"v{n}", missed=15 + n % 3, lead_time_s=60.0)
        for n in range(30)
    ]  # 17 errors a minute
    report = estimate(audit + value)
    assert report.audit.errors_per_minute.value == pytest.approx(8)
    assert report.value.errors_per_minute.value == pytest.approx(17)
    assert report.gain.value == pytest.approx(17 / 8)
    assert report.gain.low < 17 / 8 < report.gain.high
    assert report.measured_time == 1.0


def test_a_lunch_break_is_not_work_and_missing_times_are_stated() -> None:
    lines = [line(n) for n in range(30)]
    lines[0] = line(0, lead_time_s=7200.0)
    lines[1] = line(1, lead_time_s=None)
    report = estimate(lines)
    assert report.audit.minutes == pytest.approx((28 * 30 + 150 + 30) / 60)
    assert any("stated, not measured, for 1 of 30" in note for note in report.notes)


def test_without_answers_nothing_is_claimed() -> None:
    report = estimate([line(n, "open") for n in range(30)])
    assert report.precision.value is None
    assert report.sampled == 0
    assert "nothing can be said" in report.notes[0]
    json.dumps(report.to_fields(), allow_nan=False)


def test_lines_come_back() -> None:
    lines = [line(0), replace(line(1, "open"), lead_time_s=None)]
    assert from_jsonl(to_jsonl(lines)) == lines


def _answer_queue(manifest: Manifest, truth: dict[str, tuple[ReviewedBox, ...]]) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    append_answers(
        manifest.store,
        [
            Answer(i.image_id, i.sha256, 1, n, "ann", 20.0, now, False, truth[i.image_id], (),
                   "m", True)
            for n, i in enumerate(read_queue(manifest.store))
        ],
    )  # fmt: skip


def _reviewed(seed: int) -> tuple[AuditReport, float]:
    """A run whose accepted boxes are right with chance 0.8; the report, and the true precision."""
    manifest = random_run(MemoryStore(), 4, 60, seed=1)
    rng = np.random.default_rng(7)
    truth, right, accepted = {}, 0, 0
    for row in live_rows(manifest):
        d = row.detections
        keep = rng.random(len(d)) < 0.8
        good = d.scores >= np.float32(0.7)
        right += int((keep & good).sum())
        accepted += int(good.sum())
        names = ("RBC", "WBC", "Platelets")
        truth[row.image_id] = tuple(
            ReviewedBox(tuple(map(float, d.boxes[i])), names[d.category_ids[i]], "kept")
            for i in np.flatnonzero(keep)
        )
    route_run(manifest, budget="60 images", policy=POLICY, invocation="i1", seed=seed, audit=0.8)
    _answer_queue(manifest, truth)
    decide_run(manifest, POLICY)
    return audit_report(manifest), right / accepted


@pytest.mark.slow
def test_from_routing_to_report_the_truth_is_in_the_interval() -> None:
    report, _ = _reviewed(0)
    assert report.sampled == 48
    assert report.images == 240
    found = [_reviewed(seed) for seed in range(12)]
    hits = sum(r.precision.low <= truth <= r.precision.high for r, truth in found)
    assert hits >= 11
    mean = np.mean([r.precision.value for r, _ in found])
    assert abs(mean - found[0][1]) < 0.03
