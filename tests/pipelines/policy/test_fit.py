"""fit: scores become probabilities, and thresholds keep what they promise."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from pipelines.cli.main import main
from pipelines.face.run import Run
from pipelines.face.steps import fit as fit_step
from pipelines.policy.choose import choose_policy
from pipelines.policy.curves import Wanted
from pipelines.policy.fit import fit, fit_run
from pipelines.policy.guarantee import Asked, guarantee_run
from pipelines.policy.ignore_band import JudgedImage, bound_band, ignored_share
from pipelines.policy.policy import Decision, Policy
from pipelines.routing.route import route_run
from pipelines.truth.judge import JudgedBoxes, TrueBoxes, answered_images, judge
from storage.coco.truth import read_truth
from storage.errors import ConfigError
from storage.records import Category
from storage.review.answers import Answer, ReviewedBox, append_answers
from storage.review.queue import read_queue
from storage.runs.manifest import Manifest
from storage.stores.memory import MemoryStore
from storage.stores.open import open_store
from tests.support.samples.review_runs import distinct_row
from tests.support.samples.synthetic_run import boxes, make_run, tar_shard

CLASSES = ("RBC", "WBC", "Platelets")
CATEGORIES = tuple(Category(i, name, i + 1) for i, name in enumerate(CLASSES))


def judged(n: int, seed: int = 0, images: int = 200) -> JudgedBoxes:
    """Boxes of two classes that are right in ``score ** 2`` and ``score ** 0.5`` of cases."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0.05, 1, n).astype(np.float32)
    ids = rng.integers(0, 2, n)
    right = rng.random(n) < np.where(ids == 0, scores**2, scores**0.5)
    image = rng.integers(0, images, n)
    true = np.zeros((images, 3))
    np.add.at(true, (image[right], ids[right]), 1)
    return JudgedBoxes(images, scores, ids, image, right, np.ones(n), true)


def test_probabilities_are_the_share_that_is_right() -> None:
    found = fit(judged(8000), CATEGORIES, Wanted())
    # 270 boxes a bin are off by 0.02 by chance alone.
    assert found.error_after < 0.025 < 0.1 < found.error_before
    fresh = judged(8000, seed=1)
    thresholds = found.policy.thresholds(CATEGORIES)
    p = thresholds.probability(fresh.scores, fresh.category_ids.astype(np.int16))
    for low in np.arange(0, 1, 0.1):
        here = (p >= low) & (p < low + 0.1)
        if here.sum() > 200:
            assert fresh.right[here].mean() == pytest.approx(p[here].mean(), abs=0.06)


@pytest.mark.parametrize("precision", [0.7, 0.9])
def test_thresholds_keep_what_they_promise_on_boxes_never_seen(precision: float) -> None:
    found = fit(judged(8000), CATEGORIES, Wanted(precision, lost=0.05))
    fresh = judged(8000, seed=2)
    ids = fresh.category_ids.astype(np.int16)
    decided = found.policy.thresholds(CATEGORIES).decide(fresh.scores, ids)
    for category in (0, 1):
        own = fresh.category_ids == category
        assert fresh.right[own & (decided == Decision.ACCEPT)].mean() > precision - 0.03
        dropped = fresh.right & own & (decided == Decision.REJECT)
        assert dropped.sum() / (fresh.right & own).sum() < 0.05 + 0.02
    assert found.precision == pytest.approx(precision, abs=0.03)


def only(source: JudgedBoxes, kept: np.ndarray, right: np.ndarray | None = None) -> JudgedBoxes:
    """Some of the boxes (bool [N]), or all of them with another verdict."""
    return JudgedBoxes(
        source.images, source.scores[kept], source.category_ids[kept], source.image[kept],
        (source.right if right is None else right)[kept], source.weight[kept],
        source.true_by_image,
    )  # fmt: skip


def test_a_class_leans_on_the_others_by_how_little_is_known_of_it() -> None:
    everything = judged(4000)
    ids = everything.category_ids
    alone = fit(only(everything, ids == 0), CATEGORIES, Wanted()).policy
    seen = {}
    for n in (0, 3, 30, 300):
        some = (ids == 0) | ((ids == 1) & (np.cumsum(ids == 1) <= n))
        found = fit(only(everything, some), CATEGORIES, Wanted())
        curve = found.policy.thresholds(CATEGORIES)
        at = curve.probability(np.array([0.3], np.float32), np.array([1], np.int16))[0]
        seen[n] = float(at)
        wbc = found.classes[1]
        assert (wbc.boxes, wbc.leans) == (n, n < 10)
    assert alone.calibration is not None
    pooled = float(alone.calibration.all(np.array([0.3]))[0])  # 0.09 of such boxes are right
    assert seen[0] == pytest.approx(pooled, abs=0.03)
    assert seen[0] < seen[3] < seen[300]
    assert abs(seen[3] - pooled) < abs(seen[300] - pooled)
    assert seen[300] == pytest.approx(0.3**0.5, abs=0.12)  # as the class really is


