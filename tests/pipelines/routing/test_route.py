"""Routing: within the budget, nothing twice, the audit truly random, the rest where it pays."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from pipelines.policy.policy import Policy
from pipelines.routing.cost import Budget, CostModel
from pipelines.routing.route import RouteSummary, cost_of, route, route_run
from pipelines.routing.survey import RouteOptions
from pipelines.truth.usable import usable_answers
from storage.coco.truth import Truth, TruthBox, TruthImage
from storage.errors import ConfigError
from storage.review.answers import Answer, DeletedBox, ReviewedBox, append_answers, read_answers
from storage.review.gold import read_gold
from storage.review.queue import ReviewItem, queue_parts, read_head, read_queue
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
from tests.support.samples.synthetic_run import make_run, tar_shard

POLICY = Policy(accept=0.7, reject=0.1)


def _route(
    manifest: Manifest, invocation: str = "i1", budget: str = "40 images", **more: object
) -> RouteSummary:
    return route_run(manifest, budget=budget, policy=POLICY, invocation=invocation, **more)  # type: ignore[arg-type]


def _items(manifest: Manifest, hidden: bool = False) -> list[ReviewItem]:
    return list(read_queue(manifest.store, hidden=hidden))


def test_the_budget_is_met_and_the_audit_has_its_share() -> None:
    manifest = random_run(MemoryStore(), 6, 50)
    summary = _route(manifest, audit=0.25)
    items = _items(manifest)
    assert len(items) == 40
    assert Counter(i.part for i in items) == {"audit": 10, "value": 30}
    assert (summary.audit, summary.value) == (10, 30)
    assert [i.order for i in items] == list(range(40))
    assert all(i.reasons for i in items)
    assert summary.strata[0].images == 300


def test_minutes_are_not_exceeded_and_well_used() -> None:
    manifest = random_run(MemoryStore(), 6, 50)
    cost = CostModel(8, 1.5, 7, "stated")
    summary = _route(manifest, budget="30 minutes", cost=cost)
    items = _items(manifest)
    assert 29 <= sum(i.seconds for i in items) / 60 <= 30
    assert summary.minutes == pytest.approx(sum(i.seconds for i in items) / 60)
    audit_minutes = sum(i.seconds for i in items if i.part == "audit") / 60
    assert 4 < audit_minutes < 8  # a fifth, of images as costly as they are on average


def test_the_same_seed_draws_the_same_queue_and_another_does_not() -> None:
    def drawn(seed: int) -> list[ReviewItem]:
        manifest = random_run(MemoryStore(), 4, 50)
        _route(manifest, seed=seed)
        return _items(manifest)

    assert drawn(1) == drawn(1)
    one, other = drawn(1), drawn(2)
    assert {i.image_id for i in one if i.part == "audit"} != {
        i.image_id for i in other if i.part == "audit"
    }


def test_routing_an_invocation_again_changes_nothing() -> None:
    manifest = random_run(MemoryStore(), 4, 20)
    first = _route(manifest)
    again = _route(manifest)
    assert again == replace(first, repeated=True)
    assert len(queue_parts(manifest.store)) == 1


def test_nothing_is_shown_twice_over_invocations() -> None:
    manifest = random_run(MemoryStore(), 4, 50)
    for n in range(4):
        _route(manifest, f"i{n}")
    items = _items(manifest)
    assert len({i.image_id for i in items}) == len(items)
    assert len({i.sha256 for i in items}) == len(items)
    # Four budgets of forty, less audit images that were in the queue already.
    assert 140 <= len(items) <= 160


def test_the_same_pixels_under_two_names_are_shown_once() -> None:
    shard = tar_shard("a.tar")
    rows = [distinct_row(f"a.tar/{i}.jpg", shard, one_box(0.5)) for i in range(30)]
    twins = [replace(r, image_id=f"a.tar/twin-{i}.jpg") for i, r in enumerate(rows)]
    manifest = make_run(MemoryStore(), {shard: rows + twins})
    _route(manifest, budget="60 images", audit=0.5)
    shown = _items(manifest)
    assert len({i.sha256 for i in shown}) == len(shown)
    audit = [i for i in _items(manifest, hidden=True) if i.part == "audit"]
    assert len(audit) == 30  # the sample is whole: twins are in it, but not asked about again
    assert any(not i.show for i in audit)


def test_an_image_whose_pixels_changed_may_be_routed_again() -> None:
    shard = tar_shard("a.tar")
    old = distinct_row("a.tar/0.jpg", shard, one_box(0.5))
    manifest = make_run(MemoryStore(), {shard: [old]})
    _route(manifest, "i1", "1 image", audit=0)
    changed = tar_shard("a.tar", etag="2")
    new = replace(old, shard_id=changed.shard_id, sha256="ef" * 32, phash=1)
    add_shards(manifest, [], {changed: [new]})
    _route(manifest, "i2", "1 image", audit=0)
    assert [(i.image_id, i.sha256) for i in _items(manifest)] == [
        ("a.tar/0.jpg", old.sha256),
        ("a.tar/0.jpg", "ef" * 32),
    ]


@pytest.mark.slow
def test_the_audit_is_uniform_over_all_live_ok_images() -> None:
    shard = tar_shard("a.tar")
    confident = [distinct_row(f"a.tar/c{i}.jpg", shard, one_box(0.99)) for i in range(20)]
    empty = [distinct_row(f"a.tar/e{i}.jpg", shard) for i in range(20)]
    broken = [
        replace(distinct_row(f"a.tar/b{i}.jpg", shard), status="undecodable", error="x")
        for i in range(20)
    ]
    manifest = make_run(MemoryStore(), {shard: confident + empty + broken})
    drawn: Counter[str] = Counter()
    for seed in range(150):
        manifest.store.delete("review/queue/000000.parquet")
        _route(manifest, f"s{seed}", "10 images", audit=1.0, seed=seed)
        items = _items(manifest)
        assert len(items) == 10
        assert all(i.inclusion == 10 / 40 for i in items)
        drawn.update(i.image_id for i in items)
    assert set(drawn) == {r.image_id for r in confident + empty}
    # 150 draws of a quarter: 37.5 each, standard deviation 5.3.
    assert min(drawn.values()) > 37.5 - 5 * 5.3
    assert max(drawn.values()) < 37.5 + 5 * 5.3


def test_each_invocation_is_a_stratum_of_the_images_it_saw_first() -> None:
    store = MemoryStore()
    first = random_shards(3, 40)
    manifest = make_run(store, first)
    _route(manifest, "i1", audit=0.5)
    add_shards(manifest, list(first), random_shards(2, 25, seed=9, first=3))
    summary = _route(manifest, "i2", audit=0.5)
    assert {s.name: (s.images, s.drawn) for s in summary.strata} == {
        "i1": (120, 20),
        "i2": (50, 20),
    }
    later = [i for i in read_queue(store, queue_parts(store)[1:], hidden=True) if i.part == "audit"]
    assert {i.stratum for i in later} == {"i2"}
    assert {i.image_id[:4] for i in later} <= {"0003", "0004"}
    assert all(i.inclusion == 20 / 50 for i in later)


def test_without_new_images_the_old_sample_grows_in_its_own_order() -> None:
    store = MemoryStore()
    manifest = random_run(store, 4, 50)
    _route(manifest, "i1", audit=0.5, seed=3)
    _route(manifest, "i2", audit=0.5, seed=99)  # the stratum keeps the order of its first seed
    audit = [i for i in _items(manifest, hidden=True) if i.part == "audit"]
    assert sorted(i.audit_rank for i in audit) == list(range(40))
    fresh = random_run(MemoryStore(), 4, 50)
    _route(fresh, "i1", "80 images", audit=0.5, seed=3)
    whole = [i for i in _items(fresh, hidden=True) if i.part == "audit"]
    by_rank = {i.audit_rank: i.image_id for i in audit}
    assert by_rank == {i.audit_rank: i.image_id for i in whole}
    assert read_head(store, queue_parts(store)[1]).strata[0].drawn == 40


def test_a_sample_grows_past_images_that_were_deleted_since() -> None:
    store = MemoryStore()
    labelled = random_shards(4, 10)
    manifest = make_run(store, labelled)
    _route(manifest, "i1", "20 images", audit=1.0)
    survivors = list(labelled)[1:]
    add_shards(manifest, survivors, {})
    summary = _route(manifest, "i2", "10 images", audit=1.0)
    live = {r.image_id for r in live_rows(manifest)}
    audit = [i.image_id for i in _items(manifest, hidden=True) if i.image_id in live]
    assert len(audit) == len(set(audit))
    assert summary.strata[0].images == 30
    assert summary.strata[0].drawn == len(audit)


def test_a_whole_stratum_can_be_drawn_and_no_more() -> None:
    manifest = random_run(MemoryStore(), 2, 10)
    summary = _route(manifest, "i1", "500 images", audit=1.0)
    assert summary.audit == 20
    assert _route(manifest, "i2", "500 images", audit=1.0).audit == 0


def test_audit_images_stand_at_random_places_in_their_own_order() -> None:
    manifest = random_run(MemoryStore(), 6, 50)
    _route(manifest, budget="100 images", audit=0.3)
    items = _items(manifest)
    places = [i.order for i in items if i.part == "audit"]
    assert [i.audit_rank for i in items if i.part == "audit"] == list(range(30))
    assert min(places) < 20
    assert max(places) > 80
    rates = [i.value / i.seconds for i in items if i.part == "value"]
    assert rates == sorted(rates, reverse=True)


def test_what_pays_comes_before_what_does_not() -> None:
    shard = tar_shard("a.tar")
    sure = [distinct_row(f"a.tar/sure{i}.jpg", shard, one_box(0.97)) for i in range(30)]
    torn = [distinct_row(f"a.tar/torn{i}.jpg", shard, one_box(0.55)) for i in range(5)]
    manifest = make_run(MemoryStore(), {shard: sure + torn})
    _route(manifest, budget="5 images", audit=0)
    items = _items(manifest)
    assert {i.image_id for i in items} == {r.image_id for r in torn}
    assert items[0].reasons[0].signal in {"uncertain_band", "score_entropy"}


def test_near_duplicates_are_routed_once() -> None:
    shard = tar_shard("a.tar")
    frames = [
        replace(distinct_row(f"a.tar/f{i}.jpg", shard, one_box(0.5)), phash=0b1111 ^ (1 << i))
        for i in range(4)
    ]
    other = distinct_row("a.tar/x.jpg", shard, one_box(0.6))
    manifest = make_run(MemoryStore(), {shard: [*frames, other]})
    summary = _route(manifest, "i1", "5 images", audit=0)
    assert len(_items(manifest)) == 2
    assert summary.passed_over["near_duplicate"] == 3
    assert _route(manifest, "i2", "5 images", audit=0).value == 0  # nor by a later invocation


def test_a_rare_class_has_its_quota() -> None:
    shard = tar_shard("a.tar")
    common = [distinct_row(f"a.tar/c{i}.jpg", shard, one_box(0.55)) for i in range(100)]
    rare = [distinct_row(f"a.tar/r{i}.jpg", shard, one_box(0.9, 2)) for i in range(5)]
    manifest = make_run(MemoryStore(), {shard: common + rare})
    _route(manifest, budget="20 images", audit=0)
    chosen = [i for i in _items(manifest) if i.image_id.startswith("a.tar/r")]
    assert len(chosen) == 2
    assert chosen[0].reasons[0].signal == "rare_class"
    assert chosen[0].reasons[0].note == "Platelets"


def test_a_second_round_asks_about_no_pixels_of_the_first() -> None:
    first, second = random_run(MemoryStore(), 4, 30), random_run(MemoryStore(), 4, 30)
    _route(first, audit=0.5)
    asked = {i.sha256 for i in _items(first)}
    _route(second, "round-2", audit=0.5, seed=0, other_runs=[first])
    again = _items(second, hidden=True)
    assert not asked & {i.sha256 for i in again if i.show}
    # The audit is whole all the same: the first round's answers count for what is hidden.
    audit = [i for i in again if i.part == "audit"]
    assert len(audit) == 20
    assert {i.sha256 for i in audit if not i.show} <= asked


def test_what_another_run_has_an_answer_for_is_passed_over_and_said() -> None:
    first, second = random_run(MemoryStore(), 2, 30), random_run(MemoryStore(), 2, 30)
    _route(first, audit=1.0)
    answered = _items(first)
    append_answers(first.store, [_timed(item, n) for n, item in enumerate(answered)])
    alone = _route(random_run(MemoryStore(), 2, 30), audit=0.0)
    summary = _route(second, "round-2", audit=0.0, other_runs=[first])
    assert summary.passed_over["answered_before"] == len(answered)
    assert "answered_before" not in alone.passed_over
    assert not {i.sha256 for i in answered} & {i.sha256 for i in _items(second)}


def _truth(manifest: Manifest, images: int) -> Truth:
    """One box of the run's first class in each of the run's first images."""
    rows = [row for _, row in zip(range(images), live_rows(manifest), strict=False)]
    boxes = (TruthBox(7, (10.0, 10.0, 30.0, 20.0), 600.0, ignore=False),)
    return Truth(
        source="truth.json",
        images=tuple(TruthImage(row.image_id, 640, 480) for row in rows),
        boxes=(boxes,) * len(rows),
        categories={7: manifest.record.identity.categories[0].name},
        regions=(((100.0, 100.0, 50.0, 50.0),),) * len(rows),
    )


def test_gold_images_are_part_of_the_budget_and_look_like_the_others() -> None:
    manifest = random_run(MemoryStore(), 6, 50)
    truth = _truth(manifest, 100)
    summary = _route(manifest, gold=8, gold_truth=truth, audit=0.25)
    items = _items(manifest)
    assert Counter(i.part for i in items) == {"audit": 10, "gold": 8, "value": 22}
    assert (summary.audit, summary.gold, summary.value) == (10, 8, 22)
    gold = [i for i in items if i.part == "gold"]
    assert {i.image_id for i in gold} <= {image.name for image in truth.images}
    assert all(reason.signal != "gold" for i in items for reason in i.reasons)
    places = [i.order for i in gold]
    assert max(places) - min(places) > 8  # spread over the queue, not in a row
    known = read_gold(manifest.store)
    assert known.keys() == {i.sha256 for i in gold}
    name = manifest.record.identity.categories[0].name
    for image in known.values():
        assert image.source == "truth"
        assert image.boxes == (((10.0, 10.0, 40.0, 30.0), name),)
        assert image.regions == (((100.0, 100.0, 150.0, 150.0), ""),)
    # The next routing draws others.
    _route(manifest, "i2", gold=8, gold_truth=truth, audit=0.0)
    drawn = [i.sha256 for i in _items(manifest) if i.part == "gold"]
    assert len(drawn) == len(set(drawn)) == 16 == len(read_gold(manifest.store))


def test_without_gold_the_queue_is_as_it_was() -> None:
    first, second = random_run(MemoryStore(), 4, 30), random_run(MemoryStore(), 4, 30)
    _route(first)
    _route(second, gold_truth=_truth(second, 20))
    assert _items(first) == _items(second)


def test_what_another_project_settled_is_gold_and_its_answer_stays_the_label() -> None:
    first, second = random_run(MemoryStore(), 2, 30), random_run(MemoryStore(), 2, 30)
    _route(first, audit=1.0)
    append_answers(first.store, [_timed(item, n) for n, item in enumerate(_items(first))])
    _route(second, "round-2", audit=0.0, gold=5, other_runs=[first])
    gold = [i for i in _items(second) if i.part == "gold"]
    assert len(gold) == 5
    settled = {a.sha256: a for a in read_answers(first.store)}
    for sha256, image in read_gold(second.store).items():
        assert image.source == "answers"
        assert [box for box, _ in image.boxes] == [box.bbox for box in settled[sha256].boxes]
    late = [replace(_timed(item, 900 + n), annotator="eve") for n, item in enumerate(gold)]
    append_answers(second.store, late)
    both = {a.sha256: a.annotator for a in usable_answers([second, first]).answers}
    assert all(both[item.sha256] != "eve" for item in gold)
    alone = {a.annotator for a in usable_answers([second]).answers}
    assert alone == {"eve"}  # with nothing else known of the images, these are their answers


def test_an_empty_run_routes_nothing_and_says_so() -> None:
    manifest = make_run(MemoryStore(), {})
    summary = _route(manifest)
    assert (summary.audit, summary.value, summary.strata) == (0, 0, ())
    assert _items(manifest) == []


def test_memory_follows_the_budget_not_the_run() -> None:
    from pipelines.routing.survey import Earlier, RunSurvey

    manifest = random_run(MemoryStore(), 30, 40)
    options = RouteOptions(Budget.parse("10 images"))
    survey = RunSurvey(manifest, POLICY, "i", Earlier.read(manifest), options)
    survey.run()
    held = len(survey.best.best_first()) + sum(len(p.best_first()) for p in survey.rare)
    held += sum(len(draw.first(10**9)) for draw in survey.draws.values())
    assert held < 110
    assert survey.population == 1200


@pytest.mark.parametrize("audit", [-0.1, 1.1])
def test_a_share_outside_0_to_1_is_refused(audit: float) -> None:
    with pytest.raises(ConfigError, match="audit share"):
        _route(random_run(MemoryStore(), 1, 1), audit=audit)


def test_a_signal_of_ones_own_is_enough_to_route_by() -> None:
    from pipelines.policy.box_batch import BoxBatch
    from pipelines.routing.signals import Weighted

    def big(batch: BoxBatch) -> np.ndarray:
        return (batch.boxes[:, 2] - batch.boxes[:, 0]).astype(np.float64)

    manifest = random_run(MemoryStore(), 2, 30)
    options = RouteOptions(
        Budget.parse("3 images"), audit=0, rare_quota=0, signals={"big": Weighted(big, 1.0)}
    )
    route(manifest, POLICY, "i", options)
    widths = {
        r.image_id: float((r.detections.boxes[:, 2] - r.detections.boxes[:, 0]).sum())
        for r in live_rows(manifest)
    }
    best = sorted(widths, key=lambda k: -widths[k])[:3]
    assert {i.image_id for i in _items(manifest)} == set(best)


def test_no_answers_leave_the_stated_cost() -> None:
    assert cost_of([]) == CostModel()


def test_lead_times_of_answers_teach_the_cost_of_the_next_routing() -> None:
    """Twenty reviewers' answers at 5 s an image, 2 s a box and 3 s a correction."""
    manifest = random_run(MemoryStore(), 2, 40)
    _route(manifest, budget="30 images")
    items = _items(manifest)
    append_answers(manifest.store, [_timed(item, n) for n, item in enumerate(items)])
    learned = cost_of(read_answers(manifest.store))
    assert (learned.per_image_s, learned.per_box_s, learned.per_correction_s) == pytest.approx(
        (5.0, 2.0, 3.0)
    )
    assert learned.source == "lead times of 30 answers"
    _route(manifest, "i2", budget="10 images")
    head = read_head(manifest.store, queue_parts(manifest.store)[1])
    assert head.cost == learned.to_fields()


def _timed(item: ReviewItem, n: int) -> Answer:
    kept, added, gone = n % 5, n % 3, n % 2
    box = ReviewedBox((0, 0, 9, 9), "RBC", "kept", 0.9)
    return Answer(
        item.image_id, item.sha256, n, n, "ann", 5.0 + 2.0 * (kept + gone) + 3.0 * (added + gone),
        datetime.now(UTC), False, (box,) * kept + (replace(box, origin="added"),) * added,
        (DeletedBox((0, 0, 9, 9), "RBC", 0.3),) * gone, "m", False,
    )  # fmt: skip
