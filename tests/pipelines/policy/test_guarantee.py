"""A guarantee holds as often as it claims, and claims only what was shown."""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.cli.main import main
from pipelines.evaluation.audit import audit_report
from pipelines.exports.card import data_card
from pipelines.labels.decide import decide_run
from pipelines.policy.betting import DrawnStratum, fewest_too_many, least_capital, log_capital
from pipelines.policy.guarantee import ALL, Asked, accepted_counts, guarantee_run
from pipelines.policy.policy import Decision, Policy
from pipelines.policy.sequence import GRID
from pipelines.routing.route import route_run
from pipelines.truth.audit_images import audit_images
from storage.errors import ConfigError
from storage.labels.versions import read_version
from storage.records import StoredObject
from storage.review.answers import append_answers
from storage.review.not_shown import write_not_shown
from storage.review.queue import read_queue
from storage.runs.listing import Listing
from storage.runs.manifest import Manifest
from storage.stores.memory import MemoryStore
from tests.pipelines.policy.test_fit import answer, coco, some_run
from tests.support.samples.review_runs import distinct_row
from tests.support.samples.synthetic_run import (
    boxes,
    commit_rows,
    image_shard,
    make_run,
    tar_shard,
)


def sizes(accepted: np.ndarray) -> np.ndarray:
    return np.bincount(accepted)