def test_a_class_that_misses_the_precision_is_accepted_where_it_comes_closest() -> None:
    source = judged(2000)
    coin = np.random.default_rng(5).random(2000) < 0.6 * source.scores  # at best 6 in 10 are right
    right = np.where(source.category_ids == 0, coin, source.right)
    found = fit(only(source, np.ones(2000, np.bool_), right), CATEGORIES, Wanted(precision=0.7))
    rbc, wbc, platelets = found.classes
    assert rbc.accepted >= 10
    assert rbc.precision == pytest.approx(0.55, abs=0.1)
    assert not rbc.met
    assert wbc.met
    assert wbc.precision == pytest.approx(0.7, abs=0.03)
    decided = found.policy.thresholds(CATEGORIES).decide(
        np.array([0.98, 0.98, 0.98], np.float32), np.array([0, 1, 2], np.int16)
    )
    assert (decided == Decision.ACCEPT).all()  # no class is silenced
    assert any("RBC: 70% right is not reached" in warning for warning in found.warnings)
    assert any("Platelets: no box was judged" in warning for warning in found.warnings)
    assert not any("WBC" in warning for warning in found.warnings)
    assert not platelets.met


def twelve_images(healthy: int = 665) -> JudgedBoxes:
    """12 images: a healthy class, one with 21 of 100 boxes right, and one with 3 of 92."""
    rng = np.random.default_rng(4)
    ids = np.repeat([0, 1, 2], [healthy, 100, 92])
    scores = rng.uniform(0.05, 1, len(ids)).astype(np.float32)
    right = rng.random(len(ids)) < 1 / (1 + np.exp(-20 * (scores - 0.5)))
    for category, n in ((1, 21), (2, 3)):
        own = np.flatnonzero(ids == category)
        right[own] = False
        right[rng.choice(own, n, replace=False)] = True
    image = rng.integers(0, 12, len(ids))
    true = np.zeros((12, 3))
    np.add.at(true, (image[right], ids[right]), 1)
    return JudgedBoxes(12, scores, ids, image, right, np.ones(len(ids)), true)


def test_a_class_whose_boxes_are_nearly_all_wrong_gets_no_labels_and_a_note() -> None:
    source = twelve_images()
    found = fit(source, CATEGORIES, Wanted())
    rbc, wbc, platelets = found.classes
    assert rbc.met
    assert rbc.accepted > 250
    thresholds = found.policy.thresholds(CATEGORIES)
    ids = source.category_ids.astype(np.int16)
    accepted = thresholds.decide(source.scores, ids) == Decision.ACCEPT
    assert np.bincount(ids[accepted], minlength=3)[1:].tolist() == [0, 0]
    assert (wbc.boxes, wbc.right, platelets.boxes, platelets.right) == (100, 21, 92, 3)
    for name in ("WBC", "Platelets"):
        assert any(
            w.startswith(f"{name}: 90% right is not reached; none of its") for w in found.warnings
        )
    assert found.refused is None
    assert found.precision is not None
    assert found.precision > 0.88


def test_a_fit_without_a_class_that_is_right_often_enough_is_refused() -> None:
    found = fit(twelve_images(healthy=0), CATEGORIES, Wanted())
    assert found.refused is not None
    assert found.policy.thresholds(CATEGORIES).accept.tolist() == [1.0, 1.0, 1.0]
    assert fit(twelve_images(healthy=0), CATEGORIES, Wanted(precision=0.0)).refused is None


def test_few_boxes_are_accepted_one_by_one_where_each_reaches_the_floor() -> None:
    everything = twelve_images()
    ids, scores = everything.category_ids.copy(), everything.scores.copy()
    own = np.flatnonzero(ids == 2)
    right = everything.right.copy()
    right[own] = False
    scores[own] = np.linspace(0.05, 0.6, len(own))
    scores[own[-6:]], right[own[-6:]] = np.linspace(0.8, 0.95, 6), True
    source = JudgedBoxes(12, scores, ids, everything.image, right, everything.weight,
                         everything.true_by_image)  # fmt: skip
    found = fit(source, CATEGORIES, Wanted())
    decided = found.policy.thresholds(CATEGORIES).decide(scores[own], ids[own].astype(np.int16))
    assert (decided == Decision.ACCEPT).tolist() == right[own].tolist()  # six, fewer than ten


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_higher_precision_never_accepts_more_and_no_class_falls_below_the_floor(
    seed: int,
) -> None:
    source = judged(150, seed, images=12)
    ids = source.category_ids.astype(np.int16)
    before = np.ones(150, np.bool_)
    for precision in (0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0):
        wanted = Wanted(precision)
        assert wanted.floor == pytest.approx(min(precision, max(0.5, precision - 0.2)))
        thresholds = fit(source, CATEGORIES, wanted).policy.thresholds(CATEGORIES)
        accepted = thresholds.decide(source.scores, ids) == Decision.ACCEPT
        assert not (accepted & ~before).any()
        for category in np.unique(ids[accepted]):
            own = accepted & (ids == category)
            likely = thresholds.probability(source.scores[own], ids[own])
            assert likely.mean() >= wanted.floor - 1e-6
        before = accepted


def test_thin_evidence_is_drawn_to_the_prior_and_said() -> None:
    few = fit(judged(30, images=8), CATEGORIES, Wanted())
    assert any("only 8 images with 30 boxes" in warning for warning in few.warnings)
    many = fit(judged(4000), CATEGORIES, Wanted())
    assert not any("only" in warning for warning in many.warnings)
    # Without a single wrong box among 30, a faint score is still no certainty.
    source = judged(30, images=8)
    flawless = fit(only(source, np.ones(30, np.bool_), np.ones(30, np.bool_)), CATEGORIES, Wanted())
    assert flawless.policy.calibration is not None
    assert flawless.policy.calibration.all(np.array([0.05]))[0] < 0.9


def test_the_ignore_band_is_measured_and_bounded(tmp_path: Path) -> None:
    manifest, true = some_run(None)
    truth = read_truth(coco(tmp_path, true))
    categories = manifest.record.identity.categories
    wide = Policy(accept=0.99, reject=0.05)
    half = JudgedImage(boxes([[0, 0, 50, 100]], [0.5], [0]), 100, 100, 3.0)
    twice = JudgedImage(boxes([[0, 0, 50, 50], [0, 0, 50, 50]], [0.5, 0.3], [0, 0]), 100, 100, 1.0)
    assert ignored_share([half, twice], wide, categories) == pytest.approx((3 * 0.5 + 0.25) / 4)
    tight = bound_band(wide, [half, twice], categories, 0.4)
    assert ignored_share([half, twice], tight, categories) <= 0.4
    assert tight.accept == wide.accept
    free = fit_run(manifest, truth, Wanted(precision=1.0, lost=0.0))
    assert free.ignored_area is not None
    bound = fit_run(manifest, truth, Wanted(precision=1.0, lost=0.0), ignore_area=0.0)
    assert bound.ignored_area == 0.0
    assert [c.accept for c in bound.classes] == [c.accept for c in free.classes]


def test_predictions_accepted_in_bulk_count_as_audit_answers_only_if_asked() -> None:
    manifest, true = some_run(None)
    route_run(manifest, budget="40 images", policy=Policy(), invocation="one", audit=1.0)
    items = list(read_queue(manifest.store))
    given = [answer(i, true[i.image_id], "RBC") for i in items]
    append_answers(manifest.store, [replace(a, lead_time_s=None) for a in given[:30]])
    append_answers(manifest.store, given[30:])
    assert len(list(answered_images(manifest))) == 10
    found = fit_run(manifest, None)
    assert found.images == 10
    assert any("30 images were accepted in bulk" in warning for warning in found.warnings)
    counted = fit_run(manifest, None, count_bulk=True)
    assert counted.images == 40


def test_an_audit_that_was_accepted_in_bulk_alone_names_the_option_and_how_many() -> None:
    manifest, true = some_run(None)
    route_run(manifest, budget="40 images", policy=Policy(), invocation="one", audit=1.0)
    given = [answer(i, true[i.image_id], "RBC") for i in read_queue(manifest.store)]
    append_answers(manifest.store, [replace(a, lead_time_s=None) for a in given])
    asked = Asked(0.9, 0.9)
    for refusing in (
        lambda: fit_run(manifest, None),
        lambda: guarantee_run(manifest, Policy(), asked),
    ):
        with pytest.raises(ConfigError, match=r"40 answers are there, 40 of them in bulk") as said:
            refusing()
        assert "--count-bulk counts the 40 audit images" in str(said.value.hint)
    assert fit_run(manifest, None, count_bulk=True).images == 40