def just_false(accepted: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Wrong boxes: whole images in this order, until nine of ten boxes are right no longer."""
    left = fewest_too_many(int(accepted.sum()), 0.9)
    before = np.cumsum(accepted[first]) - accepted[first]
    wrong = np.zeros_like(accepted)
    wrong[first] = np.clip(left - before, 0, accepted[first])
    assert 1 - wrong.sum() / accepted.sum() < 0.9
    return wrong


@pytest.mark.slow
def test_a_false_statement_passes_in_at_most_one_audit_of_ten() -> None:
    """Populations that miss the target by one box: errors anywhere, or in some images alone."""
    rng = np.random.default_rng(0)
    for accepted in (rng.poisson(5, 600), rng.negative_binomial(1, 1 / 9, 600)):
        boxes = int(accepted.sum())
        at = rng.permutation(np.repeat(np.arange(600), accepted))[: fewest_too_many(boxes, 0.9)]
        anywhere = np.bincount(at, minlength=600)
        crowded = just_false(accepted, np.argsort(-accepted))
        any_image = just_false(accepted, rng.permutation(600))
        for wrong in (anywhere, crowded, any_image):
            passed = 0
            for _ in range(200):
                order = rng.permutation(600)[:200]
                drawn = [DrawnStratum(sizes(accepted), accepted[order], wrong[order])]
                passed += log_capital(drawn, 0.9) >= np.log(10)
            assert passed <= 0.1 * 200 + 2.5 * np.sqrt(200 * 0.09)


@pytest.mark.parametrize("wrong", [[0, 0, 1, 2, 3], [0, 1, 1, 2, 2], [0, 0, 1, 0, 5]])
def test_the_capital_never_grows_on_average_while_the_statement_is_false(wrong: list[int]) -> None:
    """Over every order in which five images can be drawn, exactly."""
    accepted = np.array([0, 2, 3, 2, 5])
    total = fewest_too_many(12, 0.5)
    assert sum(wrong) == total - 1 or sum(wrong) >= total
    paths = []
    for order in itertools.permutations(range(5)):
        at = np.array(order[:4])
        drawn = [DrawnStratum(sizes(accepted), accepted[at], np.array(wrong)[at])]
        paths.append(least_capital(drawn, np.array([[float(sum(wrong))]]), sum(wrong)))
    mean = np.exp(np.array(paths)).mean(axis=0)
    assert mean == pytest.approx(1, abs=1e-9)


def test_the_capital_never_grows_on_average_with_two_strata() -> None:
    """At the allocation that is true, over every order in which both can be drawn."""
    held = (np.array([1, 2, 4]), np.array([0, 3, 3, 2]))
    wrong = (np.array([0, 1, 4]), np.array([0, 0, 3, 0]))
    paths = []
    for one in itertools.permutations(range(3), 2):
        for two in itertools.permutations(range(4), 3):
            drawn = [
                DrawnStratum(sizes(h), h[list(at)], w[list(at)])
                for h, w, at in zip(held, wrong, (one, two), strict=True)
            ]
            paths.append(least_capital(drawn, np.array([[5.0, 3.0]]), 8))
    mean = np.exp(np.array(paths)).mean(axis=0)
    assert mean == pytest.approx(1, abs=1e-9)


def test_two_strata_are_judged_at_the_worst_allocation() -> None:
    """All errors may lie where hardly anybody looked; equal shares cost nothing."""
    size = np.array([0] * 5 + [400])  # 400 images of five boxes

    def clean(n: int, sizes: np.ndarray = size) -> DrawnStratum:
        return DrawnStratum(sizes, np.full(n, 5), np.zeros(n, np.int64))

    one = log_capital([clean(200, 2 * size)], 0.9)
    two = log_capital([clean(100), clean(100)], 0.9)
    uneven = log_capital([clean(10), clean(100)], 0.9)
    assert two == pytest.approx(one, rel=0.25)
    assert uneven < 0.3 * two
    # Everything seen: then it is known, and no longer a bet.
    assert log_capital([clean(400)], 0.9) == np.inf
    wrong = DrawnStratum(size, np.full(400, 5), np.ones(400, np.int64))
    assert log_capital([wrong], 0.9) == -np.inf


def test_one_box_decides_whether_the_statement_is_true() -> None:
    """Ten of a hundred boxes may be wrong where nine of ten are to be right; eleven may not."""
    assert fewest_too_many(100, 0.9) == 11
    assert fewest_too_many(101, 0.9) == 11
    assert fewest_too_many(10, 0.95) == 1
    accepted = np.full(20, 5)
    for wrong, held in ((10, True), (11, False)):
        all_seen = DrawnStratum(
            sizes(accepted), accepted, np.bincount(np.arange(wrong), minlength=20)
        )
        assert (log_capital([all_seen], 0.9) >= np.log(10)) == held


@pytest.mark.slow
def test_the_capital_is_the_least_over_all_allocations() -> None:
    """Small strata seen in part: a corner that became impossible says nothing of its neighbours."""
    rng = np.random.default_rng(1)
    compared = 0
    for _ in range(400):
        held = [rng.integers(1, 3, int(rng.integers(*n))) for n in ((2, 12), (20, 120))]
        boxes = sum(int(h.sum()) for h in held)
        total = fewest_too_many(boxes, 0.8)
        first = min(int(rng.choice([0, 0.3, 0.6, 0.9]) * held[0].sum()), total)
        strata = []
        for h, count in zip(held, (first, total - first), strict=True):
            at = rng.permutation(np.repeat(np.arange(len(h)), h))[:count]
            wrong = np.bincount(at, minlength=len(h))
            seen = rng.permutation(len(h))[: int(rng.integers(1, len(h) + 1))]
            strata.append(DrawnStratum(sizes(h), h[seen], wrong[seen]))
        got = log_capital(strata, 0.8)
        found = [float(s.wrong.sum()) for s in strata]
        most = [float(s.boxes - (s.accepted - s.wrong).sum()) for s in strata]
        low = max(found[0], total - most[1])
        high = min(most[0], total - found[1])
        if high < low:
            continue
        share = np.linspace(low, high, 300)
        every = np.stack([share, total - share], axis=1)
        assert got <= float(least_capital(strata, every, total).max()) + 1e-9
        compared += 1
    assert compared > 200


def test_accepted_boxes_are_counted_from_each_threshold_on() -> None:
    scores = np.array([0.98, 0.7, 0.7, 0.69, 0.01], np.float32)
    counts = accepted_counts(scores, np.array([0, 0, 1, 1, 1]), 2)
    at = {float(t): counts[g].tolist() for g, t in enumerate(GRID)}
    assert at[0.98] == [1, 0]
    assert at[0.7] == [2, 1]
    assert at[0.68] == [2, 2]
    assert at[0.06] == [2, 2]


def audited_run(n: int = 120) -> tuple[Manifest, Policy]:
    """A run whose images were all drawn; boxes of score 0.5 and more are right."""
    manifest, true = some_run(None, n)
    route_run(manifest, budget=f"{n} images", policy=Policy(), invocation="one", audit=1.0)
    items = list(read_queue(manifest.store))
    append_answers(manifest.store, [answer(i, true[i.image_id], "RBC") for i in items[: n // 2]])
    return manifest, Policy(accept=0.9, reject=0.1)


@pytest.mark.slow
def test_the_audit_shows_a_threshold_and_the_policy_carries_it() -> None:
    manifest, policy = audited_run()
    drawn = audit_images(manifest)["one"]
    assert len(drawn) == 60
    found = guarantee_run(manifest, policy, Asked(0.9))
    assert found.guarantee is not None
    least = found.guarantee.thresholds[ALL]
    assert 0.4 < least <= 0.6  # from 0.5 on all are right, from 0.45 on nine of ten
    assert (found.guarantee.images, found.guarantee.audited) == (120, 60)
    assert [p.name for p in found.classes if p.threshold is not None] == ["RBC"]
    categories = manifest.record.identity.categories
    decided = found.policy.thresholds(categories).decide(
        np.array([least, least - 0.01], np.float32), np.zeros(2, np.int16)
    )
    assert decided[0] == Decision.ACCEPT
    assert decided[1] < Decision.ACCEPT
    assert Policy.from_yaml(found.policy.to_yaml().encode(), where="x") == found.policy
    lineage = decide_run(manifest, found.policy)
    said = read_version(manifest.store).guarantee
    assert said == lineage.guarantee
    assert "At least 90% of all accepted boxes" in said
    assert "90% confidence, over the 120 images" in said
    assert f"## Guarantee\n\n{said}\n" in data_card(lineage, "coco", "", {}, {})


@pytest.mark.slow
def test_a_guarantee_is_void_elsewhere_and_decide_says_so() -> None:
    manifest, policy = audited_run()
    found = guarantee_run(manifest, policy, Asked(0.9)).policy
    by_hand = decide_run(manifest, found.with_thresholds(0.3, None)).guarantee
    assert by_hand == "The guarantee of 90% is void: --accept was given by hand."
    identity = replace(manifest.record.identity, model_sha256="f" * 64)
    with pytest.raises(ConfigError, match="its guarantee is void"):
        found.for_run(identity)
    other = Manifest(manifest.store, replace(manifest.record, identity=identity))
    freed = found.model_copy(update={"model_sha256": None})
    assert "is void: it was shown for model" in decide_run(other, freed).guarantee


@pytest.mark.slow
def test_too_little_is_said_with_how_much_more_would_do() -> None:
    manifest, true = some_run(None, 400)
    route_run(manifest, budget="400 images", policy=Policy(), invocation="one", audit=1.0)
    items = list(read_queue(manifest.store))
    append_answers(manifest.store, [answer(i, true[i.image_id], "RBC") for i in items[:12]])
    few = guarantee_run(manifest, Policy(), Asked(0.95))
    assert few.guarantee is None
    assert few.policy == Policy()
    assert few.all.more is not None
    assert 20 < few.all.more < 388
    more = [answer(i, true[i.image_id], "RBC") for i in items[12 : 12 + few.all.more]]
    append_answers(manifest.store, more)
    assert guarantee_run(manifest, Policy(), Asked(0.95)).guarantee is not None


def test_a_skipped_image_counts_as_wrong_and_an_open_one_ends_the_draw() -> None:
    shard = tar_shard("a.tar")
    found = boxes([[10.0, 10.0, 70.0, 70.0]], [0.9], [0])
    rows = [distinct_row(f"a.tar/{i}.jpg", shard, found) for i in range(30)]
    manifest = make_run(MemoryStore(), {shard: rows})
    route_run(manifest, budget="30 images", policy=Policy(), invocation="one", audit=1.0)
    ranked = sorted(read_queue(manifest.store), key=lambda item: item.audit_rank)
    given = [answer(i, [[10.0, 10.0, 70.0, 70.0]], "RBC") for i in ranked]
    given[3] = replace(given[3], skipped=True, boxes=())
    append_answers(manifest.store, [*given[:10], *given[11:]])
    drawn = audit_images(manifest)["one"]
    assert [bool(image.right.all()) for image in drawn] == [True] * 3 + [False] + [True] * 6


def test_a_deleted_image_that_was_open_holds_up_no_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One image each: deleted and open, unusable, of an unknown class; then an open one."""
    shards = [image_shard(*(f"{s}{i}.jpg" for i in range(5))) for s in range(4)]
    found = boxes([[10.0, 10.0, 70.0, 70.0]], [0.9], [0])
    rows = {s: [distinct_row(o.key, s, found) for o in s.objects] for s in shards}
    manifest = make_run(MemoryStore(), rows)
    route_run(manifest, budget="20 images", policy=Policy(), invocation="one", audit=1.0)
    ranked = sorted(read_queue(manifest.store), key=lambda item: item.audit_rank)
    given = [answer(i, [[10.0, 10.0, 70.0, 70.0]], "RBC") for i in ranked]
    given[2] = replace(given[2], unusable=("polygonlabels",))
    given[5] = answer(ranked[5], [[10.0, 10.0, 70.0, 70.0]], "no such class")
    append_answers(manifest.store, [*given[1:10], *given[11:]])
    with caplog.at_level(logging.WARNING, "labelfleet.review"):
        assert audit_images(manifest) == {"one": []}
    (waits,) = (r.getMessage() for r in caplog.records if "audit answers count" in r.getMessage())
    assert f"18 audit answers count once image {ranked[0].image_id!r}" in waits

    left = [o for s in shards for o in s.objects if o.key != ranked[0].image_id]
    Listing(manifest.store).refresh(
        sorted(left, key=lambda o: o.key), lambda fresh: iter(list(fresh) and [])
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING, "labelfleet.review"):
        drawn = audit_images(manifest)["one"]
    right = [bool(image.right.all()) for image in drawn]
    assert right == [True, False, True, True, False, True, True, True, True]
    assert f"9 audit answers count once image {ranked[10].image_id!r}" in caplog.text


def test_an_image_that_push_could_not_show_holds_up_no_answer() -> None:
    shard = tar_shard("a.tar")
    found = boxes([[10.0, 10.0, 70.0, 70.0]], [0.9], [0])
    rows = [distinct_row(f"a.tar/{i}.jpg", shard, found) for i in range(12)]
    manifest = make_run(MemoryStore(), {shard: rows})
    route_run(manifest, budget="12 images", policy=Policy(), invocation="one", audit=1.0)
    ranked = sorted(read_queue(manifest.store), key=lambda item: item.audit_rank)
    given = [answer(i, [[10.0, 10.0, 70.0, 70.0]], "RBC") for i in ranked]
    append_answers(manifest.store, given[1:])
    assert audit_images(manifest) == {"one": []}
    write_not_shown(manifest.store, {ranked[0].sha256: "it could not be read"})
    drawn = audit_images(manifest)["one"]
    assert [bool(image.right.all()) for image in drawn] == [False] + [True] * 11
    report = audit_report(manifest, decide_run(manifest, Policy()).version)
    assert report.sampled == 11
    # Answered after all, in another round: the record of the last push does not matter.
    append_answers(manifest.store, given[:1])
    assert [bool(image.right.all()) for image in audit_images(manifest)["one"]] == [True] * 12


def test_the_command_writes_it_and_leaves_with_3_where_nothing_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    _, true = some_run(str(run), 100)
    truth = coco(tmp_path, true)

    def call(*arguments: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as left:
            main([*arguments])
        assert left.value.code == code
        return capsys.readouterr().out

    said = call("fit", str(run), "--truth", truth, "--guarantee", "0.9", "--json")
    fields = json.loads(said.splitlines()[-1])
    assert (
        "assumes that the images with ground truth are a random sample"
        in (fields["guarantee"]["sentence"])
    )
    assert Policy.load(str(run / "policy.yaml")).guarantee is not None
    assert "At least 90% of all accepted boxes" in " ".join(call("decide", str(run)).split())
    call("fit", str(run), "--truth", truth, "--guarantee", "1.5", code=2)


def test_wrong_use_is_one_line_and_leaves_the_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A share in percent; a truth of other images than the run's."""
    run = tmp_path / "run"
    some_run(str(run), 100)
    (run / "policy.yaml").write_text(Policy(accept=0.9).to_yaml())
    kept = (run / "policy.yaml").read_bytes()
    other = tmp_path / "other.json"
    other.write_text(json.dumps({
        "images": [{"id": 1, "file_name": "elsewhere.png", "width": 80, "height": 80}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}],
    }))  # fmt: skip

    def said(*arguments: str, code: int) -> str:
        with pytest.raises(SystemExit) as left:
            main(["fit", str(run), *arguments])
        assert left.value.code == code
        return capsys.readouterr().err

    assert "a guarantee of 95.0 with confidence 0.9" in said("--guarantee", "95", code=2)
    line = said("--guarantee", "0.9", "--truth", str(other), code=1)
    assert "1 of 1 images have no row" in line
    assert "is this the ground truth of the run's source?" in line
    assert (run / "policy.yaml").read_bytes() == kept


def test_a_policy_fitted_on_fp32_is_not_taken_for_int8_silently() -> None:
    manifest, _ = some_run(None)
    identity = manifest.record.identity
    fitted = Policy(precision="fp32")
    assert fitted.for_run(replace(identity, precision="bf16")).accept[0] == np.float32(0.7)
    with pytest.raises(ConfigError, match="fitted on fp32 scores, the run's are int8"):
        fitted.for_run(replace(identity, precision="int8"))
    with pytest.raises(ConfigError, match="fitted on int8"):
        Policy(precision="int8").for_run(replace(identity, precision="fp32"))
    assert Policy().for_run(replace(identity, precision="int8")).accept[0] == np.float32(0.7)


@pytest.mark.slow
def test_a_class_without_a_proof_accepts_no_box_at_all() -> None:
    manifest, policy = audited_run()
    found = guarantee_run(manifest, policy, Asked(0.9, by="class"))
    assert found.guarantee is not None
    assert list(found.guarantee.thresholds) == ["RBC"]
    categories = manifest.record.identity.categories
    kept = Policy.from_yaml(found.policy.to_yaml().encode(), where="x")
    decided = kept.thresholds(categories).decide(
        np.ones(len(categories), np.float32), np.arange(len(categories), dtype=np.int16)
    )
    accepted = [c.name for c, d in zip(categories, decided, strict=True) if d == Decision.ACCEPT]
    assert accepted == ["RBC"]


@pytest.mark.slow
def test_images_outside_the_audited_draw_are_counted_in_the_sentence() -> None:
    manifest, policy = audited_run()
    whole = guarantee_run(manifest, policy, Asked(0.9)).guarantee
    assert whole is not None
    assert "not covered" not in whole.sentence
    shard = tar_shard("later.tar")
    listed = sorted((StoredObject("a.tar", 10_000, "1"), *shard.objects), key=lambda o: o.key)
    Listing(manifest.store).refresh(listed, lambda fresh: iter([shard for _ in fresh]))
    commit_rows(manifest, shard, [distinct_row("later.tar/1.jpg", shard)])
    part = guarantee_run(manifest, policy, Asked(0.9)).guarantee
    assert part is not None
    assert part.sentence.endswith(" 1 of 121 live images are not covered.")