def test_too_little_is_refused() -> None:
    with pytest.raises(ConfigError, match="too few"):
        fit(judged(8), CATEGORIES, Wanted())
    with pytest.raises(ConfigError, match="too few"):
        fit(judge([], 3), CATEGORIES, Wanted())


def test_unlabelled_regions_are_left_out() -> None:
    region = np.array([[0, 0, 100, 100], [300, 0, 400, 100]], np.float64)
    true = TrueBoxes(
        np.array([[200, 200, 240, 240]], np.float64), np.array([1]), region, np.array([-1, 2])
    )
    found = boxes(
        [[200, 200, 240, 240], [201, 200, 241, 240], [10, 10, 50, 50], [310, 10, 350, 50],
         [311, 10, 351, 50]],
        [0.9, 0.8, 0.7, 0.6, 0.5],
        [1, 1, 0, 2, 0],
    )  # fmt: skip
    done = judge([(found, true, 3.0)], 3)
    assert done.scores.tolist() == pytest.approx([0.9, 0.8, 0.5])
    assert done.right.tolist() == [True, False, False]
    assert done.weight.tolist() == [3.0] * 3
    assert done.true_by_image.tolist() == [[0, 3, 0]]


def some_run(store_url: str | None, n: int = 40) -> tuple[Manifest, dict[str, list[list[float]]]]:
    """Images of six boxes; those of score 0.5 and more are right, and said to be."""
    shard = tar_shard("a.tar")
    rows, true = [], {}
    at = [[100.0 * k, 50.0, 100.0 * k + 60, 110.0] for k in range(6)]
    for i in range(n):
        scores = np.sort(np.random.default_rng(i).uniform(0.05, 1, 6))[::-1]
        name = f"a.tar/{i}.jpg"
        rows.append(distinct_row(name, shard, boxes(at, scores, [0] * 6)))
        true[name] = [b for b, s in zip(at, scores, strict=True) if s >= 0.5]
    store = MemoryStore() if store_url is None else open_store(store_url)
    return make_run(store, {shard: rows}), true


def coco(folder: Path, true: dict[str, list[list[float]]]) -> str:
    images = [{"id": i, "file_name": name} for i, name in enumerate(true)]
    annotations = [
        {"id": n, "image_id": i, "category_id": 0, "bbox": [x, y, x2 - x, y2 - y]}
        for i, found in enumerate(true.values())
        for n, (x, y, x2, y2) in enumerate(found)
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES)]
    path = folder / "truth.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return str(path)


def test_ground_truth_and_audit_answers_say_the_same(tmp_path: Path) -> None:
    manifest, true = some_run(None)
    by_truth = fit_run(manifest, read_truth(coco(tmp_path, true)))
    route_run(manifest, budget="40 images", policy=Policy(), invocation="one", audit=1.0)
    items = list(read_queue(manifest.store))
    assert len(items) == 40
    append_answers(manifest.store, [answer(i, true[i.image_id], "RBC") for i in items])
    by_answers = fit_run(manifest, None)
    assert by_answers.policy == by_truth.policy
    assert by_truth.policy.model_sha256 == manifest.record.identity.model_sha256
    decided = by_truth.policy.thresholds(manifest.record.identity.categories).decide(
        np.array([0.45, 0.55], np.float32), np.zeros(2, np.int16)
    )
    assert decided.tolist() == [Decision.REJECT, Decision.ACCEPT]


def test_value_answers_fit_nothing_and_those_with_unknown_classes_neither(
    caplog: pytest.LogCaptureFixture,
) -> None:
    manifest, true = some_run(None)
    route_run(manifest, budget="20 images", policy=Policy(), invocation="one", audit=0.0)
    items = list(read_queue(manifest.store))
    append_answers(manifest.store, [answer(i, true[i.image_id], "RBC") for i in items])
    with pytest.raises(ConfigError) as refused:
        fit_run(manifest, None)
    assert refused.value.message == (
        "no audit was drawn for this run (20 answers are there, 0 of them in bulk), and no ground "
        "truth is given: there is nothing to fit on"
    )
    assert str(refused.value.hint).endswith("or give --truth COCO.json")
    route_run(manifest, budget="20 images", policy=Policy(), invocation="two", audit=1.0)
    audit = [i for i in read_queue(manifest.store, hidden=True) if i.part == "audit"]
    append_answers(manifest.store, [answer(i, true[i.image_id], "fly") for i in audit])
    with pytest.raises(ConfigError, match="no image of this run's audit has an answer that counts"):
        fit_run(manifest, None)
    assert "unknown class fly" in caplog.text


def test_copies_of_an_audited_image_under_other_names_are_not_fitted_on() -> None:
    shard = tar_shard("a.tar")
    found = boxes([[10.0, 10.0, 70.0, 70.0]], [0.9], [0])
    rows = [distinct_row(f"a.tar/{i}.jpg", shard, found) for i in range(40)]
    rows = [replace(row, sha256=rows[i // 2].sha256) for i, row in enumerate(rows)]
    manifest = make_run(MemoryStore(), {shard: rows})
    route_run(manifest, budget="20 images", policy=Policy(), invocation="one", audit=1.0)
    audit = [i for i in read_queue(manifest.store, hidden=True) if i.part == "audit"]
    drawn = sorted(item.image_id for item in audit)
    assert len({item.sha256 for item in audit}) * 2 > len(drawn), "no copy was left out"
    append_answers(manifest.store, [answer(i, [[10.0, 10.0, 70.0, 70.0]], "RBC") for i in audit])
    assert sorted(row.image_id for row, _, _ in answered_images(manifest)) == drawn


def answer(item: object, at: list[list[float]], category: str) -> Answer:
    kept = tuple(ReviewedBox((b[0], b[1], b[2], b[3]), category, "kept", 0.9) for b in at)
    return Answer(
        image_id=item.image_id, sha256=item.sha256, task_id=1,  # type: ignore[attr-defined]
        annotation_id=hash(item.image_id) % 2**31,  # type: ignore[attr-defined]
        annotator="ann", lead_time_s=10.0, submitted_at=datetime.now(UTC), skipped=False,
        boxes=kept, deleted=(), model_version="m", was_blind=False,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_leaves_a_policy_that_decide_and_route_take_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    _, true = some_run(str(run))
    truth = coco(tmp_path, true)

    def call(*arguments: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as left:
            main([*arguments])
        assert left.value.code == code
        return capsys.readouterr().out

    assert "cross-validated" in call("fit", str(run), "--truth", truth, "--precision", "1")
    policy = Policy.load(str(run / "policy.yaml"))
    assert policy.calibration is not None
    manifest = Manifest.open(str(run))
    assert choose_policy(manifest, None, None, None) == policy
    said = call("decide", str(run), "--accept", "0.7")
    assert "0.7 is a probability of being right" in " ".join(said.split())
    plain = tmp_path / "plain.yaml"
    plain.write_text("{accept: 0.8}")
    told = json.loads(call("decide", str(run), "--accept", "0.7", "--json").splitlines()[-1])
    assert told["thresholds_on"] == "probability"
    said = call("decide", str(run), "--accept", "0.7", "--policy", str(plain))
    assert "0.7 is a raw score" in " ".join(said.split())
    by_hand = choose_policy(manifest, None, 0.99, None)
    assert by_hand.of("RBC")[0] == 0.99  # for every class, fitted ones too
    assert by_hand.of("RBC")[1] == policy.of("RBC")[1]
    counts = json.loads(call("decide", str(run), "--json").splitlines()[-1])["counts"]
    assert counts["labels"] == sum(map(len, true.values()))
    call(
        "fit", str(run), "--truth", truth, "--precision", "1", "--out", str(tmp_path / "mine.yaml")
    )
    assert Policy.load(str(tmp_path / "mine.yaml")) == policy
    call("fit", str(run), code=2)  # without any answer


@pytest.mark.slow
def test_the_command_leaves_the_policy_in_use_where_it_refuses_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    _, true = some_run(str(run))
    rng = np.random.default_rng(0)  # boxes are right by chance, whatever their score
    at = [[100.0 * k, 50.0, 100.0 * k + 60, 110.0] for k in range(6)]
    chance = {name: [b for b in at if rng.random() < 0.15] for name in true}
    truth = coco(tmp_path, chance)

    def call(*arguments: str, code: int) -> str:
        with pytest.raises(SystemExit) as left:
            main([*arguments])
        assert left.value.code == code
        return " ".join(capsys.readouterr().out.split())

    said = call("fit", str(run), "--truth", truth, code=3)
    assert "policy: not written" in said
    assert "refused: " in said
    assert not (run / "policy.yaml").exists()
    assert choose_policy(Manifest.open(str(run)), None, None, None) == Policy()
    told = json.loads(call("fit", str(run), "--truth", truth, "--json", code=3))
    assert told["written"] is None
    assert told["refused"]
    assert fit_step(Run(str(run)), truth).refused == told["refused"]
    assert told["refused"] in capsys.readouterr().err
    assert not (run / "policy.yaml").exists()
    assert "written although" in call("fit", str(run), "--truth", truth, "--force", code=0)
    assert Policy.load(str(run / "policy.yaml")).calibration is not None
